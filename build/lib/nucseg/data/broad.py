"""Synthetic H&E images from broad ranges, for pretraining: nothing in them was measured on NuInsSeg.

For each image, `generate_broad` draws tissue, nuclei, stains and camera from the ranges in this module, which are wider
than the variation within any one laboratory. The drawing functions (`tissue`) are shared with `synth`, but not its
styles and statistics per tissue.
"""

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from nucseg.data.datasets import Sample
from nucseg.data.tissue import (
    BLOOD,
    PAD,
    PIGMENT,
    Array,
    Canvas,
    Densities,
    Layout,
    Rng,
    TissueStyle,
    cumulative,
    draw_densities,
    lay_out,
    outlines,
    smooth_noise,
)
from nucseg.errors import InputError

# Published H&E vectors (optical density, RGB); an image's vectors are drawn between and around them:
# Ruifrok & Johnston 2001, Anal Quant Cytol Histol 23:291-299, and Macenko et al. 2009, ISBI 1107-1110.
HAEMATOXYLIN = np.array([[0.650, 0.704, 0.286], [0.5626, 0.7201, 0.4062]])
EOSIN = np.array([[0.072, 0.990, 0.105], [0.2159, 0.8012, 0.5581]])

# Ranges to draw from. Lengths are in px at 0.25 µm/px, before magnification.
DIAMETER = (16.0, 46.0)  # px, of the median nucleus: 4 to 11.5 µm, from lymphocytes to hepatocytes and tumour cells
COVERED = (0.04, 0.65)  # share of the tissue under nuclei
ECCENTRICITY = (0.45, 0.93)
SOLIDITY = (0.93, 0.975)
TOUCHING = (0.0, 0.85)  # share of the nuclei that touch another
WHITE = (0.003, 0.45)  # share of the image without tissue; fat has more
MAGNIFICATION = (0.62, 1.6)
CHROMATIN_OD = (0.7, 2.3)  # of haematoxylin in a nucleus: length of its vector of optical densities (base e)
EOSIN_OD = (0.12, 0.95)  # the same for eosin in tissue
BLUR = (0.4, 1.4)  # px, sd of the optics' Gaussian
JPEG = (30, 95)  # quality factor
EMPTY = 0.03  # share of images without nuclei
FEWEST = 24  # px; nuclei with a smaller area are not labelled
CROWD = 420  # maximum number of nuclei in an image of 512 px, to bound the time; in proportion to the side
_TAG = 0xB0AD  # keeps these seeds apart from those of `synth`


@dataclass(frozen=True)
class Population:
    """Nuclei of one kind; fields as in a row of tissue statistics, for `outlines`."""

    area_px_q25: float
    area_px_median: float
    area_px_q75: float
    eccentricity_median: float
    solidity_median: float
    touching_fraction: float


@dataclass(frozen=True)
class Camera:
    """Optics, sensor and compression.

    ``white``: white point (RGB, 0..255). ``blur``: sd of the Gaussian, px. ``noise``: sd / sqrt(light). ``gamma``:
    exponent of the tone curve. ``shade``: relative sd of the illumination. ``quality``: of JPEG, 0 for none.
    """

    white: tuple[float, float, float]
    blur: float
    noise: float
    gamma: float
    shade: float
    quality: int


@dataclass(frozen=True)
class Look:
    """Everything that is drawn once per image; see `random_look`.

    ``tissue``, ``white``: style and share of white space. ``populations``, ``shares``: one to three kinds of nuclei and
    their shares of the count. ``covered``: share of the tissue under nuclei (0: no nuclei). ``thickness``: 0 (one layer
    of nuclei) to 1 (many more out of focus). ``haematoxylin``, ``eosin``: optical densities (RGB, base e) of a nucleus
    and of tissue. ``magnification``: relative to 0.25 µm/px.
    """

    tissue: TissueStyle
    white: float
    populations: tuple[Population, ...]
    shares: tuple[float, ...]
    covered: float
    thickness: float
    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    magnification: float
    camera: Camera


def between(rng: Rng, low: float, high: float) -> float:
    """Draw from a uniform distribution."""
    return float(rng.uniform(low, high))


def log_between(rng: Rng, low: float, high: float) -> float:
    """Draw from a log-uniform distribution."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _random_tissue(rng: Rng) -> tuple[TissueStyle, float]:
    """Draw a tissue's style and its share of white space."""
    spaces = str(rng.choice(["cleft", "lumen", "gland", "septa", "fat"], p=[0.38, 0.3, 0.2, 0.07, 0.05]))
    scale = log_between(rng, 16, 180)
    walled = spaces in ("lumen", "gland") and rng.random() < 0.6
    wall = between(rng, 0.25, 0.8) * scale if walled else {"septa": 8.0, "fat": 9.0}.get(spaces, 0.0)
    white = between(rng, 0.55, 0.9) if spaces == "fat" else log_between(rng, *WHITE)

    def some(chance: float, low: float, high: float) -> float:
        return between(rng, low, high) if rng.random() < chance else 0.0

    style = TissueStyle(
        spaces=spaces,
        scale=scale,
        soft=log_between(rng, 2, 10),
        wall=wall,
        columnar=bool(rng.random() < 0.4),
        fibre=some(0.6, 0.05, 0.6),
        width=log_between(rng, 4, 40),
        grain=log_between(rng, 0.07, 0.45),
        cell=log_between(rng, 7, 30),
        patch=between(rng, 0, 0.9),
        aligned=between(rng, 0, 0.9),
        vesicular=between(rng, 0, 0.9),
        halo=some(0.5, -0.7, 0.5),
        membrane=some(0.5, -0.8, 0.3),
        mottle=between(rng, 0.1, 0.9),
        blood=some(0.25, 0, 0.15),
        pigment=some(0.12, 0, 8),
    )
    return style, white


def _random_population(rng: Rng) -> Population:
    median = np.pi / 4 * log_between(rng, *DIAMETER) ** 2
    quartile = np.exp(between(rng, 0.12, 0.5))  # from uniform to pleomorphic
    return Population(
        area_px_q25=float(median / quartile),
        area_px_median=float(median),
        area_px_q75=float(median * quartile),
        eccentricity_median=between(rng, *ECCENTRICITY),
        solidity_median=between(rng, *SOLIDITY),
        touching_fraction=between(rng, *TOUCHING),
    )


def random_stains(rng: Rng) -> tuple[Array, Array]:
    """Draw unit vectors of haematoxylin and eosin in optical density, (3,) each, between and around published ones."""
    vectors = []
    for published in (HAEMATOXYLIN, EOSIN):
        way = rng.uniform(-0.3, 1.3)
        vector = (published[0] * (1 - way) + published[1] * way + rng.normal(0, 0.04, 3)).clip(0.02)
        vectors.append(vector / np.linalg.norm(vector))
    if rng.random() < 0.15:  # stained with almost only haematoxylin: the background is purple too
        vectors[1] = vectors[1] + between(rng, 0.8, 3) * vectors[0]
        vectors[1] /= np.linalg.norm(vectors[1])
    return vectors[0], vectors[1]


def random_camera(rng: Rng) -> Camera:
    """Draw a camera; six images in ten are compressed as JPEG."""
    white = (between(rng, 200, 250) + rng.normal(0, 3.5, 3)).clip(180, 255)
    return Camera(
        white=(float(white[0]), float(white[1]), float(white[2])),
        blur=log_between(rng, *BLUR),
        noise=between(rng, 0, 0.6),
        gamma=log_between(rng, 0.85, 1.2),
        shade=between(rng, 0, 0.03),
        quality=int(rng.integers(*JPEG, endpoint=True)) if rng.random() < 0.6 else 0,
    )


def random_look(rng: Rng) -> Look:
    """Draw the look of an image from the ranges of this module, each part independently."""
    tissue, white = _random_tissue(rng)
    kinds = int(rng.choice([1, 2, 3], p=[0.45, 0.35, 0.2]))
    shares = rng.dirichlet(np.full(kinds, 2.0))
    thickness = between(rng, 0, 1)
    haematoxylin, eosin = random_stains(rng)
    h = log_between(rng, *CHROMATIN_OD) * (0.85 + 0.3 * thickness)
    e = min(log_between(rng, *EOSIN_OD) * (0.85 + 0.3 * thickness), 0.75 * h)  # keeps nuclei darker than the tissue
    return Look(
        tissue=tissue,
        white=white,
        populations=tuple(_random_population(rng) for _ in range(kinds)),
        shares=tuple(float(share) for share in shares),
        covered=0.0 if rng.random() < EMPTY else log_between(rng, *COVERED),
        thickness=thickness,
        haematoxylin=_rgb(h * haematoxylin),
        eosin=_rgb(e * eosin),
        magnification=log_between(rng, *MAGNIFICATION),
        camera=random_camera(rng),
    )


def _rgb(values: Array) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


def _nuclei(rng: Rng, look: Look, layout: Layout, size: int) -> tuple[Array, Array]:
    """Draw all nuclei: (size, size) int32 labels 1..n, and which of them are out of focus, (n,) bool.

    Nuclei out of focus are added last, and so lie behind the others.
    """
    tissue = (1 - look.white) ** 0.7 * size**2
    area = sum(s * p.area_px_median for s, p in zip(look.shares, look.populations, strict=True))
    most = CROWD * size / 512
    sharp = max(1, round(min(look.covered * tissue / area, most))) if look.covered else 0
    faint = int(rng.binomial(sharp, 0.05 + 0.4 * look.thickness)) if sharp else 0
    canvas = Canvas(rng, layout, size, sharp + faint)
    ends = []
    for count in (sharp, faint):
        for share, population in zip(look.shares, look.populations, strict=True):
            _add(rng, canvas, population, max(1, round(share * count)) if count else 0)
        ends.append(canvas.n)
    labels = canvas.labels[PAD : PAD + size, PAD : PAD + size]
    return _renumber(labels, np.arange(1, canvas.n + 1) > ends[0])


def _add(rng: Rng, canvas: Canvas, population: Population, count: int) -> None:
    """Add ``count`` nuclei of one kind in their own clusters, or as many as there is room for."""
    count = min(count, len(canvas.radii) - canvas.n)
    if not count:
        return
    likely = canvas.layout.likely * np.exp(rng.uniform(0, 1.5) * smooth_noise(rng, len(canvas.layout.likely), 20))
    canvas.total = cumulative(likely, canvas.size)
    for outline in outlines(rng, count, population, 0.5):
        close = canvas.n > 0 and rng.random() < 0.7 * population.touching_fraction
        for _ in range(3):
            place, points = (canvas.beside if close else canvas.apart)(outline)
            if canvas.draw(place, points):
                break


def _renumber(labels: Array, faint: Array) -> tuple[Array, Array]:
    """Number the labels that occur 1..n, keeping their order; ``faint`` has one value per label."""
    there = np.bincount(labels.ravel(), minlength=len(faint) + 1)[1:] > 0
    new = np.concatenate([[0], np.cumsum(there) * there]).astype(np.int32)
    return new[labels], faint[there]


class Stains(NamedTuple):
    """Optical density (RGB, base e) of each stain where its density map is 1."""

    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]


def expose(rng: Rng, densities: Densities, stains: Stains, camera: Camera) -> Array:
    """Apply Beer-Lambert's law and the optics' blur: (size, size, 3) float32 light, 0..255."""
    size = len(densities.eosin)
    shade = 1 + np.float32(camera.shade) * smooth_noise(rng, size, 256).astype(np.float32)
    light = np.empty((size, size, 3), np.float32)
    eosin, chromatin = densities.eosin.astype(np.float32), densities.chromatin.astype(np.float32)
    for c in range(3):
        density = np.float32(stains.haematoxylin[c]) * chromatin + np.float32(stains.eosin[c]) * eosin
        density += np.float32(BLOOD[c]) * densities.blood + np.float32(PIGMENT[c]) * densities.brown
        light[..., c] = np.float32(camera.white[c]) * shade * np.exp(-density)
    return ndimage.gaussian_filter(light, (camera.blur, camera.blur, 0), truncate=3)


def photograph(rng: Rng, light: Array, camera: Camera) -> Array:
    """Add sensor noise, tone curve and compression: (H, W, 3) light, 0..255 -> uint8 RGB of the same size."""
    light = light.astype(np.float32, copy=False).clip(0, 255)
    noise = rng.standard_normal(light.shape, dtype=np.float32)
    light = (light + np.float32(camera.noise) * np.sqrt(light) * noise).clip(0, 255)
    image = (255 * (light / 255) ** np.float32(camera.gamma) + 0.5).clip(0, 255).astype(np.uint8)
    return jpeg(image, camera.quality) if camera.quality else image


def jpeg(image: Array, quality: int) -> Array:
    """Compress an (H, W, 3) uint8 image as JPEG of ``quality`` (1..95) and decode it."""
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        file.seek(0)
        return np.asarray(Image.open(file))


def generate_broad(seed: int | tuple[int, ...], size: int = 512, look: Look | None = None) -> Sample:
    """Draw an image of random tissue, stains and camera with its label map; the same arguments give the same bytes.

    ``seed``: one number, 0 or more, or a tuple of them; images of different seeds are independent. ``size``: 64 to
    1024 px. ``look``: instead of a `random_look`. Labels are consecutive. Nuclei out of focus are drawn but not
    labelled, and a few images (`EMPTY`) have no nuclei. ``tissue`` is "synthetic", ``vague`` is None.
    Raises InputError for a negative seed or a size out of range.

    >>> sample = generate_broad(1, size=128)
    >>> sample.image.shape, sample.labels.shape
    ((128, 128, 3), (128, 128))
    """
    seeds = seed if isinstance(seed, tuple) else (seed,)
    if not 64 <= size <= 1024:
        raise InputError(f"Synthetic images are 64 to 1024 px wide, not {size}: choose a size in that range.")
    if min(seeds) < 0:
        raise InputError(f"A seed is 0 or more, not {min(seeds)}: choose another.")
    rng = np.random.default_rng(np.random.SeedSequence([_TAG, len(seeds), *seeds]))
    look = look or random_look(rng)
    drawn = max(64, round(size / look.magnification))
    layout = lay_out(rng, look.tissue, drawn, look.white)
    everything, faint = _nuclei(rng, look, layout, drawn)
    labels = np.where(np.concatenate([[False], faint])[everything], np.int32(0), everything)
    densities = draw_densities(rng, look.tissue, layout, everything, faint)
    light = expose(rng, densities, Stains(look.haematoxylin, look.eosin), look.camera)
    image = photograph(rng, resized(light, (size, size)), look.camera)
    return Sample(image, tidy(resize_labels(labels, (size, size))), "synthetic", "_".join(map(str, seeds)))


def resize_labels(labels: Array, shape: tuple[int, int]) -> Array:
    """Resize a label map (H, W) to ``shape``: int32, with smooth outlines where it is enlarged."""
    if labels.shape == shape:
        return labels.astype(np.int32, copy=False)
    size = shape[::-1]
    near = np.asarray(Image.fromarray(labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    mask = np.where(labels > 0, np.float32(1), np.float32(0))
    if shape[0] > labels.shape[0]:  # smooth the steps between pixels; a wider filter would close gaps of one pixel
        mask = ndimage.gaussian_filter(mask, 0.6)
    reach = 2 * int(np.ceil(0.5 * max(1, shape[0] / labels.shape[0]))) + 1  # px that outlines may grow by
    filled = np.where(near > 0, near, ndimage.maximum_filter(near, reach))
    return np.where(resized(mask, shape) >= 0.5, filled, 0).astype(np.int32)


def resized(image: Array, shape: tuple[int, int]) -> Array:
    """Resize a float32 image (H, W) or (H, W, 3) to ``shape``, averaging where it shrinks."""
    if image.shape[:2] == shape:
        return image
    channels = image[..., None] if image.ndim == 2 else image
    planes = [
        np.asarray(Image.fromarray(channels[..., c]).resize(shape[::-1], Image.Resampling.BICUBIC))
        for c in range(channels.shape[-1])
    ]
    return planes[0] if image.ndim == 2 else np.stack(planes, -1)


def tidy(labels: Array) -> Array:
    """Remove nuclei with an area below `FEWEST` px and number the others 1..n."""
    area = np.bincount(labels.ravel())
    keep = area >= FEWEST
    keep[0] = False
    return (np.cumsum(keep) * keep).astype(np.int32)[labels]
