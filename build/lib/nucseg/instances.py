"""From label maps to target maps for training, and from predicted maps back to label maps.

A foreground map alone cannot separate touching nuclei (`components`). `encode` adds a second target map, the
distance map: the distance of each pixel from its nucleus's outline. It has a valley between touching nuclei, and
`decode` cuts there: it computes a watershed from every peak and merges basins without a real valley between them.
Distance as a learning target follows Naylor et al. 2019 (IEEE Trans. Med. Imaging 38:448). Judging a peak by the
ridge that separates it from a higher one is Grimaud's dynamics (1992, Proc. SPIE 1769), here as a ratio.
`experiments/representations.py` compares it with HoVer-Net's maps (Graham et al. 2019), boundaries and others.

>>> import numpy as np
>>> labels = np.zeros((24, 40), np.int32)
>>> labels[4:20, 4:20], labels[4:20, 20:36] = 1, 2  # two squares that touch
>>> maps = encode(labels)
>>> maps.shape, components(maps[0]).max(), decode(maps).max()
((2, 24, 40), np.int32(1), np.int32(2))
"""

import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

from nucseg.errors import InputError

EIGHT = np.ones((3, 3), dtype=bool)  # pixels that share only a corner are connected
CHANNELS = ("foreground", "distance")  # the target maps of `encode` and `decode`, in order
RIDGE = 0.9  # below 1 because predicted valleys are shallow; best on validation images, results/decoding
SMOOTH_PX = 2.0  # sigma; 3 is as good on validation images (results/decoding), but blurs small nuclei's valleys
DISTANCE_PX = 6.0  # where the distance map saturates; the median radius is 16 px. Best of 4, 6, 8, 12 and none
MIN_AREA = 50  # px; smaller predicted objects are dropped, as in the NuInsSeg benchmark. Of its nuclei 1 in 1000 is


def foreground(labels: np.ndarray) -> np.ndarray:
    """Encode an (H, W) label map as a (1, H, W) float32 target map, 1 inside any nucleus."""
    return (labels > 0).astype(np.float32)[None]


def components(probability: np.ndarray, threshold: float = 0.5, min_area: int = 0) -> np.ndarray:
    """Label the connected components of a foreground map, as the report does; touching nuclei become one.

    ``probability``: (H, W), 0..1. A pixel is foreground above ``threshold``. Components (8-connected) of
    fewer than ``min_area`` px are dropped. Returns an (H, W) int32 label map, numbered 1..n.
    Raises ``InputError`` for a map that is not (H, W) or a threshold outside 0..1.
    """
    if probability.ndim != 2:
        raise InputError(f"A foreground map must be (H, W), not of shape {probability.shape}.")
    if not 0 <= threshold <= 1:
        raise InputError(f"The probability threshold {threshold!r} must lie between 0 and 1.")
    labels, _ = ndimage.label(probability > threshold, structure=EIGHT)
    return renumber(labels, min_area)


def encode(labels: np.ndarray, distance_px: float = DISTANCE_PX) -> np.ndarray:
    """Encode an (H, W) label map as (2, H, W) float32 target maps, 0..1, background 0.

    - 0, *foreground*: 1 inside any nucleus. For a classification loss on its logit (Dice, focal, or their sum).
    - 1, *distance map*: the distance in px to the nucleus's outline, divided by ``distance_px`` (or by the nucleus's
      greatest distance if that is less), and at most 1. Every nucleus reaches 1, whatever its size, and values vary
      only in its outer ``distance_px`` px. For a regression loss on the sigmoid of its logit (squared or absolute
      error), or cross-entropy, whose minimum is at a soft target too; over all pixels, background included. Not for
      the focal loss, which treats targets as 0 or 1.

    The outline runs between pixels of different ids, so the outermost pixels of a nucleus have a distance of 0.5 px.
    The image's edge is not an outline, because a nucleus cut off there continues beyond it. Ids have no meaning and
    need not be consecutive. All pieces of a nucleus are foreground, scaled by the greatest distance of any piece;
    `decode` makes each piece a nucleus or drops it below ``min_area``. Nuclei 1 or 2 px across have distance 1
    throughout, so no valley separates two of them.

    ``distance_px`` applies to images at 40x; scale it with the images.
    Raises ``InputError`` if ``labels`` is not an (H, W) map of non-negative integers, or ``distance_px`` is 0.5 or
    less.
    """
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise InputError(f"A label map must be integers of shape (H, W), not {labels.dtype} of shape {labels.shape}.")
    if labels.size and labels.min() < 0:
        raise InputError("The label map has negative ids: 0 is background and nuclei are positive.")
    if not distance_px > 0.5:
        raise InputError(
            f"distance_px is {distance_px!r}: give the px over which the distance map rises, more than 0.5."
        )
    distance = np.zeros(labels.shape, np.float32)
    inside = labels > 0
    if inside.any():
        to_outline = np.minimum(_outline_distance(labels, inside)[inside], distance_px)
        distance[inside] = to_outline / _greatest(labels[inside], to_outline)
    return np.concatenate([foreground(labels), distance[None]])


def pixel_weights(labels: np.ndarray, border: float, valley: float, reach: int = 3) -> np.ndarray:
    """(H, W) label map -> (1, H, W) float32 pixel weights for the losses: 1, and more at outlines and between nuclei.

    ``border`` is added on both sides of outlines, one px wide. ``valley`` is added where two nuclei lie within
    ``reach`` px (along rows and columns) to separate touching nuclei, as in the U-Net's weight map (Ronneberger et al.
    2015). Where both apply, they add up.
    """
    farthest, nearest = (f(labels, 3) for f in (ndimage.maximum_filter, ndimage.minimum_filter))
    weights = 1 + np.float32(border) * (farthest != nearest)
    empty = np.iinfo(labels.dtype).max  # larger than any id, so that background is never the minimum
    farthest = ndimage.maximum_filter(labels, 2 * reach + 1)
    nearest = ndimage.minimum_filter(np.where(labels > 0, labels, empty), 2 * reach + 1)
    weights += np.float32(valley) * ((farthest > 0) & (farthest != nearest))
    return weights.astype(np.float32)[None]


def decode(
    maps: np.ndarray,
    threshold: float = 0.5,  # of a probability: keeps areas unbiased
    ridge: float = RIDGE,
    min_area: int = MIN_AREA,  # px
    smooth: float = SMOOTH_PX,  # px
) -> np.ndarray:
    """Decode (2, H, W) target maps, or a network's sigmoids of them, 0..1, as an (H, W) int32 label map, nuclei 1..n.

    The distance map is smoothed by a Gaussian of ``smooth`` px (sigma). Each pixel whose foreground is above
    ``threshold`` is assigned to the peak of the distance map that it drains to. Two peaks belong to one nucleus if the
    ridge between them is higher than ``ridge`` times the lower peak: a lower value splits less, a higher one more. Only
    ratios count, so the result does not depend on how certain the network is. Then objects of fewer than ``min_area``
    px are dropped; with 0 the nuclei cover the foreground exactly. Pixels are 4-connected.
    Raises ``InputError`` for another shape, values that are not finite, or an argument out of range.
    """
    if maps.ndim != 3 or len(maps) != len(CHANNELS):
        raise InputError(f"Target maps must be (2, H, W), {' and '.join(CHANNELS)}, not of shape {maps.shape}.")
    if not np.isfinite(maps).all():
        raise InputError("The target maps are not finite: the network that made them has diverged.")
    if not (0 <= threshold <= 1 and 0 <= ridge <= 1):
        raise InputError(f"threshold is {threshold!r} and ridge {ridge!r}: both must lie between 0 and 1.")
    if min_area < 0:
        raise InputError(f"min_area is {min_area!r}: it must not be negative.")
    if not 0 <= smooth <= 100:
        raise InputError(f"smooth is {smooth!r}: give the px to smooth the depth over, from 0 to 100.")
    distance = ndimage.gaussian_filter(maps[1], smooth, truncate=3) if smooth else maps[1]
    return renumber(split(distance, maps[0] > threshold, ridge), min_area)


def split(height: np.ndarray, mask: np.ndarray, ridge: float) -> np.ndarray:
    """Cut ``mask``, (H, W) bool, along the valleys of ``height``, (H, W) 0..1: an (H, W) int32 label map.

    Two peaks are separated by a valley if they meet at no more than ``ridge`` times the lower one. Ids are not
    consecutive.
    """
    # Rounded to 256 levels, a flat top is one peak instead of dozens.
    levels = np.where(mask, np.rint(np.clip(height, 0, 1) * 255), -1).astype(np.int16)
    basins = watershed(-levels, ndimage.label(_is_peak(levels) & mask)[0], mask=mask)
    return _owners(basins, levels, ridge)[basins]


def _outline_distance(labels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(H, W) distances in px from each pixel of a nucleus to its outline, 0.5 beside it; infinite without outlines."""
    rim = np.zeros(labels.shape, bool)  # pixels beside another id
    for here, there in _neighbours():
        differs = labels[here] != labels[there]
        rim[here] |= differs
        rim[there] |= differs
    if not rim.any():
        return np.full(labels.shape, np.inf)
    # The shortest path out of a nucleus crosses its own rim, so one transform serves all nuclei.
    return ndimage.distance_transform_edt(~rim & inside) + 0.5


def _greatest(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(k,) ids and values -> (k,): the greatest value with the same id."""
    _, group = np.unique(ids, return_inverse=True)  # ids may be anything up to 2**32
    greatest = np.zeros(group.max() + 1)
    np.maximum.at(greatest, group, values)
    return greatest[group]


def _neighbours() -> tuple[tuple[tuple[slice, ...], tuple[slice, ...]], ...]:
    """Index pairs that compare an image with itself, shifted by one row and by one column."""
    return (np.s_[1:, :], np.s_[:-1, :]), (np.s_[:, 1:], np.s_[:, :-1])


def _is_peak(levels: np.ndarray) -> np.ndarray:
    """(H, W) bool: no lower than any of the four neighbours.

    A shoulder (a flat part beside a rise) counts as well; `_owners` merges it with its peak.
    """
    highest = levels.copy()
    for here, there in _neighbours():
        np.maximum(highest[here], levels[there], out=highest[here])
        np.maximum(highest[there], levels[here], out=highest[there])
    return levels >= highest


def _owners(basins: np.ndarray, levels: np.ndarray, ridge: float) -> np.ndarray:
    """(n + 1,) int32: the basin into which each basin is merged, over ridges from the highest down."""
    count = int(basins.max(initial=0))
    highest = np.zeros(count + 1, levels.dtype)
    np.maximum.at(highest, basins.ravel(), levels.ravel())
    peak, owner = highest.tolist(), list(range(count + 1))

    def root(basin: int) -> int:
        while owner[basin] != basin:
            owner[basin] = owner[owner[basin]]
            basin = owner[basin]
        return basin

    for height, a, b in _ridges(basins, levels):
        a, b = sorted((root(a), root(b)), key=peak.__getitem__)
        if height > ridge * peak[a] or height == peak[a]:
            owner[a] = b
    return np.array([root(basin) for basin in range(count + 1)], np.int32)


def _ridges(basins: np.ndarray, levels: np.ndarray) -> list[list[int]]:
    """[height, a, b] of basins a < b that touch, highest first; the height is that of the highest crossing."""
    meetings = []
    for here, there in _neighbours():
        a, b = basins[here], basins[there]
        meet = (a != b) & (a > 0) & (b > 0)
        height = np.minimum(levels[here][meet], levels[there][meet])
        meetings.append(np.stack([height, np.minimum(a[meet], b[meet]), np.maximum(a[meet], b[meet])], axis=1))
    rows = np.concatenate(meetings).astype(np.int64)
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], -rows[:, 0]))]
    _, first = np.unique(rows[:, 1] * (rows[:, 2].max(initial=0) + 1) + rows[:, 2], return_index=True)
    return rows[np.sort(first)].tolist()


def renumber(labels: np.ndarray, min_area: int, first: int = 1) -> np.ndarray:
    """Drop labels of fewer than ``min_area`` px and renumber the rest in order from ``first``: (H, W) int32."""
    keep = np.bincount(labels.ravel(), minlength=1) >= max(min_area, 1)
    keep[0] = False
    return np.where(keep, np.cumsum(keep) + first - 1, 0).astype(np.int32)[labels]


def labels_from(
    maps: np.ndarray,
    threshold: float = 0.5,
    min_area: int = MIN_AREA,
    ridge: float = RIDGE,
    smooth: float = SMOOTH_PX,
) -> np.ndarray:
    """Decode a model's (C, H, W) maps, 0..1, as an (H, W) int32 label map, by `decode` or (one map) `components`."""
    if len(maps) == len(CHANNELS):
        return decode(maps, threshold, ridge, min_area, smooth)
    return components(maps[0], threshold, min_area)
