"""Benchmarks: all are listed and can be tried; and the parts of them that compute something."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import all as every
from benchmarks import side_by_side
from benchmarks.training_profile import GROUPS, group_of, operations

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_every_benchmark_is_listed():
    helpers = {"all", "side_by_side"}
    assert {path.stem for path in FOLDER.glob("[!_]*.py")} - helpers == set(every.BENCHMARKS)


@pytest.mark.parametrize("name", every.BENCHMARKS)
def test_every_benchmark_can_be_tried(name, monkeypatch, capsys):
    pytest.importorskip("cellseg_metrics")
    module = importlib.import_module(f"benchmarks.{name}")
    assert f"python -m benchmarks.{name}" in module.__doc__
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing is recorded" in said and module.__doc__.splitlines()[0].split("`")[0] in said


def test_a_trial_records_nothing_and_a_measurement_does(monkeypatch, tmp_path):
    pytest.importorskip("cellseg_metrics")
    from benchmarks import metrics_speed, scores

    monkeypatch.setattr("experiments.common.RESULTS", tmp_path)
    monkeypatch.setattr(scores, "SIZES", ((64, 2), (128, 4)))
    monkeypatch.setattr(scores, "label_map", lambda: metrics_speed.label_map(128, 2))
    monkeypatch.setattr(sys, "argv", ["benchmarks/scores.py", "--quick"])
    scores.main()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["benchmarks/scores.py", "--largest", "140"])
    scores.main()
    table = pd.read_csv(tmp_path / "scores-speed" / "sizes.csv")
    assert list(table["size_px"]) == [64, 128, 140] and list(table["nuclei"]) == [4, 16, 4]
    about = json.loads((tmp_path / "scores-speed" / "run.json").read_text())
    assert about["command"] == "python -m benchmarks.scores --largest 140"
    assert about["cellseg_metrics_512_px"]["ratio"] > 0


def test_all_runs_what_was_chosen_and_names_what_failed(monkeypatch, capsys):
    calls = []

    def call(words, cwd):
        calls.append(words[2:])
        return int(words[2] == "benchmarks.scores")

    monkeypatch.setattr(every.subprocess, "call", call)
    monkeypatch.setattr(sys, "argv", ["all", "--quick", "--only", "scores", "training_step", "encoder"])
    assert every.main() == 1
    assert calls == [["benchmarks.scores", "--quick"], ["benchmarks.encoder", "--quick"]]
    said = capsys.readouterr()
    assert "failed: scores (exit code 1)" in said.err and "training_step: skipped" in said.out
    calls.clear()
    monkeypatch.setattr(sys, "argv", ["all", "--only", "training_step", "--against", "HEAD"])
    assert every.main() == 0
    assert calls == [["benchmarks.training_step", "--against", "HEAD"]]


def test_ratios_are_medians_of_turns_without_the_first():
    seconds = side_by_side.in_turns({"slow": iter([99, 4, 6, 8]).__next__, "fast": iter([99, 1, 2, 4]).__next__}, 3)
    assert seconds == {"slow": [4, 6, 8], "fast": [1, 2, 4]}
    assert side_by_side.ratio(seconds["slow"], seconds["fast"]) == {"ratio": 3.0, "quartiles": [2.5, 3.5]}


@pytest.mark.parametrize(
    ("operation", "group"),
    [
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::native_group_norm_backward", "normalisation"),
        ("aten::linalg_vector_norm", "normalisation"),
        ("aten::baddbmm", "matrix products"),
        ("aten::_to_copy", "copies between layouts and dtypes"),
        ("aten::to", "copies between layouts and dtypes"),
        ("aten::gelu_backward", "activations"),
        ("aten::binary_cross_entropy_with_logits", "loss"),
        ("aten::mul", "additions and products"),
        ("autograd::engine::evaluate_function: _AdaptedBackward", "LoRA"),
        ("PermuteBackward0", "views and indexing"),
        ("aten::nonzero", "other"),
    ],
)
def test_operations_are_grouped_by_their_names(operation, group):
    assert group_of(operation) == group
    assert group in (*GROUPS, "other")


def test_a_profile_counts_the_calls_of_a_step():
    a = torch.rand(50, 50)
    table = operations(lambda: torch.mm(a, a).add_(1), 3, torch.device("cpu"))
    calls = table.set_index("operation")["calls"]
    assert calls["aten::mm"] == calls["aten::add_"] == 1
    assert (table["seconds"] >= 0).all() and table["seconds"].is_monotonic_decreasing


def test_the_mosaic_is_written_tile_by_tile(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    from benchmarks.large_image import mosaic, write_mosaic

    patches = [np.full((512, 512, 3), value, np.uint8) for value in range(31)]
    assert [int(tile[0, 0, 0]) for tile in mosaic(1000, patches)] == [0, 3, 7, 10]
    write_mosaic(tmp_path / "a.tif", 600)
    assert tifffile.imread(tmp_path / "a.tif").shape == (600, 600, 3)
