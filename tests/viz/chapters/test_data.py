"""Figures of the chapter on the data."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from nucseg.data import datasets, splits
from nucseg.data.datasets import Sample
from nucseg.data.splits import Split
from nucseg.instances import encode
from nucseg.viz.chapters import data as figures_of


@pytest.fixture
def sample() -> Sample:
    labels = np.zeros((100, 100), np.int32)
    labels[2:6, 2:6] = 1
    labels[60:80, 60:70], labels[60:80, 70:80] = 2, 3
    return Sample(np.full((100, 100, 3), 200, np.uint8), labels, "human liver", "a")


class TestCrop:
    def test_it_is_where_most_of_the_area_is_nuclei_and_ids_begin_at_1(self, sample):
        small = figures_of.crop(sample, 40)
        assert small.image.shape == (40, 40, 3) and small.labels.shape == (40, 40)
        assert np.unique(small.labels).tolist() == [0, 1, 2]
        assert np.count_nonzero(small.labels) == 400

    def test_ids_keep_their_order_and_a_full_crop_has_no_background(self):
        labels = np.full((10, 10), 7, np.int32)
        labels[:, 5:] = 9
        small = figures_of.crop(Sample(np.zeros((10, 10, 3), np.uint8), labels, "t", "s"), 10)
        assert small.labels[0].tolist() == [1] * 5 + [2] * 5


class TestParts:
    listing = pd.DataFrame({"tissue": ["a", "a", "a", "b", "b"], "stem": list("vwxyz")})

    def test_an_image_in_two_parts_is_one_that_leaks(self):
        split = Split("s", train=(0, 1), val=(2,), test=(2, 3))
        assert figures_of.parts_of(self.listing, split).tolist() == [
            "training",
            "training",
            "training and test",
            "test",
            "",
        ]

    def test_the_benchmarks_folds_do_not_and_the_reports_do(self):
        listing = datasets.nuinsseg_list()
        whole = SimpleNamespace(table=listing)
        for split in (splits.folds(whole)[0], splits.leave_one_tissue_out(whole)[0]):
            assert set(figures_of.parts_of(listing, split)) == {"training", "validation", "test"}
        report = figures_of.parts_of(listing, splits.report_folds(whole)[0]).tolist()
        assert report.count("training and test") == 90 and report.count("test") == 43

    def test_there_is_a_square_per_image_in_a_row_per_tissue(self):
        protocols = {"leaks": Split("s", (0, 1), (2,), (2, 3)), "does not": Split("s", (0, 1), (2,), (3, 4))}
        figure = figures_of.plot_leaks(self.listing, protocols, ["a", "b"])
        first, second = figure.axes
        assert [len(ax.patches) for ax in (first, second)] == [4, 5]
        hatched = [square for square in first.patches if square.get_hatch()]
        assert [square.get_xy() for square in hatched] == [(2, 0)]
        assert not any(square.get_hatch() for square in second.patches)
        assert [label.get_text() for label in first.get_yticklabels()] == ["a", "b"]


class TestPictures:
    def test_neighbours_differ_in_colour_and_background_is_black(self, sample):
        picture = figures_of._coloured(sample.labels)
        assert not picture[sample.labels == 0].any() and picture[sample.labels > 0].any(axis=1).all()
        assert not np.array_equal(picture[65, 65], picture[65, 75])
        assert figures_of._coloured(np.zeros((3, 3), np.int32)).shape == (3, 3, 3)

    def test_objects_are_counted_whatever_their_ids(self, sample):
        figure = figures_of.plot_decoding({"truth": sample.labels, "gaps": np.where(sample.labels == 2, 9, 0)})
        titles = [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes]
        assert titles == ["truth\n3 objects", "gaps\n1 objects"]

    def test_a_grid_has_a_title_for_each_tissue_and_one_scale_bar(self, sample):
        figure = figures_of.plot_tissues([sample] * 3, columns=2, size=50)
        titles = [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes]
        assert titles == ["human liver"] * 3 + [""]
        assert ["10 µm" in [t.get_text() for t in ax.texts] for ax in figure.axes] == [True, False, False, False]

    def test_the_vague_area_is_hatched_over_the_truth_only(self, sample):
        vague = np.zeros(sample.labels.shape, bool)
        vague[60:80, 60:70] = True
        truth, prediction = figures_of.plot_vague(sample, vague, sample.labels).axes
        assert any("////" in (c.hatches or []) for c in truth.collections if hasattr(c, "hatches"))
        assert not any(hasattr(c, "hatches") for c in prediction.collections)

    def test_maps_and_stains_are_shown_beside_the_image(self, sample):
        figure = figures_of.plot_encoding(sample, encode(sample.labels))
        assert [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes] == [
            "image",
            "label map",
            "foreground",
            "distance map",
        ]
        dyes = np.stack([sample.labels, -sample.labels, 0 * sample.labels], axis=-1).astype(float)
        haematoxylin = figures_of.plot_stains(sample, dyes).axes[1].images[0].get_array()
        assert np.array_equal(haematoxylin, sample.labels)

    def test_the_flow_names_the_functions_of_the_package(self):
        words = {text.get_text() for text in figures_of.plot_flow().axes[0].texts}
        assert {"network", "encode", "decode", "loss", "score"} <= words


class TestMeasurements:
    real = pd.DataFrame(
        {"nuclei_per_image_mean": [10.0, 20], "area_px_median": [300.0, 700], "touching_fraction": [0.1, 0.8]},
        index=["a", "b"],
    )

    def test_dots_are_real_against_here(self):
        figure = figures_of.plot_agreement(self.real, 2 * self.real)
        assert figure.axes[1].collections[0].get_offsets().tolist() == [[300, 600], [700, 1400]]

    def test_the_table_rounds_counts_and_areas_but_not_shares(self):
        html = figures_of.agreement_table(self.real, 2 * self.real).to_html()
        assert ">300<" in html and ">1,400<" in html and ">0.80<" in html and ">1.60<" in html
        assert html.count(">NuInsSeg<") == html.count(">here<") == 3

    def test_each_tissue_counts_the_same(self):
        listing = pd.DataFrame({"tissue": ["a", "a", "a", "b"], "stem": list("wxyz"), "nuclei": [1, 1, 1, 5]})
        ax = figures_of.plot_counts(listing, listing.head(2), "here").axes[0]
        x, y = ax.lines[-1].get_data()
        assert y[np.searchsorted(x, 1, side="right") - 1] == pytest.approx(0.5)
