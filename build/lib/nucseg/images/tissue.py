"""Masks of the tissue in an image, without black padding and the empty glass of a slide."""

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu

BLACK = 12  # 0-255: pixels with no channel above this are padding or missing tiles, including JPEG noise
DARK = 40  # 0-255: the same for the rim of black areas, which JPEG blurs
LEAST = 8  # px: a black area contains a square of this side, unlike dark pixels in a nucleus
REACH = 2 * LEAST  # px around a window that affect its black areas

# Limits of Otsu's thresholds, so that an image of only tissue, or only glass, is not split in two
SATURATION = (0.04, 0.10)  # HSV, 0..1
DENSITY = (0.06, 0.15)  # optical density of base 10, mean of the channels


def black(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) bool: areas of black at least 8 px wide, and their rim.

    Black areas at the image's edge are taken to continue beyond it.
    """
    value = image.max(axis=-1)
    core = value <= BLACK
    if not core.any():
        return core
    outside = np.pad(core, LEAST, constant_values=True)
    core = ndimage.binary_opening(outside, np.ones((LEAST, LEAST)))[LEAST:-LEAST, LEAST:-LEAST]
    return ndimage.binary_dilation(core, np.ones((3, 3)), iterations=LEAST, mask=core | (value <= DARK))


def whitened(image: np.ndarray) -> np.ndarray:
    """Return the image with its black areas (`black`) made white; the same array if there are none."""
    void = black(image)
    if not void.any():
        return image
    image = image.copy()
    image[void] = 255
    return image


def tissue_mask(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a slide at low magnification -> (H, W) bool, True where there is tissue.

    Tissue is more saturated, or optically denser, than Otsu's threshold (1979), and not black. Holes are filled, so
    that vessels and fat are included.
    """
    pixels = image.astype(np.float32)
    brightest, void = pixels.max(-1), black(image)
    saturation = np.where(brightest > 0, 1 - pixels.min(-1) / np.maximum(brightest, 1), 0)
    density = -np.log10(np.maximum(pixels, 1) / 255).mean(-1)
    seen = ~void
    if not seen.any():
        return seen
    found = (saturation > _otsu(saturation[seen], SATURATION)) | (density > _otsu(density[seen], DENSITY))
    return ndimage.binary_fill_holes(found & seen)


def _otsu(values: np.ndarray, limits: tuple[float, float]) -> float:
    return float(np.clip(threshold_otsu(values) if values.min() < values.max() else limits[1], *limits))
