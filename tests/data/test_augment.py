import numpy as np
import pytest
from blobs import Blobs
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
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


def test_warp_moves_image_and_labels_together_at_the_scale_asked_for(monkeypatch):
    """Disks of known area on a pale field: dark stays inside the labels, and areas follow scale squared."""
    rows, columns = np.mgrid[:200, :200]
    labels = np.zeros((200, 200), np.int32)
    for k, (y, x) in enumerate([(50, 50), (50, 150), (150, 50), (150, 150), (100, 100)], 1):
        labels[np.hypot(rows - y, columns - x) < 20] = k
    image = np.where(labels[..., None] > 0, 60, 220).repeat(3, 2).astype(np.uint8)
    monkeypatch.setattr(augment, "ZOOM", (1.0, 1.0))
    for seed, scale in enumerate((0.4, 0.8, 1.0, 1.7) * 3):
        out = augment.warp(Sample(image, labels, "", ""), 64, scale, np.random.default_rng(seed))
        assert out.image.shape == (64, 64, 3) and out.labels.shape == (64, 64) and out.labels.dtype == np.int32
        inside, outside = (
            ndimage.binary_erosion(out.labels > 0, iterations=3),
            ~ndimage.binary_dilation(out.labels > 0, iterations=3),
        )
        assert not inside.any() or out.image[inside].max() < 80
        assert not outside.any() or out.image[outside].min() > 200
    monkeypatch.setattr(augment, "ELASTIC_PX", 0.0)
    monkeypatch.setattr(augment, "SHEAR", 0.0)
    whole = augment.warp(Sample(image, labels, "", ""), 160, 0.8, np.random.default_rng(0))  # all of it, turned
    areas = np.bincount(whole.labels.ravel(), minlength=6)[5]
    assert abs(areas - np.pi * 20**2 * 0.8**2) < 0.05 * areas


def test_beyond_the_image_lies_its_reflection():
    labels = np.arange(1, 65, dtype=np.int32).reshape(8, 8)
    out = augment.warp(Sample(np.full((8, 8, 3), 7, np.uint8), labels, "", ""), 64, 1.0, np.random.default_rng(0))
    assert out.labels.min() > 0 and (out.image == 7).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_strong_keeps_nuclei_dark_and_flat_windows_empty(seed):
    sample = Blobs()[seed % 12]
    for change in (augment.strong, augment.geometry):
        out = change(sample, 64, 1.0, np.random.default_rng(seed))
        assert out.image.shape == (64, 64, 3) and out.image.dtype == np.uint8
        assert set(np.unique(out.labels)) <= {0, *np.unique(sample.labels)}
        grey, inside = out.image.mean(axis=2), out.labels > 0
        if 20 < inside.sum() < 64**2 - 20:
            assert np.median(grey[inside]) < np.median(grey[~inside])
    empty = augment.flat(sample, 32, np.random.default_rng(seed))
    assert not empty.labels.any() and empty.image.std(axis=(0, 1)).max() < 10


def test_strong_is_repeatable_and_now_and_then_flat():
    sample = Blobs()[0]
    one, two, other = (augment.strong(sample, 64, 1.0, np.random.default_rng(seed)).image for seed in (3, 3, 4))
    assert (one == two).all() and (one != other).any()
    drawn = [augment.strong(sample, 16, 4.0, np.random.default_rng(seed)) for seed in range(400)]
    assert 0 < sum(out.image.std() < 6 and not out.labels.any() for out in drawn) < 400
