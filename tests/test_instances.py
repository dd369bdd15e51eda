import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from torch.nn import functional as F

from nucseg.data.datasets import NuInsSeg
from nucseg.errors import InputError
from nucseg.instances import components, decode, encode, foreground, pixel_weights
from nucseg.metrics import score


def test_components_by_hand():
    probability = np.array(
        [
            [0.9, 0.0, 0.0, 0.0],
            [0.0, 0.9, 0.0, 0.6],
            [0.0, 0.0, 0.0, 0.6],
            [0.4, 0.0, 0.0, 0.6],
        ]
    )
    expected = [[1, 0, 0, 0], [0, 1, 0, 2], [0, 0, 0, 2], [0, 0, 0, 2]]  # a corner joins; 0.4 is background
    assert components(probability).tolist() == expected
    assert components(probability, min_area=3).max() == 1  # 3 px stay, 2 px go
    assert components(probability, threshold=0.3).max() == 3
    assert components(probability, threshold=0.95).max() == 0


def test_touching_nuclei_become_one():
    labels = np.zeros((8, 8), np.int32)
    labels[2:6, 1:4], labels[2:6, 4:7] = 1, 2
    assert components(foreground(labels)[0]).max() == 1  # the design's limit, measured later in the book


@settings(max_examples=100, deadline=None)
@given(probability=hnp.arrays(np.float32, (9, 11), elements=st.floats(0, 1, width=32)), area=st.integers(0, 12))
def test_invariants(probability, area):
    labels = components(probability, 0.5, area)
    assert labels.dtype == np.int32 and labels.shape == probability.shape
    present = np.unique(labels[labels > 0])
    assert present.tolist() == list(range(1, len(present) + 1))
    assert (probability[labels > 0] > 0.5).all()
    if len(present):
        assert np.bincount(labels.ravel())[1:].min() >= area
    if area <= 1:
        assert ((labels > 0) == (probability > 0.5)).all()
    again = components(foreground(labels)[0])
    assert (again > 0).tolist() == (labels > 0).tolist()


def test_bad_input():
    with pytest.raises(InputError, match="\\(H, W\\)"):
        components(np.zeros((1, 4, 4)))
    with pytest.raises(InputError, match="threshold"):
        components(np.zeros((4, 4)), threshold=1.5)


# ---- encode and decode ---------------------------------------------------------------------------------------


def disc(shape, row, column, radius):
    y, x = np.indices(shape)
    return np.hypot(y - row, x - column) <= radius


def two_discs(gap=0):
    """Two of radius 12 px, centres 20 + gap px apart: a neck of 13 px where they touch."""
    labels = np.zeros((48, 64), np.int32)
    labels[disc(labels.shape, 24, 20, 12)] = 1
    labels[disc(labels.shape, 24, 40 + gap, 12) & (np.indices(labels.shape)[1] > 29)] = 2
    return labels


def found(masks, labels):
    """How many of the masks a nucleus of the label map has with an IoU above 0.5."""
    return sum(any(iou_of(mask, labels == i) > 0.5 for i in np.unique(labels[mask])) for mask in masks)


def iou_of(a, b):
    return (a & b).sum() / (a | b).sum()


def thick(mask):
    """Holds a square of 5 px."""
    return ndimage.binary_erosion(mask, np.ones((5, 5))).any()


def thick_pieces(labels):
    """A mask each of the connected pieces of nuclei that are `thick`."""
    pieces = [ndimage.label(labels == number)[0] for number in np.unique(labels[labels > 0])]
    return [mask for p in pieces for i in range(1, p.max() + 1) if thick(mask := p == i)]


blob = st.tuples(st.integers(0, 59), st.integers(0, 44), st.integers(2, 9), st.integers(2, 9))


@st.composite
def blob_maps(draw):
    """Ellipses of semi-axes 2 to 9 px, later ones over earlier ones, so that some touch and some are cut up."""
    labels = np.zeros((60, 45), np.int32)
    y, x = np.indices(labels.shape)
    for number, (row, column, a, b) in enumerate(draw(st.lists(blob, max_size=12)), 1):
        labels[((y - row) / a) ** 2 + ((x - column) / b) ** 2 <= 1] = number
    return labels


def test_encode_by_hand():
    labels = np.zeros((9, 9), np.int32)
    labels[1:8, 1:8] = 5
    maps = encode(labels, distance_px=2)
    rings = [0, 0.25, 0.75, 1, 1, 1, 0.75, 0.25, 0]  # 0.5, 1.5 and 2.5 px of 2
    assert maps.dtype == np.float32 and maps.shape == (2, 9, 9)
    assert (maps[0] == (labels > 0)).all()
    np.testing.assert_allclose(maps[1, 4], rings)
    np.testing.assert_allclose(maps[1, :, 4], rings)
    np.testing.assert_allclose(encode(labels)[1, 4], [0, 1 / 7, 3 / 7, 5 / 7, 1, 5 / 7, 3 / 7, 1 / 7, 0])  # 3.5 px


def test_encode_of_touching_nuclei_has_a_valley():
    labels = np.repeat([[1, 2]], 6, axis=0).repeat(6, axis=1)  # two squares of 6 px that fill the image
    maps = encode(labels)
    assert (maps[0] == 1).all()
    np.testing.assert_allclose(maps[1, 0], np.array([5.5, 4.5, 3.5, 2.5, 1.5, 0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5]) / 5.5)


def test_the_images_edge_is_no_outline():
    assert (encode(np.ones((7, 9), np.int32)) == 1).all()
    labels = np.zeros((7, 9), np.int32)
    labels[:, :4] = 1
    np.testing.assert_allclose(encode(labels)[1, 3], np.array([3.5, 2.5, 1.5, 0.5, 0, 0, 0, 0, 0]) / 3.5)


@pytest.mark.parametrize("gap", [0, 2, 4, 8])
def test_touching_discs_are_parted(gap):
    labels = two_discs(gap)
    assert components(encode(labels)[0]).max() == 1 + (gap > 4)
    decoded = decode(encode(labels))
    assert decoded.max() == 2
    assert score(labels, decoded).aji > 0.97


@pytest.mark.parametrize("confidence", [0.6, 0.3])
def test_only_ratios_of_the_depth_count(confidence):
    maps = encode(two_discs())
    maps[1] *= confidence
    assert decode(maps).max() == 2


def test_one_nucleus_of_two_lobes_is_not_parted():
    labels = (two_discs(gap=-2) > 0).astype(np.int32)  # a waist of 15 px between lobes of 25 px
    assert decode(encode(labels)).max() == 1
    labels = (two_discs() > 0).astype(np.int32)  # a waist of 13 px
    assert decode(encode(labels), smooth=0).max() == 1
    # Its depth is saturated, so there is not even a shallow valley.
    assert decode(encode(labels), ridge=1, smooth=0).max() == 1
    assert decode(encode(labels, distance_px=12), ridge=0.95, smooth=0).max() == 2


def test_decode_by_hand():
    distance = np.array([[0.9, 0.5, 0.6, 0.8, 0.2, 1.0]])
    maps = np.stack([np.ones_like(distance), distance])

    def cut(ridge):
        return decode(maps, ridge=ridge, min_area=0, smooth=0).tolist()[0]

    assert cut(0.1) == [1, 1, 1, 1, 1, 1]  # 0.2 is above 0.1 of 0.8
    assert cut(0.3) == [1, 1, 1, 1, 2, 2] or cut(0.3) == [1, 1, 1, 1, 1, 2]  # 0.5 is above 0.3 of 0.8, 0.2 is not
    assert max(cut(0.7)) == 3  # 0.5 is 0.63 of 0.8
    assert decode(maps, threshold=1).max() == 0
    assert decode(maps, ridge=0.3, min_area=3, smooth=0).max() == 1


def test_smoothing_removes_a_valley_narrower_than_itself():
    distance = np.ones((20, 60), np.float32)
    distance[:, 20], distance[:, 40:46] = 0.6, 0.6  # 1 px wide: a scratch; 6 px wide: a valley
    maps = np.stack([np.ones_like(distance), distance])
    assert decode(maps, smooth=0).max() == 3
    # By hand: a Gaussian of sigma 2 has 0.2 of its weight on 1 px, so the scratch is 0.92 deep, and 0.87 on 6 px: 0.65.
    assert decode(maps, smooth=2).max() == 2
    assert decode(maps, smooth=2, ridge=0.6).max() == 1
    assert len(set(decode(maps, smooth=2)[:, :38].ravel())) == 1


def test_noise_makes_no_nuclei():
    maps = encode(two_discs())
    noisy = np.clip(maps + np.random.default_rng(0).normal(0, 0.05, maps.shape), 0, 1)
    assert decode(noisy).max() == 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (13, 40), (40, 13)])
def test_empty_full_and_thin(shape):
    empty, full = np.zeros(shape, np.int32), np.full(shape, 7, np.int32)
    assert (encode(empty) == 0).all() and decode(encode(empty)).max() == 0
    decoded = decode(encode(full), min_area=0)
    assert decoded.shape == shape and decoded.dtype == np.int32 and (decoded == 1).all()


def test_no_pixels_at_all():
    assert encode(np.zeros((0, 5), np.int32)).shape == (2, 0, 5)
    assert decode(np.zeros((2, 0, 5), np.float32)).shape == (0, 5)


def test_nuclei_of_a_few_pixels():
    labels = np.zeros((9, 9), np.uint16)
    labels[1, 1], labels[4, 4:6], labels[7, 0:3] = 3, 4, 9
    assert (encode(labels)[1] == (labels > 0)).all()  # each reaches 1
    decoded = decode(encode(labels), min_area=0)
    assert decoded.max() == 3 and ((decoded > 0) == (labels > 0)).all()
    assert decode(encode(labels)).max() == 0


def test_ids_mean_nothing():
    labels = two_discs()
    huge = np.where(labels == 2, 4_000_000_000, labels.astype(np.uint32))
    assert (encode(huge) == encode(labels)).all()


def test_a_nucleus_in_two_pieces_becomes_two():
    labels = np.zeros((40, 60), np.int32)
    labels[disc(labels.shape, 20, 15, 9)] = 1
    labels[disc(labels.shape, 20, 45, 9)] = 1
    labels[2:4, 30:32] = 1  # a speck of 4 px
    assert decode(encode(labels)).max() == 2
    assert decode(encode(labels), min_area=0).max() == 3


@settings(max_examples=150, deadline=None)
@given(labels=blob_maps())
def test_encode_invariants(labels):
    maps = encode(labels)
    assert maps.dtype == np.float32 and maps.shape == (2, *labels.shape)
    assert ((maps[1] > 0) == (labels > 0)).all() and maps.max() <= 1
    for number in np.unique(labels[labels > 0]):
        assert maps[1][labels == number].max() == 1
    for turn in (np.flipud, np.fliplr, np.transpose, np.rot90):
        turned = encode(turn(labels))
        np.testing.assert_allclose(turned, np.stack([turn(m) for m in maps]), atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(labels=blob_maps())
def test_round_trip(labels):
    # Of true maps, whose valleys are deep: the defaults are for a network's, and are tried on a sample below.
    decoded = decode(encode(labels), min_area=0, ridge=0.7, smooth=0)
    assert decoded.dtype == np.int32 and decoded.shape == labels.shape
    assert ((decoded > 0) == (labels > 0)).all()
    assert np.unique(np.append(decoded, 0)).tolist() == list(range(decoded.max() + 1))
    for number in range(1, decoded.max() + 1):
        assert ndimage.label(decoded == number)[1] == 1  # one piece
    masks = thick_pieces(labels)
    # A thin piece may go to a neighbour, and one with a narrow waist be cut; not most of the thick ones.
    assert found(masks, decoded) >= 0.7 * len(masks) - 1


def test_the_defaults_find_nearly_all_thick_pieces():
    rng, total, hits = np.random.default_rng(0), 0, 0
    y, x = np.indices((60, 45))
    for _ in range(100):
        labels = np.zeros(y.shape, np.int32)
        for number in range(1, rng.integers(2, 13)):
            row, column, a, b = rng.uniform([0, 0, 2, 2], [60, 45, 9, 9])
            labels[((y - row) / a) ** 2 + ((x - column) / b) ** 2 <= 1] = number
        masks = thick_pieces(labels)
        total, hits = total + len(masks), hits + found(masks, decode(encode(labels), min_area=0))
    assert total > 300 and hits > 0.95 * total  # 0.97


@settings(max_examples=100, deadline=None)
@given(labels=blob_maps())
def test_turning_and_flipping_changes_little(labels):
    maps = encode(labels)
    decoded = decode(maps, min_area=0, smooth=0)  # smoothing rounds differently in another order of the pixels
    for turn in (np.flipud, np.fliplr, np.transpose, np.rot90):
        turned = decode(np.stack([turn(m) for m in maps]), min_area=0, smooth=0)
        assert turned.max() == decoded.max()  # ridges do not depend on the order of the pixels
        masks = [turn(mask) for i in range(1, decoded.max() + 1) if thick(mask := decoded == i)]
        assert found(masks, turned) >= 0.8 * len(masks)  # which of two peaks a flat part goes to does


@settings(max_examples=100, deadline=None)
@given(
    maps=hnp.arrays(np.float32, (2, 9, 11), elements=st.floats(0, 1, width=32)),
    ridge=st.floats(0, 1),
    area=st.integers(0, 12),
)
def test_decode_takes_any_probabilities(maps, ridge, area):
    labels = decode(maps, ridge=ridge, min_area=area)
    assert labels.dtype == np.int32
    assert np.unique(np.append(labels, 0)).tolist() == list(range(labels.max() + 1))
    assert (maps[0][labels > 0] > 0.5).all()
    if area <= 1:
        assert ((labels > 0) == (maps[0] > 0.5)).all()
    elif labels.max():
        assert np.bincount(labels.ravel())[1:].min() >= area


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: encode(np.zeros((2, 4, 4), np.int32)), "\\(H, W\\)"),
        (lambda: encode(np.zeros((4, 4))), "integers"),
        (lambda: encode(np.full((4, 4), -1)), "negative"),
        (lambda: encode(np.ones((4, 4), np.int32), distance_px=0), "distance_px"),
        (lambda: decode(np.zeros((4, 4), np.float32)), "foreground and distance"),
        (lambda: decode(np.zeros((3, 4, 4), np.float32)), "foreground and distance"),
        (lambda: decode(np.full((2, 4, 4), np.nan)), "finite"),
        (lambda: decode(np.zeros((2, 4, 4)), threshold=2), "threshold"),
        (lambda: decode(np.zeros((2, 4, 4)), ridge=-1), "ridge"),
        (lambda: decode(np.zeros((2, 4, 4)), min_area=-1), "min_area"),
        (lambda: decode(np.zeros((2, 4, 4)), smooth=-1), "smooth"),
        (lambda: decode(np.zeros((2, 4, 4)), smooth=np.inf), "smooth"),
    ],
)
def test_bad_maps(call, words):
    with pytest.raises(InputError, match=words):
        call()


def at_stride(maps, stride):
    """As a head's output: averaged down to its grid, and brought back bilinearly."""
    grid = F.avg_pool2d(torch.from_numpy(maps)[None], stride)
    return F.interpolate(grid, scale_factor=stride, mode="bilinear", align_corners=False)[0].numpy()


@pytest.mark.parametrize("stride", [2, 4])
def test_a_coarser_grid_keeps_the_valley(stride):
    assert decode(at_stride(encode(two_discs()), stride)).max() == 2


REAL = os.environ.get("NUCSEG_DATA")


@pytest.mark.skipif(not REAL, reason="set NUCSEG_DATA to a NuInsSeg folder to run it")
def test_real_label_maps_at_stride_2():
    dataset = NuInsSeg(REAL)
    truths = [dataset[i].labels for i in range(0, len(dataset), 20)]
    scores = [score(truth, decode(at_stride(encode(truth), 2))) for truth in truths]
    assert np.mean([s.aji for s in scores]) > 0.95
    assert np.mean([s.pq for s in scores]) > 0.95


def test_pixel_weights_by_hand():
    labels = np.array([[0, 0, 5, 5, 5, 0, 0, 0, 0, 7, 7, 0]], np.int32)
    # beside an outline: 1 | 2 and 4 | 5 of nucleus 5, 8 | 9 and 10 | 11 of nucleus 7
    assert pixel_weights(labels, 1.0, 0.0)[0, 0].tolist() == [1, 2, 2, 1, 2, 2, 1, 1, 2, 2, 2, 2]
    # within 3 px of both nuclei: up to 4 + 3, and from 9 - 3 on
    assert pixel_weights(labels, 0.0, 2.0)[0, 0].tolist() == [1, 1, 1, 1, 1, 1, 3, 3, 1, 1, 1, 1]
    both = pixel_weights(labels, 1.0, 2.0)
    assert both.shape == (1, 1, 12) and both.dtype == np.float32
    np.testing.assert_array_equal(both, pixel_weights(labels, 1.0, 0.0) + pixel_weights(labels, 0.0, 2.0) - 1)


def test_a_single_nucleus_has_no_valley():
    labels = np.zeros((20, 20), np.int32)
    labels[4:15, 4:15] = 3
    assert (pixel_weights(labels, 0.0, 5.0) == 1).all()
    assert (pixel_weights(np.zeros_like(labels), 1.0, 5.0) == 1).all()
    labels[4:15, 9:15] = 8  # two halves that touch
    assert pixel_weights(labels, 0.0, 5.0)[0, 9, 8] == 6
