"""Pictures: figures for the book and the prediction browser. Nothing imports from here but the book."""
