import json
import sys

import pandas as pd
import pytest

from experiments import common


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--root", "/data/my set"], "--root NUINSSEG"),
        (["--root=/data/x", "--limit", "3"], "--root NUINSSEG --limit 3"),
        (["--bbbc038", "x"], "--bbbc038 BBBC038"),
        (["--start", "/home/me/nucseg/results/a/b/best.safetensors"], "--start results/a/b/best.safetensors"),
        (["--runs=/home/me/results/folds/x"], "--runs results/folds/x"),
        (["--data-note", "quality 87"], "--data-note 'quality 87'"),
    ],
)
def test_the_command_is_what_was_typed_without_the_machines_folders(monkeypatch, words, expected):
    monkeypatch.setattr(sys, "argv", ["/somewhere/experiments/stain.py", *words])
    assert common.command() == f"python -m experiments.stain {expected}"


def test_a_record_holds_the_tables_the_command_and_the_stamp(results, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments/stain.py", "--limit", "2"])
    table = pd.DataFrame({"dice": [0.5, 1 / 3]})
    folder = common.record("stain", {"scores": table}, data=common.data(2, "a note"))
    assert (folder / "scores.csv").read_text() == "dice\n0.500000\n0.333333\n"
    about = json.loads((folder / "run.json").read_text())
    assert about["command"] == "python -m experiments.stain --limit 2"
    assert about["data"] == {"name": "nuinsseg", "images": 2, "note": "a note"}
    assert about.keys() >= {"device", "versions", "commit", "date"}
