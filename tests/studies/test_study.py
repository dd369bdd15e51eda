import dataclasses
from pathlib import Path

import pytest
from blobs import SMALL, Blobs

from nucseg.cli import STUDIES, main
from nucseg.data.from_config import select_split
from nucseg.errors import Busy, InputError
from nucseg.files import only_one
from nucseg.records.runs import read_run
from nucseg.studies import study
from nucseg.training.loop import train

FAST = dataclasses.replace(SMALL, epochs=1, rank=1, alpha=1)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_report_s_grid_has_36_configurations_and_three_folds():
    path = Path(__file__).parents[2] / "studies" / "report-grid.toml"
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
            raise RuntimeError("out of memory")
        train(config, Blobs(), folder, progress=False)

    table, failures = study.run_all(tasks, run, progress=False)
    assert calls == [0, 1, 2]
    assert failures == {tmp_path / "seed_1": "RuntimeError: out of memory"}
    assert "out of memory" in (tmp_path / "seed_1" / "error.log").read_text()
    assert list(table["run"]) == ["seed_0", "seed_2"]

    calls.clear()
    table, failures = study.run_all(tasks, lambda c, f: run(c, f, broken=()), progress=False)
    assert calls == [1]  # finished runs are not repeated
    assert not failures and not (tmp_path / "seed_1" / "error.log").exists()
    assert list(table["seed"]) == [0, 1, 2]
    assert table["dice"].between(0, 1).all()


def test_folder_with_a_different_run_is_a_failure_and_is_not_overwritten(tmp_path):
    train(FAST, Blobs(), tmp_path / "run", progress=False)
    task = (dataclasses.replace(FAST, rank=2), tmp_path / "run")
    table, failures = study.run_all([task], lambda *a: pytest.fail("overwritten"), progress=False)
    assert len(table) == 0
    assert "rank" in failures[tmp_path / "run"]


def test_cross_validation_tests_every_image_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nucseg.data.from_config.open_dataset", lambda config, root: Blobs(10))
    words = ["cross-validate", "--out", str(tmp_path / "cv"), "--base", "random", "--size", "64"]
    words += ["--lora-target", "none"]
    words += ["--epochs", "1", "--device", "cpu"]
    assert main([*words, "--folds", "1,4"]) == 0
    assert sorted(p.name for p in (tmp_path / "cv").iterdir()) == ["fold_1", "fold_4"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "10 images in 5 folds" in out
    scores = study.pooled_scores(sorted((tmp_path / "cv").iterdir()))
    assert sorted(scores["stem"]) == sorted(Blobs(10).table["stem"])
    assert main([*words, "--folds", "7"]) == 2
    assert main([*words, "--folds", "x"]) == 2


def test_search_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nucseg.studies.study.open_dataset", lambda config, root: Blobs(10))
    text = '[fixed]\nbase = "random"\nsize = 64\nlora_target = "none"\nepochs = 1\ndevice = "cpu"\n'
    text += "[grid]\nlr = [1e-3, 1e-2]\n"
    path = write(tmp_path / "study.toml", text)
    assert main(["search", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "lr_0.001" in capsys.readouterr().out
    assert len((tmp_path / "out" / "runs.csv").read_text().splitlines()) == 3


VARIANTS = """
[fixed]
base = "random"
size = 64
lora_target = "none"
epochs = 1
device = "cpu"
lr = 1e-4
[budget.small]
lr = 1e-3
train_images = 4
[runs.plain]
[runs.adapted]
lora_target = "qkv"
rank = 2
[grid]
fold = [1, 2]
[again.elsewhere]
protocol = "report"
scoring = "report"
"""


def test_precedence_of_the_options_in_a_study(tmp_path):
    path = write(tmp_path / "study.toml", VARIANTS)
    full, small = study.read_study(path), study.read_study(path, "small")
    assert (full.config.lr, small.config.lr, small.config.train_images) == (1e-4, 1e-3, 4)
    given = study.read_study(path, "small", {"lr": 1e-2, "lora_target": "mlp"})
    assert given.config.lr == 1e-2  # the command line overrides the budget
    tasks = given.tasks(tmp_path)
    assert [folder.name for _, folder in tasks] == [
        "plain-fold_1", "plain-fold_2", "adapted-fold_1", "adapted-fold_2"
    ]  # fmt: skip
    assert [config.lora_target for config, _ in tasks] == [
        "mlp",
        "mlp",
        "qkv",
        "qkv",
    ]  # a variant overrides the command line
    with pytest.raises(InputError, match="has no table"):
        study.read_study(path, "large")


def test_study_rescores_its_runs_and_records_what_they_were_trained_on(tmp_path, monkeypatch, capsys):
    blobs = Blobs(20)
    monkeypatch.setattr("nucseg.studies.study.open_dataset", lambda config, root: blobs)
    monkeypatch.setattr("nucseg.data.from_config.open_dataset", lambda config, root: blobs)
    study._opened.clear()
    path = write(tmp_path / "study.toml", VARIANTS)
    words = ["search", str(path), "--out", str(tmp_path / "results" / "s" / "b"), "--budget", "small"]
    assert main(words) == 0
    run = tmp_path / "results" / "s" / "b" / "adapted-fold_2"
    again = read_run(run / "elsewhere")
    assert again.about["config"]["scoring"] == "report"
    assert again.about["command"].startswith("nucseg rescore --out results/s/b/adapted-fold_2/elsewhere ")
    own = select_split(dataclasses.replace(study.read_study(path, "small").config, fold=2), blobs)
    names = {part: set(own.names(blobs)[part]) for part in ("train", "val", "test")}
    for row in again.scores.itertuples():
        place = f"{row.tissue}/{row.stem}"
        assert row.part == next((part for part in names if place in names[part]), "none")
    assert set(again.scores["stem"]) != set(read_run(run).scores["stem"])

    before = (run / "elsewhere" / "scores.csv").read_bytes()
    words = ["rescore", "--out", str(run / "twice"), "--protocol", "report", "--scoring", "report"]
    assert main(words) == 0  # the command in its run.json reproduces the scores
    assert (run / "twice" / "scores.csv").read_bytes() == before
    capsys.readouterr()
    assert (
        main([*words[:2], str(run / "other"), "--size", "128"]) == 2
    )  # an adapter fits only the model it was trained in
    assert "trained with size = 64" in capsys.readouterr().err
    (run / "best.safetensors").unlink()
    assert main([*words[:2], str(run / "thrice")]) == 2
    assert "best.safetensors" in capsys.readouterr().err


def test_two_processes_never_work_on_the_same_run(tmp_path):
    folder = tmp_path / "seed_0"
    tasks = [(dataclasses.replace(FAST, seed=seed), tmp_path / f"seed_{seed}") for seed in range(2)]
    with only_one(folder):
        table, failures = study.run_all(tasks, lambda c, f: train(c, Blobs(), f, progress=False), progress=False)
        with pytest.raises(Busy, match="another process"):
            train(tasks[0][0], Blobs(), folder, progress=False)
    assert list(table["run"]) == ["seed_1"] and not failures
    assert not (folder / "last.pt").exists()
    train(tasks[0][0], Blobs(), folder, progress=False)  # the lock was released with its holder


def test_every_study_of_the_repository_can_be_read():
    folder = Path(__file__).parents[2] / "studies"
    assert {path.stem for path in folder.glob("*.toml")} == set(STUDIES)
    for path in folder.glob("*.toml"):
        for budget in ("", "small"):
            tasks = study.read_study(path, budget, {"base": "offline"}).tasks("out")
            for config, _ in tasks:
                config.check()
            assert len({folder for _, folder in tasks}) == len(tasks)


def test_reproduce_writes_the_studies_to_results(tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "nucseg").mkdir()
    (tmp_path / "studies").mkdir()
    write(tmp_path / "studies" / "folds.toml", VARIANTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nucseg.studies.study.open_dataset", lambda config, root: Blobs(20))
    study._opened.clear()
    words = ["reproduce", "--studies", "folds", "--budget", "small", "--base", "random"]
    assert main(words) == 0
    assert (tmp_path / "results" / "folds" / "random-small" / "plain-fold_1" / "run.json").exists()
    assert "results/folds/random-small" in capsys.readouterr().out
    assert main(["reproduce", "--studies", "best"]) == 2
    assert main([*words, "--dry-run"]) == 0
    assert "folds/random-small/plain-fold_1: finished" in capsys.readouterr().out
    assert main(["reproduce", "--budget", "abacus", "--base", "random", "--dry-run"]) == 2
    assert "[budget.abacus]" in capsys.readouterr().err


def test_the_budget_for_a_free_card_lists_five_folds_with_an_estimate(monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr("nucseg.studies.estimate.operations", lambda *_: 65e12 / 8 * 3600)  # an hour a run
    assert main(["reproduce", "--budget", "t4", "--base", "offline", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "results/best/offline-t4/fold_1: 100 epochs at 1024 px" and len(lines) == 6
    assert lines[-1] == "best: about 5.0 h on one card at 8 TFLOP/s, by arithmetic; not measured"


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
        ("runs = 3", "table"),
        ("[runs.a]\nrank = 0.5", "rank"),
        ("[girth]\nlr = [1]", "girth"),
        ('preset = "bestest"\n[grid]\nseed = [1]', "best"),
    ],
)
def test_invalid_studies_are_reported_in_one_sentence(text, word, tmp_path):
    with pytest.raises(InputError, match=word) as error:
        study.read_study(write(tmp_path / "study.toml", text))
    assert "\n" not in str(error.value)
