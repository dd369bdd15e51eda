import json

import numpy as np
import pandas as pd
import pytest

from nucseg.data.splits import Split
from nucseg.records.runs import Run
from nucseg.viz.chapters import crossvalidation as chapter

NAMES = ("dice", "iou", "aji", "pq", "sq", "rq", "aji_plus", "aji_matched_only")


def scored(fold: str, values: list[float], tissue: str = "a") -> pd.DataFrame:
    table = pd.DataFrame(dict.fromkeys(NAMES, values))
    return table.assign(fold=fold, tissue=tissue, stem=[f"{fold}-{i}" for i in range(len(values))])


def run(fold: str, values: list[float], history: tuple[float, ...] = (0.1, 0.3, 0.2)) -> Run:
    epochs = pd.DataFrame({"epoch": range(1, len(history) + 1), "val_pq": history})
    return Run({}, epochs, scored(fold, values))


@pytest.fixture
def columns() -> dict:
    small = {"fold_1": run("fold 1", [0.2, 0.4]), "fold_2": run("fold 2", [0.6, 0.8])}
    return {"offline-small": small, "mine-full": {"fold_1": run("fold 1", [0.9, 0.7])}}


@pytest.fixture
def splits() -> list[Split]:
    return [Split("fold 1", (2, 3), (1,), (0, 4)), Split("fold 2", (0,), (4,), (1, 2, 3))]


IMAGES = pd.DataFrame({"tissue": ["a", "a", "b", "b", "c"], "nuclei": [1, 10, 100, 1000, 2000]})


class TestCounting:
    def test_iou_counts_and_scores_are_written_below_each_panel(self):
        truth = np.zeros((8, 20), int)
        truth[2:6, 2:6], truth[2:6, 6:10] = 1, 2
        figure = chapter.plot_counting(truth, {"merged": np.minimum(truth, 1), "one": np.where(truth == 1, 1, 0)})
        first, second = figure.axes
        assert first.get_xlabel() == "TP 0, FP 1, FN 2\nDice 1.00  AJI 0.50  PQ 0.00"
        assert second.get_xlabel().startswith("TP 1, FP 0, FN 1")
        assert [text.get_text() for text in first.texts] == ["IoU\n0.50", "IoU\n0.50"]
        assert [ax.get_title() for ax in figure.axes] == ["merged", "one"]


class TestFolds:
    def test_table_counts_nuclei_and_shared_tissues(self, splits):
        rows = chapter.fold_table(IMAGES, splits).data.set_index("fold")
        assert rows["nuclei in test"].to_list() == [2001, 1110]
        assert rows["tissues in test"].to_list() == [2, 2] and rows["of them in train"].to_list() == [0, 1]
        assert rows[["train", "validation", "test"]].to_numpy().tolist() == [[2, 1, 2], [1, 1, 3]]

    def test_each_image_is_drawn_once_in_the_row_of_its_tissue(self, splits):
        (ax,) = chapter.plot_folds(IMAGES, splits).axes
        rows = {i: text.get_text() for i, text in enumerate(ax.get_yticklabels())}
        drawn = [[(rows[int(y)], int(x)) for x, y in dots.get_offsets()] for dots in ax.collections]
        assert drawn == [[("a", 0), ("c", 0)], [("a", 1), ("b", 0), ("b", 1)]]

    def test_short_names_fit_beside_a_plot(self):
        names = ("mouse fat (white and brown)_subscapula", "mouse muscle_tibia", "human liver")
        assert [chapter.short_name(name) for name in names] == [
            *("mouse fat, subscapula", "mouse muscle, tibia", "human liver")
        ]


class TestScores:
    def test_means_of_folds_and_of_every_column(self, columns):
        report = pd.DataFrame({name: [0.5] for name in chapter.NAMES}, index=["average"])
        shown = chapter.score_table(columns, report).data
        assert shown["PQ"].to_dict() == pytest.approx(
            {
                "fold 1": 0.3,
                "fold 2": 0.7,
                "mean, offline-small": 0.5,
                "mean, mine-full": 0.8,
                "mean, the report (its protocol)": 0.5,
            }
        )

    def test_curves_mark_the_best_epoch(self, columns):
        (ax,) = chapter.plot_curves(columns["offline-small"]).axes
        marked = [line.get_xydata()[line.get_markevery()].tolist() for line in ax.lines]
        assert marked == [[[2, 0.3]], [[2, 0.3]]]
        assert len({line.get_marker() for line in ax.lines}) == 2

    def test_distributions_are_drawn_for_every_fold_and_score(self, columns):
        scores = pd.concat([run.scores for run in columns["offline-small"].values()])
        (ax,) = chapter.plot_scores(scores).axes
        assert [text.get_text() for text in ax.get_xticklabels()] == ["Dice", "AJI", "PQ"]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["fold 1", "fold 2"]

    def test_bootstrap_is_titled_with_its_interval(self):
        means = np.arange(1001) / 1000
        (ax,) = chapter.plot_bootstrap({"images drawn": means}, 0.5).axes
        assert ax.get_title(loc="left") or ax.get_title() == "images drawn: 0.025 to 0.975"

    def test_intervals_of_constant_scores_have_no_width(self):
        shown = chapter.interval_table(scored("fold 1", [0.4, 0.4])).data
        assert shown.loc["PQ"].to_list() == ["0.400", "0.400 to 0.400", "0.400 to 0.400"]


class TestProtocol:
    @pytest.fixture
    def read(self, tmp_path):
        runs = {"fold_1": run("fold 1", [0.2]), "fold_2": run("fold 2", [0.4])}
        for n, name in enumerate(runs):
            folder = tmp_path / name / "as-the-report"
            folder.mkdir(parents=True)
            again = scored("report", [0.1 + n, 0.3 + n]).assign(part=["train", "none"], aji_matched_only=0.9)
            again.to_csv(folder / "scores.csv", index=False)
            (tmp_path / name / "run.json").write_text(json.dumps({}))
        return chapter.protocol_scores(tmp_path, runs)

    def test_the_report_s_aji_and_kumar_s_are_kept_apart(self, read):
        fair, lenient = read
        assert fair["aji"].to_list() == [0.2, 0.4]
        assert lenient["aji_kumar"].to_list() == [0.1, 0.3, 1.1, 1.3] and set(lenient["aji"]) == {0.9}

    def test_an_image_scored_by_several_models_counts_once(self, read):
        once = chapter.by_image(read[1])
        assert len(once) == 2 and once["pq"].to_list() == pytest.approx([0.6, 0.8])
        assert "aji_kumar" not in chapter.by_image(read[0])

    def test_table_has_means_and_signed_differences(self):
        table = scored("fold 1", [0.25, 0.25])
        change = pd.DataFrame({"difference": -0.1, "low": -0.2, "high": 0.05}, index=["dice", "aji", "pq"])
        shown = chapter.protocol_table({"means": table}, {"changes": change}).data
        assert shown.loc["means", "PQ"] == "0.250 (0.250 to 0.250)"
        assert shown.loc["changes", "PQ"] == "−0.100 (−0.200 to +0.050)"


class TestRanking:
    def test_ours_stands_among_published_by_pq_with_its_interval(self, columns):
        published = pd.DataFrame({"method": ["x", "y"], "dice": 0.5, "aji": 0.5, "pq": [0.6, 0.1]})
        table = chapter.ranking(published, columns)
        assert table["method"].to_list() == ["mine-full", "x", "offline-small", "y"]
        assert table["pq"].to_list() == pytest.approx([0.8, 0.6, 0.5, 0.1])
        assert table["low"].notna().to_list() == [True, False, True, False]
        (ax,) = chapter.plot_ranking(table).axes
        assert [text.get_text() for text in ax.get_yticklabels()] == table["method"].to_list()[::-1]
        assert chapter.ranking_table(table).data["PQ"].to_list() == pytest.approx([0.8, 0.6, 0.5, 0.1])


def test_a_table_of_gains_has_signs_and_both_intervals():
    row = {"difference": -0.0264, "low": -0.0521, "high": 0.007, "tissue_low": 0.0, "tissue_high": 0.5, "images": 9}
    gains = pd.DataFrame({"pq": row, "dice": dict.fromkeys(row, 0.25)}).T
    shown = chapter.gain_table(gains).data
    assert shown.index.tolist() == ["PQ", "Dice"]
    assert shown.loc["PQ"].tolist() == ["−0.026", "−0.052 to +0.007", "+0.000 to +0.500"]
    by_step = chapter.gain_table(pd.concat({"tuned": gains})).data
    assert by_step.index.tolist() == [("tuned", "PQ"), ("tuned", "Dice")]
