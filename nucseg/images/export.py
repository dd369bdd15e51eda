"""Exports for other programs: label TIFFs, overlays, and a block's nuclei as table rows, GeoJSON and ImageJ ROIs.

Everything is written block by block, so that memory use does not grow with the image.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from PIL import Image
from scipy import ndimage

from nucseg.images.measure import in_um, measure
from nucseg.images.polygons import LINE, feature, nuclei_rings, roi
from nucseg.images.slides import Slide

TILE = 512  # px, of label TIFFs
OVERLAY = 4096  # px, largest longer side of an overlay
TISSUE_LINE = (0, 114, 178)  # blue of Okabe & Ito


@dataclass(frozen=True)
class Block:
    """The nuclei of one block: ``labels``, an (h, w) window of the label map at ``top``, ``left``, holds no others.

    ``confidence``: (count,), 0..1, the probability that each is a nucleus, in the order of their ids; None if unknown.
    """

    top: int
    left: int
    labels: np.ndarray
    count: int
    confidence: np.ndarray | None = None


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
        bigtiff=height * width * dtype().itemsize > 2**31,  # uncompressed size, as the data may not compress
        metadata=None,
        **kind,
    )


def write_overlay(
    path: Path, slide: Slide, labels: Any, largest: int = OVERLAY, tissue: np.ndarray | None = None
) -> None:
    """Write the image with outlined nuclei as a PNG, reduced by a whole factor to at most ``largest`` px.

    ``tissue``: (h, w) bool mask of the whole image, at any resolution, to outline in blue.
    """
    height, width = labels.shape
    shrink = math.ceil(max(height, width) / largest)
    reach = shrink + 1  # one px of the overlay for the line, and one px to compare with neighbours
    step = max(1, 1536 // shrink) * shrink
    small = np.zeros((math.ceil(height / shrink), math.ceil(width / shrink), 3), np.uint8)
    for top in range(0, height, step):
        for left in range(0, width, step):
            h, w = min(step, height - top), min(step, width - left)
            image = slide.read(top, left, h, w)
            y, x = max(0, top - reach), max(0, left - reach)
            around = np.asarray(labels[y : top + h + reach, x : left + w + reach])
            edge = _boundaries(around) & (around > 0)
            if shrink > 1:
                edge = ndimage.maximum_filter(edge, shrink)
            image[edge[top - y : top - y + h, left - x : left - x + w]] = LINE
            mean = np.asarray(Image.fromarray(image).reduce(shrink))
            y, x = top // shrink, left // shrink
            small[y : y + len(mean), x : x + mean.shape[1]] = mean
    if tissue is not None:
        rows, columns = (np.arange(n) * m // n for n, m in zip(small.shape[:2], tissue.shape, strict=True))
        small[_boundaries(tissue[np.ix_(rows, columns)])] = TISSUE_LINE
    Image.fromarray(small).save(path, compress_level=1)  # a quarter of the time, and a little larger


def _boundaries(labels: np.ndarray) -> np.ndarray:
    """(h, w) bool: pixels with another label above, below or beside, as skimage's ``find_boundaries``, but faster."""
    edge = np.zeros(labels.shape, bool)
    down, right = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge


def export_block(block: Block, slide: Slide, key: str) -> tuple[pd.DataFrame, list[dict[str, Any]], list[bytes]]:
    """Return the table, GeoJSON features and ImageJ ROIs of a block's nuclei, in px of the whole image.

    ``key``: identifies the image, adapters and settings; the ids of the features differ between keys.
    """
    image = slide.read(block.top, block.left, *block.labels.shape)
    table = measure(block.labels, image)
    table["centroid_x_px"] += block.left
    table["centroid_y_px"] += block.top
    if block.confidence is not None:
        table["confidence"] = block.confidence
    features, rois = [], []
    shown: dict[int, dict[str, float]] = in_um(table, slide.um_per_px).set_index("id").to_dict("index")  # type: ignore
    for nucleus, polygons in nuclei_rings(block.labels, block.top, block.left):
        values = {k: round(v, 4) for k, v in shown[nucleus].items() if np.isfinite(v)}
        features.append(feature(key, nucleus, polygons, values))
        rois.append(roi(nucleus, polygons))
    return table, features, rois
