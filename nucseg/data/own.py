"""Your own annotated images: opening a folder of them, and what its masks hold."""

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
    """Open a folder with ``images`` and ``masks`` in it, as `ImageFolder` takes them; kept in memory once read.

    Black padding is made white, as when images are segmented. Raises ``InputError`` as `ImageFolder` does.
    """
    folder = Path(folder)
    for part in ("images", "masks"):
        if not (folder / part).is_dir():
            raise InputError(f"The folder '{folder}' has no subfolder '{part}': put images and masks into one each.")
    return InMemory(ImageFolder(folder / "images", folder / "masks", instances=instances, whiten=True))


def contents(dataset: Dataset) -> pd.DataFrame:
    """What the masks hold, one row per image: tissue, stem, nuclei, their median diameter in px, and the share ignored.

    The diameter is that of the disc of a nucleus's area; NaN where there is no nucleus.
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
    """The median diameter in px of the nuclei of a dataset, each taken for a disc of its area.

    Raises ``InputError`` where there is no nucleus at all.
    """
    areas = np.concatenate([_areas(dataset[index].labels) for index in range(len(dataset))])
    if not len(areas):
        raise InputError("The masks hold no nucleus: there is nothing to learn from.")
    return float(diameters(np.median(areas)))


def _areas(labels: np.ndarray) -> np.ndarray:
    areas = np.bincount(labels.ravel())[1:]
    return areas[areas > 0]


def warn_of_unknown_sizes(dataset: ImageFolder, um_per_px: float) -> None:
    """Warn where files do not say their pixel size, with what their annotated nuclei suggest.

    ``um_per_px``: of the images that the adapter was trained on, which is assumed then.
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
    """Warn that the pixel size of some images is not known; ``found``: the diameters of their nuclei, px."""
    hint = "pass --um-per-px if you know it."
    if len(found) >= 20:
        middle = float(np.median(found))
        hint = (
            f"the median diameter of their nuclei, {middle:.0f} px, suggests about {estimate(middle):.2g} (NuInsSeg's "
            "measure 8 µm, 5 to 10 by tissue); pass --um-per-px if you know it."
        )
    warnings.warn(
        f"Of some images the µm per px are not known: the training images' {um_per_px:g} is assumed; {hint}",
        Notice,
        stacklevel=3,
    )
