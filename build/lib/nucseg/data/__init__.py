"""Images with their label maps: datasets, splits, downloads, synthetic tissue and augmentation.

Nothing here depends on models: it imports from ``images`` and from the top of the package only.
"""
