import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
from blobs import Blobs
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb

from nucseg.data.datasets import Sample
from nucseg.errors import InputError
from nucseg.viz import figures


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def mosaic(cells: int, size: int = 80, gap: int = 0, seed: int = 0) -> np.ndarray:
    """Label map of the Voronoi cells of random points, with ``gap`` px of background between cells."""
    rng = np.random.default_rng(seed)
    points = rng.random((cells, 2)) * size
    y, x = np.mgrid[:size, :size]
    distances = np.sqrt((y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2)
    near = np.sort(distances, axis=-1)
    labels = distances.argmin(axis=-1).astype(np.int32) + 1
    labels[near[..., 1] - near[..., 0] < gap] = 0
    return labels


def touching_pairs(labels: np.ndarray, reach: int) -> set[tuple[int, int]]:
    """Brute force: pairs of ids that occur within a square of ``reach`` px around a pixel."""
    pairs = set()
    for y, x in np.argwhere(labels > 0):
        window = labels[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
        pairs |= {(int(labels[y, x]), int(other)) for other in np.unique(window) if other}
    return {(a, b) for a, b in pairs if a < b}


class TestColours:
    @pytest.mark.parametrize("seed", range(4))
    def test_neighbours_differ(self, seed):
        labels = mosaic(40, gap=1, seed=seed)
        pairs = touching_pairs(labels, reach=2)
        assert len(pairs) > 40
        colours = figures.neighbour_colours(labels, reach=2)
        assert all(colours[a] != colours[b] for a, b in pairs)

    @pytest.mark.parametrize("seed", range(8))
    def test_six_colours_suffice_for_nuclei_that_only_touch(self, seed):
        colours = figures.neighbour_colours(mosaic(60, seed=seed), reach=1)
        assert max(colours.values()) < len(figures.OUTLINES)

    def test_every_id_gets_a_colour_however_large_it_is(self):
        labels = np.zeros((9, 9), np.int32)
        labels[0, 0], labels[8, 8] = 7, 4_000_000
        assert set(figures.neighbour_colours(labels)) == {7, 4_000_000}
        assert figures.neighbour_colours(np.zeros((4, 4), np.int32)) == {}

    def test_a_diagonal_neighbour_counts(self):
        labels = np.array([[1, 0], [0, 2]], np.int32)
        colours = figures.neighbour_colours(labels, reach=1)
        assert colours[1] != colours[2]
        flipped = figures.neighbour_colours(labels[:, ::-1], reach=1)
        assert flipped[1] != flipped[2]

    def test_no_palette_repeats_a_colour(self):
        named = (figures.TRUTH, figures.PREDICTION, figures.MISSED, figures.SPURIOUS, figures.FOUND)
        for palette in (named, figures.OUTLINES, figures.SERIES):
            assert len(set(palette)) == len(palette)

    @pytest.mark.parametrize("fill", [*figures.SERIES, "white", "black", "#7c7b78", "#a59c74"])
    def test_ink_has_the_higher_contrast_by_wcag(self, fill):
        rgb = np.array(to_rgb(fill))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        light = linear @ [0.2126, 0.7152, 0.0722]
        contrast = {"white": 1.05 / (light + 0.05), "black": (light + 0.05) / 0.05}
        assert figures.ink(fill) == max(contrast, key=contrast.__getitem__)


class TestOutlines:
    def test_outlines_lie_between_a_nucleus_and_its_surroundings(self):
        labels = mosaic(12, size=40, gap=2)
        seen = set()
        for i, line in figures.outlines(labels):
            seen.add(i)
            for x, y in line:
                # halfway between a pixel of the nucleus and one outside it (or outside the image)
                a = np.array([np.floor(y), np.floor(x)]).astype(int)
                b = np.array([np.ceil(y), np.ceil(x)]).astype(int)
                inside = [bool((p >= 0).all() and (p < labels.shape).all() and labels[tuple(p)] == i) for p in (a, b)]
                assert sorted(inside) == [False, True]
        assert seen == set(np.unique(labels[labels > 0]).tolist())

    def test_square_is_traced_along_its_border_in_x_and_y(self):
        labels = np.zeros((20, 30), np.int32)
        labels[5:9, 20:28] = 3
        ((i, line),) = figures.outlines(labels)
        assert i == 3
        assert line.min(axis=0).tolist() == [19.5, 4.5] and line.max(axis=0).tolist() == [27.5, 8.5]

    def test_nucleus_in_two_pieces_has_two_outlines(self):
        labels = np.zeros((9, 9), np.int32)
        labels[1, 1] = labels[7, 7] = 1
        assert [i for i, _ in figures.outlines(labels)] == [1, 1]


class TestOverlay:
    def lines(self, ax) -> LineCollection:
        (collection,) = (c for c in ax.collections if isinstance(c, LineCollection))
        return collection

    def test_touching_nuclei_get_different_colours(self):
        labels = np.zeros((10, 10), np.int32)
        labels[2:8, 2:5], labels[2:8, 5:8] = 1, 2
        colours = self.lines(figures.overlay(np.zeros((10, 10, 3), np.uint8), labels)).get_colors()
        assert to_hex(colours[0]) != to_hex(colours[1])

    def test_given_colour_is_used_for_all_lines_and_lines_are_thin(self):
        sample = Blobs()[0]
        lines = self.lines(figures.overlay(sample.image, sample.labels, colour=figures.TRUTH))
        assert {to_hex(c) for c in lines.get_colors()} == {figures.TRUTH}
        assert max(lines.get_linewidths()) <= 1

    def test_image_without_nuclei_is_drawn(self):
        ax = figures.overlay(np.zeros((10, 10, 3), np.uint8), np.zeros((10, 10), np.int32))
        ax.figure.canvas.draw()

    def test_image_and_labels_of_different_sizes_are_refused(self):
        with pytest.raises(InputError, match="differ in size"):
            figures.overlay(np.zeros((10, 12, 3), np.uint8), np.zeros((10, 10), np.int32))


class TestErrors:
    truth = np.zeros((20, 60), np.int32)
    truth[5:15, 5:15], truth[5:15, 25:35], truth[5:15, 35:45] = 4, 7, 9  # the last two touch

    def test_found_missed_and_spurious(self):
        prediction = np.zeros_like(self.truth)
        prediction[5:15, 6:15] = 50  # IoU 0.9 with nucleus 4
        prediction[5:15, 25:45] = 60  # merges 7 and 9: its IoU with each is 0.5, not above it
        assert figures.errors(self.truth, prediction) == ([4], [7, 9], [60])

    def test_empty_prediction_and_empty_truth(self):
        nothing = np.zeros_like(self.truth)
        assert figures.errors(self.truth, nothing) == ([], [4, 7, 9], [])
        assert figures.errors(nothing, self.truth) == ([], [], [4, 7, 9])
        assert figures.errors(nothing, nothing) == ([], [], [])

    def test_error_map_fills_nuclei_by_kind_and_counts_them(self):
        prediction = np.where(self.truth == 4, 1, 0).astype(np.int32)
        prediction[17:20, 50:60] = 2
        ax = figures.error_map(self.truth, prediction)
        plate = ax.images[0].get_array()
        assert to_hex(plate[10, 10]) == figures.FOUND
        assert to_hex(plate[10, 30]) == to_hex(plate[10, 40]) == figures.MISSED
        assert to_hex(plate[0, 0]) == "#ffffff"
        words = [text.get_text() for text in ax.get_legend().get_texts()]
        assert words == ["found 1", "missed 2", "spurious 1"]


class TestScaleBar:
    def on(self, width: int, **options):
        ax = figures.overlay(np.zeros((width // 2, width, 3), np.uint8), np.zeros((width // 2, width), np.int32))
        return ax, figures.scale_bar(ax, **options)

    @pytest.mark.parametrize(("um_per_px", "um", "px"), [(0.25, 20, 80), (0.5, 20, 40), (0.25, 5, 20)])
    def test_length_in_px(self, um_per_px, um, px):
        ax, bar = self.on(512, um_per_px=um_per_px, um=um)
        assert bar.get_width() == px
        assert f"{um} µm" in [text.get_text() for text in ax.texts]

    @pytest.mark.parametrize("width", [64, 100, 512, 2000])
    def test_default_length_is_round_and_fits(self, width):
        ax, bar = self.on(width)
        assert 0.1 * width <= bar.get_width() <= width / 3
        assert bar.get_x() >= 0 and bar.get_x() + bar.get_width() <= width
        label = float(ax.texts[0].get_text().split()[0])
        assert label / figures.MICROMETRES_PER_PIXEL == bar.get_width()
        assert str(label).strip("0.")[0] in "125"


class TestShowRow:
    def test_one_panel_per_sample_with_the_scale_bar_on_the_first(self):
        samples = [Blobs()[i] for i in range(3)]
        figure = figures.show_row(*samples)
        assert [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes] == [s.tissue for s in samples]
        assert [bool(ax.texts) for ax in figure.axes] == [True, False, False]

    def test_without_outlines_and_with_titles(self):
        figure = figures.show_row(Blobs()[0], outlined=False, titles=["mine"])
        assert not figure.axes[0].collections

    def test_no_samples_are_refused(self):
        with pytest.raises(InputError, match="no samples to show"):
            figures.show_row()


class TestLearningCurves:
    history = pd.DataFrame(
        {
            "epoch": [1, 2, 3],
            "train_loss": [0.9, 0.5, 0.4],
            "val_dice": [0.3, 0.7, 0.6],
            "val_iou": [0.2, 0.5, 0.45],
            "val_aji": [0.1, 0.3, 0.2],
            "val_pq": [0.1, 0.2, 0.25],
        }
    )

    def test_kept_epoch_is_the_best_by_the_monitored_score(self):
        for monitor, best in (("dice", 2), ("pq", 3)):
            figure = figures.learning_curves(self.history, monitor)
            assert figure.axes[1].get_title("right") == f"kept: {best}"

    def test_curves_show_the_history(self):
        loss, scores = figures.learning_curves(self.history).axes
        assert loss.lines[0].get_ydata().tolist() == [0.9, 0.5, 0.4]
        drawn = {line.get_label(): list(line.get_ydata()) for line in scores.lines[:4]}
        assert drawn["PQ"] == [0.1, 0.2, 0.25] and set(drawn) == {"Dice", "IoU", "AJI", "PQ"}

    def test_table_that_is_not_a_history_is_refused(self):
        with pytest.raises(InputError, match=r"history\.csv"):
            figures.learning_curves(pd.DataFrame({"epoch": [1]}))


def test_drawing_does_not_change_the_sample():
    with plt.rc_context():
        figures.use_style()
        sample = Blobs()[0]
        before = sample.image.copy(), sample.labels.copy()
        figures.show_row(Sample(sample.image, sample.labels, "a", "b"))
        assert (sample.image == before[0]).all() and (sample.labels == before[1]).all()


def test_errors_are_attributed_to_the_right_ids_when_ids_are_not_in_reading_order():
    truth = np.zeros((20, 10), np.int32)
    truth[1:5, 1:5], truth[10:15, 1:6] = 2, 1  # the upper one has the greater id
    prediction = np.zeros_like(truth)
    prediction[1:5, 1:5], prediction[17:19, 7:9] = 9, 4
    assert figures.errors(truth, prediction) == ([2], [1], [4])


def test_style_sets_the_palette_for_matplotlib_and_seaborn():
    with plt.rc_context():
        figures.use_style()
        assert tuple(sns.color_palette().as_hex()) == figures.SERIES
        assert plt.rcParams["axes.prop_cycle"].by_key()["color"] == sns.color_palette()
        assert plt.rcParams["font.size"] == 10 and not plt.rcParams["axes.spines.right"]
