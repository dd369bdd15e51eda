"""Procedural H&E tissue of the 31 kinds of NuInsSeg: seeded, measured against the real one, with no download.

An image is drawn the way light meets a section: a layout (white spaces, walls, fibres) and nuclei give two
density maps, one of what lies around nuclei and one of chromatin; Beer-Lambert's law turns densities into
light. What a tissue's images measure, the number of nuclei, their areas, how many touch, the colours in and
outside them, comes from ``assets/nuinsseg_tissue_stats.csv``; what it looks like comes from ``STYLES``.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import overload

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.stats import gamma
from skimage.draw import polygon
from skimage.measure import regionprops_table

from nucseg.data import Sample
from nucseg.errors import InputError

# Haematoxylin and eosin in optical density (Ruifrok & Johnston 2001, Anal Quant Cytol Histol 23:291-299).
# They carry the variation from one slide to the next; a tissue's mean colours are its own, from the CSV.
HAEMATOXYLIN = np.array([0.650, 0.704, 0.286], np.float32)
EOSIN = np.array([0.072, 0.990, 0.105], np.float32)
BLOOD = np.array([0.12, 1.00, 0.72], np.float32)  # red cells
PIGMENT = np.array([0.45, 0.75, 1.30], np.float32)  # brown: haemosiderin, melanin
STEP = 4  # px between the knots of the layout: what is laid out is never finer
PAD = 96  # px around the image, so that a nucleus at the border is drawn whole and then cut
POINTS = 32  # of an outline


@dataclass(frozen=True)
class TissueStyle:
    """What one tissue looks like; the defaults are a plain, cellular tissue. Lengths in px, the rest 0..1.

    ``spaces``: the shape of white areas: cleft (along the fibres), lumen (smooth and large), gland (round,
    in rows), fat (round cells, white inside), septa (white between round bundles); ``scale``: their size.
    ``wall``: thickness of the epithelium around them; ``columnar``: its nuclei stand upright, else they lie
    flat. ``fibre``, ``width``: contrast and width of fibres; ``grain``: contrast of the cytoplasm, ``cell``:
    its size; ``patch``: how far nuclei gather; ``aligned``: share of nuclei along the fibres; ``vesicular``:
    share of pale nuclei with a membrane and nucleoli; ``halo``: denser (> 0) or clear (< 0) around nuclei;
    ``membrane``: cell borders stained (> 0) or torn open, white (< 0); ``blood``: share of the area under
    red cells; ``pigment``: brown specks per 512 x 512 px; ``mottle``: variation between pink and purple.
    """

    spaces: str = "cleft"
    scale: float = 40.0
    wall: float = 0.0
    columnar: bool = False
    fibre: float = 0.0
    width: float = 8.0
    grain: float = 0.12
    cell: float = 24.0
    patch: float = 0.2
    aligned: float = 0.2
    vesicular: float = 0.5
    halo: float = 0.0
    membrane: float = 0.0
    blood: float = 0.0
    pigment: float = 0.0
    mottle: float = 0.5
    soft: float = 3.0
    space: float = 1.2


S = TissueStyle
STYLES: dict[str, TissueStyle] = {
    "human bladder": S(scale=60, fibre=0.3, width=14, aligned=0.8, vesicular=0.4, grain=0.1, soft=5),
    "human brain": S(
        spaces="lumen", fibre=0.25, width=5, cell=8, grain=0.25, vesicular=0.3, halo=-0.6, space=1.4, soft=4
    ),
    "human cardia": S(fibre=0.25, width=16, patch=0.6, aligned=0.4, vesicular=0.3, membrane=-0.5, blood=0.01),
    "human cerebellum": S(
        spaces="lumen", fibre=0.12, width=5, cell=8, grain=0.3, patch=0.9, vesicular=0.05, membrane=-0.2
    ),
    "human epiglottis": S(
        scale=50, fibre=0.5, width=10, aligned=0.8, vesicular=0.1, grain=0.2, blood=0.02, soft=6, space=1.6
    ),
    "human jejunum": S(
        spaces="lumen",
        scale=150,
        wall=90,
        columnar=True,
        vesicular=0.3,
        membrane=-0.2,
        blood=0.005,
        space=2.2,
        mottle=0.6,
        soft=5,
    ),
    "human kidney": S(
        spaces="gland",
        scale=75,
        wall=34,
        columnar=True,
        patch=0.4,
        blood=0.05,
        membrane=0.15,
        space=2.5,
        soft=6,
        mottle=0.8,
    ),
    "human liver": S(
        spaces="lumen",
        scale=55,
        patch=0.0,
        vesicular=0.85,
        membrane=0.1,
        blood=0.01,
        grain=0.14,
        soft=9,
        space=3.5,
    ),
    "human lung": S(
        spaces="lumen", scale=90, wall=14, fibre=0.25, aligned=0.5, vesicular=0.1, grain=0.25, pigment=4
    ),
    "human melanoma": S(
        scale=30, fibre=0.25, patch=0.4, vesicular=0.3, grain=0.35, blood=0.15, mottle=0.7, soft=8, space=2.0
    ),
    "human muscle": S(
        scale=50, fibre=0.25, width=22, aligned=0.8, vesicular=0.2, grain=0.1, mottle=0.9, space=2.0, soft=5
    ),
    "human oesophagus": S(
        scale=60, fibre=0.2, width=18, aligned=0.7, vesicular=0.7, grain=0.07, soft=10, space=1.6
    ),
    "human pancreas": S(
        spaces="gland",
        scale=75,
        wall=45,
        vesicular=0.6,
        halo=0.3,
        mottle=1.1,
        blood=0.015,
        membrane=0.1,
        grain=0.16,
    ),
    "human peritoneum": S(
        spaces="lumen", scale=60, wall=26, fibre=0.35, aligned=0.6, grain=0.25, mottle=0.7, soft=5
    ),
    "human placenta": S(
        spaces="lumen", scale=150, wall=26, fibre=0.15, vesicular=0.6, blood=0.03, grain=0.12, space=1.3
    ),
    "human pylorus": S(fibre=0.3, width=13, aligned=0.8, vesicular=0.3, mottle=0.4),
    "human rectum": S(scale=40, fibre=0.25, aligned=0.5, patch=0.6, vesicular=0.5, pigment=4, grain=0.2),
    "human salivory gland": S(
        spaces="gland",
        scale=80,
        wall=60,
        vesicular=0.5,
        membrane=0.2,
        grain=0.1,
        mottle=0.8,
        space=2.0,
        soft=5,
    ),
    "human spleen": S(
        patch=0.4, vesicular=0.3, halo=0.15, membrane=-0.4, blood=0.06, pigment=7, grain=0.3, mottle=0.6
    ),
    "human testis": S(
        spaces="lumen", scale=70, cell=16, grain=0.35, vesicular=0.7, halo=0.5, membrane=-0.3, soft=4
    ),
    "human tongue": S(
        scale=50, fibre=0.3, width=40, aligned=0.9, vesicular=0.15, grain=0.06, mottle=0.9, soft=5, space=1.8
    ),
    "human tonsile": S(patch=0.5, scale=22, vesicular=0.3, halo=0.4, membrane=-0.7, grain=0.25, mottle=0.5),
    "human umbilical cord": S(
        scale=50, fibre=0.6, width=6, aligned=0.8, vesicular=0.1, grain=0.25, soft=8, space=1.8
    ),
    "mouse fat (white and brown)_subscapula": S(spaces="fat", scale=170, wall=9, grain=0.25, fibre=0.1),
    "mouse femur": S(patch=0.6, scale=30, vesicular=0.3, halo=0.2, membrane=-0.8, blood=0.02, pigment=1),
    "mouse heart": S(
        scale=30, fibre=0.12, width=20, aligned=0.85, vesicular=0.2, grain=0.06, space=1.3, soft=6
    ),
    "mouse kidney": S(
        spaces="gland", scale=85, wall=45, vesicular=0.85, membrane=0.15, grain=0.08, space=1.6, soft=6
    ),
    "mouse liver": S(scale=18, cell=9, grain=0.3, vesicular=0.8, membrane=-0.25, halo=0.1, patch=0.0),
    "mouse muscle_tibia": S(
        spaces="septa", scale=190, wall=8, vesicular=0.1, grain=0.05, fibre=0.04, space=1.8
    ),
    "mouse spleen": S(patch=0.35, scale=25, vesicular=0.2, membrane=-0.35, blood=0.02, mottle=0.6),
    "mouse thymus": S(patch=0.3, scale=16, vesicular=0.15, membrane=-0.6, grain=0.15),
}


@cache
def _table() -> pd.DataFrame:
    asset = files("nucseg") / "assets" / "nuinsseg_tissue_stats.csv"
    with asset.open(encoding="utf-8") as file:
        return pd.read_csv(file).set_index("tissue")


TISSUES: tuple[str, ...] = tuple(STYLES)


# --- noise -------------------------------------------------------------------------------------------------


def _knots(size: int, step: float) -> np.ndarray:
    """Positions (px) of the spline knots that ``_upsample`` needs along one axis."""
    return (np.arange(int(np.ceil(size / step)) + 4, dtype=np.float32) - 1) * np.float32(step)


def _upsample(grid: np.ndarray, size: int, step: float = STEP) -> np.ndarray:
    """Cubic B-spline through a grid of knots: (k, k) -> (size, size) float32; smooth, and never beyond them."""
    t = np.arange(size, dtype=np.float32) / np.float32(step)
    i = t.astype(np.intp)
    f = t - i
    weights = ((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3)
    for _ in range(2):  # once down the rows, then, transposed, once along them
        grid = sum((w / 6)[:, None] * grid[i + k] for k, w in enumerate(weights)).T
    return np.ascontiguousarray(grid)


def _noise(rng: np.random.Generator, size: int, scale: float) -> np.ndarray:
    """Smooth noise of mean 0 and sd 1 with features of about ``scale`` px."""
    k = len(_knots(size, scale))
    return _upsample(rng.standard_normal((k, k), dtype=np.float32), size, scale) / np.float32(0.48)


def _fbm(rng: np.random.Generator, size: int, fine: float, coarse: float, slope: float = 0.4) -> np.ndarray:
    """Octaves of noise from ``fine`` to ``coarse`` px, amplitude ~ scale^slope; sd 1."""
    scales = fine * 2.0 ** np.arange(max(1, int(np.log2(coarse / fine)) + 1))
    weights = scales**slope / np.linalg.norm(scales**slope)
    return sum(np.float32(w) * _noise(rng, size, s) for s, w in zip(scales, weights, strict=True))


def _streaks(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, length: float, width: float
) -> np.ndarray:
    """Noise stretched along u: fibres of ``length`` x ``width`` px on any grid of coordinates; sd about 1."""
    table = rng.standard_normal((256, 256), dtype=np.float32)
    out = np.zeros_like(u)
    for octave in (1.0, 0.5, 0.25):
        coords = np.stack([v / (width * octave), u / (length * octave) + 99 * octave])
        out += (
            ndimage.map_coordinates(table, coords, order=2, mode="grid-wrap", prefilter=False) * octave**0.7
        )
    return out / np.float32(0.72)


# --- layout ------------------------------------------------------------------------------------------------


@dataclass
class Layout:
    """Where things lie, on the knots of a grid of ``STEP`` px.

    ``depth``: px from the nearest white space, < 0 in it; ``seam``: 1 on the borders between glands, 0 far
    from them; ``u``, ``v``: coordinates (px) along and across the fibres; ``likely``: nuclei per px, unnormed;
    ``angle`` of nuclei, radians, and ``oriented``, the share of nuclei that keep to it.
    """

    depth: np.ndarray
    seam: np.ndarray
    u: np.ndarray
    v: np.ndarray
    likely: np.ndarray
    angle: np.ndarray
    oriented: np.ndarray


def _cells(
    rng: np.random.Generator, y: np.ndarray, x: np.ndarray, spacing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Distances (px) to the nearest and the second nearest of jittered points, ``spacing`` px apart."""
    reach = np.arange(y.min() - 2 * spacing, y.max() + 2 * spacing, spacing)
    points = np.stack(np.meshgrid(reach, reach, indexing="ij"), -1).reshape(-1, 2)
    points += rng.uniform(-0.45, 0.45, points.shape) * spacing
    near = cKDTree(points).query(np.stack([y, x], -1), k=2)[0].astype(np.float32)
    return near[..., 0], near[..., 1]


def _spaces(
    rng: np.random.Generator,
    style: TissueStyle,
    y: np.ndarray,
    x: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    white: float,
) -> tuple[np.ndarray, np.ndarray]:
    """``depth`` and ``seam`` of a layout with the share ``white`` of the tissue's kind of white space."""
    k = len(y)
    if style.spaces in ("cleft", "lumen"):
        if style.spaces == "cleft":
            high = _streaks(rng, u, v, 3.5 * style.scale, style.scale) + 0.5 * _noise(
                rng, k, style.scale / STEP
            )
        else:
            high = _noise(rng, k, style.scale / STEP) + 0.12 * _fbm(rng, k, 2, 16)
        empty = high > np.quantile(high, 1 - white)
        depth = ndimage.distance_transform_edt(~empty) - ndimage.distance_transform_edt(empty)
        return STEP * ndimage.gaussian_filter(depth.astype(np.float32), 1), np.zeros_like(u)
    wavy = 0.2 * style.scale
    y, x = (
        y + wavy * _noise(rng, k, style.scale / STEP / 2),
        x + wavy * _noise(rng, k, style.scale / STEP / 2),
    )
    first, second = _cells(rng, y, x, style.scale)
    border = (second - first) / 2
    seam = np.exp(-((border / (0.09 * style.scale)) ** 2))
    if style.spaces == "gland":
        first = first - 0.25 * style.scale * _noise(rng, k, 1.5 * style.scale / STEP)
        return first - np.quantile(first, white), seam
    if style.spaces == "fat":
        return np.quantile(border, 1 - white) - border, 0 * seam
    border = border + 0.035 * style.scale * _noise(rng, k, style.scale / STEP)  # some gaps open wide
    return border - np.quantile(border, white), 0 * seam


def _layout(rng: np.random.Generator, style: TissueStyle, size: int, white: float) -> Layout:
    """Lay out one image whose share of white is ``white`` (0..1)."""
    knots = _knots(size, STEP)
    y, x = np.meshgrid(knots, knots, indexing="ij")
    k, turn = len(knots), rng.uniform(0, np.pi)
    bend = 40 * _noise(rng, k, 200 / STEP) + 10 * _noise(rng, k, 70 / STEP) + 4 * _noise(rng, k, 24 / STEP)
    u = (x * np.cos(turn) + y * np.sin(turn)).astype(np.float32)
    v = (y * np.cos(turn) - x * np.sin(turn) + bend).astype(np.float32)
    slope_y, slope_x = np.gradient(ndimage.gaussian_filter(v, 5))
    angle = np.arctan2(slope_x, -slope_y)  # along a line of equal v
    depth, seam = _spaces(rng, style, y, x, u, v, white)
    likely = np.exp(3 * style.patch * _noise(rng, k, 110 / STEP)) + 0.02
    oriented = np.full((k, k), style.aligned)
    if style.wall:
        band = np.exp(-(((depth - 0.6 * style.wall) / (0.25 * style.wall)) ** 2))
        likely = likely * (0.06 + 2.5 * band)
        normal = np.arctan2(*np.gradient(ndimage.gaussian_filter(depth, 2)))
        angle = np.where(band > 0.3, normal if style.columnar else normal + np.pi / 2, angle)
        oriented = np.maximum(oriented, 0.85 * (band > 0.3))
    likely = likely * np.clip((depth + 2) / 8, 0.002, 1)
    return Layout(depth.astype(np.float32), seam, u, v, likely, angle, oriented)


# --- nuclei ------------------------------------------------------------------------------------------------


def _outlines(rng: np.random.Generator, n: int, row: pd.Series, even: float) -> np.ndarray:
    """Outlines of n nuclei about the origin, long axis along x: (n, POINTS, 2) float (y, x) in px.

    Ellipses with the tissue's areas and eccentricities, bent, and roughened by Fourier terms of order 2..6.
    """
    spread = np.log(row.area_px_q75 / row.area_px_q25) / 1.349  # quartiles of a lognormal
    own, image = rng.standard_normal(n).clip(-1.9, 1.9), 2.4 * even - 1.2  # an image has its own size too
    area = 1.06 * row.area_px_median * np.exp(spread * (0.85 * own + 0.5 * image))
    median_ratio = np.sqrt(1 - row.eccentricity_median**2)
    ratio = np.clip(median_ratio * np.exp(0.25 * rng.standard_normal(n)) * 1.04, 0.2, 0.96)
    long = np.sqrt(area / np.pi / ratio)
    phi = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    orders = np.arange(2, 7)
    rough = 0.58 * np.sqrt(max(0.002, 0.985 - row.solidity_median)) / orders**1.1
    swing = rng.standard_normal((n, 5)) * rough
    wave = np.cos(orders[:, None] * phi + rng.uniform(0, 2 * np.pi, (n, 5, 1)))
    radius = long[:, None] * (1 + (swing[..., None] * wave).sum(1)).clip(0.6, 1.5)
    x, y = radius * np.cos(phi), radius * np.sin(phi) * ratio[:, None]
    bend = rng.normal(0, 0.16, n) * (1 - ratio)
    y += (bend / long)[:, None] * (x**2 - 0.4 * (long**2)[:, None])
    return np.stack([y, x], -1)


def _turn(outline: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Turn one outline (POINTS, 2) by each of c angles: (c, POINTS, 2)."""
    sin, cos = np.sin(angle)[:, None], np.cos(angle)[:, None]
    y, x = outline[:, 0], outline[:, 1]
    return np.stack([y * cos + x * sin, x * cos - y * sin], -1)


class _Canvas:
    """The label map while nuclei are thrown on it; a later nucleus never covers an earlier one."""

    def __init__(self, rng: np.random.Generator, layout: Layout, size: int):
        self.rng, self.layout, self.size = rng, layout, size
        self.labels = np.zeros((size + 2 * PAD, size + 2 * PAD), np.int32)
        self.centres: list[np.ndarray] = []
        self.radii: list[float] = []
        self.touching: list[bool] = []
        inner = -(-size // STEP) + 1
        self.width = inner
        self.sum = np.cumsum(layout.likely[1 : inner + 1, 1 : inner + 1], dtype=np.float64)

    def somewhere(self, n: int) -> np.ndarray:
        """n places (n, 2), drawn where nuclei are likely."""
        cell = np.searchsorted(self.sum, self.rng.random(n) * self.sum[-1])
        knots = np.stack([cell // self.width, cell % self.width], -1)
        return np.clip(STEP * (knots + self.rng.uniform(-0.5, 0.5, (n, 2))), 0, self.size - 1)

    def angles(self, places: np.ndarray) -> np.ndarray:
        """An angle for a nucleus at each place: the layout's, nearly, or any."""
        i, j = (places / STEP + 1).astype(np.intp).T
        near = self.layout.angle[i, j] + self.rng.normal(0, 0.18, len(places))
        free = self.rng.random(len(places)) > self.layout.oriented[i, j]
        return np.where(free, self.rng.uniform(0, np.pi, len(places)), near)

    def crowd(self, points: np.ndarray) -> np.ndarray:
        """How many of each candidate's points (c, p, 2) lie on a nucleus."""
        at = points.astype(np.intp) + PAD
        return np.count_nonzero(self.labels[at[..., 0], at[..., 1]], axis=1)

    def apart(self, outline: np.ndarray, gap: float = 3.5) -> tuple[np.ndarray, np.ndarray]:
        """A place with nothing within ``gap`` px, or the emptiest one found."""
        places = self.somewhere(24)
        turned = _turn(outline, self.angles(places)) + places[:, None]
        arms = turned - places[:, None]
        reach = np.sqrt((outline**2).sum(-1)).mean()
        probe = np.concatenate([arms * (1 + gap / reach), arms[:, ::2] * 0.5], 1) + places[:, None]
        best = int(np.argmin(self.crowd(probe)))
        return places[best], turned[best]

    def beside(self, outline: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A place where the nucleus meets one that is there, overlapping it as little as may be."""
        rng = self.rng
        parent = rng.integers(len(self.centres), size=4).repeat(12)
        way = rng.uniform(0, 2 * np.pi, 48)
        reach = np.sqrt((outline**2).sum(-1)).mean() + np.array(self.radii)[parent]
        step = (reach * rng.uniform(0.7, 1.15, 48))[:, None] * np.stack([np.sin(way), np.cos(way)], -1)
        places = np.clip(np.array(self.centres)[parent] + step, 0, self.size - 1)
        turned = _turn(outline, self.angles(places)) + places[:, None]
        hit = self.crowd(turned)
        i, j = (places / STEP + 1).astype(np.intp).T
        cost = np.where(hit == 0, 99, hit) + 40 * (self.layout.depth[i, j] < -2) + rng.random(48)
        best = int(np.argmin(cost))
        return places[best], turned[best]

    def draw(self, place: np.ndarray, points: np.ndarray) -> bool:
        """Fill the outline where it is free; False, and nothing drawn, if less than 60% of it is."""
        rows, cols = polygon(points[:, 0] + PAD, points[:, 1] + PAD, self.labels.shape)
        free = self.labels[rows, cols] == 0
        if len(rows) < 24 or free.mean() < 0.6:
            return False
        top, left = rows.min() - 1, cols.min() - 1
        window = self.labels[top : rows.max() + 2, left : cols.max() + 2]
        shape = np.zeros(window.shape, bool)
        shape[rows[free] - top, cols[free] - left] = True
        if not free.all():  # what is left may be in pieces, and slivers at the seam
            shape = ndimage.binary_opening(shape)
            pieces, n = ndimage.label(shape)
            if n != 1:
                counts = np.bincount(pieces.ravel(), minlength=2)[1:]
                shape = pieces == 1 + int(np.argmax(counts))
            if shape.sum() < max(24, 0.5 * len(rows)):
                return False
        others = np.unique(window[ndimage.binary_dilation(shape, np.ones((3, 3)))])
        others = others[others > 0]
        window[shape] = len(self.centres) + 1
        for other in others:
            self.touching[other - 1] = True
        self.centres.append(place)
        self.radii.append(float(np.sqrt(len(rows) / np.pi)))
        self.touching.append(len(others) > 0)
        return True


def _scatter(
    rng: np.random.Generator, layout: Layout, row: pd.Series, n: int, size: int, even: float
) -> np.ndarray:
    """Throw n nuclei so that the tissue's share of them touches: (size, size) int32, 1..m, m <= n."""
    canvas = _Canvas(rng, layout, size)
    outlines = _outlines(rng, n, row, even)
    for outline in outlines:
        for _ in range(4):
            short = sum(canvas.touching) < row.touching_fraction * (len(canvas.centres) + 1) - 0.5
            place, points = (canvas.beside if short and canvas.centres else canvas.apart)(outline)
            if canvas.draw(place, points):
                break
    return canvas.labels[PAD : PAD + size, PAD : PAD + size]


def _even(tissue: str, seed: int) -> np.ndarray:
    """Two numbers in (0, 1), each filling it evenly as seeds count up, so that ten images have a fair mean."""
    steps = np.array([2654435769, 1779033704], dtype=object)  # golden ratio - 1 and sqrt(2) - 1, times 2**32
    return ((steps * seed + zlib.crc32(tissue.encode())) % 2**32 + 0.5).astype(float) / 2**32


def _count(row: pd.Series, even: float, size: int, solid: float) -> int:
    """How many nuclei: a gamma variable with the tissue's mean and sd, its quantile ``even`` in (0, 1)."""
    mean, sd = row.nuclei_per_image_mean, row.nuclei_per_image_sd
    drawn = gamma.ppf(np.clip(even, 0.02, 0.98), (mean / sd) ** 2, scale=sd**2 / mean)
    fits = 0.62 * 512**2 / row.area_px_median
    return max(1, round(min(drawn * solid**0.7, fits) * (size / 512) ** 2))


# --- light -------------------------------------------------------------------------------------------------


@dataclass
class Densities:
    """What takes up light, each (size, size) float32: ``eosin`` and ``chromatin``, about 1 where dense (chromatin
    also as a haze around nuclei), ``blood`` and ``brown`` (red cells and pigment), 0..1.
    """

    eosin: np.ndarray
    chromatin: np.ndarray
    blood: np.ndarray
    brown: np.ndarray


def _spots(rng: np.random.Generator, at: np.ndarray, size: int, radius: float) -> np.ndarray:
    """Round spots of about ``radius`` px at the places ``at`` (n, 2): (size, size) float32, peak about 1."""
    reach = np.arange(-int(3 * radius), int(3 * radius) + 1)
    dy, dx = np.meshgrid(reach, reach, indexing="ij")
    out = np.zeros((size + 2 * PAD,) * 2, np.float32)
    width = radius * rng.uniform(0.6, 1.3, (len(at), 1, 1))
    stamp = rng.uniform(0.5, 1, (len(at), 1, 1)) * np.exp(-(dy**2 + dx**2) / (2 * width**2))
    corner = np.clip(at, 0, size - 1).astype(np.intp)[:, :, None, None] + PAD
    np.add.at(out, (corner[:, 0] + dy, corner[:, 1] + dx), stamp.astype(np.float32))
    return out[PAD : PAD + size, PAD : PAD + size]


def _borders(labels: np.ndarray) -> np.ndarray:
    """Pixels whose upper or left neighbour has another label: (H, W) bool."""
    out = np.zeros(labels.shape, bool)
    out[1:] |= labels[1:] != labels[:-1]
    out[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    return out


def _chromatin(
    rng: np.random.Generator, labels: np.ndarray, style: TissueStyle, faint: np.ndarray
) -> np.ndarray:
    """Chromatin in nuclei: membranes, clumps, nucleoli, and each nucleus's own darkness and focus."""
    size, n = len(labels), len(faint)
    pale = rng.random(n) < style.vesicular
    dark = (
        np.exp(rng.normal(0, 0.25, n))
        * np.where(pale, 0.85, 1.1)
        * np.where(faint, rng.uniform(0.2, 0.6, n), 1)
    )
    focus = np.clip(rng.normal(0.85, 0.35, n), 0.1, 1)
    own = lambda values: np.concatenate([[0], values]).astype(np.float32)[labels]
    inside = ((labels > 0) & ~(_borders(labels) & (labels > 0) & (np.roll(labels, 1, 0) > 0))).astype(
        np.float32
    )
    rim = np.clip(2.2 * (1 - ndimage.gaussian_filter(inside, 2.6, truncate=2.5)), 0, 1)
    where = np.array(ndimage.center_of_mass(inside, labels, np.arange(1, n + 1))).reshape(-1, 2)[pale]
    spots = _spots(rng, where.repeat(3, 0) + rng.normal(0, 5, (3 * len(where), 2)), size, 2.2)
    vesicle = own(pale)
    clumps = _noise(rng, size, 3.5) + 1.2 * _noise(rng, size, 8)
    density = (
        1
        - 0.25 * vesicle
        + rim * (0.1 + 0.5 * vesicle)
        + clumps * (0.1 + 0.09 * vesicle)
        + 0.6 * vesicle * spots
    )
    density = density.clip(0.1) * inside * own(dark)
    shares = (own(focus * ~faint), 1.7), (own((1 - focus) * ~faint), 4.0), (own(faint), 6.0)
    return sum(ndimage.gaussian_filter(density * part, sigma, truncate=2.5) for part, sigma in shares)


def _red_cells(rng: np.random.Generator, share: float, size: int) -> np.ndarray:
    """Red blood cells in drifts, ``share`` of the area under them: coverage (size, size) float32, 0..1."""
    knots = _knots(size, STEP)
    k = len(knots)
    n = rng.poisson(share * size**2 / 330 * rng.gamma(0.7, 1 / 0.7))
    if not n:
        return np.zeros((size, size), np.float32)
    drift = np.exp(6 * _noise(rng, k, 16)).ravel()
    cell = np.searchsorted(np.cumsum(drift), rng.random(n) * drift.sum())
    at = STEP * (np.stack([cell // k, cell % k], -1) - 1 + rng.uniform(-1.5, 1.5, (n, 2)))
    grid = np.stack(np.meshgrid(knots, knots, indexing="ij"), -1)
    distance = cKDTree(at).query(grid, distance_upper_bound=60)[0].clip(0, 60).astype(np.float32)
    edge = 11 + 2.5 * _noise(rng, size, 14) - _upsample(distance, size)
    return np.clip(edge / 5, 0, 1) * (0.75 + 0.2 * _noise(rng, size, 18)).clip(0.2, 1.1)


def _cell_borders(labels: np.ndarray) -> np.ndarray:
    """Soft lines half-way between nuclei, where cells meet: (size, size) float32, 0..about 1."""
    half = labels[::2, ::2]
    distance, (i, j) = ndimage.distance_transform_edt(half == 0, return_indices=True)
    line = _borders(half[i, j]) & (distance > 0.5) & (distance < 14)
    soft = ndimage.gaussian_filter(line * (0.4 + distance / 8).astype(np.float32), 1.4, truncate=2.5)
    size = len(labels)
    padded = np.pad(soft, ((1, 4), (1, 4)))
    return 2.2 * _upsample(padded, size, 2)


def _densities(
    rng: np.random.Generator, style: TissueStyle, layout: Layout, labels: np.ndarray, faint: np.ndarray
) -> Densities:
    """What lies where, before it is stained; nuclei whose ``faint`` is True lie out of the plane of focus."""
    size = len(labels)
    around = ((labels > 0) & (labels <= len(faint) - faint.sum())).astype(np.float32)
    streaks = _upsample(_streaks(rng, layout.u, layout.v, 6 * style.width, style.width), size)
    texture = style.grain * _fbm(rng, size, 3, 3 * style.cell) + 0.12 * _noise(rng, size, 100)
    texture += style.fibre * np.tanh(streaks / 1.5) * 1.4 * (0.8 + 0.5 * _noise(rng, size, 90)).clip(0.1)
    depth = _upsample(layout.depth, size) + 1.0 * _fbm(rng, size, 4, 16)
    soft = style.soft * np.exp(0.6 * _noise(rng, size, 50))
    solid = 1 / (1 + np.exp(-np.clip(depth / soft, -20, 20)))
    halo = _upsample(_coarse(around), size)
    haze = (
        style.mottle
        * 0.16
        * np.exp(0.5 * _noise(rng, size, 60) + 0.35 * _noise(rng, size, 16) - 0.3 * streaks)
    )
    haze = haze * solid + (0.45 * style.halo if style.halo > 0 else 0) * halo + 0.12 * halo
    if style.halo < 0:
        solid *= 1 + style.halo * np.clip(2 * halo, 0, 1) * (1 - around)
    seam = _upsample(layout.seam, size)
    if style.wall and style.spaces in ("gland", "lumen"):
        inner = np.clip((style.wall - depth) / 8, 0, 1) if style.spaces == "lumen" else 1 - seam
        texture += 0.4 * seam - 0.1 * (1 - inner)
        haze = haze * (0.3 + inner)
    if style.membrane:
        border = _cell_borders(labels) * (0.4 + 0.8 * _noise(rng, size, 40)).clip(0, 1.3)
        texture += max(style.membrane, 0) * border
        solid *= 1 - np.clip(-style.membrane * border, 0, 0.95) * (1 - around)
    blood = _red_cells(rng, style.blood, size) * (1 - around)
    eosin = np.exp(texture) * (solid + (0.02 + 0.2 * style.fibre * np.clip(streaks, 0, 3)) * (1 - solid))
    eosin *= (1 - 0.5 * around) * (1 - 0.7 * blood)
    specks = rng.uniform(0, size, (rng.poisson(style.pigment * (size / 512) ** 2 * rng.gamma(0.6, 1.6)), 2))
    specks = specks.repeat(6, 0) + rng.normal(0, 6, (6 * len(specks), 2))
    chromatin = _chromatin(rng, labels, style, faint) + haze
    return Densities(
        ndimage.gaussian_filter(eosin, 1.0, truncate=3), chromatin, blood, _spots(rng, specks, size, 2.2)
    )


def _coarse(mask: np.ndarray) -> np.ndarray:
    """A mask (size, size) as a wide, soft field on the layout's knots."""
    small = ndimage.uniform_filter(mask, STEP)[::STEP, ::STEP]
    small = np.pad(small, ((1, 4), (1, 4)), mode="edge")
    k = len(_knots(len(mask), STEP))
    return ndimage.gaussian_filter(small, 2.2)[:k, :k]


def _restain(rng: np.random.Generator, density: np.ndarray, h: float, e: float) -> np.ndarray:
    """An optical density (3,) whose haematoxylin and eosin are exp(h) and exp(e) times as strong."""
    (strength, *_) = np.linalg.lstsq(np.stack([HAEMATOXYLIN, EOSIN], 1), density, rcond=None)
    change = strength.clip(0) * (np.exp([h, e]) - 1)
    return density + change[0] * HAEMATOXYLIN + change[1] * EOSIN


def _targets(
    rng: np.random.Generator, row: pd.Series, solid: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """White light (0..255) and the mean transmission of nuclei and of the rest (0..1) of one image, each (3,).

    They are the tissue's, restained; ``solid``: this image's share of tissue over the usual one, for the
    more of an image is white, the lighter it is on average.
    """
    white, nucleus, rest = (
        row[[f"{part}_{c}" for c in "rgb"]].to_numpy(float) for part in ("white", "nucleus", "background")
    )
    white = np.maximum(white, 1.02 * rest)
    spread = row.stain_sd / np.log(white / rest).max()
    h, e = np.clip(rng.normal(0, min(0.35, spread), 2), -0.6, 0.6)
    nucleus, rest = (_restain(rng, np.log(white / part), h, e) for part in (nucleus, rest))
    return white, np.exp(-nucleus), np.exp(-rest * solid)


def _strengths(
    eosin: np.ndarray, chromatin: np.ndarray, extra: np.ndarray, inside: np.ndarray, want: tuple[float, float]
) -> np.ndarray:
    """Strengths (a, b) with which exp(-(a eosin + b chromatin + extra)) averages ``want`` in nuclei and outside.

    Newton's method on two equations, kept within what a stain can do.
    """
    ab = np.array([0.5, 0.5])
    parts = (inside, ~inside) if inside.any() else (~inside, ~inside)
    for _ in range(8):
        light = np.exp(-(ab[0] * eosin + ab[1] * chromatin + extra))
        miss = np.array([light[p].mean() - w for p, w in zip(parts, want, strict=True)])
        slope = -np.array([[(light[p] * d[p]).mean() for d in (eosin, chromatin)] for p in parts])
        step = np.linalg.lstsq(slope, miss, rcond=1e-3)[0]
        ab = np.clip(ab - np.clip(step, -0.6, 0.6), 0.0, 5.0)
    return ab


def _expose(
    rng: np.random.Generator, d: Densities, labels: np.ndarray, row: pd.Series, solid: float
) -> np.ndarray:
    """Stain, light, and photograph: (size, size, 3) uint8 RGB."""
    size = len(labels)
    white, *want = _targets(rng, row, solid)
    shade = 1 + 0.012 * _noise(rng, size, 256)
    sensor = (0.44, 0.18, 0.30)  # noise / sqrt(light), measured: sensors see green best
    image = np.empty((size, size, 3), np.uint8)
    few = (slice(None, None, 3), slice(None, None, 3))  # enough pixels for a mean
    for c in range(3):
        extra = BLOOD[c] * d.blood + PIGMENT[c] * d.brown
        a, b = _strengths(
            d.eosin[few], d.chromatin[few], extra[few], labels[few] > 0, (want[0][c], want[1][c])
        )
        light = (
            shade
            * np.exp(-(np.float32(a) * d.eosin + np.float32(b) * d.chromatin + extra))
            * np.float32(white[c])
        )
        light = ndimage.gaussian_filter(light, 0.9, truncate=3)
        noise = rng.standard_normal((size + 1, size + 1), dtype=np.float32)
        noise = (noise[1:, 1:] + noise[1:, :-1] + noise[:-1, 1:] + noise[:-1, :-1]) / 2  # as a Bayer mosaic's
        image[..., c] = np.clip(light + sensor[c] * np.sqrt(light) * noise + 0.5, 0, 255)
    return image


# --- what others use ---------------------------------------------------------------------------------------


def _vary(rng: np.random.Generator, style: TissueStyle, usual: float) -> tuple[TissueStyle, float]:
    """One image's own style, and its share of white where ``usual`` is the tissue's."""
    if style.spaces == "fat":
        if rng.random() < 0.6:  # brown fat: small vacuoles, more of everything else
            return replace(style, spaces="gland", scale=36, wall=0), float(rng.uniform(0.2, 0.5))
        return style, float(rng.uniform(0.86, 0.93))
    own = replace(
        style,
        fibre=style.fibre * rng.lognormal(0, 0.4),
        grain=style.grain * rng.lognormal(0, 0.2),
        scale=style.scale * rng.lognormal(0, 0.2),
        vesicular=float(np.clip(style.vesicular + rng.normal(0, 0.12), 0, 1)),
        mottle=style.mottle * rng.lognormal(0, 0.3),
    )
    return own, float(np.clip(usual * rng.lognormal(-0.12, 0.5), 0.004, 0.8))


def generate(tissue: str, seed: int = 0, size: int = 512) -> Sample:
    """One synthetic image of ``tissue`` with its label map, the same bytes for the same arguments.

    ``tissue``: one of ``TISSUES``; ``seed``: any number >= 0, images of different seeds are independent,
    but consecutive seeds together have about the tissue's mean number of nuclei; ``size``: 64..2048 px, at
    the scale of a 40x scan. Labels are consecutive and there is at least one nucleus, of 20 px or more
    unless the border cuts it. Raises InputError for an unknown tissue, a negative seed or another size.
    """
    _check(tissue, seed, size)
    rng = np.random.default_rng(np.random.SeedSequence([zlib.crc32(tissue.encode()), seed]))
    row = _table().loc[tissue]
    usual = STYLES[tissue].space * row.white_fraction
    style, white = _vary(rng, STYLES[tissue], usual)
    solid = float(np.clip((1 - white) / (1 - usual), 0.2, 1.7))
    layout = _layout(rng, style, size, white)
    even = _even(tissue, seed)
    wanted = _count(row, even[0], size, solid)
    drawn = _renumber(_scatter(rng, layout, row, wanted + rng.binomial(wanted, 0.25), size, even[1]))
    faint = np.arange(1, drawn.max() + 1) > wanted  # the last few are out of the plane, and so not annotated
    labels = np.where(drawn > wanted, 0, drawn).astype(np.int32)
    image = _expose(rng, _densities(rng, style, layout, drawn, faint), labels, row, solid)
    return Sample(image, labels, tissue, _stem(tissue, seed))


def _renumber(labels: np.ndarray) -> np.ndarray:
    """Labels made consecutive, in their order: those cut away at the border leave gaps."""
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)


def _check(tissue: str, seed: int, size: int) -> None:
    if tissue not in STYLES:
        close = get_close_matches(str(tissue), TISSUES, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"the known ones are {', '.join(TISSUES)}."
        raise InputError(f"There is no tissue {tissue!r}: {hint}")
    if not 64 <= size <= 2048:
        raise InputError(f"Synthetic images are 64 to 2048 px wide, not {size}: choose a size between.")
    if seed < 0:
        raise InputError(f"A seed is 0 or more, not {seed}.")


def _stem(tissue: str, seed: int) -> str:
    return f"{re.sub('[^a-z]+', '_', tissue)}_synthetic_{seed:04d}"


class Synthetic(Sequence[Sample]):
    """A dataset of synthetic images, each drawn when it is asked for and then kept.

    ``n_per_tissue`` images of each of ``tissues`` in order, ``size`` px wide. ``seed`` picks the images:
    number k of a tissue is ``generate(tissue, 10_000 * seed + k, size)`` whatever else is in the dataset.
    ``table`` has the columns tissue and stem. Raises InputError for what ``generate`` would refuse.
    """

    def __init__(
        self, n_per_tissue: int = 2, size: int = 512, seed: int = 0, tissues: Sequence[str] = TISSUES
    ) -> None:
        if not 0 < n_per_tissue <= 10_000:
            raise InputError(f"A synthetic dataset has 1 to 10000 images of a tissue, not {n_per_tissue}.")
        for tissue in tissues:
            _check(tissue, seed, size)
        self.size = size
        self._which = [(tissue, 10_000 * seed + k) for tissue in tissues for k in range(n_per_tissue)]
        self._drawn: dict[int, Sample] = {}
        self.table = pd.DataFrame(
            [(tissue, _stem(tissue, number)) for tissue, number in self._which], columns=["tissue", "stem"]
        )

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


def touching(labels: np.ndarray) -> np.ndarray:
    """Labels of the nuclei of a label map (H, W) that touch another, corners included: sorted, (k,) int."""
    h, w = labels.shape
    pairs = []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        a = labels[: h - dy, max(0, -dx) : w - max(0, dx)]
        b = labels[dy:, max(0, dx) : w + min(0, dx)]
        meet = (a != b) & (a > 0) & (b > 0)
        pairs += [a[meet], b[meet]]
    return np.unique(np.concatenate(pairs))


def statistics(samples: Iterable[Sample]) -> pd.Series:
    """Measure samples, synthetic or real, in the terms of ``assets/nuinsseg_tissue_stats.csv``.

    ``nuclei_per_image_mean``, ``_sd``; quartiles of the areas (px), median eccentricity and solidity over all
    nuclei; ``touching_fraction`` (share of an image's nuclei that touch another), ``foreground_fraction``,
    mean RGB (0..255) in nuclei and outside, and the sd outside, each a mean over images; an image without
    nuclei counts in the last ones only where it can. Raises InputError if there is no sample.
    """
    rows, shapes = [], []
    for sample in samples:
        inside, n = sample.labels > 0, len(np.unique(sample.labels[sample.labels > 0]))
        row = {"images": 1, "nuclei": n, "foreground_fraction": inside.mean()}
        row["touching_fraction"] = len(touching(sample.labels)) / n if n else np.nan
        for part, mask in (("nucleus", inside), ("background", ~inside)):
            pixels = sample.image[mask].reshape(-1, 3).astype(np.float64)
            for c, name in enumerate("rgb"):
                row[f"{part}_{name}"] = pixels[:, c].mean() if len(pixels) else np.nan
                if part == "background":
                    row[f"background_sd_{name}"] = pixels[:, c].std() if len(pixels) else np.nan
        rows.append(row)
        names = ("area", "eccentricity", "solidity")
        shapes.append(pd.DataFrame(regionprops_table(sample.labels, properties=names)))
    if not rows:
        raise InputError("There is no sample to measure: give at least one.")
    images, nuclei = pd.DataFrame(rows), pd.concat(shapes)
    measured = images.drop(columns=["images", "nuclei"]).mean()
    quartiles = {
        f"area_px_{q}": nuclei.area.quantile(p) for q, p in (("q25", 0.25), ("median", 0.5), ("q75", 0.75))
    }
    medians = {f"{name}_median": nuclei[name].median() for name in names[1:]}
    counts = {"nuclei_per_image_mean": images.nuclei.mean(), "nuclei_per_image_sd": images.nuclei.std()}
    head = {"images": len(images), "nuclei": images.nuclei.sum()}
    return pd.Series(head | counts | quartiles | medians | measured.to_dict())
