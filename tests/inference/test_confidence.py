import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.measure import regionprops
from sklearn.neural_network import MLPClassifier

from nucseg.errors import InputError
from nucseg.inference.confidence import (
    FEATURES,
    TYPICAL_AREA,
    Confidence,
    features,
    fit,
    out_of_image,
    true_objects,
)

label_maps = hnp.arrays(np.int32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 4))


def column(name: str, labels: np.ndarray, maps: np.ndarray, scale: float = 1.0) -> list[float]:
    return features(labels, maps, scale)[:, FEATURES.index(name)].round(6).tolist()


def test_features_by_hand():
    labels = np.zeros((6, 8), np.int32)
    labels[1:3, 1:3], labels[1:3, 3:5] = 1, 2  # two squares of 4 px, side by side
    labels[5, 7] = 3  # one pixel in the corner
    foreground = np.full((6, 8), 0.2)
    foreground[1:3, 1:3] = [[0.6, 0.8], [0.8, 1.0]]
    maps = np.stack([foreground, foreground / 2])

    def found(name: str) -> list[float]:
        return column(name, labels, maps)

    assert found("log_area") == [round(math.log(a / TYPICAL_AREA), 6) for a in (4, 4, 1)]
    assert found("foreground_mean") == [0.8, 0.2, 0.2]
    assert found("foreground_min") == [0.6, 0.2, 0.2] and found("foreground_max") == [1.0, 0.2, 0.2]
    assert found("foreground_sd")[0] == round(math.sqrt(0.02), 6)
    assert found("distance_mean") == [0.4, 0.1, 0.1] and found("distance_max") == [0.5, 0.1, 0.1]
    assert found("touching") == [2 / 8, 2 / 8, 0] and found("cut_off") == [0, 0, 2 / 4]
    assert found("outside_foreground") == [0.2, 0.2, 0.2]
    assert found("rim_foreground")[0] == 0.8 and found("contrast")[0] == 0.6
    assert found("elongation") == [0, 0, 0]
    # a square's second moments are side^2 / 12, so its ellipse has pi / 3 times its area
    assert found("ellipse_fill") == [round(3 / math.pi, 6)] * 3


@settings(max_examples=50, deadline=None)
@given(labels=label_maps, seed=st.integers(0, 99))
def test_moments_agree_with_skimage(labels, seed):
    maps = np.random.default_rng(seed).random((2, *labels.shape))
    table = features(labels, maps)
    assert table.shape == (labels.max(), len(FEATURES)) and np.isfinite(table).all()
    for region in regionprops(labels, maps[0]):
        row = dict(zip(FEATURES, table[region.label - 1], strict=True))
        assert math.isclose(row["foreground_mean"], region.intensity_mean)
        assert math.isclose(row["foreground_min"], region.intensity_min)
        major, minor = (value + 1 / 12 for value in region.inertia_tensor_eigvals)  # pixels are squares, not points
        assert math.isclose(row["elongation"], math.log(major / minor) / 2, abs_tol=1e-6)
        ellipse = 4 * math.pi * math.sqrt(major * minor)
        assert math.isclose(row["ellipse_fill"], region.area / ellipse, rel_tol=1e-6)


def test_features_follow_the_scale():
    rows, columns = np.mgrid[:120, :120]
    large = (np.hypot(rows - 60, columns - 60) < 40).astype(np.int32)
    small = large[::2, ::2]
    a = features(large, np.stack([large * 0.9, large * 0.5]), scale=2.0)
    b = features(small, np.stack([small * 0.9, small * 0.5]), scale=1.0)
    np.testing.assert_allclose(a, b, atol=0.03)
    assert 0.9 < column("roundness", large, np.stack([large, large]))[0] < 1.1


def test_no_objects_and_maps_that_do_not_fit():
    assert features(np.zeros((5, 5), np.int32), np.zeros((2, 5, 5))).shape == (0, len(FEATURES))
    with pytest.raises(InputError, match="do not belong"):
        features(np.zeros((5, 5), np.int32), np.zeros((2, 4, 5)))


def objects(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """True with a probability that is a logistic function of two features; the others are noise."""
    rng = np.random.default_rng(seed)
    table = rng.normal(3, 2, (n, len(FEATURES)))
    probability = 1 / (1 + np.exp(-(1.5 * (table[:, 1] - 3) - (table[:, 4] - 3))))
    return table, rng.random(n) < probability


def test_a_fit_is_calibrated_and_as_good_as_scikit_learns():
    (table, true), (other, truth) = objects(3000, 0), objects(3000, 1)
    probability = fit(table, true).predict(other)
    for low in np.arange(0, 1, 0.2):
        inside = (probability >= low) & (probability < low + 0.2)
        assert abs(probability[inside].mean() - truth[inside].mean()) < 0.07
    peer = MLPClassifier((12,), activation="tanh", alpha=1.0, max_iter=500, random_state=0)
    theirs = peer.fit((table - 3) / 2, true).predict_proba((other - 3) / 2)[:, 1]

    def loss(p: np.ndarray) -> float:
        return -np.log(np.where(truth, p, 1 - p)).mean()

    assert loss(probability) < loss(theirs) + 0.02


def test_cross_fitting_never_sees_the_object_itself():
    """Labels without any signal: only objects seen in fitting could be predicted."""
    rng = np.random.default_rng(0)
    table, true = rng.normal(size=(300, len(FEATURES))), rng.random(300) < 0.5
    seen = fit(table, true, decay=0.0).predict(table)
    unseen = out_of_image(table, true, np.arange(300) // 10)
    assert ((seen > 0.5) == true).mean() > 0.75
    assert ((unseen > 0.5) == true).mean() < 0.6


def test_the_classifier_survives_json_and_a_foreign_one_is_refused():
    table, true = objects(200, 0)
    one = fit(table, true)
    stored = json.loads(json.dumps(one.to_dict()))
    np.testing.assert_allclose(Confidence.from_dict(stored).predict(table), one.predict(table), atol=1e-4)
    assert len(json.dumps(stored)) < 8000
    with pytest.raises(InputError, match="other features"):
        Confidence.from_dict(stored | {"features": ["area"]})
    with pytest.raises(InputError, match="true and false"):
        fit(table, np.ones(200, bool))
    assert one.predict(np.zeros((0, len(FEATURES)))).shape == (0,)


def test_true_objects_by_hand():
    truth = np.array([[1, 1, 1, 0, 2, 2]], np.int32)
    assert true_objects(truth, np.array([[1, 1, 0, 0, 2, 3]], np.int32)).tolist() == [
        True,
        False,
        False,
    ]  # 1/2 is no match
    assert true_objects(np.zeros((1, 6), np.int32), np.array([[1, 1, 0, 0, 2, 3]], np.int32)).tolist() == [False] * 3
    assert true_objects(truth, np.zeros((1, 6), np.int32)).shape == (0,)
