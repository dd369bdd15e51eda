"""Fields, blocks and seams, with a network that reads the maps from the image: different cuts must agree."""

import dataclasses
import itertools

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import nucseg.inference.evaluate as evaluating
import nucseg.inference.segmenter as predicting
from nucseg.cli import _parser
from nucseg.config import ModelConfig
from nucseg.data.prefetch import in_threads
from nucseg.errors import InputError
from nucseg.images.slides import open_slide
from nucseg.inference.confidence import FEATURES, features, fit
from nucseg.inference.decoding import Decoding
from nucseg.inference.evaluate import segment_whole
from nucseg.inference.fields import GRID, MARGIN, SIDES, spans
from nucseg.inference.segmenter import Segmenter, segment
from nucseg.instances import encode
from nucseg.metrics import score
from nucseg.model.network import build_model, predict


@pytest.fixture(scope="module")
def model():
    return build_model(ModelConfig(base="random", head="instance", size=128, rank=1))


@pytest.fixture
def seen(monkeypatch):
    """Replaces the network by one that reads both maps from the image's first two channels."""
    monkeypatch.setattr(
        predicting,
        "predict",
        lambda engine, images, scale, side: [i[..., :2].transpose(2, 0, 1).astype(np.float32) / 255 for i in images],
    )


def not_plain(height, width):
    """An image of one colour would have no nuclei, and the network would not be asked."""
    return np.random.default_rng(0).integers(60, 200, (height, width, 3), dtype=np.uint8)


def painted(labels):
    """An image that holds the true maps of ``labels``."""
    maps = np.rint(encode(labels) * 255).astype(np.uint8)
    return np.stack([maps[0], maps[1], np.full_like(maps[0], 99)], axis=-1)  # black would be no tissue


def textured(height, width):
    """An image that the network is asked about: no plain colour, and not black or white."""
    return np.random.default_rng(0).integers(60, 180, (height, width, 3), dtype=np.uint8)


def discs(height, width, count, seed=0, radius=14):
    rng = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.int32)
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disc = y**2 + x**2 < radius**2
    for number in range(1, count + 1):
        top, left = rng.integers(0, height - 2 * radius), rng.integers(0, width - 2 * radius)
        window = labels[top : top + 2 * radius + 1, left : left + 2 * radius + 1]
        free = disc[: window.shape[0], : window.shape[1]] & (window == 0)
        window[free] = number
    return labels


@settings(deadline=None)
@given(st.integers(1, 20000), st.sampled_from([0.25, 0.5, 1.0, 1.7, 3.0]), st.sampled_from([SIDES, (448,), (896,)]))
def test_cores_cover_a_side_once_from_fields_on_the_grid(length, scale, sides):
    fields = spans(length, scale, sides)
    assert fields[0].low == 0 and fields[-1].high == length
    assert all(a.high == b.low for a, b in itertools.pairwise(fields))
    for field in fields:
        assert 0 <= field.start <= field.low < field.high <= field.stop <= length
        assert field.low == 0 or (field.low - field.start) * scale >= MARGIN - 1 - scale
        assert field.high == length or (field.stop - field.high) * scale >= MARGIN - 1 - scale
        assert (field.stop - field.start) * scale <= field.side + scale
        assert field.side % 16 == 0
        if len(fields) > 1:
            assert field.side in sides or (field is fields[-1] and field.side < fields[0].side + 64)
            assert abs(field.start * scale - GRID * round(field.start * scale / GRID)) <= scale / 2 + 1e-6


@given(st.integers(2241, 20000))
def test_the_last_field_ends_with_the_image(length):
    last = spans(length)[-1]
    assert last.start + last.side == length + -length % 64  # as if the network saw all of it


def test_blocks_give_the_same_nuclei_as_the_whole(model, seen, monkeypatch):
    segmenter, truth = Segmenter([model]), discs(700, 900, 250)
    image = painted(truth)
    with open_slide(image) as slide:
        maps = np.zeros((2, *slide.shape), np.uint8)
        monkeypatch.setattr(Segmenter, "scale", lambda self, model: 1.0)  # seven rows of fields of 128 px
        assert list(segmenter.predict_rows(slide, maps, progress=False)) == [1, 2, 3, 4, 5, 6, 7]
        assert segmenter.row_ends(slide.shape)[-1] == 700
        np.testing.assert_array_equal(maps, image[..., :2].transpose(2, 0, 1))
    whole, parts = np.zeros((700, 900), np.int32), np.zeros((700, 900), np.int32)
    [one] = segmenter.label_blocks(maps, whole, block=2000)
    blocks = list(segmenter.label_blocks(maps, parts, block=200, halo=64))
    assert len(blocks) == 20 and sum(b.count for b in blocks) == parts.max() == one.count
    agreement = score(whole, parts)
    assert agreement.aji > 0.99 and agreement.pq > 0.99 and agreement.dice > 0.999
    for block in blocks:  # each knows its own nuclei, and only them
        window = parts[block.top : block.top + block.labels.shape[0], block.left : block.left + block.labels.shape[1]]
        assert (window[block.labels > 0] == block.labels[block.labels > 0]).all()
    threaded = np.zeros_like(parts)
    monkeypatch.setattr("nucseg.inference.segmenter.in_threads", lambda f, items, workers: in_threads(f, items, 4))
    list(segmenter.label_blocks(maps, threaded, block=200, halo=64, filled=iter([150, 500, 700])))
    np.testing.assert_array_equal(threaded, parts)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(60, 300), st.integers(30, 90))
def test_lone_nuclei_do_not_depend_on_the_blocks(seed, block, halo):
    rng = np.random.default_rng(seed)
    labels = np.zeros((320, 320), np.int32)
    for number, (y, x) in enumerate(np.ndindex(8, 8), 1):
        top, left = np.array([y, x]) * 40 + rng.integers(2, 12, 2)
        labels[top : top + rng.integers(8, 26), left : left + rng.integers(8, 26)] = number
    maps = np.rint(encode(labels) * 255).astype(np.uint8)
    out = np.zeros_like(labels)
    segmenter = Segmenter([build_tiny()])
    count = sum(b.count for b in segmenter.label_blocks(maps, out, block, halo))
    assert count == 64 == out.max()
    pairs = np.unique(np.stack([labels.ravel(), out.ravel()]), axis=1)
    assert pairs.shape[1] == 65  # background and one each: the same nuclei under other numbers


def build_tiny():
    class Tiny:
        mean = torch.zeros(1)
        config = ModelConfig(head="instance")
        n_maps = 2

    return Tiny()


def test_one_field_is_what_evaluation_sees(model):
    image = np.random.default_rng(1).integers(0, 220, (512, 512, 3), dtype=np.uint8)
    sure = np.abs(predict(model, image)[0] - 0.5) > 1 / 255  # maps are kept in steps of 1/255
    assert sure.mean() > 0.9
    # An untrained network finds specks: one px more or less at the rim decides which are large enough.
    whole, fields = segment_whole(model, image, min_area=0), segment(image, model, min_area=0)
    np.testing.assert_array_equal(whole[sure] > 0, fields[sure] > 0)


def test_one_field_drops_what_evaluation_drops(model, seen, monkeypatch):
    monkeypatch.setattr(evaluating, "predict", lambda model, image: predicting.predict(None, [image], 1, None)[0])
    labels = np.zeros((512, 512), np.int32)
    for number, side in enumerate((4, 6, 8, 10, 20), 1):  # 16, 36, 64, 100 and 400 px, around the 50 of `MIN_AREA`
        labels[40 : 40 + side, 60 * number : 60 * number + side] = number
    image = painted(labels)
    whole, fields = segment_whole(model, image), segment(image, model)
    np.testing.assert_array_equal(whole, fields)
    assert whole.max() == 3


def test_a_lower_ridge_cuts_fewer_apart():
    labels = np.repeat([[1, 2]], 40, axis=0).repeat(40, axis=1)
    maps = np.rint(encode(labels) * 255)
    maps[1] = 255 - (255 - maps[1]) * 0.4  # a valley of 0.6 or a little more, of peaks of 1

    def nuclei(ridge):
        out = np.zeros_like(labels)
        return sum(b.count for b in Segmenter([build_tiny()], ridge=ridge).label_blocks(maps.astype(np.uint8), out))

    assert [nuclei(ridge) for ridge in (0.5, 0.9)] == [1, 2]


def test_scale_follows_the_micrometres(model, monkeypatch):
    asked = []

    def fake(engine, images, scale, side):
        asked.extend((image.shape[:2], round(scale, 4)) for image in images)
        return [np.zeros((2, *image.shape[:2]), np.float32) for image in images]

    monkeypatch.setattr(predicting, "predict", fake)
    known = build_model(dataclasses.replace(model.config, um_per_px=0.25))
    image = textured(300, 600)
    segment(image, known)
    assert set(asked) == {((300, 512), 0.25), ((300, 472), 0.25)}  # 512 px are seen as 128
    asked.clear()
    segment(image, known, um_per_px=0.5)  # each px is two of the training images'
    assert {scale for _, scale in asked} == {0.5} and max(shape for shape, _ in asked) == (256, 256)
    assert Segmenter([known], um_per_px=0.5).smallest() == 12
    assert Segmenter([known], um_per_px=0.5, min_area=30).smallest() == 30  # px of these images, as documented
    assert Segmenter([known], um_per_px=0.5).smooth() == 1  # half the 2 px of the training images
    asked.clear()
    segment(image, model, um_per_px=0.5)  # the training resolution is not known: as they are
    assert set(asked) == {((300, 512), 0.25), ((300, 472), 0.25)}


def test_flips_average_four_views_in_place(model, monkeypatch):
    monkeypatch.setattr(
        predicting,
        "predict",
        lambda engine, images, scale, side: [np.stack([np.cumsum(np.ones(i.shape[:2]), axis=1)] * 2) for i in images],
    )
    maps = Segmenter([model], tta=True).maps([np.zeros((4, 9, 3), np.uint8)] * 2, model)
    np.testing.assert_allclose(maps, 5.0)  # 1..9 from the left and from the right


def test_an_ensemble_averages_and_blank_fields_are_skipped(model, monkeypatch):
    values = iter([0.2, 1.0])
    monkeypatch.setattr(predicting, "predict", lambda *_: [np.full((2, 8, 8), next(values))])
    maps = np.zeros((2, 8, 8), np.uint8)
    with open_slide(textured(8, 8)) as slide:
        list(Segmenter([model, model]).predict_rows(slide, maps, progress=False))
    assert (maps == 153).all()
    assert segment(np.full((40, 40, 3), 240, np.uint8), model).max() == 0  # or the iterator would be empty


def test_bad_values_are_refused(model):
    image = np.zeros((8, 8, 3), np.uint8)
    for change, word in (
        ({"um_per_px": -1.0}, "um_per_px"),
        ({"threshold": 2.0}, "threshold"),
        ({"min_area": -1}, "min_area"),
        ({"ridge": 1.1}, "ridge"),
    ):
        with pytest.raises(InputError, match=word):
            segment(image, model, **change)
    with pytest.raises(InputError, match="uint8"):
        segment(image.astype(float), model)
    with pytest.raises(InputError, match="nor one that ships"):
        segment(image, "nothing-of-that-name")
    with pytest.raises(InputError, match="one kind"):
        Segmenter([model, build_model(ModelConfig(base="random", size=64, rank=1))]).check()


def test_what_is_no_array_is_taken_or_refused_with_what_to_convert(model, seen):
    image = painted(discs(128, 128, 4))
    np.testing.assert_array_equal(segment(Image.fromarray(image), model), segment(image, model))
    for thing, words in (
        (torch.from_numpy(image), "not a tensor: pass image.permute"),
        (image.tolist(), "not a list: pass numpy.asarray"),
        (image / 255, r"float64 of shape 128 x 128 x 3: pass \(255 \* image\)"),
        ("a.png", r"not a path: open the file first, as in PIL.Image.open\('a.png'\)"),
        (image.transpose(2, 0, 1), "numpy.moveaxis"),
    ):
        with pytest.raises(InputError, match=words):
            segment(thing, model)


def test_the_command_line_has_the_same_defaults():
    options = vars(_parser().parse_args(["predict", "a.png", "--out", "out"]))
    for field in dataclasses.fields(Segmenter):
        if field.name != "models":
            assert options[field.name] == field.default, field.name


def test_nuclei_that_an_adapter_knows_as_small_are_kept(model):
    small = build_model(dataclasses.replace(model.config, field_px=128))  # a quarter of NuInsSeg's size
    segmenter = Segmenter([small])
    assert (segmenter.smallest(), segmenter.smooth()) == (3, 0.5)
    both = Segmenter([build_model(dataclasses.replace(small.config, um_per_px=0.5))], um_per_px=0.25)
    assert (both.smallest(), both.smooth()) == (12, 1)  # and twice as large again in images of half the µm per px


def test_a_file_says_its_own_resolution(model, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        predicting,
        "predict",
        lambda engine, images, scale, side: asked.append(round(scale, 4)) or [np.zeros((2, 100, 100), np.float32)],
    )
    known = build_model(dataclasses.replace(model.config, um_per_px=0.25))
    image = textured(100, 100)
    tifffile.imwrite(tmp_path / "a.tif", image, resolution=(20000, 20000), resolutionunit="CENTIMETER")  # 0.5 µm
    for segmenter in (Segmenter([known]), Segmenter([known], um_per_px=1)):
        assert segmenter.segment(tmp_path / "a.tif").shape == (100, 100)
    assert asked == [0.5, 1.0]


def test_a_tuned_adapter_decides_how_it_is_decoded_and_options_come_first(model, seen):
    """Pale discs are false, dark ones true: the classifier drops the pale ones, in whatever block they lie."""
    truth = discs(200, 300, 12)
    image = painted(truth)
    pale = truth % 2 == 1
    image[pale] = (image[pale] * 0.7).astype(np.uint8)
    maps = image[..., :2].transpose(2, 0, 1).astype(np.float32) / 255
    labels = Decoding().cut(maps)
    dark = features(labels, maps)[:, FEATURES.index("foreground_max")] > 0.9
    assert dark.any() and not dark.all()
    tuned = Decoding(threshold=0.4, min_area=60.0, min_confidence=0.5, classifier=fit(features(labels, maps), dark))
    adapter = build_model(model.config)
    adapter.decoding = tuned.to_dict()
    segmenter = Segmenter([adapter])
    assert segmenter.smallest() == 60 and segmenter.decoding() == tuned
    assert Segmenter([adapter], threshold=0.6, min_area=7).decoding().threshold == 0.6
    assert segmenter.segment(image).max() == dark.sum()
    assert segment(image, adapter, min_confidence=0.0).max() == len(dark) == segment(image, model).max()
    found = np.zeros(truth.shape, np.int32)
    list(segmenter.label_blocks(np.rint(maps * 255).astype(np.uint8), found, block=100, halo=40))
    assert found.max() == dark.sum()
    with pytest.raises(InputError, match="no object confidence"):
        segment(image, model, min_confidence=0.5)
    with pytest.raises(InputError, match="min_confidence"):
        segment(image, adapter, min_confidence=1.5)


# ---------------------------------------------------------------- black, glass and levels


def test_black_has_no_nuclei_and_is_seen_as_white(model, monkeypatch):
    views = []

    def everything(engine, images, scale, side):
        views.extend(image.copy() for image in images)
        return [np.ones((2, *image.shape[:2]), np.float32) for image in images]

    monkeypatch.setattr(predicting, "predict", everything)
    assert segment(np.zeros((512, 512, 3), np.uint8), model).max() == 0 and not views  # as a glass slide: not asked
    image = textured(200, 300)
    image[:, :120] = 0
    maps = np.zeros((2, 200, 300), np.uint8)
    with open_slide(image) as slide:
        list(Segmenter([model]).predict_rows(slide, maps, progress=False))
    assert (views[0][:, :120] == 255).all() and (views[0][:, 120:] == image[:, 120:]).all()
    assert not maps[:, :, :120].any() and (maps[:, :, 120:] == 255).all()


def test_glass_is_passed_over_in_large_images(model, monkeypatch):
    rng = np.random.default_rng(0)
    image = rng.integers(215, 250, (1200, 6000, 1), dtype=np.uint8).repeat(3, axis=2)  # no field of it is all white
    image[400:800, 4500:5100] = np.array([190, 110, 170]) + rng.integers(-20, 20, (400, 600, 3))
    asked = []

    def counting(engine, images, scale, side):
        asked.extend(images)
        return [np.zeros((2, *image.shape[:2]), np.float32) for image in images]

    monkeypatch.setattr(predicting, "predict", counting)
    monkeypatch.setattr(predicting, "LARGE", 2048)
    model = build_model(dataclasses.replace(model.config, size=512, field_px=512))
    counts = {}
    for tissue_mask in (True, False):
        asked.clear()
        Segmenter([model], tissue_mask=tissue_mask).segment(image)
        counts[tissue_mask] = len(asked)
    rows, columns = Segmenter([model]).layout(image.shape[:2])
    fields = len(rows) * len(columns)
    assert counts[False] == fields and 2 <= counts[True] <= fields / 2
    with open_slide(image) as slide:
        found = Segmenter([model]).tissue(slide)
    down = found.shape[0] / 1200
    inside = np.s_[round(410 * down) : round(790 * down), round(4510 * down) : round(5090 * down)]
    assert found[inside].all() and found.mean() < 1.3 * 400 * 600 / (1200 * 6000)


def test_a_slide_is_read_at_the_level_that_the_model_sees(model, monkeypatch, tmp_path):
    """A pyramid at 0.25 µm/px, a model of 0.5 µm/px: the level of half the size is read, the maps fit level 0."""
    truth = discs(600, 800, 60, radius=20)
    image = painted(truth)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as writer:
        about = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm"}
        writer.write(image, tile=(64, 64), photometric="rgb", subifds=1, metadata=about)
        writer.write(image[::2, ::2].copy(), tile=(64, 64), photometric="rgb", subfiletype=1)
    shapes = []

    def reading_off(engine, images, scale, side):
        shapes.extend((image.shape[:2], round(scale, 3)) for image in images)
        return [image[..., :2].transpose(2, 0, 1).astype(np.float32) / 255 for image in images]

    monkeypatch.setattr(predicting, "predict", reading_off)
    coarse = build_model(dataclasses.replace(model.config, size=512, field_px=512, um_per_px=0.5))
    found = Segmenter([coarse]).segment(tmp_path / "a.ome.tif")
    assert shapes == [((300, 400), 1.0)]  # seen as it is stored in that level
    assert found.shape == (600, 800) and score(truth, found).pq > 0.8
