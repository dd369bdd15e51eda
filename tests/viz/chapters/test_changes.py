import numpy as np
import pandas as pd
import pytest

from nucseg.records.runs import Run
from nucseg.records.statistics import difference
from nucseg.viz.chapters import changes


def scores(**pq: float) -> pd.DataFrame:
    """One row per image: scores by stem, in one fold and tissue."""
    rows = [{"fold": "fold 1", "tissue": "t", "stem": stem, "dice": 0.5, "aji": 0.5, "pq": v} for stem, v in pq.items()]
    return pd.DataFrame(rows)


def test_differences_are_taken_image_by_image_whatever_the_order():
    ours, theirs = scores(a=0.5, b=0.7), scores(b=0.6, a=0.1, c=0.9)
    found = changes.paired(ours, theirs).set_index("stem")
    assert found["pq"].round(9).to_dict() == {"a": 0.4, "b": 0.1}
    assert found["dice"].tolist() == [0, 0]


def test_the_interval_is_that_of_the_statistics_room():
    rng = np.random.default_rng(0)
    ours = scores(**{f"s{i}": v for i, v in enumerate(rng.random(30))})
    theirs = scores(**{f"s{i}": v for i, v in enumerate(rng.random(30))})
    row = difference(ours, theirs).loc["pq"]
    assert changes.interval(changes.paired(ours, theirs)) == tuple(row[["difference", "low", "high"]])


def test_an_image_in_two_folds_is_drawn_as_one():
    once = changes.paired(scores(a=1.0, b=0.0), scores(a=0.0, b=0.0))
    twice = pd.concat([once, once.assign(fold="fold 2")])
    assert changes.interval(twice) == changes.interval(once.sort_values("stem"))  # no narrower for the copy


def test_a_difference_is_printed_with_signs():
    assert changes.signed(0.0144, -0.0051, 0.0213) == "+0.014 (−0.005 to +0.021)"
    assert changes.signed(-0.2, -0.31, -0.1, decimals=1) == "−0.2 (−0.3 to −0.1)"


def test_runs_are_compared_within_their_folds():
    runs = {
        "reference-fold_1": Run({}, pd.DataFrame(), scores(a=0.1)),
        "reference-fold_2": Run({}, pd.DataFrame(), scores(a=0.5).assign(fold="fold 2")),
        "ema-fold_1": Run({}, pd.DataFrame(), scores(a=0.2)),
        "ema-fold_2": Run({}, pd.DataFrame(), scores(a=0.4).assign(fold="fold 2")),
        "ema-fold_3": Run({}, pd.DataFrame(), scores(a=0.9).assign(fold="fold 3")),  # has no reference
    }
    found = changes.by_fold(runs, "ema", "reference").set_index("fold")["pq"]
    assert found.round(9).to_dict() == {"fold 1": 0.1, "fold 2": -0.1}


def test_the_table_has_a_row_per_entry():
    rows = {"x": changes.paired(scores(a=0.6), scores(a=0.5)), "y": changes.paired(scores(a=0.2), scores(a=0.5))}
    assert changes.cells(rows, ("pq",))["PQ"].to_dict() == {
        "x": "+0.100 (+0.100 to +0.100)",
        "y": "−0.300 (−0.300 to −0.300)",
    }
    assert "caption" in changes.table(rows, "A caption").to_html()


def test_the_plot_marks_each_difference_where_it_belongs():
    rows = {"x": changes.paired(scores(a=0.6), scores(a=0.5)), "y": changes.paired(scores(a=0.2), scores(a=0.5))}
    figure = changes.plot(rows, ("dice", "pq"))
    marks = [line for line in figure.axes[1].lines if line.get_marker() in "os^D"]
    assert [(round(float(m.get_xdata()[0]), 9), m.get_ydata()[0]) for m in marks] == [(0.1, 0), (-0.3, -1)]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["x", "y"]
    assert not figure.legends
    series = changes.plot(rows, series={"x": "against a", "y": "against b"})
    assert [t.get_text() for t in series.legends[0].get_texts()] == ["against a", "against b"]


def test_a_mark_per_fold():
    two = pd.concat([changes.paired(scores(a=0.6), scores(a=0.5)).assign(fold=f"fold {k}") for k in (1, 2)])
    figure = changes.plot({"x": two}, split=True)
    marks = [line for line in figure.axes[0].lines if line.get_marker() in "os^D"]
    assert len(marks) == 2 and len(figure.legends[0].get_texts()) == 2


@pytest.mark.parametrize(
    ("cost", "gain", "best"),
    [
        ([1, 2, 3], [0.1, 0.2, 0.3], [True, True, True]),  # each costs more and gains more
        ([1, 2, 3], [0.3, 0.2, 0.1], [True, False, False]),  # the first beats the others
        ([1, 1, 2], [0.2, 0.3, 0.3], [False, True, False]),
        ([1, 1], [0.2, 0.2], [True, True]),  # equals do not beat each other
    ],
)
def test_pareto(cost, gain, best):
    assert changes.pareto(cost, gain).tolist() == best
