"""Predictions with known errors."""

import numpy as np

from nucseg.data.datasets import Sample
from nucseg.metrics import score
from nucseg.viz.chapters.fooled import disturb, pixels

LABELS = np.zeros((60, 90), np.int32)
LABELS[10:20, 10:20], LABELS[10:20, 22:32], LABELS[40:50, 60:70] = (
    1,
    2,
    4,
)  # 1 and 2 are two pixels apart; there is no 3


def test_without_errors_it_is_the_truth():
    assert (disturb(LABELS, np.random.default_rng(0), missed=0, merged=0, shift=0) == LABELS).all()


def test_all_are_missed_or_neighbours_merged():
    assert not disturb(LABELS, np.random.default_rng(0), missed=1).any()
    merged = disturb(LABELS, np.random.default_rng(0), missed=0, merged=1, shift=0)
    assert set(np.unique(merged)) == {0, 1, 4} and ((merged > 0) == (LABELS > 0)).all()


def test_nuclei_move_by_the_shift_at_most():
    moved = disturb(LABELS, np.random.default_rng(3), missed=0, merged=0, shift=2)
    for number in (1, 4):
        there, here = (np.argwhere(m == number).min(axis=0) for m in (LABELS, moved))
        assert (abs(here - there) <= 2).all() and (moved == number).sum() == 100
    assert 0.3 < score(LABELS, moved).iou < 1


def test_pixels_have_their_surroundings_and_their_answer():
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    sample = Sample(image, LABELS, "a tissue", "a stem")
    features, answers = pixels(sample, 200, np.random.default_rng(1), reach=2)
    assert features.shape == (200, 75) and set(answers) <= {0.0, 1.0}
    y, x = np.random.default_rng(1).integers(2, np.array([[58], [88]]), (2, 200))
    assert (answers == (LABELS[y, x] > 0)).all()
    standard = (image - image.mean(axis=(0, 1))) / image.std(axis=(0, 1))
    centre = features.reshape(200, 3, 5, 5)[:, :, 2, 2]
    assert np.allclose(centre, standard[y, x])
