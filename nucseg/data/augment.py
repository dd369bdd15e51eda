"""Random, repeatable changes of a training image and its label map, drawn from one generator."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.color import hed_from_rgb, rgb_from_hed

from nucseg.data.datasets import Sample


def resize(sample: Sample, size: int) -> Sample:
    """Scale to a square of ``size`` px: the image bilinearly (averaging if it shrinks), labels by nearest neighbour."""
    if sample.labels.shape == (size, size):
        return sample
    image = Image.fromarray(sample.image).resize((size, size), Image.Resampling.BILINEAR)
    labels = Image.fromarray(sample.labels.astype(np.int32)).resize((size, size), Image.Resampling.NEAREST)
    return Sample(np.asarray(image), np.asarray(labels), sample.tissue, sample.stem)


def crop(sample: Sample, size: int, rng: np.random.Generator) -> Sample:
    """Cut a random square of ``size`` px; a side that is not longer is kept whole."""
    top, left = (int(rng.integers(0, max(0, side - size) + 1)) for side in sample.labels.shape)
    window = np.s_[top : top + size, left : left + size]
    return Sample(sample.image[window], sample.labels[window], sample.tissue, sample.stem)


def zoom(rng: np.random.Generator, most: float = 1.35) -> float:
    """Draw a magnification between ``1 / most`` and ``most``, as likely to enlarge as to shrink."""
    return float(most ** rng.uniform(-1, 1))


def flip(sample: Sample, rng: np.random.Generator) -> Sample:
    """Flip vertically and horizontally, each with probability 1/2."""
    image, labels = sample.image, sample.labels
    for axis in (0, 1):
        if rng.random() < 0.5:
            image, labels = np.flip(image, axis), np.flip(labels, axis)
    return Sample(image, labels, sample.tissue, sample.stem)


def flip_and_rotate(sample: Sample, rng: np.random.Generator, degrees: float = 10.0) -> Sample:
    """Flip as in `flip`, then rotate by up to ±``degrees`` with black corners: the report's augmentation."""
    sample = flip(sample, rng)
    angle = float(rng.uniform(-degrees, degrees))
    image = Image.fromarray(np.ascontiguousarray(sample.image)).rotate(angle, Image.Resampling.BILINEAR)
    labels = Image.fromarray(np.ascontiguousarray(sample.labels, dtype=np.int32)).rotate(
        angle, Image.Resampling.NEAREST
    )
    return Sample(np.asarray(image), np.asarray(labels), sample.tissue, sample.stem)


def histology(sample: Sample, rng: np.random.Generator) -> Sample:
    """Vary orientation, stain and focus, in which slides of the same tissue differ; the sample must be square.

    Flips and quarter turns (no orientation is special under a microscope), the amounts of haematoxylin and eosin
    (`stain`), and a slight blur of one image in five.
    """
    sample = flip(sample, rng)
    turns = int(rng.integers(4))
    image, labels = np.rot90(sample.image, turns), np.rot90(sample.labels, turns)
    image = stain(image, rng)
    if rng.random() < 0.2:
        image = ndimage.gaussian_filter(image, (*[rng.uniform(0.3, 1.2)] * 2, 0))
    return Sample(image, labels, sample.tissue, sample.stem)


def stain(image: np.ndarray, rng: np.random.Generator, strength: float = 0.25, shift: float = 0.02) -> np.ndarray:
    """Change the amount of each stain of an (H, W, 3) uint8 image at random; returns the same shape and type.

    In the optical densities of haematoxylin, eosin and DAB (Ruifrok & Johnston 2001), each is multiplied by
    1 ± ``strength`` and shifted by ± ``shift`` (Tellez et al. 2018).
    """
    return restain(image, rng.uniform(1 - strength, 1 + strength, 3), rng.uniform(-shift, shift, 3))


def restain(
    image: np.ndarray, factors: Sequence[float] | np.ndarray, shifts: Sequence[float] | np.ndarray = (0, 0, 0)
) -> np.ndarray:
    """Change the amounts of haematoxylin, eosin and DAB of an (H, W, 3) uint8 image; returns the same shape and type.

    ``factors`` multiply the three amounts (optical density of base 10), ``shifts`` are added to them after that.
    """
    # as skimage.color.rgb2hed and hed2rgb, in float32: optical density of base 10, clipped where there is no light
    density = -np.log10(np.maximum(image.astype(np.float32) / 255, 1e-6))
    amounts = density @ hed_from_rgb.astype(np.float32)
    changed = amounts * np.asarray(factors, np.float32) + np.asarray(shifts, np.float32)
    return np.clip(np.rint(255 * 10 ** -(changed @ rgb_from_hed.astype(np.float32))), 0, 255).astype(np.uint8)
