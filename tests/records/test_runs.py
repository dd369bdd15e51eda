from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nucseg.errors import InputError
from nucseg.records.runs import read_run, results_folder, study_runs
from nucseg.records.statistics import bootstrap_mean, difference, summarise, variance_explained

REPORT_SEARCH = Path(__file__).parents[2] / "book" / "reference" / "report_code_param_search.csv"


def test_bootstrap_agrees_with_the_normal_interval_on_many_values():
    values = np.random.default_rng(0).normal(0.5, 0.1, 400)
    low, high = bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert abs(low - (values.mean() - half)) < 0.1 * half
    assert abs(high - (values.mean() + half)) < 0.1 * half


def test_bootstrap_of_one_value_two_values_and_none():
    assert bootstrap_mean(np.array([0.3])) == (0.3, 0.3)
    assert all(np.isnan(bootstrap_mean(np.array([]))))
    low, high = bootstrap_mean(np.array([0.0, 1.0]))
    assert (low, high) == (0.0, 1.0)


def test_summary_holds_the_mean_of_each_score_within_its_interval():
    rng = np.random.default_rng(1)
    columns = ["dice", "iou", "aji", "aji_plus", "pq", "sq", "rq", "aji_matched_only"]
    scores = pd.DataFrame({name: rng.random(30) for name in columns})
    scores["fold"] = ["one"] * 10 + ["two"] * 20
    scores["tissue"] = ["a", "b", "c"] * 10
    table = summarise(scores)
    assert list(table.index) == columns
    assert ((table["low"] < table["mean"]) & (table["mean"] < table["high"])).all()
    assert table.loc["pq", "mean"] == scores["pq"].mean()
    of_folds = (scores["pq"][:10].mean() + scores["pq"][10:].mean()) / 2
    assert abs(table.loc["pq", "fold_mean"] - of_folds) < 1e-12
    assert ((table["tissue_low"] <= table["mean"]) & (table["mean"] <= table["tissue_high"])).all()


def test_cluster_bootstrap_is_wider_only_if_groups_differ():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 10)
    same = rng.normal(0, 1, 200)
    apart = same + 5 * np.repeat(rng.normal(0, 1, 20), 10)

    def width(values, by=None):
        low, high = bootstrap_mean(values, by)
        return high - low

    assert 0.6 < width(same, groups) / width(same) < 1.5
    assert width(apart, groups) > 2 * width(apart)
    # with one image per group, resampling groups is resampling images
    assert bootstrap_mean(same, np.arange(200)) == bootstrap_mean(same)


def test_missing_runs_and_folders_are_reported(tmp_path):
    with pytest.raises(InputError, match="cannot read a finished run"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="clone the repository"):
        results_folder(tmp_path)


def test_every_recorded_run_can_be_read_and_states_its_provenance():
    folder = results_folder(__file__)
    runs = [path.parent for path in folder.glob("*/*/run.json")]
    assert runs
    for path in runs:
        run = read_run(path)
        about = run.about
        assert len(run.scores) == about["split"]["test"]
        assert len(about["commit"]) == 40, f"{path}: was recorded from a checkout with uncommitted changes"
        assert about["command"].startswith("nucseg ")
        for word in (about["data"]["name"], about["base"]["name"], about["device"], about["date"][:10]):
            assert word in run.provenance
        assert run.scores["dice"].between(0, 1).all()
        assert (run.scores["aji"] <= run.scores["iou"] + 1e-6).all()  # holds for every AJI after Kumar
        text = (path / "run.json").read_text()
        assert not any(f'"/{top}' in text or f" /{top}" in text for top in ("home", "tmp", "mnt", "Users"))


def scores_of(values: list[float], tissues: str = "aabb") -> pd.DataFrame:
    stems = [f"s{i}" for i in range(len(values))]
    return pd.DataFrame({"tissue": list(tissues), "stem": stems, "pq": values, "aji": 0.5, "dice": 0.5})


def test_differences_are_paired_by_image_and_not_by_row():
    hard = np.array([0.1, 0.9, 0.3, 0.6])
    ours, theirs = scores_of(list(hard + 0.05)), scores_of(list(hard))
    row = difference(ours, theirs.sample(frac=1, random_state=0)).loc["pq"]
    assert row["images"] == 4
    for name in ("difference", "low", "high", "tissue_low", "tissue_high"):
        assert abs(row[name] - 0.05) < 1e-12  # every pair differs by 0.05, so the interval has no width
    with pytest.raises(InputError, match="no image in common"):
        difference(ours, theirs.assign(tissue="c"))


def test_variance_explained_by_hand():
    rows = [(a, b, 10 * a + b) for a in (0, 1) for b in (0, 1)]  # sums of squares: 100 for a, 1 for b, no interaction
    table = pd.DataFrame(rows, columns=["a", "b", "y"])
    shares = variance_explained(table, ["a", "b"], "y")
    assert shares.round(12).to_dict() == {"a": round(100 / 101, 12), "b": round(1 / 101, 12), "rest": 0.0}
    with pytest.raises(InputError, match="full grid"):
        variance_explained(table[:3], ["a", "b"], "y")
    with pytest.raises(InputError, match="is constant"):
        variance_explained(table.assign(y=1.0), ["a", "b"], "y")


def test_variance_explained_in_the_report_s_search():
    table = pd.read_csv(REPORT_SEARCH) if REPORT_SEARCH.exists() else pytest.skip("the report's results are not here")
    shares = variance_explained(table, ["rank", "alpha", "lr"], "val_dice")
    assert round(shares["lr"], 3) == 0.882 and round(shares["alpha"], 3) == 0.091 and shares["rank"] < 0.001


def test_study_runs_are_the_finished_ones_by_base_and_budget(tmp_path):
    for run in ("folds/offline-small/fold_1", "folds/mobile_sam-full/fold_2", "folds/random-small/fold_1"):
        (tmp_path / run).mkdir(parents=True)
        pd.DataFrame({"pq": [0.5]}).to_csv(tmp_path / run / "scores.csv")
        if not run.startswith("folds/random"):  # that run has not finished
            (tmp_path / run / "run.json").write_text("{}")
    found = study_runs("folds", tmp_path)
    assert {column: list(runs) for column, runs in found.items()} == {
        "mobile_sam-full": ["fold_2"],
        "offline-small": ["fold_1"],
    }
    assert study_runs("nothing", tmp_path) == {}


def test_names_that_look_like_numbers_or_missing_values_stay_text(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "scores.csv").write_text("fold,tissue,stem,dice\nown images,,001,0.5\nown images,NA,1e5,1\n")
    scores = read_run(tmp_path).scores
    assert scores[["tissue", "stem"]].to_numpy().tolist() == [["", "001"], ["NA", "1e5"]]
    assert scores["dice"].tolist() == [0.5, 1.0]
