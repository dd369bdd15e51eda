import json

import numpy as np
import pytest
from blobs import Blobs

from nucseg.errors import InputError
from nucseg.inference.confidence import features, fit
from nucseg.inference.decoding import GRID, Decoding, keep, mean_score, tune
from nucseg.instances import decode, encode


def noisy(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps of a network that finds every nucleus, but also faint spurious ones."""
    rng = np.random.default_rng(index)
    sample = Blobs(8, 96)[index]
    maps = encode(sample.labels) * 0.9
    rows, columns = np.mgrid[:96, :96]
    for _ in range(6):
        y, x = rng.uniform(10, 86, 2)
        blob = np.clip(1.4 - np.hypot(rows - y, columns - x) / 8, 0, 1) * 0.62
        maps = np.maximum(maps, np.stack([blob, blob]) * (maps[0] == 0))
    return maps.astype(np.float32), sample.labels


def test_the_default_decodes_as_ever():
    maps, _ = noisy(0)
    labels, confidence = Decoding().decode(maps)
    np.testing.assert_array_equal(labels, decode(maps))
    assert (confidence == 1).all() and len(confidence) == labels.max()


def test_tuning_drops_what_is_not_there():
    pairs = [noisy(i) for i in range(8)]
    maps, truths = [m for m, _ in pairs[:6]], [t for _, t in pairs[:6]]
    chosen, about = tune(maps, truths)
    assert about["score_start"] <= about["score_decoding"] <= about["score_confidence"]
    assert 0 < about["true"] <= 1
    others = [m for m, _ in pairs[6:]], [t for _, t in pairs[6:]]
    before = mean_score(others[1], [Decoding().decode(m)[0] for m in others[0]])
    after = mean_score(others[1], [chosen.decode(m)[0] for m in others[0]])
    assert after > before + 0.03


def test_a_grid_of_the_defaults_changes_nothing(monkeypatch):
    for name in GRID:
        monkeypatch.setitem(GRID, name, (getattr(Decoding(), name),))
    chosen, about = tune(*zip(*[noisy(i) for i in range(3)], strict=True))
    assert about["score_start"] == about["score_decoding"]
    assert (chosen.threshold, chosen.ridge, chosen.min_area) == (0.5, Decoding().ridge, Decoding().min_area)


def test_areas_and_lengths_follow_the_scale():
    large = np.repeat(np.repeat(noisy(1)[0], 2, axis=1), 2, axis=2)
    how = Decoding(min_area=60.0)
    assert how.decode(large, scale=2.0)[0].max() == how.decode(noisy(1)[0])[0].max()


def test_only_confident_nuclei_are_kept():
    maps, _ = noisy(0)
    labels = Decoding().cut(maps)
    pale = features(labels, maps)[:, 1] < 0.7
    assert pale.any() and not pale.all()
    how = Decoding(min_confidence=0.5, classifier=fit(features(labels, maps), ~pale))
    kept, confidence = how.decode(maps)
    np.testing.assert_array_equal(kept, keep(labels, ~pale))
    assert len(confidence) == kept.max() and confidence.min() >= 0.5
    assert keep(np.array([[0, 1, 2, 3]]), np.array([False, True, True])).tolist() == [[0, 0, 1, 2]]


def test_a_decoding_survives_json():
    maps, _ = noisy(0)
    labels = Decoding().cut(maps)
    table = features(labels, maps)
    how = Decoding(0.45, 0.8, 3.0, 75.0, 0.2, fit(table, table[:, 1] > 0.7))
    again = Decoding.from_dict(json.loads(json.dumps(how.to_dict())))
    np.testing.assert_array_equal(again.decode(maps)[0], how.decode(maps)[0])
    assert Decoding.from_dict({}) == Decoding()
    with pytest.raises(InputError, match="another version"):
        Decoding.from_dict({"colour": 1})
    with pytest.raises(InputError, match="no object confidence"):
        Decoding(min_confidence=0.5).check()
    with pytest.raises(InputError, match="between 0 and 1"):
        Decoding(min_confidence=2.0).check()
