import numpy as np
import pytest
from blobs import Blobs
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import hed2rgb, rgb2hed

from nucseg.data import augment
from nucseg.data.datasets import Sample


@pytest.mark.parametrize("change", [augment.flip_and_rotate, augment.histology])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999))
def test_image_and_labels_move_together(change, seed):
    """Nuclei are dark and their surroundings pale: after any change they must still be."""
    sample = Blobs()[seed % 12]
    out = change(sample, np.random.default_rng(seed))
    assert out.image.shape == (*out.labels.shape, 3) and out.image.dtype == np.uint8
    assert set(np.unique(out.labels)) <= set(np.unique(sample.labels))
    grey = out.image.mean(axis=2)
    inside = out.labels > 0
    outside = ~inside & (grey > 5)  # without the black corners
    if inside.sum() > 20 and outside.sum() > 20:
        assert np.median(grey[inside]) < np.median(grey[outside]) - 40


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_histology_only_moves_pixels_of_the_label_map(seed):
    sample = Blobs()[0]
    out = augment.histology(sample, np.random.default_rng(seed))
    assert sorted(np.bincount(out.labels.ravel())) == sorted(np.bincount(sample.labels.ravel()))


def test_the_same_generator_gives_the_same_image():
    sample = Blobs()[0]
    one, two, other = (augment.histology(sample, np.random.default_rng(seed)).image for seed in (3, 3, 4))
    assert (one == two).all() and (one != other).any()


def test_stain_without_strength_is_the_image_itself():
    image = Blobs()[1].image
    assert np.abs(augment.stain(image, np.random.default_rng(0), 0, 0).astype(int) - image).max() <= 1


def test_stain_agrees_with_skimage_on_doubled_haematoxylin():
    class Double:
        """Not random: factor 2 for haematoxylin, 1 for the others, no shift."""

        def uniform(self, low, high, size):
            return np.array([2.0, 1.0, 1.0]) if low > 0 else np.zeros(3)

    amounts = np.random.default_rng(0).uniform(0.005, 0.05, (16, 16, 3))  # of all three stains, in skimage's unit
    image = np.rint(255 * hed2rgb(amounts)).astype(np.uint8)
    expected = np.rint(255 * hed2rgb(rgb2hed(image) * (2, 1, 1)))
    found = augment.stain(image, Double(), 0.25, 0.02)
    assert np.abs(found - expected).max() <= 1
    assert np.abs(found - image.astype(float)).max() > 20


def test_crop_and_resize_by_hand():
    labels = np.arange(16, dtype=np.int32).reshape(4, 4)
    sample = Sample(np.repeat(labels[..., None], 3, axis=2).astype(np.uint8), labels, "t", "s")
    seen = set()
    for seed in range(40):
        out = augment.crop(sample, 2, np.random.default_rng(seed))
        assert out.labels.shape == (2, 2) and (out.image[..., 0] == out.labels).all()
        assert out.labels[1, 1] - out.labels[0, 0] == 5
        seen.add(int(out.labels[0, 0]))
    assert seen == {0, 1, 2, 4, 5, 6, 8, 9, 10}  # every place
    assert augment.crop(sample, 9, np.random.default_rng(0)).labels.shape == (4, 4)
    double = augment.resize(sample, 8)
    assert (double.labels == np.kron(labels, np.ones((2, 2), int))).all()
    assert augment.resize(sample, 4) is sample


def test_zoom_is_as_likely_to_enlarge_as_to_shrink():
    values = [augment.zoom(np.random.default_rng(seed), 1.5) for seed in range(500)]
    assert 1 / 1.5 <= min(values) < 0.7 and 1.4 < max(values) <= 1.5
    assert abs(np.mean(np.log(values))) < 0.03


def test_restaining_by_one_changes_nothing_and_by_two_doubles_the_density():
    rng = np.random.default_rng(3)
    image = rng.integers(60, 250, (32, 32, 3)).astype(np.uint8)
    assert np.abs(augment.restain(image, (1, 1, 1)).astype(int) - image).max() <= 1
    doubled = augment.restain(image, (2, 2, 2)).astype(float)
    expected = 255 * (image / 255.0) ** 2  # Beer-Lambert: twice the stain, the transmission squared
    assert np.abs(doubled - expected).max() <= 1.5
    assert augment.restain(image, (1.5, 1, 1)).mean() < image.mean()
