"""Scores of a predicted label map against the true one: Dice, IoU, AJI, AJI+, PQ, SQ, RQ.

One pass over the pixels counts how many of them each true nucleus T_i shares with each predicted one P_j.
That table, a `Contingency`, is all any of the scores needs:

>>> import numpy as np
>>> truth = np.array([[1, 1, 2, 2], [1, 1, 2, 2]])
>>> merged = np.array([[7, 7, 7, 7], [7, 7, 7, 7]])  # both nuclei found, but as one
>>> table = contingency(truth, merged)
>>> table.overlap
array([[4],
       [4]])
>>> dice(table), aji(table), round(aji_plus(table), 4), pq(table)
(1.0, 0.5, 0.3333, 0.0)

Conventions, for every score:

- Range 0 to 1, 1 is best. Both maps empty: 1. One of them empty: 0. No pair above IoU 0.5: SQ, RQ and PQ 0.
- Ids mean nothing: any positive integer will do, and renaming them changes no score. Of two predictions that
  match equally well, AJI takes the one met first in reading order.
- The scores are of one image. For a set, report the mean of the per-image values, or their `weighted_mean`;
  the mean of PQ is not the mean of SQ times the mean of RQ.
- For label maps AJI <= IoU and AJI+ <= IoU = Dice / (2 - Dice). AJI and AJI+ may lie either way round.

The corrections of NucEval (arXiv:2605.03144) are the keywords `vague` and `border`, true masks that overlap,
and `weighted_mean`. They raise scores without any change of the model: report them beside the plain ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from nucseg.errors import InputError

VAGUE_SHARE = 0.25  # NucEval's: an instance with more of its area than this in a vague area is dropped


@dataclass(frozen=True)
class Contingency:
    """How n true and m predicted nuclei share their pixels; `contingency` makes it.

    ``overlap``: (n, m) int64, the pixels of T_i that P_j has too. ``true_areas``: (n,), ``predicted_areas``:
    (m,), all above 0. ``true_foreground``, ``predicted_foreground``, ``shared_foreground``: pixels in any
    true nucleus, in any predicted one, in both; true nuclei may overlap, so their areas can add up to more.
    """

    overlap: np.ndarray
    true_areas: np.ndarray
    predicted_areas: np.ndarray
    true_foreground: int
    predicted_foreground: int
    shared_foreground: int

    @cached_property
    def union(self) -> np.ndarray:
        """(n, m) int64: pixels in T_i or P_j."""
        return self.true_areas[:, None] + self.predicted_areas[None, :] - self.overlap

    @cached_property
    def iou(self) -> np.ndarray:
        """(n, m) float64: the intersection over union of T_i and P_j."""
        return self.overlap / self.union

    @cached_property
    def assignment(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the one-to-one matching with the largest sum of IoU, without pairs of IoU 0."""
        return _assign(self.iou)


@dataclass(frozen=True)
class Scores:
    """All scores of one image, 0 to 1, and the numbers of nuclei they were computed from."""

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
    """All scores of one image, from one contingency table; the arguments are those of `contingency`.

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
    """Count the pixels that true and predicted nuclei share, after these corrections in this order.

    ``truth``: (H, W) label map, or (N, H, W) bool, one mask per nucleus, which may overlap (a mask without
    pixels is no nucleus). ``prediction``: (H, W) label map. ``min_area``: predicted nuclei of fewer px are
    dropped; the NuInsSeg benchmark's value is 50. ``vague``: (H, W) bool, where the annotators could not
    tell: nuclei, true and predicted, with more than 25% of their area there are dropped, and all others lose
    those pixels. ``border``: k: pixels within k px of a pixel on the other side of a true nucleus's outline
    are taken from both maps, inside and outside alike; the image's edge is no outline. A nucleus left without
    pixels is gone.

    "Within k px" is NucEval's kernel, OpenCV's ellipse (`_ellipse`): a little wider than high.

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
        predicted = _keep(predicted, (np.bincount(predicted.owner) >= min_area)[predicted.owner])
    if vague is not None:
        true, predicted = _without_vague(true, vague.ravel()), _without_vague(predicted, vague.ravel())
    if border > 0:
        certain = ~_border_zone(true, prediction.shape, border).ravel()
        true, predicted = _keep(true, certain[true.pixel]), _keep(predicted, certain[predicted.pixel])
    return _count(true, predicted, prediction.size)


def dice(table: Contingency) -> float:
    """Dice of the foregrounds T and P, 2 |T ∩ P| / (|T| + |P|) (Dice 1945)."""
    return _ratio(2 * table.shared_foreground, table.true_foreground + table.predicted_foreground, table)


def iou(table: Contingency) -> float:
    """Intersection over union of the foregrounds, |T ∩ P| / |T ∪ P| (Jaccard 1912)."""
    shared = table.shared_foreground
    return _ratio(shared, table.true_foreground + table.predicted_foreground - shared, table)


def aji(table: Contingency, match: Literal["iou", "intersection"] = "iou") -> float:
    """Aggregated Jaccard index, Algorithm 1 of Kumar et al. 2017 (IEEE Trans. Med. Imaging 36:1550).

    Σ_i |T_i ∩ P_j(i)| / (Σ_i |T_i ∪ P_j(i)| + Σ_unused |P_j|), j(i) being the prediction of the largest IoU
    with T_i. One prediction may serve several true nuclei. A true nucleus that nothing overlaps adds its area
    to the denominator, and so does a prediction that was never taken.

    ``match="intersection"`` takes the j(i) of the largest |T_i ∩ P_j| instead, as some implementations do
    (cellseg-metrics among them): a big prediction then wins over a tight one.

    >>> import numpy as np
    >>> table = contingency(np.array([[1, 1, 1, 0, 0, 0, 0]]), np.array([[3, 4, 4, 4, 4, 4, 4]]))
    >>> aji(table) == 1 / (3 + 6), aji(table, match="intersection") == 2 / (7 + 1)
    (True, True)
    """
    if match not in ("iou", "intersection"):
        raise InputError(f"match is {match!r}: give 'iou' or 'intersection'.")
    if table.overlap.size == 0:
        return float(table.overlap.shape == (0, 0))
    best = (table.iou if match == "iou" else table.overlap).argmax(axis=1)
    rows = np.flatnonzero(table.overlap[np.arange(len(best)), best])
    intersection, union, missed, spurious = _sums(table, rows, best[rows])
    return intersection / (union + missed + spurious)


def aji_plus(table: Contingency) -> float:
    """AJI+ (Graham et al. 2019, Med. Image Anal. 58:101563): AJI with a one-to-one matching.

    The matching has the largest sum of IoU (Hungarian method). What it leaves over, true or predicted, adds
    its area to the denominator. A prediction that merges two nuclei is used once here, twice in `aji`.
    """
    intersection, union, missed, spurious = _sums(table, *table.assignment)
    return _ratio(intersection, union + missed + spurious, table)


def aji_matched_only(table: Contingency) -> float:
    """AJI+ that forgives every missed nucleus; only for comparison with scores that were computed this way.

    The matching of `aji_plus`, with the area of unmatched predictions in the denominator but not that of
    unmatched true nuclei: one nucleus of a hundred, outlined well, scores 1. Never below `aji_plus`.
    """
    intersection, union, _, spurious = _sums(table, *table.assignment)
    return _ratio(intersection, union + spurious, table)


def rq(table: Contingency) -> float:
    """Recognition quality (Kirillov et al. 2019): TP / (TP + FP / 2 + FN / 2), TP the pairs of IoU > 0.5."""
    return _ratio(2 * len(_found(table)), sum(table.overlap.shape), table)


def sq(table: Contingency) -> float:
    """Segmentation quality (Kirillov et al. 2019): the mean IoU of the pairs of IoU > 0.5."""
    return _ratio(float(_found(table).sum()), len(_found(table)), table)


def pq(table: Contingency) -> float:
    """Panoptic quality, SQ * RQ (Kirillov et al. 2019, CVPR)."""
    return sq(table) * rq(table)


def weighted_mean(values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray) -> float:
    """Σ w v / Σ w, over images; with ``nuclei_true`` as weights every nucleus counts the same (NucEval).

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
    """Nuclei as (owner, pixel) pairs: a form that overlapping masks fit into as well as label maps do.

    ``owner``: (k,), each number from 0 to n - 1 occurs. ``pixel``: (k,), position in the flattened image.
    """

    owner: np.ndarray
    pixel: np.ndarray


def _objects(nuclei: np.ndarray) -> _Objects:
    """Number the nuclei by their first pixel, so that no score can depend on the ids."""
    if nuclei.ndim == 3:
        ids, pixel = np.nonzero(nuclei.reshape(len(nuclei), nuclei[0].size if len(nuclei) else 0))
    else:
        pixel = np.flatnonzero(nuclei != 0)  # four times as fast as on integers
        ids = nuclei.ravel()[pixel]
    if len(ids) == 0:
        return _Objects(np.zeros(0, np.intp), np.zeros(0, np.intp))
    if ids.max() > 4 * len(ids) + 1024:  # sorting is slow, but a table up to 2**32 does not fit
        ids = np.unique(ids, return_inverse=True)[1]
    ids = ids.astype(np.intp, copy=False)
    first = np.full(ids.max() + 1, -1)
    first[ids[::-1]] = pixel[::-1]  # of repeated ids the last assignment stays, here the first pixel
    present = np.flatnonzero(first >= 0)
    number = np.zeros(len(first), np.intp)
    number[present[np.argsort(first[present], kind="stable")]] = np.arange(len(present))
    return _Objects(number[ids], pixel)


def _keep(objects: _Objects, keep: np.ndarray) -> _Objects:
    """The pairs that ``keep``, (k,) bool, selects; nuclei left without pixels vanish, the order stays."""
    owner = objects.owner[keep]
    number = np.cumsum(np.bincount(owner) > 0) - 1
    return _Objects(number[owner], objects.pixel[keep])


def _without_vague(objects: _Objects, vague: np.ndarray) -> _Objects:
    inside = vague[objects.pixel]
    dropped = np.bincount(objects.owner, weights=inside) > VAGUE_SHARE * np.bincount(objects.owner)
    return _keep(objects, ~(inside | dropped[objects.owner]))


def _border_zone(objects: _Objects, shape: tuple[int, ...], k: int) -> np.ndarray:
    """(H, W) bool: pixels around which the ellipse of radius k holds pixels both of a nucleus and not of it."""
    zone = np.zeros(shape, bool)
    overlapping = len(np.unique(objects.pixel)) < len(objects.pixel)
    # Nuclei that share no pixel fit into one label map; otherwise each needs its own.
    groups = [objects.owner == i for i in range(objects.owner.max() + 1)] if overlapping else [slice(None)]
    for group in groups:
        labels = np.zeros(shape, np.intp)
        labels.ravel()[objects.pixel[group]] = objects.owner[group] + 1
        _mark_changes(labels, k, zone)
    return zone


def _ellipse(k: int) -> list[int]:
    """How far OpenCV's ellipse of 2 k + 1 px reaches to either side in its rows 0, 1, ... k from the centre.

    The formula of ``cv2.getStructuringElement(MORPH_ELLIPSE, ...)``, rounding halves to even as it does.

    >>> [2 * reach + 1 for reach in _ellipse(2)]
    [5, 5, 1]
    """
    return [round(k * math.sqrt((k * k - dy * dy) / (k * k))) for dy in range(k + 1)]


def _mark_changes(labels: np.ndarray, k: int, zone: np.ndarray) -> None:
    """Set ``zone`` where the label map has another value within the ellipse: one shift and comparison per offset."""
    h, w = labels.shape
    for dy, reach in enumerate(_ellipse(k)[:h]):
        reach = min(reach, w - 1)
        # Half of the ellipse is enough: what differs seen from one pixel differs seen from the other.
        for dx in range(-reach if dy else 1, reach + 1):
            here = slice(0, h - dy), slice(max(-dx, 0), w - max(dx, 0))
            there = slice(dy, h), slice(max(dx, 0), w + min(dx, 0))
            differs = labels[here] != labels[there]
            zone[here] |= differs
            zone[there] |= differs


def _count(true: _Objects, predicted: _Objects, size: int) -> Contingency:
    true_areas, predicted_areas = np.bincount(true.owner), np.bincount(predicted.owner)
    n, m = len(true_areas), len(predicted_areas)
    column = np.zeros(size, np.intp)  # 0 is background
    column[predicted.pixel] = predicted.owner + 1
    counts = np.bincount(true.owner * (m + 1) + column[true.pixel], minlength=n * (m + 1))
    foreground = np.zeros(size, bool)
    foreground[true.pixel] = True
    return Contingency(
        overlap=counts.reshape(n, m + 1)[:, 1:],
        true_areas=true_areas,
        predicted_areas=predicted_areas,
        true_foreground=int(np.count_nonzero(foreground)),
        predicted_foreground=len(predicted.pixel),
        shared_foreground=int(np.count_nonzero(foreground[predicted.pixel])),
    )


def _assign(quality: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = linear_sum_assignment(quality, maximize=True)
    real = quality[rows, columns] > 0  # the solver also pairs off what has nothing in common
    return rows[real], columns[real]


def _sums(table: Contingency, rows: np.ndarray, columns: np.ndarray) -> tuple[int, int, int, int]:
    """Pixels of a matching: its intersections, its unions, true nuclei not in it, predictions not in it."""
    missed, spurious = table.true_areas.copy(), table.predicted_areas.copy()
    missed[rows], spurious[columns] = 0, 0
    pairs = rows, columns
    return (
        int(table.overlap[pairs].sum()),
        int(table.union[pairs].sum()),
        int(missed.sum()),
        int(spurious.sum()),
    )


def _found(table: Contingency) -> np.ndarray:
    """The IoU of the pairs above 0.5, which are one-to-one by themselves unless true nuclei overlap."""
    good = table.iou > 0.5
    if (good.sum(axis=0) > 1).any():
        return table.iou[_assign(np.where(good, table.iou, 0))]
    return table.iou[good]


def _ratio(numerator: float, denominator: float, table: Contingency) -> float:
    return numerator / denominator if denominator else float(table.overlap.shape == (0, 0))


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
