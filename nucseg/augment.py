"""Random changes of a training image and its label map, drawn from one generator, so that they can be repeated."""

import numpy as np
from PIL import Image

from nucseg.data import Sample


def resize(sample: Sample, size: int) -> Sample:
    """Scale to a square of ``size`` px: the image bilinearly (averaging where it shrinks), labels by nearest."""
    if sample.labels.shape == (size, size):
        return sample
    image = Image.fromarray(sample.image).resize((size, size), Image.Resampling.BILINEAR)
    labels = Image.fromarray(sample.labels.astype(np.int32)).resize((size, size), Image.Resampling.NEAREST)
    return Sample(np.asarray(image), np.asarray(labels), sample.tissue, sample.stem)


def crop(sample: Sample, size: int, rng: np.random.Generator) -> Sample:
    """A random square of ``size`` px, or the whole image along a side that is not longer."""
    top, left = (int(rng.integers(0, max(0, side - size) + 1)) for side in sample.labels.shape)
    window = np.s_[top : top + size, left : left + size]
    return Sample(sample.image[window], sample.labels[window], sample.tissue, sample.stem)


def flip_and_rotate(sample: Sample, rng: np.random.Generator, degrees: float = 10.0) -> Sample:
    """The report's augmentation: each flip with chance 1/2, then a turn within ±``degrees``, corners black."""
    image, labels = sample.image, sample.labels
    for axis in (0, 1):
        if rng.random() < 0.5:
            image, labels = np.flip(image, axis), np.flip(labels, axis)
    angle = float(rng.uniform(-degrees, degrees))
    turned = Image.fromarray(np.ascontiguousarray(image)).rotate(angle, Image.Resampling.BILINEAR)
    turned_labels = Image.fromarray(np.ascontiguousarray(labels, dtype=np.int32)).rotate(
        angle, Image.Resampling.NEAREST
    )
    return Sample(np.asarray(turned), np.asarray(turned_labels), sample.tissue, sample.stem)
