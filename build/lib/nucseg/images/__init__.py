"""Image input and output: reading images, slides and masks; polygons, measurements and exports to other programs.

Nothing here depends on datasets or models: it imports from the top of the package only.
"""
