"""Drawing H&E tissue: noise, layouts, nuclei and the densities of light-absorbing structures.

`synth` uses it for NuInsSeg's tissues, `broad` for tissue from broad ranges. Every function takes a random generator,
so that the same seed gives the same image.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.draw import polygon

BLOOD = (0.12, 1.00, 0.72)  # optical density (RGB, base e) of red blood cells
PIGMENT = (0.45, 0.75, 1.30)  # the same of haemosiderin and melanin
STEP = 4  # px between the knots of the layout, and so its finest detail
PAD = 96  # px of margin, so that nuclei at the border are drawn whole and then cut
POINTS = 32  # corners of an outline
Rng = np.random.Generator
Array = np.ndarray


@dataclass(frozen=True)
class TissueStyle:
    """The look of a tissue; the defaults give a plain, cellular one. Lengths in px, the rest about 0..1.

    ``spaces``: shape of the white areas: cleft (along the fibres), lumen (smooth and large), gland (round, in
    rows), fat (cells, white inside) or septa (white between bundles). ``scale``: their size. ``soft``: width of
    their edges. ``space``: their share, as a multiple of the share of purely white pixels in the tissue's images.
    ``wall``: thickness of the epithelium around them. ``columnar``: its nuclei stand upright, otherwise they lie flat.
    ``fibre``, ``width``: contrast and width of fibres. ``grain``, ``cell``: contrast and coarsest size of the
    cytoplasm's texture. ``patch``: how strongly nuclei cluster. ``aligned``: share of nuclei along the fibres.
    ``vesicular``: share of pale nuclei with a membrane and nucleoli. ``halo``: purple (> 0) or clear (< 0)
    surroundings of nuclei. ``membrane``: cell borders, stained (> 0) or torn open and white (< 0). ``mottle``:
    purple haze. ``blood``: share of the area under red cells. ``pigment``: groups of brown specks per 512 x 512 px.
    """

    spaces: str = "cleft"
    scale: float = 40
    soft: float = 3
    space: float = 1.2
    wall: float = 0
    columnar: bool = False
    fibre: float = 0
    width: float = 8
    grain: float = 0.12
    cell: float = 24
    patch: float = 0.2
    aligned: float = 0.2
    vesicular: float = 0.5
    halo: float = 0
    membrane: float = 0
    mottle: float = 0.5
    blood: float = 0
    pigment: float = 0


def _knots(size: int, step: float) -> Array:
    """Positions (px) of the spline knots along one axis of an image of ``size`` px, as `_upsample` needs them."""
    return (np.arange(int(np.ceil(size / step)) + 4, dtype=np.float32) - 1) * np.float32(step)


def _grid(size: int) -> Array:
    """The layout's knots: (k, k, 2), y and x in px."""
    return np.stack(np.meshgrid(_knots(size, STEP), _knots(size, STEP), indexing="ij"), -1)


def _upsample(grid: Array, size: int, step: float = STEP) -> Array:
    """Interpolate a grid of knots by cubic B-splines: (k, k) -> (size, size), within the range of the knots."""
    t = np.arange(size, dtype=np.float32) / np.float32(step)
    i = t.astype(np.intp)
    f = t - i
    weights = ((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3)
    for _ in range(2):  # along the columns, then, transposed, along the rows
        rows = [(w / 6)[:, None] * np.take(grid, i + k, axis=0) for k, w in enumerate(weights)]
        for row in rows[1:]:  # in place: memory traffic dominates the time
            rows[0] += row
        grid = np.ascontiguousarray(rows[0].T)
    return grid


def smooth_noise(rng: Rng, size: int, scale: float) -> Array:
    """Smooth noise of mean 0 and sd 1 with features of about ``scale`` px: (size, size) float32."""
    k = len(_knots(size, scale))
    return _upsample(rng.standard_normal((k, k), dtype=np.float32), size, scale) / np.float32(0.48)


def _fbm(rng: Rng, size: int, fine: float, coarse: float) -> Array:
    """Octaves of noise from ``fine`` to ``coarse`` px; sd 1. Amplitude ~ scale^0.4, as in real tissue."""
    scales = fine * 2.0 ** np.arange(max(1, int(np.log2(coarse / fine)) + 1))
    weights = (scales**0.4 / np.linalg.norm(scales**0.4)).astype(np.float32)
    return reduce(np.add, [w * smooth_noise(rng, size, s) for s, w in zip(scales, weights, strict=True)])


def _streaks(rng: Rng, u: Array, v: Array, length: float, width: float) -> Array:
    """Noise stretched along ``u``: fibres of ``length`` x ``width`` px on any grid of coordinates; sd about 1."""
    table = rng.standard_normal((256, 256), dtype=np.float32)
    out = np.zeros_like(u)
    for octave in (1.0, 0.5, 0.25):
        at = np.stack([v / (width * octave), u / (length * octave) + 99 * octave])
        out += octave**0.7 * ndimage.map_coordinates(table, at, order=2, mode="grid-wrap", prefilter=False)
    return out / np.float32(0.72)


class Layout(NamedTuple):
    """The arrangement of a tissue; each array is (k, k), on the layout's knots."""

    depth: Array  # px to the nearest white space, < 0 within it
    seam: Array  # 1 on the borders between glands, 0 far from them
    u: Array  # px along the fibres
    v: Array  # px across them
    likely: Array  # relative density of nuclei
    angle: Array  # of the long axis of nuclei, radians from x towards y
    oriented: Array  # share of nuclei that follow ``angle``


def _spaces(rng: Rng, style: TissueStyle, at: Array, u: Array, v: Array, white: float) -> tuple[Array, Array]:
    """``depth`` and ``seam`` of a layout with the share ``white`` of white space in the style's shape."""
    k, scale = len(at), style.scale
    blobs = smooth_noise(rng, k, scale / STEP)
    if style.spaces in ("cleft", "lumen"):
        cleft = style.spaces == "cleft"
        high = _streaks(rng, u, v, 3.5 * scale, scale) + 0.5 * blobs if cleft else blobs + 0.12 * _fbm(rng, k, 2, 16)
        empty = high > np.quantile(high, 1 - white)
        depth = ndimage.distance_transform_edt(~empty) - ndimage.distance_transform_edt(empty)
        return STEP * ndimage.gaussian_filter(depth.astype(np.float32), 1), np.zeros_like(u)
    wavy = np.stack([smooth_noise(rng, k, scale / STEP / 2), smooth_noise(rng, k, scale / STEP / 2)], -1)
    reach = np.arange(at.min() - 2 * scale, at.max() + 2 * scale, scale)
    centres = np.stack(np.meshgrid(reach, reach), -1).reshape(-1, 2)
    centres += rng.uniform(-0.45, 0.45, centres.shape) * scale
    near = cKDTree(centres).query(at + 0.2 * scale * wavy, k=2)[0].astype(np.float32)
    border = (near[..., 1] - near[..., 0]) / 2
    if style.spaces == "gland":
        round_ = near[..., 0] - 0.25 * scale * smooth_noise(rng, k, 1.5 * scale / STEP)
        return round_ - np.quantile(round_, white), np.exp(-((border / (0.09 * scale)) ** 2))
    if style.spaces == "septa":
        border = border + 0.035 * scale * blobs  # so that some gaps are wide
        return border - np.quantile(border, white), np.zeros_like(u)
    return np.quantile(border, 1 - white) - border, np.zeros_like(u)


def lay_out(rng: Rng, style: TissueStyle, size: int, white: float) -> Layout:
    """Lay out one image with the share ``white`` (0..1) of white space."""
    at = _grid(size)
    k, turn = len(at), rng.uniform(0, np.pi)
    waves = [amplitude * smooth_noise(rng, k, length / STEP) for amplitude, length in ((40, 200), (10, 70), (4, 24))]
    bend = waves[0] + waves[1] + waves[2]
    u = (at @ np.array([np.sin(turn), np.cos(turn)])).astype(np.float32)
    v = (at @ np.array([np.cos(turn), -np.sin(turn)]) + bend).astype(np.float32)
    slope_y, slope_x = np.gradient(ndimage.gaussian_filter(v, 5))
    angle = np.arctan2(slope_x, -slope_y)  # along a line of equal v
    depth, seam = _spaces(rng, style, at, u, v, white)
    likely = np.exp(3 * style.patch * smooth_noise(rng, k, 110 / STEP)) + 0.02
    oriented = np.full((k, k), style.aligned)
    if style.wall:
        band = np.exp(-(((depth - 0.6 * style.wall) / (0.25 * style.wall)) ** 2))
        likely = likely * (0.06 + 2.5 * band)
        normal = np.arctan2(*np.gradient(ndimage.gaussian_filter(depth, 2)))
        angle = np.where(band > 0.3, normal if style.columnar else normal + np.pi / 2, angle)
        oriented = np.maximum(oriented, 0.85 * (band > 0.3))
    likely = likely * np.clip((depth + 2) / 8, 0.002, 1)
    return Layout(depth.astype(np.float32), seam, u, v, likely, angle, oriented)


def cumulative(likely: Array, size: int) -> Array:
    """Cumulative sum of a density over the knots in the image, for `_places` to draw from."""
    k = -(-size // STEP)
    return np.cumsum(likely[1 : k + 1, 1 : k + 1], dtype=np.float64)


def _places(rng: Rng, total: Array, n: int, size: int) -> Array:
    """Draw n places (n, 2) in the image (y and x, px) from the density with the cumulative sum ``total``."""
    k = -(-size // STEP)
    cell = np.searchsorted(total, rng.random(n) * total[-1]).clip(max=k * k - 1)
    at = STEP * (np.stack([cell // k, cell % k], -1) + rng.uniform(-0.5, 0.5, (n, 2)))
    return np.clip(at, 0, size - 1)


def outlines(rng: Rng, n: int, row: Any, even: float) -> Array:
    """Outlines of n nuclei about the origin, long axis along x: (n, POINTS, 2), y and x in px.

    Ellipses with the areas and eccentricities of ``row``, bent, and roughened by Fourier terms of order 2 to 6.
    ``row``: anything with the attributes area_px_q25, area_px_median and area_px_q75 (px), eccentricity_median,
    solidity_median and touching_fraction. ``even``: the image's quantile among those of its tissue, 0 (small nuclei)
    to 1 (large).
    """
    spread = np.log(row.area_px_q75 / row.area_px_q25) / 1.349  # sd of a lognormal distribution, from its quartiles
    own = rng.standard_normal(n).clip(-1.9, 1.9)
    area = np.maximum(40, 1.06 * row.area_px_median * np.exp(spread * (0.85 * own + 1.2 * even - 0.6)))
    ratio = 1.04 * np.sqrt(1 - row.eccentricity_median**2) * np.exp(0.25 * rng.standard_normal(n))
    ratio = ratio.clip(0.2, 0.96)
    long = np.sqrt(area / np.pi / ratio)
    phi, orders = np.linspace(0, 2 * np.pi, POINTS, endpoint=False), np.arange(2, 7)
    rough = 0.58 * np.sqrt(max(0.002, 0.985 - row.solidity_median)) / orders**1.1
    swing = rng.standard_normal((n, 5, 1)) * rough[:, None]
    wave = np.cos(orders[:, None] * phi + rng.uniform(0, 2 * np.pi, (n, 5, 1)))
    radius = long[:, None] * (1 + (swing * wave).sum(1)).clip(0.6, 1.5)
    x, y = radius * np.cos(phi), radius * np.sin(phi) * ratio[:, None]
    bend = rng.normal(0, 0.16, n).clip(-0.35, 0.35) * (1 - ratio)
    y += (bend / long)[:, None] * (x**2 - 0.4 * (long**2)[:, None])
    return np.stack([y, x], -1)


class Canvas:
    """A label map to which nuclei are added one by one; a later nucleus never covers an earlier one."""

    def __init__(self, rng: Rng, layout: Layout, size: int, room: int) -> None:
        self.rng, self.layout, self.size = rng, layout, size
        self.total = cumulative(layout.likely, size)
        self.labels = np.zeros((size + 2 * PAD, size + 2 * PAD), np.int32)
        self.n = 0
        self.centres, self.radii, self.touching = np.zeros((room, 2)), np.zeros(room), np.zeros(room, bool)

    def turned(self, outline: Array, places: Array) -> Array:
        """The outline at c places (c, 2), rotated along the layout or at random: (c, POINTS, 2)."""
        i, j = (places / STEP + 1).astype(np.intp).T
        angle = self.layout.angle[i, j] + self.rng.normal(0, 0.18, len(places))
        free = self.rng.random(len(places)) > self.layout.oriented[i, j]
        angle = np.where(free, self.rng.uniform(0, np.pi, len(places)), angle)[:, None]
        y, x = outline.T
        arms = np.stack([y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)], -1)
        return arms + places[:, None]

    def crowd(self, points: Array) -> Array:
        """Number of each candidate's points (c, p, 2) that lie on a nucleus: (c,)."""
        at = points.astype(np.intp) + PAD
        return np.count_nonzero(self.labels[at[..., 0], at[..., 1]], axis=1)

    def apart(self, outline: Array, gap: float = 3.5) -> tuple[Array, Array]:
        """A place with no nucleus within ``gap`` px, or else the emptiest found, and the outline there."""
        places = _places(self.rng, self.total, 24, self.size)
        points = self.turned(outline, places)
        arms = points - places[:, None]
        wider = arms * (1 + gap / np.sqrt((outline**2).sum(-1)).mean())
        best = int(np.argmin(self.crowd(np.concatenate([wider, 0.5 * arms[:, ::2]], 1) + places[:, None])))
        return places[best], points[best]

    def beside(self, outline: Array) -> tuple[Array, Array]:
        """A place where the nucleus touches one already drawn, with the least overlap found, and the outline there."""
        parent = self.rng.integers(self.n, size=4).repeat(12)
        way = self.rng.uniform(0, 2 * np.pi, 48)
        reach = np.sqrt((outline**2).sum(-1)).mean() + self.radii[parent]
        step = (reach * self.rng.uniform(0.7, 1.15, 48))[:, None] * np.stack([np.sin(way), np.cos(way)], -1)
        places = np.clip(self.centres[parent] + step, 0, self.size - 1)
        points = self.turned(outline, places)
        hit = self.crowd(points)
        i, j = (places / STEP + 1).astype(np.intp).T
        cost = np.where(hit == 0, 99, hit) + 40 * (self.layout.depth[i, j] < -2) + self.rng.random(48)
        best = int(np.argmin(cost))
        return places[best], points[best]

    def draw(self, place: Array, points: Array) -> bool:
        """Fill the free part of the outline; return False, with nothing drawn, if too little of it is free."""
        rows, cols = polygon(points[:, 0] + PAD, points[:, 1] + PAD, self.labels.shape)
        free = self.labels[rows, cols] == 0
        if len(rows) < 24 or free.mean() < 0.6:
            return False
        top, left = rows.min() - 1, cols.min() - 1
        window = self.labels[top : rows.max() + 2, left : cols.max() + 2]
        shape = np.zeros(window.shape, bool)
        shape[rows[free] - top, cols[free] - left] = True
        if not free.all():  # the rest may be in pieces, with slivers at the seam: keep the largest
            pieces, _ = ndimage.label(ndimage.binary_opening(shape))
            shape = pieces == 1 + int(np.argmax(np.bincount(pieces.ravel(), minlength=2)[1:]))
            if shape.sum() < max(24, 0.5 * len(rows)):
                return False
        others = np.unique(window[ndimage.binary_dilation(shape, np.ones((3, 3)))])
        others = others[others > 0]
        self.centres[self.n], self.radii[self.n] = place, np.sqrt(len(rows) / np.pi)
        self.touching[others - 1] = True
        self.touching[self.n] = len(others) > 0
        self.n += 1
        window[shape] = self.n
        return True


def scatter(rng: Rng, layout: Layout, row: Any, n: int, size: int, even: float) -> Array:
    """Place n nuclei, a fraction ``row.touching_fraction`` touching others: (size, size) int32, labels 1..m, m <= n."""
    canvas = Canvas(rng, layout, size, n)
    for outline in outlines(rng, n, row, even):
        for _ in range(4):
            short = canvas.touching.sum() < row.touching_fraction * (canvas.n + 1) - 0.9
            place, points = (canvas.beside if short and canvas.n else canvas.apart)(outline)
            if canvas.draw(place, points):
                break
    labels = canvas.labels[PAD : PAD + size, PAD : PAD + size]
    return np.unique(labels, return_inverse=True)[1].reshape(size, size).astype(np.int32)


class Densities(NamedTuple):
    """Density maps of the light-absorbing structures, each (size, size): about 1 where dense, 0 where absent."""

    eosin: Array
    chromatin: Array  # in nuclei, and as haze between them
    blood: Array
    brown: Array


def _spots(rng: Rng, at: Array, size: int, radius: float) -> Array:
    """Round spots of about ``radius`` px at the places ``at`` (n, 2): (size, size) float32, peak about 1."""
    reach = np.arange(-int(3 * radius), int(3 * radius) + 1)
    dy, dx = np.meshgrid(reach, reach, indexing="ij")
    out = np.zeros((size + 2 * PAD,) * 2, np.float32)
    width = radius * rng.uniform(0.6, 1.3, (len(at), 1, 1))
    stamp = rng.uniform(0.5, 1, (len(at), 1, 1)) * np.exp(-(dy**2 + dx**2) / (2 * width**2))
    corner = np.clip(at, 0, size - 1).astype(np.intp)[:, :, None, None] + PAD
    np.add.at(out, (corner[:, 0] + dy, corner[:, 1] + dx), stamp.astype(np.float32))
    return out[PAD : PAD + size, PAD : PAD + size]


def _borders(labels: Array) -> Array:
    """Pixels whose upper or left neighbour has another label: (H, W) bool."""
    out = np.zeros(labels.shape, bool)
    out[1:] |= labels[1:] != labels[:-1]
    out[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    return out


def _chromatin(rng: Rng, labels: Array, style: TissueStyle, faint: Array) -> Array:
    """Chromatin in nuclei: membranes, clumps and nucleoli, with a darkness and a focus for each nucleus."""
    size, n = len(labels), len(faint)
    pale = rng.random(n) < style.vesicular
    dark = np.exp(rng.normal(0, 0.25, n)) * np.where(pale, 0.85, 1.1) * np.where(faint, rng.uniform(0.2, 0.6, n), 1)
    focus = np.clip(rng.normal(0.85, 0.35, n), 0.1, 1)

    def own(values: Array) -> Array:
        return np.concatenate([[0], values]).astype(np.float32)[labels]

    inside = ((labels > 0) & ~_borders(labels)).astype(np.float32)
    rim = np.clip(2.2 * (1 - ndimage.gaussian_filter(inside, 2.6, truncate=2.5)), 0, 1)
    middle = np.array(ndimage.center_of_mass(labels > 0, labels, np.arange(1, n + 1))).reshape(-1, 2)[pale]
    nucleoli = _spots(rng, middle.repeat(3, 0) + rng.normal(0, 5, (3 * len(middle), 2)), size, 2.2)
    clumps = smooth_noise(rng, size, 3.5) + 1.2 * smooth_noise(rng, size, 8)
    vesicle = own(pale)
    density = 1 + 0.1 * rim + 0.1 * clumps + vesicle * (0.5 * rim + 0.09 * clumps + 0.6 * nucleoli - 0.25)
    density = density.clip(0.1) * (labels > 0) * own(dark)
    parts = (own(focus * ~faint), 1.7), (own((1 - focus) * ~faint), 4.0), (own(faint), 6.0)
    return reduce(np.add, [ndimage.gaussian_filter(density * part, blur, truncate=2.5) for part, blur in parts])


def _red_cells(rng: Rng, share: float, size: int) -> Array:
    """Groups of red blood cells over about ``share`` of the area: coverage (size, size), 0..about 1."""
    n = rng.poisson(share * size**2 / 330 * rng.gamma(0.7, 1 / 0.7))
    if not n:
        return np.zeros((size, size), np.float32)
    at = _grid(size)
    drift = np.exp(6 * smooth_noise(rng, len(at), 16))
    centres = _places(rng, cumulative(drift, size), n, size) + rng.uniform(-6, 6, (n, 2))
    distance = cKDTree(centres).query(at, distance_upper_bound=60)[0].clip(0, 60).astype(np.float32)
    edge = 11 + 2.5 * smooth_noise(rng, size, 14) - _upsample(distance, size)
    return np.clip(edge / 5, 0, 1) * (0.75 + 0.2 * smooth_noise(rng, size, 18)).clip(0.2, 1.1)


def _cell_borders(labels: Array) -> Array:
    """Soft lines half-way between close nuclei, where cells meet: (size, size), 0..about 1."""
    half = labels[::2, ::2]
    distance, (i, j) = ndimage.distance_transform_edt(half == 0, return_indices=True)
    line = _borders(half[i, j]) & (distance > 0.5) & (distance < 14)
    soft = ndimage.gaussian_filter(line * (0.4 + distance / 8).astype(np.float32), 1.4, truncate=2.5)
    return 2.2 * _upsample(np.pad(soft, ((1, 4), (1, 4))), len(labels), 2)


def _halo(mask: Array) -> Array:
    """The share of a mask (size, size) within about 10 px of each pixel, 0..1."""
    small = np.pad(ndimage.uniform_filter(mask, STEP)[::STEP, ::STEP], ((1, 4), (1, 4)), mode="edge")
    return _upsample(ndimage.gaussian_filter(small, 2.2), len(mask))


def draw_densities(rng: Rng, style: TissueStyle, layout: Layout, labels: Array, faint: Array) -> Densities:
    """All density maps of one image. ``faint``: (n,) bool, True for nuclei out of the plane of focus."""
    size = len(labels)
    around = ((labels > 0) & (labels <= np.count_nonzero(~faint))).astype(np.float32)
    halo, seam = _halo(around), _upsample(layout.seam, size)
    streaks = _upsample(_streaks(rng, layout.u, layout.v, 6 * style.width, style.width), size)
    texture = style.grain * _fbm(rng, size, 3, 3 * style.cell) + 0.12 * smooth_noise(rng, size, 100)
    texture += style.fibre * 1.4 * np.tanh(streaks / 1.5) * (0.8 + 0.5 * smooth_noise(rng, size, 90)).clip(0.1)
    depth = _upsample(layout.depth, size) + _fbm(rng, size, 4, 16)
    soft = style.soft * np.exp(0.6 * smooth_noise(rng, size, 50))
    solid = 1 / (1 + np.exp(-np.clip(depth / soft, -20, 20)))
    coarse, fine = smooth_noise(rng, size, 60), smooth_noise(rng, size, 16)
    uneven = np.exp(0.5 * coarse + 0.35 * fine - min(0.3, style.fibre) * streaks)
    haze = 0.16 * style.mottle * uneven * solid + (0.12 + 0.45 * max(style.halo, 0)) * halo
    if style.halo < 0:
        solid *= 1 + style.halo * np.clip(2 * halo, 0, 1) * (1 - around)
    if style.wall and style.spaces in ("gland", "lumen"):
        inner = np.clip((style.wall - depth) / 8, 0, 1) if style.spaces == "lumen" else 1 - seam
        texture += 0.4 * seam - 0.1 * (1 - inner)
        haze *= 0.3 + inner
    if style.membrane:
        border = style.membrane * _cell_borders(labels) * (0.4 + 0.8 * smooth_noise(rng, size, 40)).clip(0, 1.3)
        texture += border.clip(0)
        solid *= 1 - (-border).clip(0, 0.95) * (1 - around)
    blood = _red_cells(rng, style.blood, size) * (1 - around)
    wisps = 0.02 + 0.2 * style.fibre * streaks.clip(0, 3)  # strands that cross white spaces
    eosin = np.exp(texture) * (solid + wisps * (1 - solid)) * (1 - 0.5 * around) * (1 - 0.7 * blood)
    specks = rng.uniform(0, size, (rng.poisson(style.pigment * (size / 512) ** 2 * rng.gamma(0.6, 1.6)), 2))
    specks = specks.repeat(6, 0) + rng.normal(0, 6, (6 * len(specks), 2))
    chromatin = _chromatin(rng, labels, style, faint) + haze
    return Densities(ndimage.gaussian_filter(eosin, 1, truncate=3), chromatin, blood, _spots(rng, specks, size, 2.2))
