import dataclasses
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nucseg.data import broad, synth
from nucseg.data.broad import Look, generate_broad, jpeg, random_look, resize_labels
from nucseg.data.datasets import Sample
from nucseg.data.tissue import lay_out
from nucseg.errors import InputError


@pytest.fixture(scope="module")
def some() -> list[Sample]:
    return [generate_broad(k, 256) for k in range(24)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(st.integers(0, 2**40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_look_keeps_to_the_ranges(seed):
    look = random_look(rng(seed))

    def within(value, limits):
        return limits[0] - 1e-9 <= value <= limits[1] + 1e-9

    assert within(look.magnification, broad.MAGNIFICATION)
    assert look.covered == 0 or within(look.covered, broad.COVERED)
    assert within(look.camera.blur, broad.BLUR)
    assert look.camera.quality == 0 or within(look.camera.quality, broad.JPEG)
    assert all(180 <= white <= 255 for white in look.camera.white)
    assert 0 < look.white < 0.95
    assert 1 <= len(look.populations) == len(look.shares) <= 3 and sum(look.shares) == pytest.approx(1)
    for population in look.populations:
        assert within(2 * np.sqrt(population.area_px_median / np.pi), broad.DIAMETER)
        assert population.area_px_q25 < population.area_px_median < population.area_px_q75
        assert within(population.eccentricity_median, broad.ECCENTRICITY)
        assert within(population.solidity_median, broad.SOLIDITY)
        assert within(population.touching_fraction, broad.TOUCHING)
    h, e = np.linalg.norm(look.haematoxylin), np.linalg.norm(look.eosin)
    assert within(h / (0.85 + 0.3 * look.thickness), broad.CHROMATIN_OD)
    assert 0 < e <= 0.75 * h + 1e-9


def test_looks_fill_the_ranges():
    looks = [random_look(rng(seed)) for seed in range(400)]
    for name, limits in (("magnification", broad.MAGNIFICATION), ("covered", broad.COVERED)):
        drawn = [getattr(look, name) for look in looks if getattr(look, name)]
        span = np.log(limits[1] / limits[0])
        assert np.log(max(drawn) / min(drawn)) > 0.95 * span, name
    assert 2 < sum(look.covered == 0 for look in looks) < 30
    assert {look.tissue.spaces for look in looks} == {"cleft", "lumen", "gland", "septa", "fat"}
    assert len({look.haematoxylin for look in looks}) == 400


def test_stain_vectors_are_unit_and_of_their_stain():
    """Haematoxylin takes more red than eosin does, and eosin of all colours mostly green."""
    for seed in range(100):
        haematoxylin, eosin = broad.random_stains(rng(seed))
        assert np.linalg.norm(haematoxylin) == pytest.approx(1) and np.linalg.norm(eosin) == pytest.approx(1)
        assert min(*haematoxylin, *eosin) > 0
        assert haematoxylin[0] > eosin[0] and eosin.argmax() == 1


@given(st.integers(0, 2**40), st.integers(64, 200))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_seed_and_size_gives_a_valid_sample(seed, size):
    sample = generate_broad(seed, size)
    assert sample.image.shape == (size, size, 3) and sample.image.dtype == np.uint8
    assert sample.labels.shape == (size, size) and sample.labels.dtype == np.int32
    areas = np.bincount(sample.labels.ravel())[1:]
    assert (areas >= broad.FEWEST).all(), "labels have a gap, or a nucleus is a speck"
    assert sample.vague is None and sample.tissue == "synthetic"


def test_nothing_measured_on_nuinsseg_is_read(monkeypatch, some):
    def refuse(*_):
        raise AssertionError("the statistics of NuInsSeg's tissues were read")

    monkeypatch.setattr(synth, "_measured", refuse)
    monkeypatch.setattr(synth, "_vary", refuse)
    monkeypatch.setattr(synth, "STYLES", {})
    with pytest.raises((AssertionError, InputError)):
        synth.generate("human liver", 0, 64)  # so the patches do hit what reads them
    assert generate_broad(3, 256).image.tobytes() == some[3].image.tobytes()


def test_the_same_seed_gives_the_same_bytes_in_another_process(some):
    code = (
        "import zlib; from nucseg.data.broad import generate_broad; generate_broad(9, 64); s = generate_broad(5, 256);"
        "print(zlib.crc32(s.image), zlib.crc32(s.labels))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    there = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert there.split() == [str(zlib.crc32(some[5].image)), str(zlib.crc32(some[5].labels))]


def test_seeds_of_several_numbers_are_kept_apart():
    seeds = (0, 1, (0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0))  # trailing zeros too, which SeedSequence ignores
    assert len({generate_broad(seed, 64).image.tobytes() for seed in seeds}) == len(seeds)
    assert generate_broad((1,), 64).image.tobytes() == generate_broad(1, 64).image.tobytes()


def test_images_differ_as_h_and_e_does(some):
    """Sizes, numbers and colours spread over at least the factor that one laboratory's do not."""
    areas = [np.median(np.bincount(s.labels.ravel())[1:]) for s in some if s.labels.any()]
    counts = [int(s.labels.max()) for s in some]
    colours = np.array([s.image.reshape(-1, 3).mean(0) for s in some])
    assert max(areas) > 5 * min(areas) and max(counts) > 40 and min(counts) < 8
    assert (np.ptp(colours, axis=0) > (50, 60, 40)).all()


def test_nuclei_are_darker_than_what_surrounds_them(some):
    red = [s.image[..., 0].astype(float) for s in some]
    darker = [
        r[s.labels == 0].mean() - r[s.labels > 0].mean() for r, s in zip(red, some, strict=True) if s.labels.any()
    ]
    assert min(darker) > 5 and np.median(darker) > 40


def test_a_look_decides_what_is_drawn():
    look = random_look(rng(1))
    none = generate_broad(4, 128, dataclasses.replace(look, covered=0.0))
    many = generate_broad(4, 128, dataclasses.replace(look, covered=0.5, white=0.01, magnification=1.0))
    assert none.labels.max() == 0 and many.labels.max() > 3


def test_magnification_enlarges_nuclei():
    population = broad.Population(350, 400, 450, 0.6, 0.97, 0.0)
    look = dataclasses.replace(random_look(rng(2)), populations=(population,), shares=(1.0,), covered=0.1, white=0.01)

    def median(sample):
        return np.median(np.bincount(sample.labels.ravel())[1:])

    small, large = (
        np.mean([median(generate_broad(k, 256, dataclasses.replace(look, magnification=m))) for k in range(3)])
        for m in (0.8, 1.6)
    )
    assert large / small == pytest.approx(4, rel=0.2)


def test_what_is_out_of_focus_is_not_labelled():
    look = dataclasses.replace(random_look(rng(2)), covered=0.2, white=0.01, magnification=1.0)
    thin, thick = (generate_broad(5, 256, dataclasses.replace(look, thickness=t)) for t in (0.0, 1.0))
    for sample in (thin, thick):
        assert sample.labels.max() > 10
    drawn = []
    layout = lay_out(rng(3), look.tissue, 256, 0.01)
    for thickness in (0.0, 1.0):
        _, faint = broad._nuclei(rng(4), dataclasses.replace(look, thickness=thickness), layout, 256)
        drawn.append(faint.mean())
        assert faint.tolist() == sorted(faint.tolist()), "the nuclei out of focus come last"
    assert drawn[0] < 0.15 < 0.2 < drawn[1]


@pytest.mark.parametrize(("arguments", "says"), [((-1,), "seed"), ((0, 63), "64 to 1024"), ((0, 1025), "64 to 1024")])
def test_wrong_input_is_refused_in_one_sentence(arguments, says):
    with pytest.raises(InputError, match=says) as caught:
        generate_broad(*arguments)
    assert "\n" not in str(caught.value)


def test_jpeg_loses_more_at_lower_quality(some):
    image = some[1].image
    loss = [np.abs(jpeg(image, quality).astype(float) - image).mean() for quality in (20, 60, 95)]
    assert loss[0] > loss[1] > loss[2] > 0 and jpeg(image, 60).shape == image.shape


@given(st.integers(0, 10**6), st.floats(0.5, 3.2))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_resized_labels_keep_their_nuclei(seed, factor):
    labels = generate_broad(seed, 96).labels
    shape = (round(96 * factor), round(96 * factor))
    resized = resize_labels(labels, shape)
    assert resized.shape == shape and resized.dtype == np.int32
    assert set(np.unique(resized)) <= set(np.unique(labels))
    before, after = (np.bincount(a.ravel(), minlength=labels.max() + 1)[1:] for a in (labels, resized))
    large = before > 150
    assert np.allclose(after[large] / factor**2, before[large], rtol=0.1)


def test_resized_outlines_are_smooth():
    """Discs enlarged twice lie nearer to the true discs than with the steps of their pixels."""
    off_smooth = off_steps = 0
    for radius in (4, 6, 10):
        disc, ideal = (
            sum((axis - (side - 1) / 2) ** 2 for axis in np.mgrid[:side, :side]) < (radius * side / 40) ** 2
            for side in (40, 80)
        )
        labels = disc.astype(np.int32)
        off_smooth += np.count_nonzero((resize_labels(labels, (80, 80)) > 0) != ideal)
        off_steps += np.count_nonzero((labels.repeat(2, 0).repeat(2, 1) > 0) != ideal)
    assert off_smooth < 0.75 * off_steps


def test_a_gap_of_one_pixel_stays_open():
    labels = np.zeros((20, 20), np.int32)
    labels[5:15, 2:9], labels[5:15, 10:17] = 1, 2
    for factor in (2, 3):
        assert not len(synth.touching(resize_labels(labels, (20 * factor, 20 * factor))))


def test_a_look_is_plain_data():
    assert Look(**dataclasses.asdict(random_look(rng(0)))).magnification == random_look(rng(0)).magnification
