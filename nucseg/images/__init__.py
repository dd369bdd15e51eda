"""Files in and out: reading images, slides and masks; polygons, measurements and what other programs read.

Nothing here knows of datasets or models: it imports from the top of the package only.
"""
