"""Your own annotated images: opening a folder of them, and summarising its masks."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from nucseg.data.datasets import Dataset, ImageFolder, InMemory
from nucseg.errors import InputError, Notice
from nucseg.images.masks import Instances
from nucseg.images.pixel_size import diameters, estimate
from nucseg.images.slides import open_slide


def open_own(folder: str | Path, instances: Instances = "ids") -> InMemory:
    """Open a folder with the subfolders ``images`` and ``masks`` (`ImageFolder`), cached in memory.

    Black padding is made white, as in segmentation. Raises ``InputError`` for a missing subfolder, and as `ImageFolder`
    does.
    """
    folder = Path(folder)
    for part in ("images", "masks"):
        if not (folder / part).is_dir():
            raise InputError(f"The folder '{folder}' has no subfolder '{part}': put images and masks into one each.")
    return InMemory(ImageFolder(folder / "images", folder / "masks", instances=instances, whiten=True))


def contents(dataset: Dataset) -> pd.DataFrame:
    """Summarise the masks, one row per image: tissue, stem, number of nuclei, median diameter in px, share ignored.

    A nucleus's diameter is that of a disc of its area; NaN for images without nuclei.
    """
    rows = []
    for index in range(len(dataset)):
        sample = dataset[index]
        areas = _areas(sample.labels)
        rows.append({
            "tissue": sample.tissue,
            "stem": sample.stem,
            "nuclei": len(areas),
            "median_diameter_px": float(diameters(np.median(areas))) if len(areas) else np.nan,
            "ignored": 0.0 if sample.vague is None else float(sample.vague.mean()),
        })  # fmt: skip
    return pd.DataFrame(rows)


def median_diameter(dataset: Dataset) -> float:
    """The median diameter of a dataset's nuclei in px, taken as discs of their areas.

    Raises ``InputError`` if there is no nucleus.
    """
    areas = np.concatenate([_areas(dataset[index].labels) for index in range(len(dataset))])
    if not len(areas):
        raise InputError("The masks hold no nucleus: annotate some nuclei first.")
    return float(diameters(np.median(areas)))


def _areas(labels: np.ndarray) -> np.ndarray:
    areas = np.bincount(labels.ravel())[1:]
    return areas[areas > 0]


def warn_of_unknown_sizes(dataset: ImageFolder, um_per_px: float) -> None:
    """Warn if files do not state their pixel size, with an estimate from their annotated nuclei.

    ``um_per_px``: pixel size of the adapter's training images, which is then assumed.
    """
    unknown = []
    for index in range(len(dataset)):
        with open_slide(dataset.image_path(index)) as slide:
            if slide.um_per_px is None:
                unknown.append(index)
    areas = np.concatenate([np.zeros(0), *(_areas(dataset[index].labels) for index in unknown)])
    if unknown:
        warn_unknown(um_per_px, diameters(areas))


def warn_unknown(um_per_px: float, found: np.ndarray) -> None:
    """Warn that the pixel size of some images is unknown; ``found``: (n,) diameters of their nuclei, px."""
    hint = "pass --um-per-px if you know it."
    if len(found) >= 20:
        middle = float(np.median(found))
        hint = (
            f"the median diameter of their nuclei, {middle:.0f} px, suggests about {estimate(middle):.2g} (NuInsSeg's "
            "measure 8 µm, 5 to 10 by tissue); pass --um-per-px if you know it."
        )
    warnings.warn(
        f"The pixel size of some images is not known: the training images' {um_per_px:g} µm/px is assumed; {hint}",
        Notice,
        stacklevel=3,
    )
