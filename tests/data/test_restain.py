import dataclasses

import numpy as np

from nucseg.data import synth
from nucseg.data.broad import FEWEST, generate_broad, random_look
from nucseg.data.datasets import Sample
from nucseg.data.restain import _mirrored, _stained, enlarge, recolour, restain
from nucseg.data.synth import touching


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def discs(side: int = 64) -> Sample:
    """Fluorescence: two bright discs that touch, a dim one, and one cut by the left edge."""
    rows, columns = np.mgrid[:side, :side]
    labels = np.zeros((side, side), np.int32)
    for number, (y, x) in enumerate([(20, 20), (20, 35), (48, 40), (45, 1)], 1):
        labels[((rows - y) ** 2 + (columns - x) ** 2 < 64) & (labels == 0)] = number
    shine = np.array([6, 120, 110, 40, 100])[labels]
    return Sample(np.repeat(shine[..., None], 3, -1).astype(np.uint8), labels, "fluorescence", "discs")


def test_nothing_measured_on_nuinsseg_is_read(monkeypatch):
    def refuse(*_):
        raise AssertionError("the statistics of NuInsSeg's tissues were read")

    monkeypatch.setattr(synth, "_measured", refuse)
    monkeypatch.setattr(synth, "STYLES", {})
    restain(discs(), rng(), 128)


def test_restained_nuclei_keep_their_outlines():
    """Four discs of radius 8: at the size of the image itself, labels are those of the source, up to the window."""
    look = dataclasses.replace(random_look(rng(0)), magnification=1.0)
    sample = discs()
    for seed in range(8):
        out = restain(sample, rng(seed), 64, look)
        assert out.image.shape == (64, 64, 3) and out.labels.dtype == np.int32 and out.tissue == "restained"
        area = np.bincount(out.labels.ravel())[1:]
        assert (area >= FEWEST).all()
        red = out.image[..., 0].astype(float)
        if out.labels.any():
            assert red[out.labels > 0].mean() < red[out.labels == 0].mean() - 10
    touch = [len(touching(restain(sample, rng(seed), 64, look).labels)) for seed in range(8)]
    assert max(touch) >= 2, "the two discs that touch are still two, and still touch"


def test_restaining_a_smaller_image_goes_on_as_its_mirror_image():
    bright, labels = _mirrored(discs().image[..., 0].astype(np.float32), discs().labels, 128)
    assert labels.shape == bright.shape == (128, 128)
    assert np.array_equal(bright[32:96, 32:96], discs().image[..., 0])
    inside = labels[32:96, 32:96]
    assert np.array_equal(inside > 0, discs().labels > 0)
    for number in range(1, 5):  # one label in the middle for each of the source's
        assert len(np.unique(inside[discs().labels == number])) == 1
    cut = inside[45, 0]
    assert cut > 0 and cut == labels[32 + 45, 31], "a nucleus cut by the edge is whole"
    assert len(np.unique(labels)) - 1 > 8, "copies have labels of their own"


def test_a_dim_nucleus_is_made_up_for():
    stained = _stained(discs(), rng(0))
    means = [stained[discs().labels == number].mean() for number in (1, 3)]
    assert means[1] > 0.5 * means[0] and stained[discs().labels == 0].mean() < 0.05


def test_an_image_without_nuclei_is_restained_to_tissue():
    empty = Sample(np.full((80, 80, 3), 9, np.uint8), np.zeros((80, 80), np.int32), "fluorescence", "empty")
    assert restain(empty, rng(), 96).labels.max() == 0


def test_enlarging_takes_a_window():
    sample = discs()
    whole = enlarge(sample, 1.5, 200, rng())
    assert whole.image.shape == (96, 96, 3) and set(np.unique(whole.labels)) == {0, 1, 2, 3, 4}
    part = enlarge(sample, 2.0, 64, rng())
    assert part.image.shape == (64, 64, 3) and part.labels.shape == (64, 64)


def test_recolouring_leaves_labels_and_changes_colours():
    sample = generate_broad(6, 96)
    again = recolour(sample, rng(1))
    assert np.array_equal(again.labels, sample.labels) and again.image.shape == sample.image.shape
    assert np.abs(again.image.astype(float) - sample.image).mean() > 3
    assert recolour(sample, rng(1)).image.tobytes() == again.image.tobytes()
