"""One row of measurements per nucleus: areas, lengths, shapes and stain."""

import numpy as np
import pandas as pd
from skimage.color import rgb2hed
from skimage.measure import regionprops_table

_PROPERTIES = {
    "label": "id",
    "centroid-1": "centroid_x_px",
    "centroid-0": "centroid_y_px",
    "area": "area_px",
    "perimeter": "perimeter_px",
    "axis_major_length": "major_axis_px",
    "axis_minor_length": "minor_axis_px",
    "eccentricity": "eccentricity",
    "solidity": "solidity",
    "intensity_mean": "haematoxylin_mean",
}
_LENGTHS = ("centroid_x", "centroid_y", "perimeter", "major_axis", "minor_axis")
COLUMNS = list(_PROPERTIES.values())


def measure(labels: np.ndarray, image: np.ndarray, um_per_px: float | None = None) -> pd.DataFrame:
    """Measure the nuclei of an (H, W) label map and its (H, W, 3) uint8 image, one row per nucleus, as skimage does.

    - ``id``; ``centroid_x_px``, ``centroid_y_px`` (from the top left corner of the top left pixel, as in the
      polygons: that pixel's centre is at 0.5, 0.5), ``area_px``, ``perimeter_px``, ``major_axis_px``,
      ``minor_axis_px``; ``eccentricity`` and ``solidity``, 0..1; ``haematoxylin_mean``, the amount of stain from
      ``skimage.color.rgb2hed``.
    - If ``um_per_px`` is given, the same lengths and the area in µm (``_um``, ``area_um2``).
    """
    inside, hematoxylin = labels > 0, np.zeros(labels.shape, np.float32)
    hematoxylin[inside] = rgb2hed(image[inside][:, None])[:, 0, 0]  # of the nuclei alone: most of an image is none
    names = ["label", "centroid", *list(_PROPERTIES)[3:]]
    table = pd.DataFrame(regionprops_table(labels, hematoxylin, properties=names)).rename(columns=_PROPERTIES)
    table[["centroid_x_px", "centroid_y_px"]] += 0.5  # skimage counts from the pixel's centre
    return in_um(table[COLUMNS], um_per_px)


def in_um(table: pd.DataFrame, um_per_px: float | None) -> pd.DataFrame:
    """Add the lengths and areas in µm to a table of `measure`, if ``um_per_px`` is known."""
    if um_per_px is None:
        return table
    lengths = {f"{name}_um": table[f"{name}_px"] * um_per_px for name in _LENGTHS}
    return table.assign(area_um2=table["area_px"] * um_per_px**2, **lengths)
