"""Areas that were not annotated move along with every augmentation, pixel for pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nucseg.data import augment
from nucseg.data.datasets import Sample
from nucseg.data.vague import fold_in, take_out


def sample(seed=0, side=64):
    """An image that encodes its vague area: red there, green elsewhere, blue in nuclei."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((side, side), np.int32)
    for number in range(1, 9):
        top, left = rng.integers(0, side - 10, 2)
        labels[top : top + 9, left : left + 9] = number
    vague = np.zeros((side, side), bool)
    vague[: side // 3] = vague[:, side // 2 : side // 2 + 7] = True
    image = np.stack([255 * vague, 255 * ~vague, 255 * (labels > 0)], axis=-1).astype(np.uint8)
    return Sample(image, labels, "t", "s", vague)


def test_there_and_back():
    one = sample()
    again = take_out(fold_in(one))
    np.testing.assert_array_equal(again.labels, one.labels)
    np.testing.assert_array_equal(again.vague, one.vague)
    assert fold_in(one).vague is None and again.labels.dtype == np.int32
    without = Sample(one.image, one.labels, "t", "s")
    assert fold_in(without) is without and not take_out(without).vague.any()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_every_augmentation_moves_the_area_with_the_image(seed):
    rng = np.random.default_rng(seed)
    one = augment.crop(fold_in(sample(seed)), 40, rng)
    one = take_out(augment.flip(augment.resize(one, 80), rng))
    red, green = one.image[..., 0] > 200, one.image[..., 1] > 200  # in between where the resize has mixed them
    assert one.vague[red].all() and not one.vague[green].any()
    assert ((one.image[..., 2] > 200) <= (one.labels > 0)).all()


@pytest.mark.parametrize("seed", range(4))
def test_turns_move_it_too(seed):
    one = sample(seed)
    one = Sample(np.where(one.image > 0, 255, one.image), one.labels, "t", "s", one.vague)
    turned = take_out(augment.flip_and_rotate(fold_in(one), np.random.default_rng(seed)))
    assert turned.vague[turned.image[..., 0] > 250].mean() > 0.99
    assert turned.vague[turned.image[..., 1] > 250].mean() < 0.01
    whole = take_out(augment.histology(fold_in(one), np.random.default_rng(seed)))
    assert whole.vague.sum() == one.vague.sum() and (whole.labels > 0).sum() == (one.labels > 0).sum()
