import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nucseg.data.broad import Population
from nucseg.data.synth import touching
from nucseg.data.tissue import (
    PAD,
    POINTS,
    Canvas,
    TissueStyle,
    _knots,
    _upsample,
    draw_densities,
    lay_out,
    outlines,
    scatter,
    smooth_noise,
)

ROUND = Population(350, 400, 460, 0.5, 0.97, 0.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def areas(points: np.ndarray) -> np.ndarray:
    """Areas of polygons (n, p, 2) by the shoelace formula."""
    y, x = points[..., 0], points[..., 1]
    return 0.5 * np.abs((x * np.roll(y, 1, -1) - y * np.roll(x, 1, -1)).sum(-1))


@given(st.integers(5, 90), st.floats(1, 20), st.floats(-3, 3), st.floats(-3, 3))
@settings(deadline=None, derandomize=True)
def test_splines_reproduce_a_plane(size, step, a, b):
    """Cubic B-splines are exact for linear functions: value a y + b x at every px, not only at the knots."""
    knots = _knots(size, step).astype(float)
    plane = _upsample(a * knots[:, None] + b * knots[None], size, step)
    px = np.arange(size)
    assert plane.shape == (size, size)
    np.testing.assert_allclose(plane, a * px[:, None] + b * px[None], atol=1e-3)


@given(st.integers(0, 999))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_splines_stay_within_the_range_of_the_knots(seed):
    grid = rng(seed).random((len(_knots(40, 4)),) * 2)
    fine = _upsample(grid, 40)
    assert grid.min() <= fine.min() and fine.max() <= grid.max()


@pytest.mark.parametrize("scale", [3.5, 8, 20])
def test_noise_has_mean_0_and_sd_1(scale):
    fields = [smooth_noise(rng(k), 256, scale) for k in range(20)]
    assert np.mean(fields) == pytest.approx(0, abs=0.1) and np.std(fields) == pytest.approx(1, abs=0.1)
    neighbours = np.corrcoef(fields[0][:, :-1].ravel(), fields[0][:, 1:].ravel())[0, 1]
    assert neighbours > 1 - 1 / scale


@pytest.mark.parametrize("spaces", ["cleft", "lumen", "gland", "septa"])
def test_a_layout_has_the_share_of_white_asked_for(spaces):
    style = TissueStyle(spaces=spaces, scale=50)
    shares = [(lay_out(rng(k), style, 256, 0.3).depth < 0).mean() for k in range(3)]
    assert np.mean(shares) == pytest.approx(0.3, abs=0.06)


def test_outlines_have_the_areas_and_shapes_asked_for():
    drawn = outlines(rng(), 600, ROUND, 0.5)
    assert drawn.shape == (600, POINTS, 2)
    assert np.median(areas(drawn)) == pytest.approx(400, rel=0.1)
    slim = outlines(rng(), 600, Population(350, 400, 460, 0.9, 0.97, 0.0), 0.5)
    round_, slender = (np.median(np.ptp(p[..., 0], -1) / np.ptp(p[..., 1], -1)) for p in (drawn, slim))
    assert round_ > 0.8 and slender < 0.6


def test_a_nucleus_never_covers_an_earlier_one():
    canvas = Canvas(rng(), lay_out(rng(1), TissueStyle(), 128, 0.02), 128, 60)
    for outline in outlines(rng(2), 60, ROUND, 0.5):
        before = canvas.labels.copy()
        drawn = canvas.draw(*canvas.beside(outline) if canvas.n else canvas.apart(outline))
        kept = before > 0
        assert np.array_equal(canvas.labels[kept], before[kept])
        assert drawn == (canvas.labels != before).any()
    assert canvas.n > 20 and canvas.labels.max() == canvas.n
    assert canvas.labels.shape == (128 + 2 * PAD,) * 2


def test_the_share_of_touching_nuclei_follows():
    layout = lay_out(rng(1), TissueStyle(), 320, 0.02)
    few, many = (
        scatter(rng(3), layout, Population(350, 400, 460, 0.5, 0.97, share), 60, 320, 0.5) for share in (0.0, 0.8)
    )
    assert len(touching(few)) / few.max() < 0.15 and len(touching(many)) / many.max() > 0.6


def test_chromatin_lies_in_nuclei_and_eosin_outside():
    style = TissueStyle()
    layout = lay_out(rng(1), style, 160, 0.02)
    labels = scatter(rng(3), layout, ROUND, 20, 160, 0.5)
    maps = draw_densities(rng(4), style, layout, labels, np.zeros(labels.max(), bool))
    inside = labels > 0
    assert maps.chromatin[inside].mean() > 4 * maps.chromatin[~inside].mean()
    assert maps.eosin[~inside].mean() > maps.eosin[inside].mean()
    assert all(m.shape == (160, 160) and m.min() >= -1e-6 for m in maps)
