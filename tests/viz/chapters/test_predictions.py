import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from nucseg.data.datasets import Sample
from nucseg.instances import encode, renumber, split
from nucseg.metrics import errors
from nucseg.viz.chapters import predictions as chapter


def sample(labels: np.ndarray) -> Sample:
    return Sample(np.full((*labels.shape, 3), 220, np.uint8), labels, "mouse fat (white and brown)_subscapula", "x")


@pytest.fixture
def truth() -> np.ndarray:
    labels = np.zeros((60, 90), np.int32)
    labels[5:15, 5:15], labels[5:15, 15:25] = 1, 2  # will be merged
    labels[5:35, 40:50] = 3  # will be split
    labels[45:55, 5:15] = 4  # will be missed
    labels[45:55, 60:70] = 5  # will be found
    return labels


@pytest.fixture
def predicted(truth) -> np.ndarray:
    labels = np.where(truth == 5, 5, 0).astype(np.int32)
    labels[5:15, 5:25] = 1
    labels[5:19, 40:50], labels[21:35, 40:50] = 2, 3
    labels[45:55, 30:38] = 4  # no nucleus here
    return labels


class TestFailures:
    def test_each_error_counts_once_under_its_kind(self, truth, predicted):
        table = chapter.failures([sample(truth)], [errors(truth, predicted)], [predicted])
        assert table["kind"].to_list() == ["merged", "split", "missed", "spurious"]
        assert table["area"].to_list() == [200, 300, 100, 80]
        assert table.loc[3, ["y", "x"]].to_list() == [49.5, 33.5]

    def test_gallery_shows_the_largest_of_each_kind_once_per_image(self, truth, predicted):
        samples, labels = [sample(truth)] * 2, [predicted] * 2
        found = [errors(truth, predicted)] * 2
        table = chapter.failures(samples, found, labels)
        figure = chapter.plot_gallery(table, samples, labels, each=3, side=40)
        shown = np.reshape([len(ax.images) for ax in figure.axes], (4, 3))
        assert shown.tolist() == [[1, 1, 0]] * 4
        assert all(ax.images[0].get_array().shape == (40, 40, 3) for ax in figure.axes if ax.images)
        assert figure.axes[0].get_title(loc="left") or figure.axes[0].get_title().startswith("merged: one object")

    def test_halves_of_the_images_are_compared(self):
        table = pd.DataFrame({"nuclei_true": [10, 30], "merged": [1, 15], "split": [0, 3]})
        shown = chapter.density_table(table.assign(dice=[0.8, 0.9], aji=0.5, pq=0.4)).data
        assert shown["sparse half"].to_list() == ["1", "10", "0.100", "0.000", "0.800", "0.500", "0.400"]
        assert shown["dense half"].to_list()[2:4] == ["0.500", "0.100"]


class TestDecoding:
    def test_the_longest_border_is_found(self):
        labels = np.array([[1, 1, 2], [3, 3, 2], [3, 3, 2], [3, 3, 2]])
        assert chapter.longest_border(labels) == (2, 3)
        assert chapter.longest_border(np.array([[1, 0, 2]])) is None

    @pytest.mark.parametrize("touching", [True, False])
    def test_six_panels_the_last_along_a_cut(self, truth, touching):
        labels = truth if touching else np.where(truth == 2, 0, truth)
        maps = encode(labels)
        height = ndimage.gaussian_filter(maps[1], 1)
        mask = maps[0] > 0.5
        nuclei = renumber(split(height, mask, 0.9), 0)
        figure = chapter.plot_decoding(sample(labels), mask, height, split(height, mask, 1.0), nuclei)
        profile = figure.axes[5]
        assert len(figure.axes) == 6 and profile.axison == touching
        if touching:
            curve, limit = (line.get_ydata() for line in profile.lines)
            assert min(curve) < limit[0] == pytest.approx(0.9 * min(curve[0], curve[-1]))


class TestRanked:
    def test_a_long_name_has_a_line_of_its_own_above_the_row(self, truth, predicted):
        scores = pd.Series({"dice": 0.5, "pq": 0.25})
        figure = chapter.plot_ranked({"best": (sample(truth), predicted, scores)})
        (row,) = np.atleast_1d(figure.subfigs)
        words = row._suptitle.get_text()
        assert words == "best: mouse fat, subscapula\nDice 0.50, PQ 0.25, 1 found, 4 missed, 4 spurious"
        figure.canvas.draw()
        assert row._suptitle.get_window_extent().x1 <= figure.bbox.width
        assert not any(ax.get_title() for ax in figure.axes)


class TestStain:
    def test_each_panel_changes_one_stain(self):
        seen = []

        def change(image, factors):
            seen.append(factors)
            return image

        chapter.plot_stains(np.zeros((20, 20, 3), np.uint8), change)
        assert seen == [*((f, 1.0, 1.0) for f in (0.5, 1.0, 2.0)), *((1.0, f, 1.0) for f in (0.5, 1.0, 2.0))]

    def test_curves_show_means(self):
        rows = [(s, f, 0.5, 0.2 * f) for s in ("haematoxylin", "eosin") for f in (0.5, 1.0) for _ in range(2)]
        axes = chapter.plot_stain_curves(pd.DataFrame(rows, columns=["stain", "factor", "dice", "pq"])).axes
        pq = next(line for line in axes[0].lines if line.get_label() == "PQ")
        assert pq.get_xydata().tolist() == [[0.5, 0.1], [1.0, 0.2]]

    @pytest.fixture
    def changes(self) -> pd.DataFrame:
        rows = [
            {"model": m, "stain": s, "factor": f, "plain": 0.5, "difference": -0.1, "low": -0.2, "high": 0.05}
            for m in ("instance", "report")
            for s in ("haematoxylin", "eosin")
            for f in (0.5, 2.0)
        ]
        return pd.DataFrame(rows)

    def test_recorded_curves_pass_through_the_unchanged_image(self, changes):
        for ax in chapter.plot_recorded_stain(changes).axes:
            lines = [line for line in ax.lines if not line.get_label().startswith("_")]
            assert [line.get_label() for line in lines] == ["nuinsseg-1", "preset report"]
            assert lines[0].get_xydata() == pytest.approx(np.array([[0.5, 0.4], [1, 0.5], [2, 0.4]]))

    def test_table_keeps_absolute_and_relative_changes_apart(self, changes):
        shown = chapter.stain_table(changes).data
        assert list(shown.index) == ["0.5 ×", "2 ×"]
        assert shown["preset report", "change of PQ"].iloc[0] == "−0.100 (−0.200 to +0.050)"
        assert shown["preset report", "of its PQ"].iloc[0] == "−20%"
