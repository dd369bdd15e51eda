"""A folder of BBBC038: tiny images in the layout of ``nucseg fetch bbbc038``."""

import numpy as np
from PIL import Image


def write_bbbc038(folder, histology=(), kinds=("fluorescence", "brightfield")):
    """A folder in the layout of ``nucseg fetch bbbc038``, with small images of two touching discs each."""
    rows, columns = np.mgrid[:48, :60]
    labels = np.zeros((48, 60), np.uint16)
    for number, x in enumerate((20, 34), 1):
        labels[((rows - 24) ** 2 + (columns - x) ** 2 < 49) & (labels == 0)] = number
    names = [("histology", stem) for stem in histology] + [(kind, f"{k:012x}") for kind in kinds for k in range(3)]
    for i, (kind, stem) in enumerate(names):
        inside, outside = ((120, 120, 120), (5, 5, 5)) if kind == "fluorescence" else ((90, 50, 130), (220, 190, 215))
        image = np.where(labels[..., None] > 0, inside, outside).astype(np.uint8)
        image[0, 0] = i  # makes every image different
        for part, array in (("images", image), ("masks", labels)):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / part / kind / f"{stem}.png")
    return folder
