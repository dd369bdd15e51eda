"""The microscope fields of BBBC038's histology images, and the images held out of training.

The 107 images (256 x 320 px) are pieces of 27 larger fields, most of them 512 x 640 px, and pixels continue from one
image to the next. A split by image would put neighbours on both sides, so the split is by field.
"""

from importlib import resources

import numpy as np
import pandas as pd


def fields() -> pd.DataFrame:
    """List the 107 histology images and their fields: columns ``image`` (12 digits of its id) and ``field`` (1 to 27).

    Two images belong to one field if their facing edges correlate by more than 0.7 and differ about as little as
    adjacent rows within an image (true neighbours: correlation 0.75 to 0.996, 1 to 2.5 times the difference of
    adjacent rows; others: 4 times and more). Fields are numbered by their first image. Sorted by ``image``.
    """
    text = resources.files("nucseg") / "assets" / "bbbc038_fields.csv"
    with text.open(encoding="utf-8") as handle:
        return pd.read_csv(handle, dtype={"image": str, "field": int})


def parts_of_histology() -> dict[str, str]:
    """The split part of each histology image (train, val or test), by the first 12 digits of its id.

    Even fields are held out for tests (13 fields, 50 images), fields 1, 9, 17 and 25 validate (13 images), and the
    other 10 fields train (44 images).
    """
    table = fields()
    part = np.where(table["field"] % 2 == 0, "test", np.where(table["field"] % 8 == 1, "val", "train"))
    return dict(zip(table["image"], part, strict=True))


def held_out_histology() -> tuple[str, ...]:
    """The 50 histology images held out to measure generalisation, as 12 digits of their ids, sorted.

    The base ``offline`` is not trained on them from its second edition on; its first edition was.
    """
    return tuple(image for image, part in parts_of_histology().items() if part == "test")
