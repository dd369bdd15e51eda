"""What is tissue, black and glass, on pictures made by hand."""

import numpy as np

from nucseg.images.tissue import black, tissue_mask, whitened


def glass(height=200, width=300):
    rng = np.random.default_rng(0)
    return rng.integers(236, 245, (height, width, 1)).repeat(3, axis=2).astype(np.uint8)


def stained(height, width, seed=1):
    rng = np.random.default_rng(seed)
    return np.clip(np.array([200, 120, 180]) + rng.normal(0, 15, (height, width, 3)), 0, 255).astype(np.uint8)


def test_all_black_is_black_and_dark_nuclei_are_not():
    assert black(np.zeros((50, 60, 3), np.uint8)).all()
    image = stained(60, 60)
    assert whitened(image) is image and not black(image).any()
    image[20:40, 20:40] = (35, 20, 70)  # as dark as nuclei get
    image[50:55, 50:55] = 0  # smaller than any padding
    assert not black(image).any()
    image[:, :20] = 0
    assert (whitened(image)[:, :20] == 255).all() and (whitened(image)[:, 20:] == image[:, 20:]).all()


def test_tissue_on_glass_with_its_holes():
    image = glass()
    image[50:150, 60:200] = stained(100, 140)
    image[90:110, 100:140] = 240  # a vessel
    found = tissue_mask(image)
    expected = np.zeros(found.shape, bool)
    expected[50:150, 60:200] = True
    assert (found == expected).mean() > 0.995 and found[90:110, 100:140].all()


def test_all_glass_all_tissue_and_black():
    assert tissue_mask(glass()).mean() < 0.001
    assert tissue_mask(stained(100, 100)).all()
    padded = glass()
    padded[:, 150:] = 0
    assert tissue_mask(padded).mean() < 0.01
    pale = np.clip(glass().astype(int) - [0, 28, 12], 0, 255).astype(np.uint8)  # faint eosin
    assert tissue_mask(pale).mean() > 0.95
