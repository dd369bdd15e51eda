import doctest
import itertools
import os
import tracemalloc
from collections.abc import Iterator
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tifffile
from cellseg_metrics.functional import aggregated_jaccard_index, panoptic_quality
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from nucseg import metrics
from nucseg.errors import InputError
from nucseg.metrics import Scores, contingency, score, weighted_mean

RATES = [f.name for f in fields(Scores) if not f.name.startswith("nuclei")]

# Label maps as hostile as can be: tiny, ids in pieces, ties everywhere.
pairs_of_maps = hnp.array_shapes(min_dims=2, max_dims=2, max_side=6).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(np.int32, shape, elements=st.integers(0, 4)) for _ in range(2)])
)
seeds = st.integers(0, 2**32 - 1)


# ---------------------------------------------------------------------------------------------- scenes


def square(top: int, left: int, side: int = 10, size: int = 40) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def disc(size: int, y: float, x: float, radius: float) -> np.ndarray:
    yy, xx = np.ogrid[:size, :size]
    return (yy - y) ** 2 + (xx - x) ** 2 <= radius**2


def labels_of(*masks: np.ndarray) -> np.ndarray:
    labels = np.zeros(masks[0].shape, np.int32)
    for i, mask in enumerate(masks, start=1):
        labels[mask] = i
    return labels


def scene(rng: np.random.Generator, size: int = 128, nuclei: int = 18) -> np.ndarray:
    """Discs of different size that often touch and sometimes cut into each other."""
    return labels_of(*[disc(size, *rng.uniform(0, size, 2), rng.uniform(4, 13)) for _ in range(nuclei)])


def perturbed(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A prediction with typical errors: wrong outlines, missed, merged, split and spurious nuclei."""
    out = np.zeros_like(truth)
    ids = [i for i in np.unique(truth) if i]
    for i in ids:
        mask = truth == i
        kind = rng.choice(["keep", "grow", "shrink", "shift", "drop", "split", "merge"])
        if kind == "grow":
            mask = ndimage.binary_dilation(mask, iterations=int(rng.integers(1, 4)))
        elif kind == "shrink":
            mask = ndimage.binary_erosion(mask, iterations=int(rng.integers(1, 3)))
        elif kind == "shift":
            mask = ndimage.shift(mask.astype(np.uint8), rng.integers(-5, 6, 2), order=0).astype(bool)
        elif kind == "merge":
            mask = mask | (truth == rng.choice(ids))
        if kind != "drop":
            out[mask] = 2 * i
        if kind == "split" and mask.any():
            rows = np.nonzero(mask)[0]
            cut = rows.min() + (np.ptp(rows) + 1) * rng.uniform(0.2, 0.8)
            out[mask & (np.arange(len(truth))[:, None] > cut)] = 2 * i + 1
    for extra in range(int(rng.integers(0, 4))):
        spurious = disc(len(truth), *rng.uniform(0, len(truth), 2), rng.uniform(2, 6))
        out[spurious & (out == 0)] = 10**6 + extra
    return out


def random_pairs(count: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        truth = scene(rng)
        yield truth, perturbed(truth, rng)


def without(labels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A prediction that is perfect except for a share of missed nuclei."""
    ids = np.unique(labels)[1:]
    return np.where(np.isin(labels, rng.choice(ids, round(share * len(ids)), replace=False)), 0, labels)


def real_maps() -> list[np.ndarray]:
    root = os.environ.get("NUCSEG_DATA")
    if not root:
        pytest.skip("NUCSEG_DATA does not name a NuInsSeg folder")
    files = sorted(Path(root).glob("*/label masks modify/*.tif"))
    if not files:
        pytest.skip("NUCSEG_DATA has no '<tissue>/label masks modify/<stem>.tif'")
    return [tifffile.imread(f) for f in files[:: max(1, len(files) // 8)]]


# --------------------------------------------------- the definitions again, slowly, with sets of pixels


def pixel_sets(labels: np.ndarray) -> list[set[tuple[int, int]]]:
    """The nuclei as sets of pixels, in reading order of their first pixel."""
    sets: dict[int, set[tuple[int, int]]] = {}
    for place, label in np.ndenumerate(labels):
        if label:
            sets.setdefault(int(label), set()).add(place)  # type: ignore[arg-type]
    return list(sets.values())


def kumar_aji(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Algorithm 1 of the paper, line by line."""
    true, predicted = pixel_sets(truth), pixel_sets(prediction)
    c = u = 0
    used = set()
    for g in true:
        overlaps = [Fraction(len(g & s), len(g | s)) for s in predicted]
        if not overlaps or max(overlaps) == 0:
            u += len(g)
            continue
        j = overlaps.index(max(overlaps))
        c, u = c + len(g & predicted[j]), u + len(g | predicted[j])
        used.add(j)
    u += sum(len(s) for j, s in enumerate(predicted) if j not in used)
    return c / u


def best_matchings(truth: np.ndarray, prediction: np.ndarray) -> set[tuple[float, float]]:
    """(AJI+, the same without missed nuclei) of every one-to-one matching with the largest sum of IoU."""
    true, predicted = pixel_sets(truth), pixel_sets(prediction)
    choices = [[None, *(j for j, s in enumerate(predicted) if g & s)] for g in true]
    results: dict[Fraction, set[tuple[float, float]]] = {}
    for matching in itertools.product(*choices):
        used = [j for j in matching if j is not None]
        if len(used) > len(set(used)):
            continue
        matched = [(g, predicted[j]) for g, j in zip(true, matching, strict=True) if j is not None]
        c = sum(len(g & s) for g, s in matched)
        u = sum(len(g | s) for g, s in matched)
        u += sum(len(s) for j, s in enumerate(predicted) if j not in used)
        missed = sum(len(g) for g, j in zip(true, matching, strict=True) if j is None)
        total = sum((Fraction(len(g & s), len(g | s)) for g, s in matched), Fraction(0))
        results.setdefault(total, set()).add((c / (u + missed), c / u if u else 0.0))
    return results[max(results)]


# ------------------------------------------------------------------------------- values worked by hand


def check(s: Scores, **expected: float) -> None:
    for name, value in expected.items():
        assert getattr(s, name) == pytest.approx(value, abs=1e-12), name


def test_examples_in_the_docstrings():
    failed, attempted = doctest.testmod(metrics)
    assert (failed, attempted >= 14) == (0, True)


def test_two_nuclei_merged_into_one_prediction():
    a, b = square(5, 5), square(5, 15)
    s = score(labels_of(a, b), labels_of(a | b))
    # AJI takes the prediction twice: 200 / 400; AJI+ once and misses a nucleus: 100 / (200 + 100)
    check(s, dice=1, iou=1, aji=1 / 2, aji_plus=1 / 3, aji_matched_only=1 / 2, pq=0, sq=0, rq=0)
    assert (s.nuclei_true, s.nuclei_predicted) == (2, 1)


def test_one_nucleus_split_in_halves():
    a, b = square(5, 5), square(5, 15)
    s = score(labels_of(a | b), labels_of(a, b))
    # One half is taken, 100 / 200, the other is spurious; its IoU is 0.5, which is not above 0.5
    check(s, dice=1, iou=1, aji=1 / 3, aji_plus=1 / 3, aji_matched_only=1 / 3, pq=0, sq=0, rq=0)


@pytest.mark.parametrize(("shift", "found"), [(2, True), (3, True), (4, False), (10, False)])
def test_a_shifted_square(shift: int, found: bool):
    s = score(labels_of(square(5, 5)), labels_of(square(5, 5 + shift)))
    overlap = (10 - shift) / (10 + shift)  # columns in both / columns in either
    check(s, dice=(10 - shift) / 10, iou=overlap, aji=overlap, aji_plus=overlap, aji_matched_only=overlap)
    check(s, pq=overlap * found, sq=overlap * found, rq=float(found))


def test_missed_and_spurious():
    a, b, far = square(2, 2), square(2, 20), square(25, 25, side=5)
    s = score(labels_of(a, b), labels_of(a, far))
    check(s, dice=200 / 325, iou=100 / 225, aji=100 / 225, aji_plus=100 / 225, aji_matched_only=100 / 125)
    check(s, pq=1 / 2, sq=1, rq=1 / 2)


def test_two_shifted_discs():
    a, b = disc(64, 20, 20, 9), disc(64, 20, 45, 9)
    a2, b2 = np.roll(a, 3, axis=0), np.roll(b, 4, axis=1)
    both = [(a & a2).sum(), (b & b2).sum()]
    either = [(a | a2).sum(), (b | b2).sum()]
    s = score(labels_of(a, b), labels_of(a2, b2))
    check(s, aji=sum(both) / sum(either), aji_plus=sum(both) / sum(either), iou=sum(both) / sum(either), rq=1)
    check(s, sq=(both[0] / either[0] + both[1] / either[1]) / 2, dice=sum(both) / (2 * a.sum()))


def test_aji_and_aji_plus_lie_either_way_round():
    a, b = square(5, 5), square(5, 15)
    merged = score(labels_of(a, b), labels_of(a | b))
    assert merged.aji > merged.aji_plus
    # A crumb beside a big nucleus, both in one prediction: taking it for the crumb too counts its area twice.
    big, crumb = square(5, 5, side=20), square(25, 5, side=1)
    s = score(labels_of(big, crumb), labels_of(big | crumb))
    check(s, aji=401 / 802, aji_plus=400 / 402)


def test_a_prediction_cannot_stand_for_two_true_nuclei_that_overlap():
    stack = np.stack([square(5, 5, side=20), square(5, 6, side=20)])
    s = score(stack, labels_of(stack[0]))
    check(s, sq=1, rq=2 / 3, pq=2 / 3, aji=(400 + 380) / (400 + 420), aji_plus=400 / 800, dice=800 / 820)


# --------------------------------------------------------------------------------- empty and extreme


@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (0, 4)])
def test_both_empty_is_perfect(shape: tuple[int, int]):
    empty = np.zeros(shape, np.int32)
    for truth in (empty, np.zeros((0, *shape), bool), np.zeros((3, *shape), bool)):
        s = score(truth, empty, vague=np.zeros(shape, bool), border=2, min_area=50)
        check(s, **dict.fromkeys(RATES, 1.0), nuclei_true=0, nuclei_predicted=0)


def test_one_empty_is_zero():
    empty, full = np.zeros((8, 8), np.int32), np.ones((8, 8), np.int32)
    check(score(empty, full), **dict.fromkeys(RATES, 0.0), nuclei_true=0, nuclei_predicted=1)
    check(score(full, empty), **dict.fromkeys(RATES, 0.0), nuclei_true=1, nuclei_predicted=0)
    check(score(full, empty, border=3), **dict.fromkeys(RATES, 0.0))
    assert metrics.aji(contingency(full, empty), match="intersection") == 0


def test_nothing_in_common_is_zero():
    check(score(labels_of(square(0, 0)), labels_of(square(20, 20))), **dict.fromkeys(RATES, 0.0))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (16, 16)])
def test_an_image_that_is_one_nucleus(shape: tuple[int, int]):
    check(score(np.full(shape, 3), np.full(shape, 9), border=2), **dict.fromkeys(RATES, 1.0), nuclei_true=1)


@pytest.mark.parametrize(
    ("dtype", "ids"),
    [
        (np.uint8, (255, 7, 250)),
        (np.uint16, (65535, 1, 40000)),
        (np.uint32, (2**32 - 1, 2**31, 5)),
        (np.int64, (2**62, 1, 2**40)),
        (np.uint64, (2**64 - 1, 3, 2**63)),
        (">u2", (513, 2, 770)),  # as read from a big-endian TIFF
    ],
)
def test_ids_of_any_integer_type_and_size(dtype: str, ids: tuple[int, ...]):
    truth, prediction = next(random_pairs(1, seed=5))
    renamed = [np.select([m % 4 == k for k in (1, 2, 3)], [1, 2, 3], 0) for m in (truth, prediction)]
    odd = [np.array([0, *ids], dtype)[m] for m in renamed]
    assert score(*odd) == score(*renamed)
    assert score(np.asfortranarray(odd[0]), np.repeat(odd[1], 2, axis=1)[:, ::2]) == score(*renamed)


def test_more_nuclei_than_pixels_of_each():
    labels = np.arange(1, 26 * 26 + 1).reshape(26, 26)
    s = score(labels, labels[::-1])
    check(s, **dict.fromkeys(RATES, 1.0), nuclei_true=676, nuclei_predicted=676)


# ------------------------------------------------------------------------------------- wrong input

GOOD = np.ones((4, 4), np.int32)


@pytest.mark.parametrize(
    ("truth", "prediction", "keywords", "says"),
    [
        (GOOD, np.ones((4, 5), np.int32), {}, "one image"),
        (np.ones((2, 4, 5), bool), GOOD, {}, "one image"),
        (GOOD.astype(float), GOOD, {}, "truth is float64"),
        (GOOD, GOOD.astype(np.float32), {}, "prediction is float32"),
        (GOOD, GOOD > 0, {}, "prediction is bool"),
        (-GOOD, GOOD, {}, "truth has negative"),
        (GOOD, -GOOD, {}, "prediction has negative"),
        (GOOD[None], GOOD, {}, "must be bool"),
        (GOOD, GOOD[None], {}, "prediction has shape"),
        (GOOD[0], GOOD[0], {}, "truth has shape"),
        (GOOD, GOOD, {"vague": GOOD}, "vague must be bool"),
        (GOOD, GOOD, {"vague": np.ones((4, 5), bool)}, "vague must be bool"),
        (GOOD, GOOD, {"border": -1}, "negative"),
        (GOOD, GOOD, {"min_area": -1}, "negative"),
    ],
)
def test_wrong_input_is_refused(truth, prediction, keywords, says):
    with pytest.raises(InputError, match=says):
        score(truth, prediction, **keywords)


def test_an_unknown_matching_is_refused():
    with pytest.raises(InputError, match="intersection"):
        metrics.aji(contingency(GOOD, GOOD), match="dice")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------- invariants


@given(pairs_of_maps)
@settings(max_examples=150, deadline=None)
def test_what_holds_for_every_pair(pair: tuple[np.ndarray, np.ndarray]):
    s = score(*pair)
    assert all(0 <= getattr(s, name) <= 1 for name in RATES)
    assert s.pq == s.sq * s.rq
    assert max(s.aji, s.aji_plus) <= s.iou + 1e-12
    assert s.aji_matched_only >= s.aji_plus
    assert s.iou == pytest.approx(s.dice / (2 - s.dice))
    assert s.nuclei_true == len(np.setdiff1d(pair[0], 0))
    swapped = score(*pair[::-1])
    for name in ("dice", "iou", "pq", "sq", "rq"):
        assert getattr(swapped, name) == pytest.approx(getattr(s, name)), name


@given(pairs_of_maps)
@settings(max_examples=50, deadline=None)
def test_a_map_against_itself_is_perfect(pair: tuple[np.ndarray, np.ndarray]):
    check(score(pair[0], pair[0]), **dict.fromkeys(RATES, 1.0))


@given(pairs_of_maps, st.permutations([3, 7, 2**20, 2**31 - 1]), st.permutations([1, 2, 3, 4]))
@settings(max_examples=100, deadline=None)
def test_names_of_labels_change_nothing_even_where_matches_tie(pair, names, others):
    renamed = np.array([0, *names])[pair[0]], np.array([0, *others])[pair[1]]
    assert score(*renamed) == score(*pair)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_aji_plus_is_symmetric_and_disjoint_masks_are_a_label_map(seed: int):
    rng = np.random.default_rng(seed)
    truth = scene(rng, size=64, nuclei=8)
    prediction = perturbed(truth, rng)
    s = score(truth, prediction)
    assert s.aji_plus == pytest.approx(score(prediction, truth).aji_plus)
    stack = np.stack([truth == i for i in np.unique(truth) if i])
    for keywords in ({}, {"border": 2}, {"min_area": 50, "vague": disc(64, *rng.uniform(0, 64, 2), 20)}):
        assert score(stack, prediction, **keywords) == score(truth, prediction, **keywords)


# --------------------------------------------------------------------- against other implementations


def has_equal_intersections(table: metrics.Contingency) -> bool:
    """Some true nucleus shares its largest number of pixels with two predictions."""
    for row in np.unique(table.rows):
        overlap = table.overlap[table.rows == row]
        if np.count_nonzero(overlap == overlap.max()) > 1:
            return True
    return False


def test_equal_to_cellseg_metrics_on_100_random_pairs():
    compared = differing = 0
    for truth, prediction in random_pairs(150):
        table = contingency(truth, prediction)
        if compared == 100 or has_equal_intersections(table):
            continue
        compared += 1
        theirs = aggregated_jaccard_index(truth, prediction)
        assert metrics.aji(table, match="intersection") == pytest.approx(theirs, abs=1e-6)
        panoptic = panoptic_quality(truth, prediction)
        for name, key in (("pq", "pq"), ("sq", "sq"), ("rq", "dq")):
            assert getattr(metrics, name)(table) == pytest.approx(panoptic[key], abs=1e-6), name
        differing += abs(metrics.aji(table) - theirs) > 1e-6
    assert compared == 100
    assert 0 < differing < 50  # the two ways to match are not the same, and mostly agree


def test_cellseg_metrics_takes_every_one_of_several_largest_intersections():
    a, b = square(5, 5), square(5, 15)
    truth, halves = labels_of(a | b), labels_of(a, b)
    assert has_equal_intersections(contingency(truth, halves))
    assert metrics.aji(contingency(truth, halves), match="intersection") == 100 / (200 + 100)
    assert aggregated_jaccard_index(truth, halves) == pytest.approx((100 + 100) / (200 + 200))


def test_equal_to_the_papers_algorithm_on_random_scenes():
    for truth, prediction in random_pairs(25, seed=1):
        assert score(truth, prediction).aji == pytest.approx(kumar_aji(truth, prediction), abs=1e-12)


@given(pairs_of_maps)
@settings(max_examples=100, deadline=None)
def test_equal_to_brute_force_on_tiny_maps(pair: tuple[np.ndarray, np.ndarray]):
    if not (pair[0].any() or pair[1].any()):
        return
    s = score(*pair)
    assert s.aji == pytest.approx(kumar_aji(*pair), abs=1e-12)
    # With ties, any matching of the largest sum is as right as another.
    ours = (s.aji_plus, s.aji_matched_only)
    assert any(ours == pytest.approx(other, abs=1e-12) for other in best_matchings(*pair))


def test_aji_plus_equals_brute_force_on_scenes():
    rng = np.random.default_rng(2)
    for _ in range(20):
        truth = scene(rng, size=48, nuclei=6)
        prediction = perturbed(truth, rng)
        s = score(truth, prediction)
        ours = (s.aji_plus, s.aji_matched_only)
        assert any(ours == pytest.approx(other, abs=1e-12) for other in best_matchings(truth, prediction))


def dense(table: metrics.Contingency, values: np.ndarray) -> np.ndarray:
    """(n, m): the values of the pairs as a whole table, 0 where nothing is shared."""
    out = np.zeros((len(table.true_ids), len(table.predicted_ids)))
    out[table.rows, table.columns] = values
    return out


def dense_scores(table: metrics.Contingency) -> tuple[float, float, float]:
    """AJI, AJI+ and PQ from whole tables and SciPy's dense Hungarian solver."""
    overlap, iou = dense(table, table.overlap), dense(table, table.iou)
    areas = table.true_areas[:, None], table.predicted_areas[None, :]

    def jaccard(rows: np.ndarray, columns: np.ndarray) -> float:
        real = overlap[rows, columns] > 0
        rows, columns = rows[real], columns[real]
        shared = overlap[rows, columns].sum()
        union = (areas[0] + areas[1] - overlap)[rows, columns].sum()
        left = np.delete(areas[0].ravel(), rows).sum() + np.delete(areas[1].ravel(), columns).sum()
        return float(shared / (union + left))

    good = iou[iou > 0.5]
    rq = 2 * len(good) / sum(iou.shape)
    aji = jaccard(np.arange(len(iou)), iou.argmax(axis=1))
    return aji, jaccard(*linear_sum_assignment(iou, maximize=True)), rq * (good.sum() / len(good))


def test_equal_to_dense_tables_to_the_last_digit_on_200_random_pairs():
    for truth, prediction in random_pairs(200, seed=9):
        s = score(truth, prediction)
        assert (s.aji, s.aji_plus, s.pq) == dense_scores(contingency(truth, prediction))


def test_aji_plus_where_every_nucleus_hangs_on_its_neighbours():
    rng = np.random.default_rng(4)
    for _ in range(20):  # bricks that cover the image: all pairs are one knot, most of them below IoU 0.5
        truth, prediction = np.zeros((2, 60, 60), np.int32)
        for labels in (truth, prediction):
            for top in range(0, 60, 6):
                cuts = np.sort(rng.choice(np.arange(1, 60), 9, replace=False))
                labels[top : top + 6] = 10 * top + np.searchsorted(cuts, np.arange(60), side="right") + 1
        table = contingency(truth, np.roll(prediction, 3, axis=0))
        rows, columns = linear_sum_assignment(dense(table, table.iou), maximize=True)
        best = dense(table, table.iou)[rows, columns].sum()
        assert table.iou[table.assignment].sum() == pytest.approx(best, abs=1e-12)
        for line in (table.rows, table.columns):
            assert len(np.unique(line[table.assignment])) == len(table.assignment)


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.integers(0, 5)))
@settings(max_examples=150, deadline=None)
def test_the_matching_has_the_largest_sum(weights: np.ndarray):
    rows, columns = np.nonzero(weights)
    values = weights[rows, columns] / 5  # many ties, and weights of 1
    pairs = metrics._matching(rows, columns, values)
    assert len(set(rows[pairs])) == len(set(columns[pairs])) == len(pairs)
    best = weights[linear_sum_assignment(weights, maximize=True)].sum() / 5
    assert values[pairs].sum() == pytest.approx(best, abs=1e-12)


def test_memory_grows_with_the_pixels_and_not_with_the_square_of_the_nuclei():
    truth = np.arange(256 * 256, dtype=np.int32).reshape(256, 256) + 1  # a dense table would take 32 GiB
    tracemalloc.start()
    s = score(truth, np.roll(truth, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert s.nuclei_true == 65536 and s.aji == s.aji_plus == s.pq == 1
    assert peak < 400 * truth.size


# ------------------------------------------------------------------------------- errors one by one


def test_errors_by_hand():
    truth, prediction = np.zeros((2, 40, 60), np.int32)
    truth[5:15, 5:15], truth[5:15, 15:25] = 9, 2  # one prediction over both: a merger
    prediction[5:15, 5:25] = 4
    truth[5:35, 30:40] = 3  # two predictions in it: a split
    prediction[5:19, 30:40], prediction[21:35, 30:40] = 8, 7
    truth[25:35, 45:55] = 5  # missed: two specks in it do not fill half of it
    prediction[28:30, 48:50], prediction[32:34, 52:54] = 1, 2
    prediction[1:4, 45:55] = 6  # spurious
    truth[25:35, 5:15] = prediction[26:35, 5:15] = 70  # found
    assert metrics.errors(truth, prediction) == metrics.Errors(
        found=[70], missed=[9, 2, 3, 5], spurious=[6, 4, 8, 7, 1, 2], mergers={4: [9, 2]}, splits={3: [8, 7]}
    )
    assert metrics.errors(prediction, truth).mergers == {3: [8, 7]}  # a split seen from the other side


def test_half_is_not_most():
    truth, prediction = np.zeros((2, 1, 20), np.int32)
    truth[0, 0:4], truth[0, 4:8] = 1, 2
    prediction[0, 2:8] = 1  # half of the first nucleus, all of the second: IoU 2/8 and 4/6
    assert metrics.errors(truth, prediction) == metrics.Errors([2], [1], [], {}, {})
    prediction[0, 0:16] = 1  # all of both, and they fill exactly half of it
    assert metrics.errors(truth, prediction) == metrics.Errors([], [1, 2], [1], {}, {})
    prediction[0, 15] = 0
    assert metrics.errors(truth, prediction).mergers == {1: [1, 2]}


def test_errors_of_empty_maps():
    empty, full = np.zeros((4, 4), np.int32), np.full((4, 4), 6)
    assert metrics.errors(empty, empty) == metrics.Errors([], [], [], {}, {})
    assert metrics.errors(full, empty) == metrics.Errors([], [6], [], {}, {})
    assert metrics.errors(empty, full) == metrics.Errors([], [], [6], {}, {})


@given(pairs_of_maps)
@settings(max_examples=150, deadline=None)
def test_errors_agree_with_the_scores_and_with_sets_of_pixels(pair: tuple[np.ndarray, np.ndarray]):
    e, s = metrics.errors(*pair), score(*pair)
    assert sorted(e.found + e.missed) == np.setdiff1d(pair[0], 0).tolist()
    assert (len(e.found) + len(e.missed), len(e.found) + len(e.spurious)) == (s.nuclei_true, s.nuclei_predicted)
    assert s.rq == (2 * len(e.found) / total if (total := s.nuclei_true + s.nuclei_predicted) else 1)
    for faults, inner, outer, wrong in ((e.mergers, *pair, e.spurious), (e.splits, *pair[::-1], e.missed)):
        for holder in wrong:
            most = [
                i for i in np.setdiff1d(inner, 0) if 2 * ((inner == i) & (outer == holder)).sum() > (inner == i).sum()
            ]
            filled = (np.isin(inner, most) & (outer == holder)).sum()
            merged = len(most) > 1 and 2 * filled > (outer == holder).sum()
            assert sorted(faults.get(holder, [])) == (most if merged else [])
        assert set(faults) <= set(wrong)


# -------------------------------------------------------------------------------------- corrections


def test_min_area_drops_small_predictions_only():
    big, small = square(5, 5), square(25, 25, side=7)
    s = score(labels_of(big, small), labels_of(big, small), min_area=50)  # 100 px stay, 49 px go
    check(s, aji=100 / 149, rq=2 / 3, nuclei_true=2, nuclei_predicted=1)
    assert score(labels_of(small), labels_of(small), min_area=49).nuclei_predicted == 1


def test_nuclei_mostly_in_a_vague_area_are_dropped_and_the_others_cut():
    truth = labels_of(square(0, 0), square(0, 20), square(20, 0))
    prediction = labels_of(square(0, 0), square(20, 20))
    vague = np.zeros((40, 40), bool)
    vague[0:10, 0:2] = True  # 20 of 100 px: stays, cut to 80
    vague[0:10, 27:30] = True  # 30 of 100 px: true nucleus dropped
    vague[20:30, 20:23] = True  # 30 of 100 px: prediction dropped
    table = contingency(truth, prediction, vague=vague)
    assert table.true_areas.tolist() == [80, 100]
    assert table.predicted_areas.tolist() == [80]
    assert table.true_foreground == 180
    check(score(truth, prediction, vague=vague), aji=80 / 180, sq=1, rq=2 / 3, nuclei_true=2)


def test_exactly_a_quarter_in_a_vague_area_stays():
    vague = np.zeros((40, 40), bool)
    vague[0:5, 0:5] = True
    assert contingency(labels_of(square(0, 0)), labels_of(square(0, 0)), vague=vague).true_areas == [75]
    vague[5, 5] = True
    assert score(labels_of(square(0, 0)), labels_of(square(0, 0)), vague=vague).nuclei_true == 0


def test_the_border_zone_by_hand():
    truth = labels_of(square(10, 10))
    grown = ndimage.binary_dilation(truth > 0).astype(np.int32)
    assert score(truth, grown).aji < 0.75
    for k, side in ((1, 8), (2, 6), (3, 4)):
        table = contingency(truth, grown, border=k)
        assert table.true_areas.tolist() == table.predicted_areas.tolist() == [side**2]
    assert score(truth, grown, border=5).nuclei_true == 0  # no pixel is further than 5 px from the outline
    # Two nuclei side by side have an outline between them; the image's edge is none.
    table = contingency(labels_of(square(0, 0), square(0, 10)), labels_of(square(0, 0)), border=1)
    assert table.true_areas.tolist() == [9 * 9, 8 * 9]


# cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * k + 1, 2 * k + 1)).sum(axis=1)
OPENCVS_ELLIPSE = {
    1: [1, 3, 1],
    2: [1, 5, 5, 5, 1],
    3: [1, 5, 7, 7, 7, 5, 1],
    5: [1, 7, 9, 11, 11, 11, 11, 11, 9, 7, 1],
}


@pytest.mark.parametrize("k", OPENCVS_ELLIPSE)
def test_the_border_zone_is_dilation_minus_erosion_of_each_nucleus(k: int):
    truth, prediction = next(random_pairs(1, seed=3))
    columns = np.abs(np.arange(2 * k + 1) - k)
    kernel = columns <= (np.array(OPENCVS_ELLIPSE[k])[:, None] - 1) / 2
    disjoint = np.stack([truth == i for i in np.unique(truth) if i])
    overlapping = np.concatenate([disjoint, disc(128, 60, 60, 20)[None]])
    for masks, given_truth in ((disjoint, truth), (overlapping, overlapping)):
        zone = np.zeros(truth.shape, bool)
        for mask in masks:
            core = ndimage.binary_erosion(mask, kernel, border_value=1)
            zone |= ndimage.binary_dilation(mask, kernel) & ~core
        expected = score(masks & ~zone, np.where(zone, 0, prediction))
        assert score(given_truth, prediction, border=k) == expected
        assert expected.nuclei_true > 0


def test_a_border_wider_than_the_image():
    truth = np.array([[0, 0, 1, 1, 1, 1, 1, 1]])
    assert contingency(truth, truth, border=3).true_areas == [3]
    for map_ in (truth, truth.T):
        check(score(map_, map_, border=99), **dict.fromkeys(RATES, 1.0), nuclei_true=0, nuclei_predicted=0)


def test_overlapping_masks_keep_their_whole_area():
    a, b = disc(64, 30, 25, 12), disc(64, 30, 38, 12)
    table = contingency(np.stack([a, b]), labels_of(a, b))
    assert table.true_areas.tolist() == [a.sum(), b.sum()]
    assert list(zip(table.rows, table.columns, table.overlap, strict=True)) == [
        (0, 0, (a & ~b).sum()),
        (0, 1, (a & b).sum()),
        (1, 1, b.sum()),
    ]
    assert (table.true_ids.tolist(), table.predicted_ids.tolist()) == ([0, 1], [1, 2])
    assert table.true_foreground == table.shared_foreground == (a | b).sum()


def test_weighted_mean():
    assert weighted_mean([1.0, 0.0], [3, 1]) == 0.75
    assert weighted_mean([0.2, 0.4, 0.9], [1, 1, 0]) == pytest.approx(0.3)
    for values, weights in (([1.0], [0.0]), ([1.0, 2.0], [1.0]), ([1.0, 1.0], [2.0, -1.0]), ([], [])):
        with pytest.raises(InputError, match="weight"):
            weighted_mean(values, weights)


# --------------------------------------------------------------------- what a score can and cannot see


def missing_a_fifth(maps: list[np.ndarray]) -> float:
    """The mean AJI of predictions that are perfect but for 20% of the nuclei, and what must hold of each."""
    rng = np.random.default_rng(0)
    ajis = []
    for truth in maps:
        prediction = without(truth, 0.2, rng)
        s = score(truth, prediction)
        assert s.aji_matched_only == 1
        assert s.aji == s.aji_plus == s.iou == np.count_nonzero(prediction) / np.count_nonzero(truth)
        ajis.append(s.aji)
    return float(np.mean(ajis))


def test_leaving_out_a_fifth_of_the_nuclei():
    rng = np.random.default_rng(7)
    maps = [scene(rng, size=256, nuclei=int(rng.integers(20, 80))) for _ in range(20)]
    assert missing_a_fifth(maps) == pytest.approx(0.8, abs=0.02)  # and without the missed ones: 1


def test_leaving_out_a_fifth_of_the_nuclei_of_real_images():
    assert missing_a_fifth(real_maps()) == pytest.approx(0.8, abs=0.05)


def test_real_label_maps_with_perturbed_predictions():
    rng = np.random.default_rng(11)
    for truth in real_maps():
        truth = truth[:256, :256].astype(np.int32)
        prediction = perturbed(truth, rng)
        table = contingency(truth, prediction)
        s = score(truth, prediction)
        assert s.aji == pytest.approx(kumar_aji(truth, prediction), abs=1e-12)
        assert s.aji <= s.iou
        assert metrics.pq(table) == pytest.approx(panoptic_quality(truth, prediction)["pq"], abs=1e-6)
        theirs = aggregated_jaccard_index(truth, prediction)
        assert metrics.aji(table, match="intersection") == pytest.approx(theirs, abs=1e-6)
        check(score(truth, truth, border=1), **dict.fromkeys(RATES, 1.0))
