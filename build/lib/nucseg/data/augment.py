"""Augmentation: random, reproducible changes of a training image and its label map."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.color import hed_from_rgb, rgb_from_hed

from nucseg.data.datasets import Sample

# Settings of `strong`. Ranges follow HoVer-NeXt (Baumann et al. 2024); the range of stains follows results/stain.
FLAT = 0.02  # share of plain training windows: a network that never saw one would fill it with nuclei
ZOOM = (0.5, 1.5)
SHEAR = 0.1  # tangent of the angle, either way
ELASTIC_GRID, ELASTIC_PX = 6, 4.0  # randomly displaced points along a side, and the displacement's sigma
BLUR = 0.1  # share of windows that are slightly blurred


def resize(sample: Sample, size: int) -> Sample:
    """Scale to a square of ``size`` px: the image bilinearly (averaging if it shrinks), labels by nearest neighbour."""
    if sample.labels.shape == (size, size):
        return sample
    image = Image.fromarray(sample.image).resize((size, size), Image.Resampling.BILINEAR)
    labels = Image.fromarray(sample.labels.astype(np.int32)).resize((size, size), Image.Resampling.NEAREST)
    return Sample(np.asarray(image), np.asarray(labels), sample.tissue, sample.stem)


def crop(sample: Sample, size: int, rng: np.random.Generator) -> Sample:
    """Cut a random square of ``size`` px; sides that are not longer are kept whole."""
    top, left = (int(rng.integers(0, max(0, side - size) + 1)) for side in sample.labels.shape)
    window = np.s_[top : top + size, left : left + size]
    return Sample(sample.image[window], sample.labels[window], sample.tissue, sample.stem)


def zoom(rng: np.random.Generator, most: float = 1.35) -> float:
    """Draw a magnification between ``1 / most`` and ``most``; enlarging and shrinking are equally likely."""
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
    """Vary orientation, stain and focus as they differ between slides of a tissue; the sample must be square.

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

    The optical densities of haematoxylin, eosin and DAB (Ruifrok & Johnston 2001) are multiplied by random factors in
    1 ± ``strength`` and shifted by up to ± ``shift`` (Tellez et al. 2018).
    """
    return restain(image, rng.uniform(1 - strength, 1 + strength, 3), rng.uniform(-shift, shift, 3))


def restain(
    image: np.ndarray, factors: Sequence[float] | np.ndarray, shifts: Sequence[float] | np.ndarray = (0, 0, 0)
) -> np.ndarray:
    """Change the amounts of haematoxylin, eosin and DAB of an (H, W, 3) uint8 image; returns the same shape and type.

    ``factors`` multiply the three amounts (optical density of base 10); ``shifts`` are then added.
    """
    # as skimage.color.rgb2hed and hed2rgb, but in float32; the clipping avoids the logarithm of 0
    density = -np.log10(np.maximum(image.astype(np.float32) / 255, 1e-6))
    amounts = density @ hed_from_rgb.astype(np.float32)
    changed = amounts * np.asarray(factors, np.float32) + np.asarray(shifts, np.float32)
    return np.clip(np.rint(255 * 10 ** -(changed @ rgb_from_hed.astype(np.float32))), 0, 255).astype(np.uint8)


def strong(sample: Sample, side: int, scale: float, rng: np.random.Generator) -> Sample:
    """Cut a random window and change its geometry and stain: `warp`, `stain_strongly`, and rarely a slight blur.

    ``side``: px of the square window. ``scale``: window px per sample px, before the random zoom. A few windows show a
    plain colour and no nucleus (`flat`). Blur never occurs alone, because published ablations found that harmful.
    """
    if rng.random() < FLAT:
        return flat(sample, side, rng)
    window = warp(sample, side, scale, rng)
    image = stain_strongly(window.image, rng)
    if rng.random() < BLUR:
        image = ndimage.gaussian_filter(image, (*[rng.uniform(0.3, 1.0)] * 2, 0))
    return Sample(image, window.labels, sample.tissue, sample.stem)


def geometry(sample: Sample, side: int, scale: float, rng: np.random.Generator) -> Sample:
    """Cut a random window and change its geometry as `strong` does, but its stain only as `histology` does."""
    window = warp(sample, side, scale, rng)
    return Sample(stain(window.image, rng), window.labels, sample.tissue, sample.stem)


def flat(sample: Sample, side: int, rng: np.random.Generator) -> Sample:
    """Return a window of one random colour or grey, half of them with faint noise, without a nucleus."""
    colour = rng.uniform(0, 255) + rng.uniform(-30, 30, 3) * (rng.random() < 0.5)
    noise = rng.normal(0, rng.uniform(0, 4), (side, side, 1)) * (rng.random() < 0.5)
    image = np.clip(np.rint(colour + noise), 0, 255).astype(np.uint8)
    return Sample(image, np.zeros((side, side), np.int32), sample.tissue, sample.stem)


def warp(sample: Sample, side: int, scale: float, rng: np.random.Generator) -> Sample:
    """Cut a random square window at any angle: mirrored, zoomed by `ZOOM`, sheared, and in half of the cases bent.

    ``side``: px of the window. ``scale``: window px per sample px, before the zoom. Where the window extends beyond
    the sample, image and labels are continued by reflection.
    """
    shape = np.array(sample.labels.shape)
    scale *= rng.uniform(*ZOOM)
    angle, shear = rng.uniform(0, 2 * np.pi), rng.uniform(-SHEAR, SHEAR)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mirror = np.diag([1, rng.choice([-1, 1])])
    matrix = turn @ mirror @ np.array([[1, shear], [0, 1]]) / scale  # sample px per window px
    reach = side / scale / 2
    centre = [rng.uniform(min(reach, n / 2), max(n - reach, n / 2)) for n in shape]
    grid = np.stack(np.meshgrid(*[np.arange(side) - (side - 1) / 2] * 2, indexing="ij")).astype(np.float32)
    if rng.random() < 0.5:
        shifts = rng.normal(0, ELASTIC_PX, (2, ELASTIC_GRID, ELASTIC_GRID)).astype(np.float32)
        grid += [np.asarray(Image.fromarray(s).resize((side, side), Image.Resampling.BICUBIC)) for s in shifts]
    # the position of each window pixel in the sample, as an index: pixel centres are at whole numbers
    at = np.tensordot(matrix.astype(np.float32), grid, 1) + np.array(centre, np.float32)[:, None, None] - 0.5
    labels = ndimage.map_coordinates(sample.labels, at, order=0, mode="reflect")
    image = sample.image
    if scale < 1:  # shrink first, averaging as in `resize`, because sampling alone would alias
        height, width = np.maximum(1, np.rint(shape * scale).astype(int))
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        at = (at + 0.5) * (image.shape[:2] / shape).astype(np.float32)[:, None, None] - 0.5
    colours = [ndimage.map_coordinates(image[..., c], at, np.float32, order=1, mode="reflect") for c in range(3)]
    return Sample(np.rint(np.stack(colours, -1)).astype(np.uint8), labels, sample.tissue, sample.stem)


def stain_strongly(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Vary an (H, W, 3) uint8 image like other laboratories and scanners; returns the same shape and type.

    The amounts of haematoxylin and eosin are multiplied by log-uniform factors from 1/2 to 2 and slightly shifted
    (`restain`). Then the optical density of each colour channel is changed by up to 8%.
    """
    factors = 2 ** (rng.uniform(-1, 1, 3) * (1, 1, 0.4))  # the third, DAB, is only the remainder of the other two
    changed = restain(image, factors, rng.uniform(-0.03, 0.03, 3))
    light = 255 * (changed / 255.0) ** rng.uniform(0.92, 1.08, 3)
    return np.clip(np.rint(light), 0, 255).astype(np.uint8)


# Augmentations by the value of --augmentation. Those in WINDOWS cut the training window themselves, at any angle.
AUGMENTATIONS: dict[str, Callable[[Sample, np.random.Generator], Sample]] = {
    "flip_and_rotate": flip_and_rotate,
    "histology": histology,
}
WINDOWS: dict[str, Callable[[Sample, int, float, np.random.Generator], Sample]] = {
    "geometry": geometry,
    "strong": strong,
}
