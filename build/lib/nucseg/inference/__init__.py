"""From an image to its nuclei, and a model scored over a dataset.

`segmenter`: one image of any size (scale, fields, test-time augmentation, ensembles). `batch`, `folder`: many files
and what is written about them. `engines`: what runs the network. `decoding`, `confidence`: from maps to nuclei.
`options`: checks that need no PyTorch. `export_model`: the network for other programs. Nothing here trains.
"""
