import numpy as np
import pandas as pd
import pytest

from nucseg.errors import InputError
from nucseg.records.runs import Run
from nucseg.viz.chapters import tissues as chapter


def scored(tissue: str, *pq: float) -> pd.DataFrame:
    stems = [f"{tissue}-{i}" for i in range(len(pq))]
    return pd.DataFrame({"tissue": tissue, "stem": stems, "dice": pq, "aji": pq, "pq": pq})


SCORES = pd.concat([scored("human easy", 0.8, 0.6), scored("human hard", 0.1, 0.3, 0.2)], ignore_index=True)


def runs(*tables: pd.DataFrame) -> dict[str, Run]:
    return {f"fold_{i}": Run({"split": {"train": 10 + i}}, pd.DataFrame(), t) for i, t in enumerate(tables)}


class TestTables:
    def test_tissues_are_ranked_by_pq_with_their_images_and_other_columns(self):
        columns = {"offline-small": runs(SCORES), "mine-full": runs(SCORES.assign(pq=0.5))}
        shown = chapter.tissue_table(columns).data
        assert shown["tissue"].to_list() == ["human easy", "human hard"] and shown["images"].to_list() == [2, 3]
        assert shown["PQ"].to_list() == pytest.approx([0.7, 0.2]) and set(shown["PQ, mine-full"]) == {0.5}

    def test_the_report_s_tissues_are_shown_from_three_sources(self):
        ours = SCORES.groupby("tissue")[["dice", "aji", "pq"]].mean()
        shown = chapter.report_table(ours.loc[["human hard"]] + 0.5, ours + 0.1, ours).data
        assert list(shown.index) == ["human hard"]
        assert shown.xs("PQ", axis=1, level=1).iloc[0].to_list() == pytest.approx([0.7, 0.3, 0.2])

    def test_standardised_properties_use_logarithms_of_number_and_area(self):
        table = pd.DataFrame(
            {"nuclei_per_image_mean": [1, 10, 100], "area_px_median": [1, 10, 100], "touching_fraction": [0, 0.1, 0.2]}
        )
        assert chapter.standardised(table).to_numpy() == pytest.approx(np.repeat([[-1], [0], [1]], 3, axis=1))


class TestLeftOut:
    @pytest.fixture
    def pairs(self) -> pd.DataFrame:
        return chapter.left_out(runs(scored("human hard", 0.2, 0.1), scored("human easy", 0.8)), SCORES)

    def test_images_are_paired_by_name(self, pairs):
        assert pairs["pq"].to_list() == [0.2, 0.1, 0.8] and pairs["pq_in"].to_list() == [0.1, 0.3, 0.8]
        assert pairs["train"].to_list() == [10, 10, 11]

    def test_table_and_figure_show_the_change(self, pairs):
        rows = chapter.left_out_table(pairs).data.set_index("tissue")
        assert rows.loc["human hard", "difference"].startswith("−0.050 (−0.200 to +0.100")
        assert rows["images"].to_dict() == {"human easy": 1, "human hard": 2}
        (ax,) = chapter.plot_left_out(pairs).axes
        assert [text.get_text() for text in ax.get_yticklabels()] == ["human hard", "human easy"]


class TestFigures:
    def test_ranking_has_a_line_per_tissue_best_first(self):
        left, right = chapter.plot_ranking(SCORES).axes
        assert [text.get_text() for text in left.get_yticklabels()] == ["human easy (2)", "human hard (3)"]
        assert (left.get_xlabel(), right.get_xlabel()) == ("PQ", "AJI")

    def test_effects_that_are_clear_of_zero_are_filled(self):
        rows = np.array([[0.1, 0.05, 0.2], [0.0, -0.1, 0.1], [-0.1, -0.2, -0.05]])
        (ax,) = chapter.plot_effects({"PQ": rows}).axes
        dots = [line for line in ax.lines if line.get_marker() == "o"]
        assert [line.get_markerfacecolor() != "white" for line in dots] == [True, False, True]
        with pytest.raises(InputError, match="one row per property"):
            chapter.plot_effects({"PQ": rows[:2]})

    def test_properties_are_drawn_against_pq(self):
        ours = SCORES.groupby("tissue")[["pq"]].mean()
        table = pd.DataFrame({name: [20.0, 200.0] for name in chapter.PROPERTIES}, index=ours.index)
        axes = chapter.plot_properties(table, ours).axes
        assert [ax.get_xscale() for ax in axes] == ["log", "log", "linear"]
        assert {text.get_text() for text in axes[0].texts} == {"easy", "hard"}
