"""The tables and pictures of the nuclei: against skimage, and by hand."""

import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from skimage.color import rgb2hed
from skimage.measure import regionprops, regionprops_table
from skimage.segmentation import find_boundaries

from nucseg.images.export import LINE, TISSUE_LINE, _boundaries, write_labels, write_overlay
from nucseg.images.measure import COLUMNS, measure
from nucseg.images.slides import open_slide


@pytest.fixture
def nuclei():
    rng = np.random.default_rng(0)
    labels = np.zeros((90, 120), np.int32)
    y, x = np.mgrid[:90, :120]
    labels[(y - 30) ** 2 / 100 + (x - 40) ** 2 / 400 < 1] = 3
    labels[60:80, 70:90] = 7
    image = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    return labels, image


def test_the_table_is_regionprops(nuclei):
    labels, image = nuclei
    table = measure(labels, image, um_per_px=0.5).set_index("id")
    regions = regionprops(labels, rgb2hed(image)[..., 0])
    assert list(table.index) == [3, 7] and COLUMNS[0] == "id"
    for region in regions:
        row = table.loc[region.label]
        assert (row["area_px"], row["area_um2"]) == (region.area, region.area / 4)
        # from the corner of the first px, as the polygons are
        assert (row["centroid_y_px"] - 0.5, row["centroid_x_px"] - 0.5) == pytest.approx(region.centroid)
        assert row["perimeter_px"] == region.perimeter and row["perimeter_um"] == region.perimeter / 2
        assert row["major_axis_px"] == region.axis_major_length and row["eccentricity"] == region.eccentricity
        assert row["solidity"] == region.solidity
        assert row["haematoxylin_mean"] == pytest.approx(region.intensity_mean, rel=1e-5)
    square = table.loc[7]  # by hand: 20 x 20 px, from (60, 70) on
    assert (square["area_px"], square["centroid_x_px"], square["centroid_y_px"]) == (400, 80, 70)
    assert "area_um2" not in measure(labels, image)
    assert measure(np.zeros_like(labels), image).empty


@settings(deadline=None, max_examples=60)
@given(
    arrays(np.int32, st.tuples(st.integers(1, 24), st.integers(1, 24)), elements=st.integers(0, 4)),
    st.sampled_from([1, 2, 5]),
)
def test_every_column_is_skimages(labels, size):
    """On nuclei of any shape: scattered, in lines, with holes, touching one another and the border."""
    labels = np.kron(labels, np.ones((size, size), np.int32))  # in blocks, so that some have an inside
    image = np.random.default_rng(labels.sum()).integers(0, 256, (*labels.shape, 3), dtype=np.uint8)
    table = measure(labels, image)
    if not labels.any():
        assert table.empty
        return
    expected = regionprops_table(
        labels,
        rgb2hed(image)[..., 0],
        properties=(
            *("label", "centroid", "area", "perimeter", "axis_major_length", "axis_minor_length"),
            *("eccentricity", "solidity", "intensity_mean"),
        ),
    )
    expected["centroid-0"], expected["centroid-1"] = expected["centroid-1"] + 0.5, expected["centroid-0"] + 0.5
    for (name, found), column in zip(table.items(), expected.values(), strict=True):
        # the square roots of what is zero but for rounding are 1e-8, in skimage as here
        np.testing.assert_allclose(found, column, rtol=1e-6, atol=1e-6, err_msg=str(name))
    np.testing.assert_array_equal(table["solidity"], expected["solidity"])  # counts of pixels


@given(arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 3)))
def test_boundaries_are_skimages(labels):
    np.testing.assert_array_equal(_boundaries(labels), find_boundaries(labels))


@pytest.mark.parametrize("count, dtype", [(7, np.uint16), (70_000, np.uint32)])
def test_label_tiffs_keep_every_id(tmp_path, count, dtype):
    labels = np.zeros((600, 530), np.int32)
    labels[::2, ::3] = np.resize(np.arange(1, count + 1), labels[::2, ::3].shape)
    write_labels(tmp_path / "a.tif", labels, count, um_per_px=0.25)
    stored = tifffile.imread(tmp_path / "a.tif")
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, labels)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.pages.first.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        across, per = tiff.pages.first.tags["XResolution"].value
        assert 1e4 / (across / per) == pytest.approx(0.25)


def test_the_overlay_outlines_nuclei_and_nothing_else(tmp_path, nuclei):
    labels, image = nuclei
    with open_slide(image) as slide:
        write_overlay(tmp_path / "a.png", slide, labels)
    with open_slide(np.full_like(image, 128)) as slide:
        write_overlay(tmp_path / "small.png", slide, labels, largest=40)
    drawn = np.asarray(Image.open(tmp_path / "a.png"))
    on = (drawn == LINE).all(-1)
    assert on[60, 70:90].all() and on[79, 70:90].all() and not on[65:75, 75:85].any()
    np.testing.assert_array_equal(drawn[~on], image[~on])
    assert (labels[on] > 0).all()
    small = np.asarray(Image.open(tmp_path / "small.png"))
    assert small.shape == (30, 40, 3)
    line = (np.array(LINE) * 2 + 128) / 3  # of the square's upper edge: two of three rows
    assert np.abs(small[20, 24:29] - line).max() < 1


def test_columns_of_an_empty_table_are_those_of_a_full_one(nuclei):
    assert list(measure(*nuclei).columns) == COLUMNS == list(pd.DataFrame(columns=COLUMNS).columns)


def test_the_overlay_shows_the_tissue_mask(tmp_path):
    image = np.full((80, 120, 3), 200, np.uint8)
    tissue = np.zeros((20, 30), bool)
    tissue[5:15, 5:25] = True
    with open_slide(image) as slide:
        write_overlay(tmp_path / "a.png", slide, np.zeros((80, 120), np.int32), tissue=tissue)
    drawn = (np.asarray(Image.open(tmp_path / "a.png")) == TISSUE_LINE).all(-1)
    assert drawn[20, 20:100].all() and drawn[20:60, 20].all() and not drawn[30:50, 30:90].any()
