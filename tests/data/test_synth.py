import os
import subprocess
import sys
import time
import zlib
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label

from nucseg.data.datasets import Sample
from nucseg.data.synth import STYLES, TISSUES, Synthetic, generate, statistics, touching
from nucseg.errors import InputError

REAL = pd.read_csv(str(files("nucseg") / "assets" / "nuinsseg_tissue_stats.csv")).set_index("tissue")
COLOURS = [f"{part}_{c}" for part in ("nucleus", "background") for c in "rgb"]


def test_there_are_31_tissues_in_the_order_of_the_csv():
    assert tuple(REAL.index) == TISSUES == tuple(STYLES)
    assert len(TISSUES) == 31


# --- one image ---------------------------------------------------------------------------------------------


def check(sample: Sample, size: int) -> None:
    """What holds for every synthetic image."""
    assert sample.image.shape == (size, size, 3) and sample.image.dtype == np.uint8
    assert sample.labels.shape == (size, size) and sample.labels.dtype == np.int32
    assert sample.vague is None
    n = sample.labels.max()
    assert n >= 1
    areas = np.bincount(sample.labels.ravel(), minlength=n + 1)[1:]
    assert (areas > 0).all(), "labels have a gap"
    edge = np.concatenate([sample.labels[[0, -1]].ravel(), sample.labels[:, [0, -1]].ravel()])
    within = np.setdiff1d(np.arange(1, n + 1), edge)
    assert (areas[within - 1] >= 20).all(), "a whole nucleus is a speck"
    for k in within[:40]:
        assert label(sample.labels == k, connectivity=2).max() == 1, f"nucleus {k} is in pieces"


@given(st.sampled_from(TISSUES), st.integers(0, 2**40), st.integers(64, 160))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_tissue_seed_and_size_gives_a_valid_sample(tissue, seed, size):
    sample = generate(tissue, seed, size)
    check(sample, size)
    assert sample.tissue == tissue


@pytest.mark.parametrize("size", [64, 256, 700])
def test_the_size_asked_for_comes_back(size):
    check(generate("mouse spleen", 1, size), size)


def test_a_larger_image_shows_more_tissue_not_larger_nuclei():
    small, large = (statistics([generate("mouse spleen", k, size) for k in (0, 1)]) for size in (256, 512))
    assert 3 < large.nuclei / small.nuclei < 5
    assert large.area_px_median == pytest.approx(small.area_px_median, rel=0.25)


def test_the_same_seed_gives_the_same_bytes_whatever_was_drawn_before():
    first = generate("human liver", 7, 128)
    generate("human brain", 7, 128)
    np.random.random(5)  # noqa: NPY002  # the global generator must not matter
    again = generate("human liver", 7, 128)
    assert first.image.tobytes() == again.image.tobytes() and first.labels.tobytes() == again.labels.tobytes()
    assert first.stem == again.stem == "human_liver_synthetic_0007"


def test_the_bytes_are_the_same_in_another_process():
    code = (
        "import zlib; from nucseg.data.synth import generate; s = generate('human lung', 5, 96);"
        "print(zlib.crc32(s.image), zlib.crc32(s.labels))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    there = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    here = generate("human lung", 5, 96)
    assert there.split() == [str(zlib.crc32(here.image)), str(zlib.crc32(here.labels))]


def test_another_seed_or_tissue_gives_another_image():
    images = [generate(t, s, 96).image.tobytes() for t in ("human liver", "mouse liver") for s in (0, 1)]
    assert len(set(images)) == 4


def test_stems_are_unlike_and_safe_as_file_names():
    stems = [generate(tissue, 3, 64).stem for tissue in TISSUES]
    assert len(set(stems)) == 31
    assert all(stem.replace("_", "").isalnum() and stem.isascii() for stem in stems)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("human livr",), "'human liver'"),
        (("xyzzy",), "human bladder, human brain"),
        (("human liver", -1), "seed"),
        (("human liver", 0, 63), "64 to 2048"),
        (("human liver", 0, 2049), "64 to 2048"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(arguments, says):
    with pytest.raises(InputError, match=says) as caught:
        generate(*arguments)
    assert "\n" not in str(caught.value)


# --- what it looks like ------------------------------------------------------------------------------------


SIDE = 320  # px: enough to measure, and cheaper than 512
PARTS = (SIDE / 512) ** 2


def measure(tissue: str, n: int) -> pd.Series:
    """n images measured, their nuclei counted for an image of 512 px."""
    out = statistics(generate(tissue, k, SIDE) for k in range(n))
    out["nuclei_per_image_mean"] /= PARTS
    return out


@pytest.fixture(scope="module")
def few() -> pd.DataFrame:
    """Two images of each tissue. Seeds 0 and 1 are not the whole cycle of ten, so bounds are wide."""
    return pd.DataFrame({tissue: measure(tissue, 2) for tissue in TISSUES}).T


def test_every_tissue_measures_like_the_real_one(few):
    colours = (few[COLOURS] - REAL[COLOURS]).abs()
    assert colours.max(axis=None) < 30, colours.max(axis=1).idxmax()
    assert colours.mean(axis=None) < 6
    ratio = few / REAL[few.columns]
    many = few.nuclei >= 30  # a median of fewer says little
    assert many.sum() > 15
    off = ratio.area_px_median[many & ~ratio.area_px_median.between(0.55, 1.6)]
    assert off.empty, off
    assert 0.9 < ratio.area_px_median.median() < 1.1
    assert ratio.nuclei_per_image_mean.between(0.2, 2.5).all(), ratio.nuclei_per_image_mean
    assert 0.85 < ratio.nuclei_per_image_mean.median() < 1.15
    assert 0.8 < ratio.foreground_fraction.median() < 1.2
    away = (few - REAL[few.columns]).abs()[many]
    assert (away.touching_fraction < 0.25).all(), away.touching_fraction
    assert (away.eccentricity_median < 0.12).all(), away.eccentricity_median
    assert (away.solidity_median < 0.04).all(), away.solidity_median


def test_tissues_differ_as_the_real_ones_do(few):
    """The ranking of tissues is preserved, so that a model can learn the differences between them."""
    for name in (
        "nuclei_per_image_mean",
        "area_px_median",
        "foreground_fraction",
        "background_g",
        "nucleus_r",
    ):
        assert few[name].corr(REAL[name], method="spearman") > 0.8, name
    assert few.touching_fraction.corr(REAL.touching_fraction, method="spearman") > 0.8


@pytest.mark.parametrize("tissue", ["human pancreas", "human salivory gland", "mouse kidney", "mouse liver"])
def test_ten_images_measure_like_the_tissue(tissue):
    made, real = measure(tissue, 10), REAL.loc[tissue]
    assert made.nuclei_per_image_mean == pytest.approx(real.nuclei_per_image_mean, rel=0.25)
    assert made.area_px_median == pytest.approx(real.area_px_median, rel=0.25)
    assert made.foreground_fraction == pytest.approx(real.foreground_fraction, rel=0.30)
    assert made.touching_fraction == pytest.approx(real.touching_fraction, abs=0.15)
    for colour in COLOURS:
        assert made[colour] == pytest.approx(real[colour], abs=12), colour


def test_nuclei_are_darker_than_what_surrounds_them():
    for tissue in ("human liver", "mouse heart", "human tonsile", "human cerebellum"):
        sample = generate(tissue, 4, 256)
        red = sample.image[..., 0].astype(float)  # haematoxylin absorbs red, eosin hardly
        assert red[sample.labels > 0].mean() < red[sample.labels == 0].mean() - 8, tissue


def test_an_image_takes_well_under_a_second():
    generate("human liver", 0, 64)  # imports and the table
    spent = []
    for tissue in ("human bladder", "human kidney", "human tongue", "mouse femur", "mouse thymus"):
        start = time.process_time()
        generate(tissue, 2)
        spent.append(time.process_time() - start)
    assert np.median(spent) < 1.0


# --- the dataset -------------------------------------------------------------------------------------------


def test_a_dataset_is_a_sequence_with_a_table():
    data = Synthetic(n_per_tissue=2, size=64, tissues=("human liver", "mouse heart"))
    assert len(data) == 4
    assert list(data.table.columns) == ["tissue", "stem"]
    assert [sample.stem for sample in data] == list(data.table.stem)
    assert [sample.tissue for sample in data] == list(data.table.tissue)
    assert data[-1].stem == "mouse_heart_synthetic_0001"
    assert [s.stem for s in data[1:3]] == list(data.table.stem[1:3])
    with pytest.raises(IndexError):
        data[4]


def test_an_image_does_not_depend_on_the_rest_of_the_dataset():
    one = Synthetic(n_per_tissue=1, size=64, seed=3, tissues=("mouse heart",))
    two = Synthetic(n_per_tissue=2, size=64, seed=3, tissues=("human liver", "mouse heart"))
    assert one[0].image.tobytes() == two[2].image.tobytes()
    assert one[0].image.tobytes() == generate("mouse heart", 30_000, 64).image.tobytes()


def test_datasets_of_different_seeds_share_no_image():
    first, second = (Synthetic(3, 64, seed, ("human liver",)) for seed in (0, 1))
    assert not set(first.table.stem) & set(second.table.stem)
    assert first[0].image.tobytes() != second[0].image.tobytes()


def test_a_dataset_draws_only_what_is_asked_for_and_once():
    start = time.process_time()
    data = Synthetic(n_per_tissue=100, size=2048)
    assert time.process_time() - start < 2 and len(data) == 3100
    small = Synthetic(1, 64, tissues=("human liver",))
    assert small[0] is small[0]


@pytest.mark.parametrize("wrong", [{"n_per_tissue": 0}, {"n_per_tissue": 10_001}, {"size": 1}, {"tissues": ["x"]}])
def test_a_dataset_refuses_wrong_input_at_once(wrong):
    with pytest.raises(InputError):
        Synthetic(**wrong)


# --- measuring ---------------------------------------------------------------------------------------------


def squares() -> np.ndarray:
    labels = np.zeros((20, 20), np.int32)
    labels[0:4, 0:4] = 1
    labels[4:8, 4:8] = 2  # meets 1 at a corner
    labels[0:4, 10:14] = 3
    labels[0:4, 15:19] = 4  # one pixel of background between
    return labels


def test_nuclei_touch_at_corners_but_not_across_a_gap():
    assert touching(squares()).tolist() == [1, 2]
    assert touching(squares()[:, ::-1]).tolist() == [1, 2]
    assert touching(np.zeros((5, 5), np.int32)).tolist() == []


def test_statistics_of_a_known_image():
    labels = squares()
    image = np.where(labels[..., None] > 0, (10, 20, 30), (100, 110, 120)).astype(np.uint8)
    empty = Sample(np.full_like(image, 200), np.zeros_like(labels), "t", "empty")
    out = statistics([Sample(image, labels, "t", "a"), empty])
    assert out.images == 2 and out.nuclei == 4 and out.nuclei_per_image_mean == 2
    assert out.nuclei_per_image_sd == pytest.approx(8**0.5)
    assert out.area_px_q25 == out.area_px_median == out.area_px_q75 == 16
    assert out.eccentricity_median == 0 and out.solidity_median == 1
    assert out.touching_fraction == 0.5, "an image without nuclei has no share of them"
    assert out.foreground_fraction == pytest.approx(64 / 400 / 2)
    assert [out[f"nucleus_{c}"] for c in "rgb"] == [10, 20, 30]
    assert [out[f"background_{c}"] for c in "rgb"] == [150, 155, 160]
    assert out.background_sd_r == 0


def test_statistics_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least one"):
        statistics([])
