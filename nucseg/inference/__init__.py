"""From an image to its nuclei: segmenting images of any size, many files, and scoring a model over a dataset.

Nothing here trains.
"""
