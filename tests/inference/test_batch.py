"""Files in, files out; and the table of faults: what was broken, what happened, what was lost (nothing)."""

import dataclasses
import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from geojson_pydantic import FeatureCollection
from PIL import Image
from skimage.measure import regionprops

import nucseg.inference.batch as batch
from nucseg.cli import main
from nucseg.config import ModelConfig
from nucseg.errors import Busy, InputError
from nucseg.files import only_one
from nucseg.images.polygons import read_geojson, read_rois
from nucseg.inference.batch import Scratch, predict_files
from nucseg.inference.confidence import FEATURES, features, fit
from nucseg.inference.decoding import Decoding
from nucseg.inference.folder import Job, find_images
from nucseg.inference.segmenter import Segmenter, load, segment
from nucseg.model.network import build_model, save_model

pytestmark = pytest.mark.filterwarnings("ignore:.*pixel size of some images is not known")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A small model whose head looks at darkness: made by hand, so that it finds something without training."""
    model = build_model(ModelConfig(base="random", head="instance", size=256, field_px=256, rank=1, um_per_px=0.25))
    path = tmp_path_factory.mktemp("adapter") / "dark.safetensors"
    save_model(path, model)
    return path


class Dark:
    """Replaces the network: dark pixels are nuclei, and darkness is the distance map."""

    def __call__(self, engine, images, scale, side):
        darks = [1 - image.astype(np.float32).mean(-1) / 255 for image in images]
        return [np.stack([dark, dark]) for dark in darks]


@pytest.fixture
def segmenter(adapter, monkeypatch):
    monkeypatch.setattr("nucseg.inference.segmenter.predict", Dark())
    return Segmenter([load(adapter)], min_area=20)


def slide(path, shape=(300, 420), seed=0, **options):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = np.full((*shape, 3), 220, np.uint8)
    for top, left in rng.integers(15, np.array(shape) - 15, (shape[0] * shape[1] // 3000, 2)):
        image[(y - top) ** 2 + (x - left) ** 2 < 90] = (90, 60, 120)
    if Path(path).suffix == ".tif":
        tifffile.imwrite(path, image, photometric="rgb", tile=(64, 64), **options)
    else:
        Image.fromarray(image).save(path)
    return image


def names(out):
    return sorted(p.name for p in out.iterdir())


def test_every_output_agrees_with_the_label_map(tmp_path, segmenter):
    image = slide(tmp_path / "a.tif", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    out = tmp_path / "out"
    summary, failures = predict_files([tmp_path / "a.tif"], out, segmenter, progress=False)
    assert not failures
    ends = ["geojson", "json", "labels.tif", "nuclei.csv", "overlay.png", "rois.zip"]
    assert names(out) == [f"a.{end}" for end in ends] + ["summary.csv"]
    labels = tifffile.imread(out / "a.labels.tif")
    np.testing.assert_array_equal(labels, segment(image, segmenter.models[0], um_per_px=0.5, min_area=20))
    table = pd.read_csv(out / "a.nuclei.csv").set_index("id")
    assert summary.loc[0, "nuclei"] == len(table) == labels.max() > 5
    assert summary.loc[0, "um_per_px"] == 0.5
    for region in regionprops(labels):
        assert table.loc[region.label, "area_px"] == region.area
        assert table.loc[region.label, "area_um2"] == region.area / 4
        centroid = table.loc[region.label, ["centroid_y_px", "centroid_x_px"]] - 0.5  # from the corner of the first px
        assert centroid.tolist() == pytest.approx(region.centroid)
    text = (out / "a.geojson").read_text()
    assert len(FeatureCollection.model_validate_json(text).features) == labels.max()
    np.testing.assert_array_equal(read_geojson(out / "a.geojson", labels.shape), labels)
    rois = read_rois(out / "a.rois.zip", labels.shape)
    np.testing.assert_array_equal(rois, labels)
    assert np.asarray(Image.open(out / "a.overlay.png")).shape == image.shape


def test_the_confidence_of_each_nucleus_is_written(tmp_path, segmenter):
    image = slide(tmp_path / "a.png", shape=(260, 300))
    maps = Dark()(None, [image], 1.0, None)[0]
    labels = Decoding().cut(maps)
    table = features(labels, maps)
    large = table[:, FEATURES.index("log_area")] > np.median(table[:, FEATURES.index("log_area")])
    tuned = Decoding(min_area=20.0, min_confidence=0.3, classifier=fit(table, large))
    segmenter.models[0].decoding = tuned.to_dict()
    how, out = Segmenter(segmenter.models), tmp_path / "out"
    predict_files([tmp_path / "a.png"], out, how, ["labels", "csv", "geojson"], progress=False)
    written = pd.read_csv(out / "a.nuclei.csv").set_index("id")["confidence"]
    assert 0 < len(written) < labels.max() and written.min() >= 0.3 and written.max() <= 1
    eight_bit = np.rint(maps * 255).astype(np.float32) / 255  # as the maps are kept
    expected_labels, expected = tuned.decode(eight_bit, how.nucleus_scale())
    found = tifffile.imread(out / "a.labels.tif")
    for number in written.index:  # the same nuclei, whatever their numbers
        theirs = np.unique(expected_labels[found == number])
        assert len(theirs) == 1 and written[number] == pytest.approx(expected[theirs[0] - 1], abs=1e-5)
    nuclei = json.loads((out / "a.geojson").read_text())["features"]
    assert [n["properties"]["measurements"]["confidence"] for n in nuclei] == written.round(4).tolist()
    # outputs that are added later take it from the table, since the maps are gone
    (out / "a.geojson").unlink()
    predict_files([tmp_path / "a.png"], out, how, ["labels", "csv", "geojson"], progress=False)
    again = json.loads((out / "a.geojson").read_text())["features"]
    assert sorted(n["properties"]["measurements"]["confidence"] for n in again) == sorted(written.round(4))


def test_finished_images_are_skipped_and_other_settings_refused(tmp_path, segmenter, monkeypatch):
    slide(tmp_path / "a.png")
    out = tmp_path / "out"
    first, _ = predict_files([tmp_path / "a.png"], out, segmenter, ["csv"], progress=False)
    monkeypatch.setattr("nucseg.inference.segmenter.predict", None)  # would be called, if anything were segmented again
    again, failures = predict_files([tmp_path / "a.png"], out, segmenter, ["csv"], progress=False)
    pd.testing.assert_frame_equal(first, again)
    assert not failures
    summary, failures = predict_files([tmp_path / "a.png"], out, Segmenter(segmenter.models), ["csv"], progress=False)
    assert summary.empty  # the old result is not shown as if it were this one's
    assert "min_area" in failures[tmp_path / "a.png"]
    slide(tmp_path / "a.png", seed=1)
    _, failures = predict_files([tmp_path / "a.png"], out, segmenter, ["csv"], progress=False)
    assert "image_sha256" in failures[tmp_path / "a.png"]


def test_images_of_one_name_and_missing_ones(tmp_path):
    (tmp_path / "x").mkdir()
    slide(tmp_path / "x" / "a.png"), slide(tmp_path / "a.tif")
    assert [job.path for job in find_images([tmp_path / "x", tmp_path / "x" / "a.png"])] == [tmp_path / "x" / "a.png"]
    with pytest.raises(InputError, match="same name"):
        find_images([tmp_path / "x", tmp_path / "a.tif"])
    with pytest.raises(InputError, match="no file or folder"):
        find_images([tmp_path / "b.tif"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no images"):
        find_images([tmp_path / "empty"])


def test_from_the_command_line(tmp_path, adapter, capsys):
    slide(tmp_path / "a.png", (80, 90))
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    words = [str(tmp_path / "a.png"), str(tmp_path / "bad.png"), "--adapter", str(adapter), "--device", "cpu"]
    assert main(["predict", *words, "--out", str(tmp_path / "out"), "--outputs", "labels,csv"]) == 1
    said = capsys.readouterr()
    assert "bad.png failed" in said.err and "some images is not known" in said.err and "a.png" in said.out
    assert names(tmp_path / "out") == ["a.json", "a.labels.tif", "a.nuclei.csv", "summary.csv"]
    assert main(["predict", str(tmp_path / "none.png"), "--out", str(tmp_path / "o"), "--adapter", str(adapter)]) == 2
    assert main(["predict", *words, "--out", str(tmp_path / "o"), "--outputs", "pdf"]) == 2


# ---------------------------------------------------------------- faults


class Killed(BaseException):
    """Simulates a kill: nothing in the package catches it."""


def whole(out):
    """Everything but the seconds (and the hash of a record with them), by file."""
    result = {}
    for path in sorted(out.iterdir()):
        if path.suffix == ".json":
            result[path.name] = {
                k: v for k, v in json.loads(path.read_text()).items() if k not in ("seconds", "record_sha256")
            }
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                result[path.name] = {n: archive.read(n) for n in archive.namelist()}
        elif path.suffix not in (".csv",) or "summary" not in path.name:
            result[path.name] = path.read_bytes()
    return result


@pytest.fixture
def unbroken(tmp_path, segmenter):
    slide(tmp_path / "a.tif", (700, 500))
    predict_files([tmp_path / "a.tif"], tmp_path / "unbroken", segmenter, progress=False)
    return tmp_path / "a.tif", whole(tmp_path / "unbroken")


@pytest.mark.parametrize("row", [0, 1])
def test_killed_between_rows(unbroken, tmp_path, segmenter, monkeypatch, row):
    path, expected = unbroken
    rows = Segmenter.predict_rows

    def breaking(*arguments, **options):
        for done in rows(*arguments, **options):
            if done == row + 1:
                raise Killed  # before it is written down that the row is done
            yield done

    monkeypatch.setattr(Segmenter, "predict_rows", breaking)
    with pytest.raises(Killed):
        predict_files([path], tmp_path / "out", segmenter, progress=False)
    assert not [n for n in names(tmp_path / "out") if not n.startswith(".")]
    started = []
    monkeypatch.setattr(
        Segmenter, "predict_rows", lambda s, h, m, start, **o: started.append(start) or rows(s, h, m, start, **o)
    )
    predict_files([path], tmp_path / "out", segmenter, progress=False)
    assert started == [row] and whole(tmp_path / "out") == expected


@pytest.mark.parametrize("former", [[300, 700], None])
def test_rows_of_another_layout_are_predicted_again(unbroken, tmp_path, segmenter, monkeypatch, former):
    path, expected = unbroken
    rows = Segmenter.predict_rows

    def breaking(*arguments, **options):
        yield next(rows(*arguments, **options))
        raise Killed

    monkeypatch.setattr(Segmenter, "predict_rows", breaking)
    with pytest.raises(Killed):
        predict_files([path], tmp_path / "out", segmenter, progress=False)
    written = tmp_path / "out" / ".a.part" / "state.json"
    state = json.loads(written.read_text())
    assert state.pop("row_ends") == segmenter.row_ends((700, 500)) and state["rows"] == 1
    written.write_text(json.dumps(state | ({"row_ends": former} if former else {})))
    started = []
    monkeypatch.setattr(
        Segmenter, "predict_rows", lambda s, h, m, start, **o: started.append(start) or rows(s, h, m, start, **o)
    )
    predict_files([path], tmp_path / "out", segmenter, progress=False)
    assert started == [0] and whole(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "step",
    ["segmenter.Segmenter.label_blocks", "batch.export.write_labels", "batch.export.write_overlay", "write_json"],
)
def test_killed_or_disk_full_while_writing(unbroken, tmp_path, segmenter, monkeypatch, step):
    path, expected = unbroken
    for fault in (Killed(), OSError(errno.ENOSPC, "No space left on device")):
        out = tmp_path / type(fault).__name__
        with monkeypatch.context() as broken:

            def fail(*arguments, fault=fault, **options):
                raise fault

            if step == "write_json":
                write = batch.write_json
                broken.setattr(
                    batch, step, lambda p, v, *a, write=write, **o: fail() if "nuclei" in v else write(p, v, *a, **o)
                )
            else:
                broken.setattr(f"nucseg.inference.{step}", fail)
            if isinstance(fault, Killed):
                with pytest.raises(Killed):
                    predict_files([path], out, segmenter, progress=False)
            else:
                summary, failures = predict_files([path], out, segmenter, progress=False)
                assert "No space left" in failures[path] and summary.empty
        assert not (out / "a.json").exists()
        predict_files([path], out, segmenter, progress=False)
        assert whole(out) == expected


@pytest.mark.parametrize(
    "content", [b'{"rows": 99, "settings": null, "seconds": 0}', b'{"rows": "x", "settings": {}, "seconds": "y"}']
)
def test_a_damaged_state_file_starts_again(unbroken, tmp_path, segmenter, content):
    path, expected = unbroken
    work = tmp_path / "out" / ".a.part"
    work.mkdir(parents=True)
    (work / "state.json").write_bytes(content)
    (work / "maps").write_bytes(bytes(2 * 700 * 500))
    predict_files([path], tmp_path / "out", segmenter, progress=False)
    assert whole(tmp_path / "out") == expected


@pytest.mark.parametrize("content", [b"", b"{", b'{"settings": 1}', b"\xff\xfe"])
def test_a_state_file_that_may_not_be_ours_is_refused(unbroken, tmp_path, segmenter, content):
    path, _ = unbroken
    work = tmp_path / "out" / ".a.part"
    work.mkdir(parents=True)
    (work / "state.json").write_bytes(content)
    (work / "maps").write_bytes(b"of another program")
    with pytest.raises(InputError, match=r"\.a\.part' was not made by nucseg predict, or is damaged"):
        predict_files([path], tmp_path / "out", segmenter, progress=False)
    assert (work / "state.json").read_bytes() == content
    assert (work / "maps").read_bytes() == b"of another program"


def test_a_damaged_result_is_named(unbroken, tmp_path, segmenter):
    path, _ = unbroken
    (tmp_path / "unbroken" / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json' was not written by nucseg predict, or is damaged"):
        predict_files([path], tmp_path / "unbroken", segmenter, progress=False)
    assert (tmp_path / "unbroken" / "a.json").read_text() == "{"


def test_a_disk_that_is_too_small_is_found_out_first(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(batch.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="GiB free"):
        Scratch(tmp_path / "maps", (2, 100, 100), np.uint8)
    assert not (tmp_path / "maps").exists()


def test_another_process_on_the_same_image_is_left_alone(unbroken, tmp_path, segmenter):
    path, _ = unbroken
    with only_one(tmp_path / "out" / ".a.part"):
        with pytest.raises(Busy):
            batch.predict_file(Job(path), tmp_path / "out", segmenter, progress=False)
        summary, failures = predict_files([path], tmp_path / "out", segmenter, progress=False)
    assert summary.empty and not failures and "a.json" not in names(tmp_path / "out")


def _work(adapter, paths, out, barrier):
    import nucseg.inference.segmenter as predicting

    predicting.predict = Dark()
    barrier.wait()
    predict_files(paths, out, Segmenter([load(adapter)], min_area=20), progress=False)


def test_two_processes_share_a_folder(tmp_path, adapter, segmenter):
    paths = [tmp_path / f"{name}.tif" for name in "abcd"]
    for seed, path in enumerate(paths):
        slide(path, (300, 300), seed)
    predict_files(paths, tmp_path / "alone", segmenter, progress=False)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_work, args=(adapter, paths, tmp_path / "both", barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert whole(tmp_path / "both") == whole(tmp_path / "alone")


@pytest.mark.skipif(not hasattr(os, "kill") or sys.platform == "win32", reason="needs SIGKILL")
def test_a_process_that_is_really_killed_goes_on(tmp_path, adapter):
    slide(tmp_path / "a.tif", (1100, 400))
    words = [sys.executable, "-m", "nucseg.cli", "predict", str(tmp_path / "a.tif"), "--adapter", str(adapter)]
    words += ["--device", "cpu", "--um-per-px", "0.25"]
    subprocess.run([*words, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen(
        [*words, "--out", str(tmp_path / "out")], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    state = tmp_path / "out" / ".a.part" / "state.json"
    until = time.monotonic() + 60
    while not state.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    process.wait()
    subprocess.run([*words, "--out", str(tmp_path / "out")], check=True, capture_output=True)
    assert whole(tmp_path / "out") == whole(tmp_path / "whole")


def test_a_folder_of_images_and_results_in_one(tmp_path, segmenter):
    for name in ("a.png", "b.png"):
        slide(tmp_path / name, seed=ord(name[0]))
    first, failures = predict_files([tmp_path], tmp_path, segmenter, progress=False)
    assert len(first) == 2 and not failures
    before = names(tmp_path)
    second, failures = predict_files(
        [tmp_path], tmp_path, segmenter, progress=False
    )  # overlays and label maps are not images
    assert not failures and names(tmp_path) == before
    pd.testing.assert_frame_equal(first, second)


def test_the_summary_is_of_the_folder_and_what_was_deleted_is_made_again(tmp_path, segmenter):
    for name in ("a.png", "b.png"):
        slide(tmp_path / name)
    out = tmp_path / "out"
    predict_files([tmp_path], out, segmenter, progress=False)
    labels = (out / "a.labels.tif").read_bytes()
    (out / "a.labels.tif").unlink()
    (out / "notes.json").write_text('{"nuclei": 3}')  # not nucseg's
    (out / "more.json").mkdir()
    again, failures = predict_files([tmp_path / "a.png"], out, segmenter, progress=False)
    assert not failures and (out / "a.labels.tif").read_bytes() == labels
    assert list(again["image"]) == ["a.png"]
    assert list(pd.read_csv(out / "summary.csv")["image"]) == ["a.png", "b.png"]


def test_places_on_a_large_slide_keep_their_decimals(tmp_path, segmenter, monkeypatch):
    slide(tmp_path / "a.png")
    table = batch.export.export_block

    def far(block, slide_, name):
        rows, features, rois = table(block, slide_, name)
        return rows.assign(centroid_x_px=rows["centroid_x_px"] + 123_456), features, rois

    monkeypatch.setattr(batch.export, "export_block", far)
    predict_files([tmp_path / "a.png"], tmp_path / "out", segmenter, ["csv", "labels"], progress=False)
    found = pd.read_csv(tmp_path / "out" / "a.nuclei.csv")["centroid_x_px"].to_numpy() - 123_456
    true = [r.centroid[1] + 0.5 for r in regionprops(tifffile.imread(tmp_path / "out" / "a.labels.tif"))]
    np.testing.assert_allclose(found, true, atol=0.006)


@pytest.mark.filterwarnings("default")
def test_an_adapter_without_a_resolution_says_what_um_per_px_does_not_do(tmp_path, segmenter):
    slide(tmp_path / "a.png")
    bare = load_like(segmenter.models[0], um_per_px=0.0)
    with pytest.warns(UserWarning, match="changes no scale"):
        predict_files([tmp_path / "a.png"], tmp_path / "out", Segmenter([bare], um_per_px=0.5), progress=False)
    both = Segmenter([segmenter.models[0], bare], um_per_px=0.5)
    with pytest.raises(InputError, match="different scales"):
        predict_files([tmp_path / "a.png"], tmp_path / "both", both, progress=False)


def load_like(model, **changes):
    """The model with another configuration."""
    other = build_model(dataclasses.replace(model.config, **changes))
    other.adapter_name, other.adapter_sha256 = "other", "0" * 64
    return other
