"""Scores of a predicted label map against the true one: Dice, IoU, AJI, AJI+, PQ, SQ, RQ.

One pass over the pixels counts the pixels that each true nucleus T_i shares with each predicted one P_j. All scores
are computed from this table, a `Contingency`. It holds only overlapping pairs, so that time and memory grow with the
number of pixels and of these pairs:

>>> import numpy as np
>>> truth = np.array([[1, 1, 2, 2], [1, 1, 2, 2]])
>>> merged = np.array([[7, 7, 7, 7], [7, 7, 7, 7]])  # both nuclei found, but as one
>>> table = contingency(truth, merged)
>>> table.overlap  # T_1 and P_1 share 4 pixels, T_2 and P_1 share 4 pixels
array([4, 4])
>>> dice(table), aji(table), round(aji_plus(table), 4), pq(table)
(1.0, 0.5, 0.3333, 0.0)

Conventions, for every score:

- Range 0 to 1, 1 is best. Both maps empty: 1. One of them empty: 0. No pair above IoU 0.5: SQ, RQ and PQ 0.
- Ids have no meaning: any positive integers will do, and renumbering changes no score. Of two predictions that match
  equally well, AJI takes the first in reading order.
- The scores are those of one image. For a set, report the mean of the per-image values, or their `weighted_mean`;
  the mean of PQ is not the mean of SQ times the mean of RQ.
- For label maps AJI <= IoU and AJI+ <= IoU = Dice / (2 - Dice). Either of AJI and AJI+ may be the larger one.

NucEval's corrections (arXiv:2605.03144) are available as the keywords `vague` and `border`, as overlapping true masks,
and as `weighted_mean`. They raise scores without any change of the model, so report them beside the plain scores.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from nucseg.errors import InputError

VAGUE_SHARE = 0.25  # NucEval's: an instance with more of its area than this in a vague area is dropped


@dataclass(frozen=True)
class Contingency:
    """The pixels shared by n true and m predicted nuclei, as a sparse table; created by `contingency`.

    Pair k of the K pairs that share a pixel is true nucleus ``rows[k]`` and predicted nucleus ``columns[k]``, with
    ``overlap[k]`` shared pixels; the pairs are sorted by row, then by column. ``true_areas``: (n,) px,
    ``predicted_areas``: (m,) px, all above 0. ``true_ids``, ``predicted_ids``: (n,), (m,), the label of each
    nucleus (in a stack of masks: its index). ``true_foreground``, ``predicted_foreground``, ``shared_foreground``:
    number of pixels in any true nucleus, in any predicted one, and in both. As true nuclei may overlap, their areas can
    add up to more.
    """

    rows: np.ndarray
    columns: np.ndarray
    overlap: np.ndarray
    true_areas: np.ndarray
    predicted_areas: np.ndarray
    true_ids: np.ndarray
    predicted_ids: np.ndarray
    true_foreground: int
    predicted_foreground: int
    shared_foreground: int

    @cached_property
    def union(self) -> np.ndarray:
        """(K,) int64: pixels in either nucleus of each pair."""
        return self.true_areas[self.rows] + self.predicted_areas[self.columns] - self.overlap

    @cached_property
    def iou(self) -> np.ndarray:
        """(K,) float64: intersection over union of each pair, above 0."""
        return self.overlap / self.union

    @cached_property
    def assignment(self) -> np.ndarray:
        """Indices of the pairs of the one-to-one matching with the largest sum of IoU."""
        return _matching(self.rows, self.columns, self.iou)

    @property
    def empty(self) -> bool:
        """Whether there is neither a true nor a predicted nucleus."""
        return not len(self.true_areas) and not len(self.predicted_areas)


@dataclass(frozen=True)
class Scores:
    """All scores of one image, 0 to 1, and its numbers of nuclei."""

    dice: float
    iou: float
    aji: float
    aji_plus: float
    aji_matched_only: float
    pq: float
    sq: float
    rq: float
    nuclei_true: int
    nuclei_predicted: int


def score(
    truth: np.ndarray,
    prediction: np.ndarray,
    *,
    vague: np.ndarray | None = None,
    border: int = 0,
    min_area: int = 0,
) -> Scores:
    """Compute all scores of one image; the arguments are those of `contingency`.

    >>> import numpy as np
    >>> truth = np.array([[1, 1, 0, 2, 2]])
    >>> s = score(truth, np.where(truth == 1, 5, 0))  # one nucleus exactly right, the other missed
    >>> s.aji, s.aji_matched_only, s.sq, round(s.rq, 4), s.nuclei_true, s.nuclei_predicted
    (0.5, 1.0, 1.0, 0.6667, 2, 1)
    """
    table = contingency(truth, prediction, vague=vague, border=border, min_area=min_area)
    return Scores(
        dice=dice(table),
        iou=iou(table),
        aji=aji(table),
        aji_plus=aji_plus(table),
        aji_matched_only=aji_matched_only(table),
        pq=pq(table),
        sq=sq(table),
        rq=rq(table),
        nuclei_true=len(table.true_areas),
        nuclei_predicted=len(table.predicted_areas),
    )


def contingency(
    truth: np.ndarray,
    prediction: np.ndarray,
    *,
    vague: np.ndarray | None = None,
    border: int = 0,
    min_area: int = 0,
) -> Contingency:
    """Count the pixels shared by true and predicted nuclei, after the corrections below, applied in this order.

    ``truth``: (H, W) label map, or (N, H, W) bool, one mask per nucleus, which may overlap (masks without pixels are
    ignored). ``prediction``: (H, W) label map. ``min_area``: predicted nuclei of fewer px are dropped; the NuInsSeg
    benchmark's value is 50. ``vague``: (H, W) bool, True where the annotators were unsure: true and predicted nuclei
    with more than 25% of their area there are dropped, and all others lose those pixels. ``border``: pixels within this
    many px of the other side of a true nucleus's outline are removed from both maps, inside and outside alike; the
    image's edge is not an outline. Nuclei left without pixels are dropped. Raises ``InputError`` for wrong shapes or
    types, or negative values.

    Distances for ``border`` use NucEval's kernel, OpenCV's ellipse (`_ellipse`), which is slightly wider than high.

    >>> import numpy as np
    >>> truth = np.zeros((12, 12), np.int32)
    >>> truth[3:9, 3:9] = 1
    >>> shifted = np.roll(truth, 1, axis=1)
    >>> round(iou(contingency(truth, shifted)), 4), iou(contingency(truth, shifted, border=1))
    (0.7143, 1.0)
    """
    _check(truth, prediction, vague, border, min_area)
    predicted, true = _objects(prediction), _objects(truth)
    if min_area > 0:
        predicted = _select(predicted, (_areas(predicted) >= min_area)[predicted.owner])
    if vague is not None:
        true, predicted = _without_vague(true, vague.ravel()), _without_vague(predicted, vague.ravel())
    if border > 0:
        certain = ~_border_zone(true, prediction.shape, border).ravel()
        true, predicted = _clip(true, certain), _clip(predicted, certain)
    return _count(true, predicted)


def dice(table: Contingency) -> float:
    """Dice of the foregrounds T and P, 2 |T ∩ P| / (|T| + |P|) (Dice 1945)."""
    return _ratio(2 * table.shared_foreground, table.true_foreground + table.predicted_foreground, table)


def iou(table: Contingency) -> float:
    """Intersection over union of the foregrounds, |T ∩ P| / |T ∪ P| (Jaccard 1912)."""
    shared = table.shared_foreground
    return _ratio(shared, table.true_foreground + table.predicted_foreground - shared, table)


def aji(table: Contingency, match: Literal["iou", "intersection"] = "iou") -> float:
    """Aggregated Jaccard index, Algorithm 1 of Kumar et al. 2017 (IEEE Trans. Med. Imaging 36:1550).

    Σ_i |T_i ∩ P_j(i)| / (Σ_i |T_i ∪ P_j(i)| + Σ_unused |P_j|), where j(i) is the prediction with the largest IoU with
    T_i. One prediction may serve several true nuclei. The areas of true nuclei without an overlapping prediction, and
    of unused predictions, are added to the denominator.

    ``match="intersection"`` chooses j(i) by the largest |T_i ∩ P_j| instead, as some implementations do
    (cellseg-metrics among them); this prefers large predictions to tight ones. Raises ``InputError`` for another
    ``match``.

    >>> import numpy as np
    >>> table = contingency(np.array([[1, 1, 1, 0, 0, 0, 0]]), np.array([[3, 4, 4, 4, 4, 4, 4]]))
    >>> aji(table) == 1 / (3 + 6), aji(table, match="intersection") == 2 / (7 + 1)
    (True, True)
    """
    if match not in ("iou", "intersection"):
        raise InputError(f"match is {match!r}: give 'iou' or 'intersection'.")
    best = np.lexsort((-(table.iou if match == "iou" else table.overlap), table.rows))  # stable: the first of equals
    intersection, union, missed, spurious = _sums(table, best[_starts(table.rows)])
    return _ratio(intersection, union + missed + spurious, table)


def aji_plus(table: Contingency) -> float:
    """AJI+ (Graham et al. 2019, Med. Image Anal. 58:101563): AJI with a one-to-one matching.

    The matching has the largest sum of IoU (Hungarian method). The areas of unmatched nuclei, true or predicted, are
    added to the denominator. A prediction that merges two nuclei is used once here, twice in `aji`.
    """
    intersection, union, missed, spurious = _sums(table, table.assignment)
    return _ratio(intersection, union + missed + spurious, table)


def aji_matched_only(table: Contingency) -> float:
    """AJI+ without a penalty for missed nuclei; only for comparison with scores computed this way.

    It uses the matching of `aji_plus`, but adds only the areas of unmatched predictions to the denominator, not those
    of unmatched true nuclei: one well-outlined nucleus of a hundred scores 1. Never below `aji_plus`.
    """
    intersection, union, _, spurious = _sums(table, table.assignment)
    return _ratio(intersection, union + spurious, table)


def rq(table: Contingency) -> float:
    """Recognition quality (Kirillov et al. 2019): TP / (TP + FP / 2 + FN / 2), TP the pairs of IoU > 0.5."""
    return _ratio(2 * len(_found(table)), len(table.true_areas) + len(table.predicted_areas), table)


def sq(table: Contingency) -> float:
    """Segmentation quality (Kirillov et al. 2019): the mean IoU of the pairs of IoU > 0.5."""
    found = _found(table)
    return _ratio(float(table.iou[found].sum()), len(found), table)


def pq(table: Contingency) -> float:
    """Panoptic quality, SQ * RQ (Kirillov et al. 2019, CVPR)."""
    return sq(table) * rq(table)


@dataclass(frozen=True)
class Errors:
    """The nuclei behind RQ, by label and in reading order; created by `errors`.

    ``found``: true nuclei with a prediction of IoU > 0.5 (true positives). ``missed``: the other true nuclei (false
    negatives). ``spurious``: predictions without such a true nucleus (false positives). ``mergers``: those of
    ``spurious`` that merge nuclei, each with the true nuclei in it. ``splits``: those of ``missed`` that were split,
    each with the predictions in it.

    A prediction merges two or more true nuclei if each of them has more than half of its area in the prediction,
    and together they fill more than half of it. A split is the same with the roles exchanged.
    """

    found: list[int]
    missed: list[int]
    spurious: list[int]
    mergers: dict[int, list[int]]
    splits: dict[int, list[int]]


def errors(truth: np.ndarray, prediction: np.ndarray) -> Errors:
    """List the nuclei of two (H, W) label maps that were found, missed, spurious, merged and split.

    >>> import numpy as np
    >>> truth = np.array([[1, 1, 2, 2, 0, 3, 3, 3, 3]])
    >>> errors(truth, np.array([[7, 7, 7, 7, 0, 8, 8, 9, 9]]))
    Errors(found=[], missed=[1, 2, 3], spurious=[7, 8, 9], mergers={7: [1, 2]}, splits={3: [8, 9]})
    """
    table = contingency(truth, prediction)
    pairs = _found(table)
    found, used = np.zeros(len(table.true_ids), bool), np.zeros(len(table.predicted_ids), bool)
    found[table.rows[pairs]], used[table.columns[pairs]] = True, True
    mergers = _held(table.columns, table.rows, table.predicted_areas, table.true_areas, table.overlap)
    splits = _held(table.rows, table.columns, table.true_areas, table.predicted_areas, table.overlap)
    true_ids, predicted_ids = table.true_ids, table.predicted_ids
    return Errors(
        found=true_ids[found].tolist(),
        missed=true_ids[~found].tolist(),
        spurious=predicted_ids[~used].tolist(),
        mergers={int(predicted_ids[j]): true_ids[inner].tolist() for j, inner in mergers if not used[j]},
        splits={int(true_ids[i]): predicted_ids[inner].tolist() for i, inner in splits if not found[i]},
    )


def weighted_mean(values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray) -> float:
    """Weighted mean over images, Σ w v / Σ w; with ``nuclei_true`` as weights, all nuclei count equally (NucEval).

    ``values``, ``weights``: (n,) each. Raises ``InputError`` for different shapes, or weights that are negative or all
    0.

    >>> round(weighted_mean([0.5, 0.9], weights=[30, 10]), 4)
    0.6
    """
    v, w = np.asarray(values, float), np.asarray(weights, float)
    if v.ndim != 1 or v.shape != w.shape:
        raise InputError(f"values of shape {v.shape} and weights of shape {w.shape}: give one weight per value.")
    if not (w >= 0).all() or not w.sum() > 0:
        raise InputError("The weights must not be negative, and at least one must be above 0.")
    return float(v @ w / w.sum())


class _Objects(NamedTuple):
    """Nuclei as runs of pixels of the flattened image, for label maps and overlapping masks alike.

    Run k holds the pixels ``start[k]`` to ``stop[k]`` - 1 of nucleus ``owner[k]``; each number from 0 to n - 1 occurs,
    and the runs of one nucleus are in reading order. ``ids``: (n,), the label of each nucleus.
    """

    owner: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    ids: np.ndarray


def _objects(nuclei: np.ndarray) -> _Objects:
    """Number the nuclei by their first pixel, so that no score can depend on the ids."""
    if nuclei.ndim == 2:
        start, stop, value = _runs(nuclei.ravel())
    else:  # the masks are concatenated, each preceded by a background pixel
        masks = nuclei.reshape(len(nuclei), -1) if nuclei.size else np.zeros((0, 0), bool)
        start, stop, _ = _runs(np.pad(masks, ((0, 0), (1, 0))).ravel())
        value, start = np.divmod(start, masks.shape[1] + 1)
        start, stop = start - 1, stop - value * (masks.shape[1] + 1) - 1
    ids, first, owner = np.unique(value, return_index=True, return_inverse=True)
    order = np.argsort(start[first], kind="stable")
    number = np.empty(len(ids), np.intp)
    number[order] = np.arange(len(ids))
    return _Objects(number[owner], start, stop, ids[order])


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, stop and value of each run of equal values, without those of 0."""
    start = _starts(values)
    stop, value = np.append(start[1:], len(values)), values[start]
    inside = value != 0
    return start[inside], stop[inside], value[inside]


def _starts(values: np.ndarray) -> np.ndarray:
    """The start of each run of equal values."""
    change = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=change[1:])
    return np.flatnonzero(change)


def _areas(objects: _Objects) -> np.ndarray:
    """(n,) int64: pixels of each nucleus."""
    return _sum_by(objects.owner, objects.stop - objects.start, len(objects.ids))


def _sum_by(group: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """(count,) int64: the sum of integers in each group; exact, as they stay below 2**53."""
    return np.bincount(group, weights=values, minlength=count).astype(np.int64)


def _pixels(objects: _Objects) -> tuple[np.ndarray, np.ndarray]:
    """Owner and position of every pixel, run after run."""
    return np.repeat(objects.owner, objects.stop - objects.start), _ranges(objects.start, objects.stop)


def _ranges(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """The numbers from each start to its stop - 1, one range after the other."""
    length = stop - start
    return np.arange(length.sum()) + np.repeat(start - np.cumsum(length) + length, length)


def _select(objects: _Objects, keep: np.ndarray) -> _Objects:
    """The runs selected by ``keep``, (k,) bool, in the same order; nuclei left without pixels are dropped."""
    owner = objects.owner[keep]
    left = np.bincount(owner, minlength=len(objects.ids)) > 0
    return _Objects((np.cumsum(left) - 1)[owner], objects.start[keep], objects.stop[keep], objects.ids[left])


def _clip(objects: _Objects, keep: np.ndarray) -> _Objects:
    """The nuclei without the pixels outside ``keep``, (H * W,) bool."""
    owner, pixel = _pixels(objects)
    inside = keep[pixel]
    owner, pixel = owner[inside], pixel[inside]
    start = np.ones(len(owner), bool)
    start[1:] = (owner[1:] != owner[:-1]) | (pixel[1:] != pixel[:-1] + 1)
    first = np.flatnonzero(start)
    stop = np.append(pixel[first[1:] - 1], pixel[-1:]) + 1
    return _select(_Objects(owner[first], pixel[first], stop, objects.ids), np.ones(len(first), bool))


def _without_vague(objects: _Objects, vague: np.ndarray) -> _Objects:
    owner, pixel = _pixels(objects)
    dropped = np.bincount(owner, weights=vague[pixel], minlength=len(objects.ids)) > VAGUE_SHARE * _areas(objects)
    return _clip(_select(objects, ~dropped[objects.owner]), ~vague)


def _border_zone(objects: _Objects, shape: tuple[int, ...], k: int) -> np.ndarray:
    """(H, W) bool: pixels around which the ellipse of radius k holds pixels both of a nucleus and not of it."""
    zone = np.zeros(shape, bool)
    owner, pixel = _pixels(objects)
    overlapping = len(np.unique(pixel)) < len(pixel)
    # Nuclei that share no pixel fit into one label map; otherwise each needs its own.
    groups = [owner == i for i in range(len(objects.ids))] if overlapping else [slice(None)]
    for group in groups:
        labels = np.zeros(shape, np.intp)
        labels.ravel()[pixel[group]] = owner[group] + 1
        _mark_changes(labels, k, zone)
    return zone


def _ellipse(k: int) -> list[int]:
    """Half-widths of OpenCV's ellipse of 2 k + 1 px, for its rows 0, 1, ... k from the centre.

    Uses the formula of ``cv2.getStructuringElement(MORPH_ELLIPSE, ...)``, including its rounding of halves to even.

    >>> [2 * reach + 1 for reach in _ellipse(2)]
    [5, 5, 1]
    """
    return [round(k * math.sqrt((k * k - dy * dy) / (k * k))) for dy in range(k + 1)]


def _mark_changes(labels: np.ndarray, k: int, zone: np.ndarray) -> None:
    """Set ``zone`` where another value lies within the ellipse, by one shift and comparison per offset."""
    h, w = labels.shape
    for dy, reach in enumerate(_ellipse(k)[:h]):
        reach = min(reach, w - 1)
        # Half of the ellipse is enough, because differing from another pixel is symmetric.
        for dx in range(-reach if dy else 1, reach + 1):
            here = slice(0, h - dy), slice(max(-dx, 0), w - max(dx, 0))
            there = slice(dy, h), slice(max(dx, 0), w + min(dx, 0))
            differs = labels[here] != labels[there]
            zone[here] |= differs
            zone[there] |= differs


def _count(true: _Objects, predicted: _Objects) -> Contingency:
    row, column, length = _shared(true, predicted)
    m = max(len(predicted.ids), 1)
    pairs, pair = np.unique(row * m + column, return_inverse=True)
    foreground = _foreground(true)
    return Contingency(
        rows=pairs // m,
        columns=pairs % m,
        overlap=_sum_by(pair, length, len(pairs)),
        true_areas=_areas(true),
        predicted_areas=_areas(predicted),
        true_ids=true.ids,
        predicted_ids=predicted.ids,
        true_foreground=int(_areas(foreground).sum()),
        predicted_foreground=int(_areas(predicted).sum()),
        shared_foreground=int(_shared(foreground, predicted)[2].sum()),
    )


def _shared(true: _Objects, predicted: _Objects) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Owner, other owner and pixels of each two runs that overlap; predicted nuclei do not overlap each other."""
    first = np.searchsorted(predicted.stop, true.start, side="right")
    last = np.searchsorted(predicted.start, true.stop, side="left")
    run, other = np.repeat(np.arange(len(first)), last - first), _ranges(first, last)
    length = np.minimum(true.stop[run], predicted.stop[other]) - np.maximum(true.start[run], predicted.start[other])
    return true.owner[run], predicted.owner[other], length


def _foreground(objects: _Objects) -> _Objects:
    """The pixels of any nucleus, each once, as runs of one object."""
    order = np.argsort(objects.start, kind="stable")
    start, stop = objects.start[order], objects.stop[order]
    reached = np.append(0, np.maximum.accumulate(stop)[:-1]) if len(stop) else stop
    start = np.maximum(start, reached)
    new = start < stop
    return _Objects(np.zeros(np.count_nonzero(new), np.intp), start[new], stop[new], np.ones(1, np.intp))


def _matching(rows: np.ndarray, columns: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Indices, sorted, of the pairs of the one-to-one matching with the largest sum of weights (all above 0).

    A pair is in every best matching if it outweighs the best other pair of its row and the best other pair of its
    column together. Taking such pairs first leaves few for a general solver.
    """
    taken, left = [], np.arange(len(rows))
    while len(left):
        row, column, w = rows[left], columns[left], weight[left]
        sure = left[w > _rivals(row, w) + _rivals(column, w)]
        if not len(sure):
            taken.append(left[_solve(row, column, w)])
            break
        taken.append(sure)
        left = left[~(np.isin(row, rows[sure]) | np.isin(column, columns[sure]))]
    return np.sort(np.concatenate([np.zeros(0, np.intp), *taken]))


def _rivals(line: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """For each pair, the largest weight of the other pairs of its row or column, 0 where there is none."""
    order = np.lexsort((-weight, line))
    starts = _starts(line[order])
    size = np.diff(starts, append=len(line))
    sorted_weight = np.append(weight[order], 0.0)
    rival = np.repeat(sorted_weight[starts], size)
    rival[starts] = np.where(size > 1, sorted_weight[starts + 1], 0.0)
    out = np.empty(len(line))
    out[order] = rival
    return out


def _solve(rows: np.ndarray, columns: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Indices of the pairs of the matching with the largest sum of weights (0 to 1), by SciPy's sparse solver."""
    (row, i), (column, j) = (np.unique(line, return_inverse=True) for line in (rows, columns))
    n, m = len(row), len(column)
    # The solver matches every row, so each gets an extra column that stands for "none", at the cost of weight 0.
    cost = np.concatenate([2 - weight, np.full(n, 2.0)])  # at least 1, because 0 means "no pair"
    graph = coo_array((cost, (np.append(i, np.arange(n)), np.append(j, m + np.arange(n)))), shape=(n, m + n))
    match = np.full(n, -1)
    here, there = min_weight_full_bipartite_matching(graph.tocsr())
    match[here] = there
    return np.flatnonzero(match[i] == j)


def _sums(table: Contingency, pairs: np.ndarray) -> tuple[int, int, int, int]:
    """Pixel counts of a matching: intersections, unions, unmatched true nuclei, unmatched predictions."""
    missed, spurious = table.true_areas.copy(), table.predicted_areas.copy()
    missed[table.rows[pairs]], spurious[table.columns[pairs]] = 0, 0
    return (
        int(table.overlap[pairs].sum()),
        int(table.union[pairs].sum()),
        int(missed.sum()),
        int(spurious.sum()),
    )


def _found(table: Contingency) -> np.ndarray:
    """Indices of the pairs above IoU 0.5, which are one-to-one by themselves unless true nuclei overlap."""
    good = np.flatnonzero(table.iou > 0.5)
    if len(np.unique(table.columns[good])) < len(good):
        return good[_matching(table.rows[good], table.columns[good], table.iou[good])]
    return good


def _held(
    outer: np.ndarray, inner: np.ndarray, outer_areas: np.ndarray, inner_areas: np.ndarray, overlap: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Outer nuclei more than half filled by two or more inner ones, each more than half inside; with the inner ones."""
    pairs = np.flatnonzero(2 * overlap > inner_areas[inner])
    pairs = pairs[np.lexsort((inner[pairs], outer[pairs]))]
    for group in np.split(pairs, _starts(outer[pairs])[1:]):
        if len(group) > 1 and 2 * overlap[group].sum() > outer_areas[outer[group[0]]]:
            yield int(outer[group[0]]), inner[group]


def _ratio(numerator: float, denominator: float, table: Contingency) -> float:
    return numerator / denominator if denominator else float(table.empty)


def _check(truth: np.ndarray, prediction: np.ndarray, vague: np.ndarray | None, border: int, min_area: int) -> None:
    if truth.ndim == 3 and truth.dtype != bool:
        raise InputError(f"A stack of true masks must be bool, (N, H, W): got {truth.dtype} {truth.shape}.")
    if truth.ndim != 3:
        _check_labels(truth, "truth")
    _check_labels(prediction, "prediction")
    if truth.shape[-2:] != prediction.shape:
        raise InputError(f"truth is {truth.shape} and prediction {prediction.shape}: give maps of one image.")
    if vague is not None and (vague.dtype != bool or vague.shape != prediction.shape):
        raise InputError(f"vague must be bool, {prediction.shape}: got {vague.dtype} {vague.shape}.")
    if border < 0 or min_area < 0:
        raise InputError(f"border is {border} and min_area {min_area}: neither may be negative.")


def _check_labels(labels: np.ndarray, name: str) -> None:
    if labels.ndim != 2:
        raise InputError(f"{name} has shape {labels.shape}: give a label map, (H, W).")
    if labels.dtype.kind not in "iu":
        raise InputError(f"{name} is {labels.dtype}: give a label map of integers, a number for each nucleus.")
    if labels.size and labels.min() < 0:
        raise InputError(f"{name} has negative labels: 0 is background and nuclei are positive.")
