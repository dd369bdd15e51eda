"""From a label map to what the network learns, and from what it predicts back to a label map."""

import numpy as np
from scipy import ndimage

from nucseg.errors import InputError

EIGHT = np.ones((3, 3), dtype=bool)  # touching by a corner counts as touching


def foreground(labels: np.ndarray) -> np.ndarray:
    """(H, W) label map -> (1, H, W) float32 target map, 1 inside any nucleus."""
    return (labels > 0).astype(np.float32)[None]


def components(probability: np.ndarray, threshold: float = 0.5, min_area: int = 0) -> np.ndarray:
    """Connected components of a foreground map: the report's way to instances, blind to touching nuclei.

    ``probability``: (H, W), 0..1. A pixel is foreground above ``threshold``. Components (8-connected) of
    fewer than ``min_area`` px are dropped. Returns an (H, W) int32 label map, numbered 1..n.
    Raises ``InputError`` for another number of dimensions or a threshold outside 0..1.
    """
    if probability.ndim != 2:
        raise InputError(f"A foreground map must be (H, W), not of shape {probability.shape}.")
    if not 0 <= threshold <= 1:
        raise InputError(f"The probability threshold {threshold!r} must lie between 0 and 1.")
    labels, count = ndimage.label(probability > threshold, structure=EIGHT)
    if min_area > 0 and count:
        keep = np.bincount(labels.ravel(), minlength=count + 1) >= min_area
        keep[0] = False
        renumber = np.zeros(count + 1, dtype=np.int32)
        renumber[keep] = np.arange(1, keep.sum() + 1)
        labels = renumber[labels]
    return labels.astype(np.int32)
