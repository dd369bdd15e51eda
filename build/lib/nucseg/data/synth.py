"""Synthetic H&E images of NuInsSeg's 31 tissues: seeded, matched to measurements, and without a download.

A layout (white spaces, walls, fibres) and nuclei give density maps (`tissue`), which Beer-Lambert's law turns into
light. The measurable properties of a tissue come from ``assets/nuinsseg_tissue_stats.csv``: the number of nuclei, their
areas, how many touch, and the colours inside and outside them. The rest of its look comes from ``STYLES``.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any, overload

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.stats import gamma
from skimage.measure import regionprops_table

from nucseg.data.datasets import Sample
from nucseg.data.tissue import (
    BLOOD,
    PIGMENT,
    Array,
    Densities,
    Rng,
    TissueStyle,
    draw_densities,
    lay_out,
    scatter,
    smooth_noise,
)
from nucseg.errors import InputError

# Haematoxylin and eosin in optical density (Ruifrok & Johnston 2001, Anal Quant Cytol Histol 23:291-299).
# They describe how slides vary; the mean colours of each tissue come from the CSV.
HAEMATOXYLIN = np.array([0.650, 0.704, 0.286])
EOSIN = np.array([0.072, 0.990, 0.105])
SENSOR = (0.44, 0.18, 0.30)  # sd of the noise / sqrt(light), measured: it is lowest in green


S = TissueStyle
# fmt: off
STYLES: dict[str, TissueStyle] = {  # in the order of the CSV
    "human bladder": S(scale=60, fibre=0.3, width=14, aligned=0.8, vesicular=0.4, grain=0.1, soft=5),
    "human brain": S("lumen", fibre=0.25, width=5, cell=8, grain=0.3, vesicular=0.3, halo=-0.6, space=1.8, soft=4),
    "human cardia": S(fibre=0.25, width=16, patch=0.6, aligned=0.4, vesicular=0.3, membrane=-0.5, blood=0.01),
    "human cerebellum": S("lumen", fibre=0.12, width=5, cell=7, grain=0.3, patch=0.9, vesicular=0.05, membrane=-0.2),
    "human epiglottis": S(scale=50, fibre=0.5, width=10, aligned=0.8, vesicular=0.1, grain=0.2, blood=0.02, soft=6,
                          space=1.6),
    "human jejunum": S("lumen", scale=150, wall=90, columnar=True, vesicular=0.3, membrane=-0.2, blood=0.005,
                       space=2.2, mottle=0.6, soft=5),
    "human kidney": S("gland", scale=75, wall=34, columnar=True, patch=0.4, blood=0.05, membrane=0.15, space=2.5,
                      soft=6, mottle=0.8),
    "human liver": S("lumen", scale=55, patch=0, vesicular=0.85, membrane=0.1, blood=0.01, grain=0.14, soft=9,
                     space=3.5),
    "human lung": S("lumen", scale=90, wall=14, fibre=0.25, aligned=0.5, vesicular=0.1, grain=0.25, pigment=4),
    "human melanoma": S(scale=30, fibre=0.25, patch=0.4, vesicular=0.3, grain=0.35, blood=0.15, mottle=0.7, soft=8,
                        space=2),
    "human muscle": S(scale=50, fibre=0.25, width=22, aligned=0.8, vesicular=0.2, grain=0.1, mottle=0.9, space=2,
                      soft=5),
    "human oesophagus": S(scale=60, fibre=0.2, width=18, aligned=0.7, vesicular=0.7, grain=0.07, soft=10, space=1.6),
    "human pancreas": S("gland", scale=75, wall=45, vesicular=0.6, halo=0.3, mottle=1.1, blood=0.015, membrane=0.1,
                        grain=0.16),
    "human peritoneum": S("lumen", scale=60, wall=26, fibre=0.35, aligned=0.6, grain=0.25, mottle=0.7, soft=5),
    "human placenta": S("lumen", scale=150, wall=26, fibre=0.15, vesicular=0.6, blood=0.03, space=1.3),
    "human pylorus": S(fibre=0.3, width=13, aligned=0.8, vesicular=0.3, mottle=0.4),
    "human rectum": S(fibre=0.25, aligned=0.5, patch=0.6, pigment=4, grain=0.2),
    "human salivory gland": S("gland", scale=80, wall=60, membrane=0.2, grain=0.1, mottle=0.8, space=2, soft=5),
    "human spleen": S(patch=0.4, vesicular=0.3, halo=0.15, membrane=-0.4, blood=0.06, pigment=7, grain=0.3,
                      mottle=0.6),
    "human testis": S("lumen", scale=70, cell=16, grain=0.35, vesicular=0.7, halo=0.5, membrane=-0.3, soft=4),
    "human tongue": S(scale=50, fibre=0.3, width=40, aligned=0.9, vesicular=0.15, grain=0.06, mottle=0.9, soft=5,
                      space=1.8),
    "human tonsile": S(patch=0.5, scale=22, vesicular=0.3, halo=0.4, membrane=-0.7, grain=0.25),
    "human umbilical cord": S(scale=50, fibre=0.6, width=6, aligned=0.8, vesicular=0.1, grain=0.25, soft=8,
                              space=1.8),
    "mouse fat (white and brown)_subscapula": S("fat", scale=170, wall=9, grain=0.25, fibre=0.1, mottle=0.15),
    "mouse femur": S(patch=0.6, scale=30, vesicular=0.3, halo=0.2, membrane=-0.8, blood=0.02, pigment=1),
    "mouse heart": S(scale=30, fibre=0.12, width=20, aligned=0.85, vesicular=0.2, grain=0.06, space=1.3, soft=6),
    "mouse kidney": S("gland", scale=85, wall=45, vesicular=0.85, membrane=0.15, grain=0.08, space=1.6, soft=6),
    "mouse liver": S(scale=18, cell=9, grain=0.3, vesicular=0.8, membrane=-0.25, halo=0.1, patch=0),
    "mouse muscle_tibia": S("septa", scale=190, wall=8, vesicular=0.1, grain=0.05, fibre=0.04, space=1.8),
    "mouse spleen": S(patch=0.35, scale=25, vesicular=0.2, membrane=-0.35, blood=0.02, mottle=0.6),
    "mouse thymus": S(patch=0.3, scale=16, vesicular=0.15, membrane=-0.6, grain=0.15),
}
# fmt: on
TISSUES: tuple[str, ...] = tuple(STYLES)


@cache
def _measured(tissue: str) -> Any:
    """The row of a tissue in the CSV, with its columns as attributes."""
    with (files("nucseg") / "assets" / "nuinsseg_tissue_stats.csv").open(encoding="utf-8") as file:
        table = pd.read_csv(file)
    return next(row for row in table.itertuples(index=False) if row.tissue == tissue)


def _even(tissue: str, seed: int) -> Array:
    """Two quantiles in (0, 1) for an image; ten seeds, starting at a multiple of ten, fall into each tenth once.

    This brings the mean of ten images close to that of their tissue. The order of the tenths differs between tissues.
    """
    block, k = divmod(seed, 10)
    order = np.random.default_rng(zlib.crc32(tissue.encode())).permuted(np.tile(np.arange(10), (2, 1)), axis=1)
    inside = (
        (block * 2654435769 + 2**31) % 2**32
    ) / 2**32  # multiples of the golden ratio, which are evenly spread too
    return (order[:, k] + inside) / 10


def _count(row: Any, even: float, size: int, share: float) -> int:
    """Number of nuclei: the quantile ``even`` in (0, 1) of a gamma distribution with the tissue's mean and sd.

    It grows with ``share``: the image's share of tissue relative to the usual share.
    """
    mean, sd = row.nuclei_per_image_mean, row.nuclei_per_image_sd
    drawn = gamma.ppf(np.clip(even, 0.02, 0.98), (mean / sd) ** 2, scale=sd**2 / mean)
    fits = 0.62 * 512**2 / row.area_px_median  # the largest number that fits side by side
    return max(1, round(min(drawn * share**0.7, fits) * (size / 512) ** 2))


def _restain(density: Array, h: float, e: float) -> Array:
    """Scale the haematoxylin and eosin of an optical density (3,) by exp(h) and exp(e)."""
    strength = np.linalg.lstsq(np.stack([HAEMATOXYLIN, EOSIN], 1), density, rcond=None)[0].clip(0)
    return density + strength * (np.exp([h, e]) - 1) @ np.stack([HAEMATOXYLIN, EOSIN])


def _targets(rng: Rng, row: Any, share: float) -> tuple[Array, Array, Array]:
    """White light (0..255) and the mean transmission of nuclei and of the rest (0..1) of one image, each (3,).

    They are those of the tissue with stain variation; an image with less tissue is lighter between nuclei.
    """

    def part(name: str) -> Array:
        return np.array([getattr(row, f"{name}_{c}") for c in "rgb"])

    rest, white = part("background"), np.maximum(part("white"), 1.02 * part("background"))
    spread = min(0.35, row.stain_sd / np.log(white / rest).max())
    h, e = np.clip(rng.normal(0, spread, 2), -0.6, 0.6)
    nucleus, rest = (_restain(np.log(white / colour), h, e) for colour in (part("nucleus"), rest))
    return white, np.exp(-nucleus), np.exp(-rest * share)


def _strengths(
    eosin: Array, chromatin: Array, extra: Array, inside: Array, want: tuple[float, float]
) -> tuple[np.float32, np.float32]:
    """Solve for (a, b) such that exp(-(a eosin + b chromatin + extra)) averages ``want`` in nuclei and outside.

    Newton's method on two equations, with both strengths kept between 0 and 5.
    """
    ab = np.array([0.5, 0.5])
    parts = (inside, ~inside)
    for _ in range(8):
        light = np.exp(-(ab[0] * eosin + ab[1] * chromatin + extra))
        miss = np.array([light[p].mean() - w for p, w in zip(parts, want, strict=True)])
        slope = -np.array([[(light[p] * d[p]).mean() for d in (eosin, chromatin)] for p in parts])
        step = np.linalg.lstsq(slope, miss, rcond=1e-3)[0]
        ab = np.clip(ab - np.clip(step, -0.6, 0.6), 0.0, 5.0)
    return np.float32(ab[0]), np.float32(ab[1])


def _expose(rng: Rng, d: Densities, labels: Array, row: Any, share: float) -> Array:
    """Stain, illuminate and photograph the densities: (size, size, 3) uint8 RGB."""
    size = len(labels)
    white, nucleus, rest = _targets(rng, row, share)
    shade = 1 + 0.012 * smooth_noise(rng, size, 256)
    image = np.empty((size, size, 3), np.uint8)
    few = np.s_[:: 1 + size // 256, :: 1 + size // 256]  # a subset of the pixels is enough for a mean
    for c in range(3):
        extra = BLOOD[c] * d.blood + PIGMENT[c] * d.brown
        want = float(nucleus[c]), float(rest[c])
        a, b = _strengths(d.eosin[few], d.chromatin[few], extra[few], labels[few] > 0, want)
        crisp = np.float32(white[c]) * shade * np.exp(-(a * d.eosin + b * d.chromatin + extra))
        light = ndimage.gaussian_filter(crisp, 0.9, truncate=3)
        dots = rng.standard_normal((size + 1, size + 1), dtype=np.float32)
        noise = (dots[1:, 1:] + dots[1:, :-1] + dots[:-1, 1:] + dots[:-1, :-1]) / 2  # as after a Bayer mosaic
        image[..., c] = np.clip(light + np.float32(SENSOR[c]) * np.sqrt(light) * noise + 0.5, 0, 255)
    return image


def _vary(rng: Rng, style: TissueStyle, usual: float) -> tuple[TissueStyle, float]:
    """Vary a tissue's style and its ``usual`` share of white for one image."""
    if style.spaces == "fat":
        if rng.random() < 0.6:  # brown fat: small vacuoles, more tissue between them
            return replace(style, spaces="gland", scale=36, wall=0), float(rng.uniform(0.2, 0.5))
        return style, float(rng.uniform(0.86, 0.93))
    own = replace(
        style,
        fibre=style.fibre * rng.lognormal(0, 0.4),
        grain=style.grain * rng.lognormal(0, 0.2),
        scale=style.scale * rng.lognormal(0, 0.2),
        mottle=style.mottle * rng.lognormal(0, 0.3),
        vesicular=float(np.clip(style.vesicular + rng.normal(0, 0.12), 0, 1)),
    )
    return own, float(np.clip(usual * rng.lognormal(-0.12, 0.5), 0.004, 0.8))


def _check(tissue: str, seed: int, size: int) -> None:
    if tissue not in STYLES:
        close = get_close_matches(str(tissue), TISSUES, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"the known ones are {', '.join(TISSUES)}."
        raise InputError(f"There is no tissue {tissue!r}: {hint}")
    if not 64 <= size <= 2048:
        raise InputError(f"Synthetic images are 64 to 2048 px wide, not {size}: choose a size in that range.")
    if seed < 0:
        raise InputError(f"A seed is 0 or more, not {seed}: choose another.")


def _stem(tissue: str, seed: int) -> str:
    return f"{re.sub('[^a-z]+', '_', tissue)}_synthetic_{seed:04d}"


def generate(tissue: str, seed: int = 0, size: int = 512) -> Sample:
    """Draw one image of ``tissue`` with its label map; the same arguments give the same bytes.

    ``tissue``: one of ``TISSUES``. ``seed``: 0 or more; images of different seeds are independent, except that
    the numbers of nuclei are spread evenly over consecutive seeds. ``size``: 64 to 2048 px, at the scale of a 40x
    scan. Labels are consecutive; there is at least one nucleus, and each has an area of at least 20 px unless the
    border cuts it. ``vague`` is None. Raises InputError for an unknown tissue, a negative seed or a size out of range.
    """
    _check(tissue, seed, size)
    rng = np.random.default_rng(np.random.SeedSequence([zlib.crc32(tissue.encode()), seed]))
    row, even = _measured(tissue), _even(tissue, seed)
    usual = STYLES[tissue].space * row.white_fraction
    style, white = _vary(rng, STYLES[tissue], usual)
    share = float(np.clip((1 - white) / (1 - usual), 0.2, 1.7))
    layout = lay_out(rng, style, size, white)
    wanted = _count(row, even[0], size, share)
    drawn = scatter(rng, layout, row, wanted + rng.binomial(wanted, 0.25), size, even[1])
    faint = np.arange(1, drawn.max() + 1) > wanted  # the last ones are out of focus, and so not annotated
    labels = np.where(drawn > wanted, np.int32(0), drawn)
    image = _expose(rng, draw_densities(rng, style, layout, drawn, faint), labels, row, share)
    return Sample(image, labels, tissue, _stem(tissue, seed))


class Synthetic(Sequence[Sample]):
    """A dataset of synthetic images, each drawn when first requested and then kept in memory.

    It holds ``n_per_tissue`` (1 to 10,000) images of each of ``tissues`` in turn, ``size`` px wide. Image k of a
    tissue is ``generate(tissue, 10_000 * seed + k, size)``, whatever else is in the dataset. ``table``: one row per
    image, with columns tissue and stem. Raises InputError as `generate` does.
    """

    name = "synthetic"

    def __init__(self, n_per_tissue: int = 2, size: int = 512, seed: int = 0, tissues: Sequence[str] = TISSUES) -> None:
        if not 1 <= n_per_tissue <= 10_000:
            raise InputError(f"A synthetic dataset has 1 to 10000 images of a tissue, not {n_per_tissue}.")
        for tissue in tissues:
            _check(tissue, seed, size)
        self.size = size
        self._which = [(tissue, 10_000 * seed + k) for tissue in tissues for k in range(n_per_tissue)]
        self._drawn: dict[int, Sample] = {}
        rows = [(tissue, _stem(tissue, number)) for tissue, number in self._which]
        self.table = pd.DataFrame(rows, columns=["tissue", "stem"])

    def __len__(self) -> int:
        return len(self._which)

    @overload
    def __getitem__(self, i: int) -> Sample: ...
    @overload
    def __getitem__(self, i: slice) -> list[Sample]: ...
    def __getitem__(self, i: int | slice) -> Sample | list[Sample]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        if i not in self._drawn:
            self._drawn[i] = generate(*self._which[i], size=self.size)
        return self._drawn[i]


def touching(labels: Array) -> Array:
    """Labels of the nuclei in an (H, W) label map that touch another by a side or corner: (k,), sorted."""
    h, w = labels.shape
    met = []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        a = labels[: h - dy, max(0, -dx) : w - max(0, dx)]
        b = labels[dy:, max(0, dx) : w + min(0, dx)]
        meet = (a != b) & (a > 0) & (b > 0)
        met += [a[meet], b[meet]]
    return np.unique(np.concatenate(met))


def _measure(sample: Sample) -> dict[str, float]:
    """Measure one image as in the CSV; NaN for values undefined without nuclei or without background."""
    inside, n = sample.labels > 0, int(np.count_nonzero(np.unique(sample.labels)))
    out: dict[str, float] = {
        "nuclei": n,
        "touching_fraction": len(touching(sample.labels)) / n if n else np.nan,
    }
    out["foreground_fraction"] = float(inside.mean())
    for part, mask in (("nucleus", inside), ("background", ~inside)):
        for c, name in enumerate("rgb"):
            out[f"{part}_{name}"] = sample.image[mask, c].mean() if mask.any() else np.nan
    for c, name in enumerate("rgb"):
        out[f"background_sd_{name}"] = sample.image[~inside, c].std() if not inside.all() else np.nan
    return out


def statistics(samples: Iterable[Sample]) -> pd.Series:
    """Measure samples, synthetic or real, with the columns of ``assets/nuinsseg_tissue_stats.csv``.

    Counts: ``images``, ``nuclei``, and the mean and sd of nuclei per image. Over all nuclei: quartiles of the area
    (px), median eccentricity and solidity. As means over images: ``touching_fraction`` (share of nuclei that touch
    another, see `touching`), ``foreground_fraction``, mean RGB (0..255) inside and outside nuclei, and the sd outside.
    Raises InputError if there is no sample.
    """
    rows, shapes = [], []
    for sample in samples:
        rows.append(_measure(sample))
        shape = regionprops_table(sample.labels, properties=("area", "eccentricity", "solidity"))
        shapes.append(pd.DataFrame(shape))
    if not rows:
        raise InputError("There is no sample to measure: give at least one.")
    images, nuclei = pd.DataFrame(rows), pd.concat(shapes)
    counts = images.pop("nuclei")
    head: dict[str, Any] = {"images": len(counts), "nuclei": counts.sum()}
    head |= {"nuclei_per_image_mean": counts.mean(), "nuclei_per_image_sd": counts.std()}
    for name, q in (("q25", 0.25), ("median", 0.5), ("q75", 0.75)):
        head[f"area_px_{name}"] = nuclei["area"].quantile(q)
    head |= {f"{name}_median": nuclei[name].median() for name in ("eccentricity", "solidity")}
    return pd.Series(head | images.mean().to_dict())
