import dataclasses
from pathlib import Path

import pytest
from blobs import Blobs
from test_train import SMALL

from nucseg import study
from nucseg.cli import main
from nucseg.errors import InputError
from nucseg.train import train

FAST = dataclasses.replace(SMALL, epochs=1, rank=1, alpha=1)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_reports_grid_is_36_configurations_and_three_folds():
    path = Path(__file__).parents[1] / "studies" / "report-grid.toml"
    tasks = study.read_study(path).tasks("out")
    assert len(tasks) == 36 * 3
    assert len({folder for _, folder in tasks}) == len(tasks)
    assert {(c.rank, c.alpha, c.lr) for c, _ in tasks} == {
        (r, a, lr) for r in (2, 4, 8, 16) for a in (2.0, 4.0, 8.0) for lr in (1e-4, 3e-4, 1e-3)
    }
    assert {c.epochs for c, _ in tasks} == {30}


def test_finished_runs_are_skipped_and_failures_are_listed(tmp_path):
    tasks = [(dataclasses.replace(FAST, seed=seed), tmp_path / f"seed_{seed}") for seed in range(3)]
    calls: list[int] = []

    def run(config, folder, broken=(1,)):
        calls.append(config.seed)
        if config.seed in broken:
            raise RuntimeError("the cable is loose")
        train(config, Blobs(), folder, progress=False)

    table, failures = study.run_all(tasks, run, progress=False)
    assert calls == [0, 1, 2]
    assert failures == {tmp_path / "seed_1": "RuntimeError: the cable is loose"}
    assert "the cable is loose" in (tmp_path / "seed_1" / "error.log").read_text()
    assert list(table["run"]) == ["seed_0", "seed_2"]

    calls.clear()
    table, failures = study.run_all(tasks, lambda c, f: run(c, f, broken=()), progress=False)
    assert calls == [1]  # nothing else is repeated
    assert not failures and not (tmp_path / "seed_1" / "error.log").exists()
    assert list(table["seed"]) == [0, 1, 2]
    assert table["dice"].between(0, 1).all()


def test_a_folder_with_another_run_is_a_failure_and_not_a_result(tmp_path):
    train(FAST, Blobs(), tmp_path / "run", progress=False)
    task = (dataclasses.replace(FAST, rank=2), tmp_path / "run")
    table, failures = study.run_all([task], lambda *a: pytest.fail("overwritten"), progress=False)
    assert len(table) == 0
    assert "rank" in failures[tmp_path / "run"]


def test_cross_validation_covers_every_image_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nucseg.train.open_dataset", lambda config, root: Blobs(10))
    words = ["cross-validate", "--out", str(tmp_path / "cv"), "--base", "random", "--size", "64", "--where", "none"]
    words += ["--epochs", "1", "--device", "cpu"]
    assert main([*words, "--folds", "0,3"]) == 0
    assert sorted(p.name for p in (tmp_path / "cv").iterdir()) == ["fold0", "fold3"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "10 images in 5 folds" in out
    scores = study.pooled_scores(sorted((tmp_path / "cv").iterdir()))
    assert sorted(scores["stem"]) == sorted(Blobs(10).table["stem"])
    assert main([*words, "--folds", "7"]) == 2
    assert main([*words, "--folds", "x"]) == 2


def test_search_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nucseg.study.open_dataset", lambda config, root: Blobs(10))
    text = (
        '[fixed]\nbase = "random"\nsize = 64\nwhere = "none"\nepochs = 1\ndevice = "cpu"\n[grid]\nlr = [1e-3, 1e-2]\n'
    )
    path = write(tmp_path / "study.toml", text)
    assert main(["search", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "lr_0.001" in capsys.readouterr().out
    assert len((tmp_path / "out" / "runs.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "grid"),
        ("[grid]\nlr = 3", "list"),
        ("[grid]\nlr = []", "list"),
        ("[grid]\nlr = [1e-3, 1e-3]", "different"),
        ('[grid]\nlr = ["fast"]', "float"),
        ("[grid]\nlearning_rate = [1e-3]", "learning_rate"),
        ("[grid]\nfold = [-1]", "fold"),
        ("grid = 3", "table"),
        ("[girth]\nlr = [1]", "girth"),
        ('preset = "best"\n[grid]\nseed = [1]', "best"),
    ],
)
def test_bad_studies_are_one_sentence(text, word, tmp_path):
    with pytest.raises(InputError, match=word) as error:
        study.read_study(write(tmp_path / "study.toml", text))
    assert "\n" not in str(error.value)
