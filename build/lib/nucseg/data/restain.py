"""Real images with new colours: recoloured histology, and fluorescence restained as H&E.

The annotators' outlines are kept. Stains, camera and the tissue around nuclei are drawn as in `broad`.
"""

from dataclasses import replace

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.measure import label

from nucseg.data.broad import (
    DIAMETER,
    Look,
    Stains,
    between,
    expose,
    log_between,
    photograph,
    random_camera,
    random_look,
    resize_labels,
    resized,
    tidy,
)
from nucseg.data.datasets import Sample
from nucseg.data.tissue import Array, Rng, draw_densities, lay_out, smooth_noise


def enlarge(sample: Sample, factor: float, size: int, rng: Rng) -> Sample:
    """Enlarge a random window of ``sample`` by ``factor`` to ``size`` px, or to less if the image is too small."""
    sides = [min(side, max(1, round(size / factor))) for side in sample.labels.shape]
    corner = [int(rng.integers(0, whole - side + 1)) for whole, side in zip(sample.labels.shape, sides, strict=True)]
    window = np.s_[corner[0] : corner[0] + sides[0], corner[1] : corner[1] + sides[1]]
    shape = (min(size, round(sides[0] * factor)), min(size, round(sides[1] * factor)))
    image = Image.fromarray(np.ascontiguousarray(sample.image[window])).resize(shape[::-1], Image.Resampling.BICUBIC)
    labels = tidy(resize_labels(np.ascontiguousarray(sample.labels[window]), shape))
    return Sample(np.asarray(image), labels, sample.tissue, sample.stem)


def recolour(sample: Sample, rng: Rng) -> Sample:
    """Change the stains and the camera of an image: mix its optical densities by a random matrix close to 1."""
    density = -np.log((sample.image.astype(np.float32) + 1) / 256)
    mixing = np.eye(3) * log_between(rng, 0.7, 1.4) + rng.normal(0, 0.08, (3, 3))
    light = 255 * np.exp(-(density @ mixing.astype(np.float32)).clip(0))
    camera = replace(random_camera(rng), noise=between(rng, 0, 0.2))
    return replace(sample, image=photograph(rng, light, camera))


def restain(sample: Sample, rng: Rng, size: int = 512, look: Look | None = None) -> Sample:
    """Turn a fluorescence image into H&E: its intensity becomes haematoxylin, and synthetic tissue adds the eosin.

    The image is enlarged so that the nuclei's median diameter is a draw from `DIAMETER`, and a window of ``size`` px is
    cut; smaller images are continued by reflection. Dim nuclei are brightened towards the others. Labels are those of
    ``sample``, resized and renumbered. ``look``: instead of a `random_look`.
    """
    look = look or random_look(rng)
    tissue = replace(look.tissue, spaces="cleft", wall=0.0)  # the nuclei are already placed: no walls, few white spaces
    factor = _enlargement(sample.labels, log_between(rng, *DIAMETER) * look.magnification)
    side = max(1, round(size / factor))
    bright, labels = _mirrored(_stained(sample, rng), sample.labels, side)
    top, left = (int(rng.integers(0, whole - side + 1)) for whole in labels.shape)
    window = np.s_[top : top + side, left : left + side]
    bright = resized(np.ascontiguousarray(bright[window]), (size, size)).clip(0)
    labels = tidy(resize_labels(np.ascontiguousarray(labels[window]), (size, size)))
    layout = lay_out(rng, tissue, size, min(look.white, 0.06))
    drawn = draw_densities(rng, tissue, layout, labels, np.zeros(labels.max(), bool))
    mix = np.float32(between(rng, 0.5, 1))  # share of the measured intensity; the rest is synthetic chromatin
    real = bright * (1 + 0.12 * smooth_noise(rng, size, 4)).astype(np.float32)
    chromatin = drawn.chromatin * (1 - mix * (labels > 0)) + mix * real
    stained = drawn._replace(chromatin=chromatin.astype(np.float32))
    light = expose(rng, stained, Stains(look.haematoxylin, look.eosin), look.camera)
    return Sample(photograph(rng, light, look.camera), labels, "restained", sample.stem)


def _enlargement(labels: Array, diameter: float) -> float:
    """The enlargement, 0.5 to 3.2, that gives a label map's median nucleus the given ``diameter`` (px)."""
    area = np.bincount(labels.ravel())[1:]
    if not area.any():
        return 2.0
    return float(np.clip(diameter / np.sqrt(4 / np.pi * np.median(area[area > 0])), 0.5, 3.2))


def _mirrored(bright: Array, labels: Array, side: int) -> tuple[Array, Array]:
    """Continue both by reflection to at least ``side`` px; a nucleus cut by the edge is joined to its reflection."""
    rows, columns = (max(0, side - whole) for whole in labels.shape)
    if not rows and not columns:
        return bright, labels
    edges = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2))
    copies = label(
        np.pad(labels, edges, mode="symmetric"), connectivity=1
    )  # components of equal label, so that neighbours stay separate
    return np.pad(bright, edges, mode="symmetric"), copies.astype(np.int32)


def _stained(sample: Sample, rng: Rng) -> Array:
    """Haematoxylin of a fluorescence image, (H, W) float32: about 1 in nuclei, 0 in the background."""
    shine = ndimage.gaussian_filter(sample.image.max(-1).astype(np.float32), 0.6)  # against compression artefacts
    inside = sample.labels > 0
    if not inside.any():
        return np.zeros_like(shine)
    shine = (shine - (0 if inside.all() else np.median(shine[~inside]))).clip(0)
    own = np.nan_to_num(ndimage.mean(shine, sample.labels, np.arange(1, sample.labels.max() + 1)))
    own = own.clip(max(2.0, 0.1 * own.max()))  # a lower limit, which also serves labels without a pixel
    usual, made_up = float(np.median(own)), between(rng, 0.5, 1)
    scale = np.concatenate([[usual], usual ** (1 - made_up) * own**made_up]).astype(np.float32)
    stained = shine / scale[sample.labels]
    haze = between(rng, 0.1, 0.4)  # stray light and noise between nuclei
    stained = np.where(inside, stained, (stained - haze).clip(0, 0.6))
    return stained.clip(0, 1.6).astype(np.float32) ** np.float32(between(rng, 0.6, 1.1))
