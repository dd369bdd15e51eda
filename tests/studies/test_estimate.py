"""Estimated hours of studies on a graphics card."""

import dataclasses

import pytest

from nucseg.config import Config
from nucseg.studies import estimate

SMALL = Config(base="random", size=128, crop=64, rank=4, dropout=0.0, epochs=3)


def test_operations_are_counted_by_hand(monkeypatch):
    monkeypatch.setattr(estimate, "_forward", lambda config, side: {128: 40.0, 64: 10.0}[side])
    # 3 epochs of 5 windows, three forward passes each, and of 2 validation images; then 7 test images
    assert estimate.operations(SMALL, 5, 2, 7) == 3 * (5 * 10 * 3 + 2 * 40) + 7 * 40
    assert estimate.operations(dataclasses.replace(SMALL, crop=0), 5, 2, 7) == 3 * (5 * 40 * 3 + 2 * 40) + 7 * 40


def test_hours_follow_the_rate_and_the_number_of_images(monkeypatch):
    monkeypatch.setattr(estimate, "_forward", lambda config, side: 3600.0)
    monkeypatch.setitem(estimate.RATES, "abacus", 1.0)
    task = (dataclasses.replace(SMALL, epochs=1), None)
    # of 100 images 20 test and 12 validate: 68 * 3 + 12 + 20 forward passes of an hour each
    assert estimate.hours([task], "abacus", images=100) == pytest.approx(68 * 3 + 12 + 20)
    few = (dataclasses.replace(task[0], train_images=10, val_images=5), None)
    assert estimate.hours([few, few], "abacus", images=100) == pytest.approx(2 * (10 * 3 + 5 + 20))


def test_an_image_of_twice_the_side_takes_about_four_times_as_much():
    small, large = (
        estimate.operations(SMALL, 0, 0, 1),
        estimate.operations(dataclasses.replace(SMALL, size=256), 0, 0, 1),
    )
    assert 3.6 < large / small < 4.1
    assert 1e8 < small < 1e11
