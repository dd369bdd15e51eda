"""Figures and the prediction browser. Only the book and users import from here, never the rest of the package."""
