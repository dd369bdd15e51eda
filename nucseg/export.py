"""What other programs read: label TIFFs, a table a nucleus, an overlay, and one block's nuclei in every form.

Everything is written block by block, so that memory does not grow with the image.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.measure import regionprops_table
from skimage.segmentation import find_boundaries

from nucseg.polygons import LINE, feature, nuclei_rings, roi
from nucseg.predict import Block
from nucseg.slides import Slide

TILE = 512  # px, of label TIFFs
OVERLAY = 4096  # px, the longer side of an overlay at most

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
    """A row a nucleus of an (H, W) label map and its (H, W, 3) uint8 image; all columns are those of skimage.

    - ``id``; ``centroid_x_px``, ``centroid_y_px`` (from the centre of the top left pixel), ``area_px``,
      ``perimeter_px``, ``major_axis_px``, ``minor_axis_px``; ``eccentricity`` and ``solidity``, 0..1;
      ``haematoxylin_mean``, the amount of the stain as ``skimage.color.rgb2hed`` gives it.
    - The same lengths and the area in µm (``_um``, ``area_um2``) where ``um_per_px`` is given.
    """
    # float64 before the conversion would be eight times the image
    hematoxylin = rgb2hed(image)[..., 0].astype(np.float32) if labels.any() else np.zeros(labels.shape, np.float32)
    names = ["label", "centroid", *list(_PROPERTIES)[3:]]
    table = pd.DataFrame(regionprops_table(labels, hematoxylin, properties=names)).rename(columns=_PROPERTIES)
    return in_um(table[COLUMNS], um_per_px)


def in_um(table: pd.DataFrame, um_per_px: float | None) -> pd.DataFrame:
    """The table of `measure` with its lengths and areas in µm beside those in px, if ``um_per_px`` is known."""
    if um_per_px is None:
        return table
    lengths = {f"{name}_um": table[f"{name}_px"] * um_per_px for name in _LENGTHS}
    return table.assign(area_um2=table["area_px"] * um_per_px**2, **lengths)


# ---------------------------------------------------------------- pictures and label maps


def write_labels(path: Path, labels: Any, count: int, um_per_px: float | None = None) -> None:
    """Write an (H, W) label map as a tiled, zlib-compressed TIFF: uint16, or uint32 above 65,535 nuclei."""
    height, width = labels.shape
    dtype = np.uint16 if count <= np.iinfo(np.uint16).max else np.uint32

    def tiles() -> Iterator[np.ndarray]:
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                part = np.asarray(labels[top : top + TILE, left : left + TILE])
                yield np.pad(part, [(0, TILE - n) for n in part.shape]).astype(dtype)

    kind: dict[str, Any] = {"resolutionunit": "NONE"}
    if um_per_px:
        kind = {"resolution": (1e4 / um_per_px,) * 2, "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(
        path,
        tiles(),
        shape=(height, width),
        dtype=dtype,
        tile=(TILE, TILE),
        compression="zlib",
        photometric="minisblack",
        bigtiff=height * width * dtype().itemsize > 2**31,  # it may compress badly
        metadata=None,
        **kind,
    )


def write_overlay(path: Path, slide: Slide, labels: Any, largest: int = OVERLAY) -> None:
    """Write the image with its nuclei outlined as a PNG, shrunk by a whole number to ``largest`` px at most."""
    height, width = labels.shape
    shrink = math.ceil(max(height, width) / largest)
    reach = shrink + 1  # a line one px wide in the small picture, and a px to see the neighbours
    step = max(1, 1536 // shrink) * shrink
    small = np.zeros((math.ceil(height / shrink), math.ceil(width / shrink), 3), np.uint8)
    for top in range(0, height, step):
        for left in range(0, width, step):
            h, w = min(step, height - top), min(step, width - left)
            image = slide.read(top, left, h, w)
            y, x = max(0, top - reach), max(0, left - reach)
            around = np.asarray(labels[y : top + h + reach, x : left + w + reach])
            edge = find_boundaries(around, mode="inner")
            if shrink > 1:
                edge = ndimage.maximum_filter(edge, shrink)
            image[edge[top - y : top - y + h, left - x : left - x + w]] = LINE
            rows, columns = math.ceil(h / shrink), math.ceil(w / shrink)
            padded = np.pad(image, ((0, rows * shrink - h), (0, columns * shrink - w), (0, 0)), mode="edge")
            mean = padded.reshape(rows, shrink, columns, shrink, 3).mean((1, 3))
            small[top // shrink : top // shrink + rows, left // shrink : left // shrink + columns] = np.rint(mean)
    Image.fromarray(small).save(path)


def export_block(block: Block, slide: Slide, name: str) -> tuple[pd.DataFrame, list[dict[str, Any]], list[bytes]]:
    """The table, the GeoJSON features and the ImageJ ROIs of one block's nuclei, in px of the whole image."""
    image = slide.read(block.top, block.left, *block.labels.shape)
    table = measure(block.labels, image)
    table["centroid_x_px"] += block.left
    table["centroid_y_px"] += block.top
    features, rois = [], []
    shown: dict[int, dict[str, float]] = in_um(table, slide.um_per_px).set_index("id").to_dict("index")  # type: ignore
    for nucleus, polygons in nuclei_rings(block.labels, block.top, block.left):
        values = {k: round(v, 4) for k, v in shown[nucleus].items() if np.isfinite(v)}
        features.append(feature(name, nucleus, polygons, values))
        rois.append(roi(nucleus, polygons))
    return table, features, rois
