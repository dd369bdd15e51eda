"""What the book's chapters call in one line: the figures and tables of one chapter each, in a module of its name.

A chapter shows the code that teaches its subject; drawing and formatting live here. Nothing else imports these modules.
"""
