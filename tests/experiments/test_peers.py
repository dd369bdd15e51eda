"""The peers: what is exported to them and how their label maps are scored; each trains for a moment where installed."""

import importlib.util
import json
import sys

import numpy as np
import pandas as pd
import pytest
from blobs import Blobs

from experiments import common, peers
from experiments.peers_train import Budget, Clock, cellpose_rate
from nucseg.data.synth import Synthetic
from nucseg.errors import InputError

MODULES = {"unet": "segmentation_models_pytorch", "stardist": "stardist", "cellpose": "cellpose"}


def test_some_indices_are_spread_evenly():
    assert peers.some([10, 11, 12, 13, 14], 3) == [10, 12, 14]
    assert peers.some([10, 11, 12], 0) == [10, 11, 12]


def test_the_test_part_is_exported_without_its_label_maps(tmp_path):
    data = Blobs(4)
    parts = {"train": [0, 1], "val": [2], "test": [3]}
    peers.export(data, parts, tmp_path, 32, {"split": "a"})
    with np.load(tmp_path / "train.npz") as train, np.load(tmp_path / "test.npz") as test:
        side = data[0].labels.shape[0]
        window = np.s_[(side - 32) // 2 : (side + 32) // 2]
        np.testing.assert_array_equal(train["labels"][1], data[1].labels[window, window])
        np.testing.assert_array_equal(train["images"][1], data[1].image[window, window])
        assert test.files == ["images"] and test["images"].shape == (1, 32, 32, 3)
    peers.export(data, {"train": [3]}, tmp_path, 32, {"split": "a"})  # the same export is not repeated
    with np.load(tmp_path / "train.npz") as train:
        assert len(train["images"]) == 2


def test_a_perfect_peer_scores_one_and_small_objects_are_dropped():
    data = Blobs(2)
    perfect = np.stack([data[0].labels, data[1].labels])
    speck = perfect.copy()
    empty = np.argwhere(speck[0] == 0)[0]
    speck[0][tuple(empty)] = 10_000
    table = peers.scores("unet", data, [0, 1], speck)
    assert list(table.columns[:3]) == ["peer", "tissue", "stem"]
    assert table[["dice", "aji", "pq"]].to_numpy().tolist() == [[1.0] * 3] * 2


def test_a_peer_replaces_its_own_rows_only(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["experiments/peers.py", "--python", "/home/me/bin/python"])

    def rows(peer, pq):
        return pd.DataFrame({"peer": [peer], "tissue": ["t"], "stem": ["s"], "pq": [pq]})

    for peer, pq in (("cellpose", 0.1), ("unet", 0.2), ("cellpose", 0.3)):
        peers.merge(peer, rows(peer, pq), {"weights": int(10 * pq)}, data={})
    saved = pd.read_csv(tmp_path / "peers" / "scores.csv")
    assert saved[["peer", "pq"]].to_numpy().tolist() == [["unet", 0.2], ["cellpose", 0.3]]
    about = json.loads((tmp_path / "peers" / "run.json").read_text())
    assert {name: peer["weights"] for name, peer in about["peers"].items()} == {"unet": 2, "cellpose": 3}
    assert about["command"] == "python -m experiments.peers --python PYTHON"


def test_a_failed_training_is_told_in_one_sentence(tmp_path):
    with pytest.raises(InputError, match="training of unet ended early"):
        peers.train("unet", sys.executable, tmp_path, tmp_path / "out", Budget(0.01, "wall", 1))


def test_the_clock_goes_on_after_an_interruption(tmp_path):
    path = tmp_path / "clock.json"
    path.write_text('{"wall": 30.0, "cpu": 12.0}')
    wall, cpu = Clock(path, Budget(1, "wall", 1)), Clock(path, Budget(1, "cpu", 2))
    assert wall.progress == pytest.approx(0.5, abs=0.05)
    assert cpu.progress == pytest.approx(0.1, abs=0.05)
    assert Clock(path, Budget(0.5, "wall", 1)).over and not wall.over
    wall.save()
    assert json.loads(path.read_text())["wall"] >= 30


def test_cellposes_rate_has_the_shape_of_its_500_epochs():
    epochs, highest = 500, 0.005
    theirs = np.append(np.linspace(0, highest, 10), highest * np.ones(epochs - 10))[: epochs - 100]
    for _ in range(10):
        theirs = np.append(theirs, theirs[-1] / 2 * np.ones(10))
    ours = [cellpose_rate((epoch + 0.5) / epochs) for epoch in range(epochs)]
    np.testing.assert_allclose(ours[12:], theirs[12:])
    np.testing.assert_allclose(ours[:10], theirs[:10], atol=highest / 10)


@pytest.mark.parametrize("peer", MODULES)
def test_a_peer_trains_for_a_moment_and_returns_label_maps(peer, tmp_path):
    if importlib.util.find_spec(MODULES[peer]) is None:
        pytest.skip(f"{MODULES[peer]} is not installed: each peer has an environment of its own (experiments/peers.py)")
    data = Synthetic(5, size=128, tissues=["human liver"])  # Cellpose leaves out images of fewer than five nuclei
    peers.export(data, {"train": [0, 1], "val": [2, 3], "test": [4]}, tmp_path, 0, {})
    about = peers.train(peer, sys.executable, tmp_path, tmp_path / "out", Budget(0.05, "wall", 1))
    with np.load(tmp_path / "out" / "labels.npz") as saved:
        assert saved["labels"].shape == (1, *data[4].labels.shape)
    assert about["weights"] > 1e5 and about["seconds"] >= 3
