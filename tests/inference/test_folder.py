"""Ownership of files in an output folder: files that nucseg did not write are never changed."""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nucseg.errors import InputError
from nucseg.inference.batch import predict_files
from nucseg.inference.folder import ENDINGS, OUTPUTS, find_images, read_record
from nucseg.inference.segmenter import Segmenter

pytestmark = pytest.mark.filterwarnings("ignore:.*pixel size of some images is not known")


class Stub:
    """A model without a network: dark is nucleus."""

    adapter_name, adapter_sha256, n_maps = "stub", "0" * 64, 2
    mean, head, decoding = torch.zeros(1), torch.nn.Identity(), {}

    class config:
        head, without, um_per_px, nucleus_scale, size, field_px = "instance", "", 0.0, 1.0, 64, 64

    head = torch.nn.Identity()


@pytest.fixture(autouse=True)
def dark(monkeypatch):
    def maps(engine, images, scale, side):
        darkness = [1 - image.astype(np.float32).mean(-1) / 255 for image in images]
        return [np.stack([dark, dark]) for dark in darkness]

    monkeypatch.setattr("nucseg.inference.engines.engine_for", lambda model, name: None)
    monkeypatch.setattr("nucseg.inference.segmenter.predict", maps)


HOW = Segmenter([Stub()], min_area=5)


def picture(path, seed=0, side=48):
    rng = np.random.default_rng(seed)
    image = np.full((side, side, 3), 220, np.uint8)
    y, x = np.mgrid[:side, :side]
    for cy, cx in rng.integers(6, side - 6, (4, 2)):
        image[(y - cy) ** 2 + (x - cx) ** 2 < 16] = (90, 60, 120)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def segment(*paths, out, outputs=OUTPUTS, **options):
    return predict_files(paths, out, HOW, outputs, progress=False, **options)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- the property

NAMES = [f"{stem}{ending}" for stem in ("a", "b", "sub/a") for ending in (*ENDINGS.values(), ".json")]
NAMES += ["summary.csv", "notes.txt", "a.txt", ".a.part/maps", ".a.part/state.json", ".a.part/notes.txt", ".b.part"]


@st.composite
def histories(draw):
    """Earlier segmentations with their outputs, what then happened to each file, and the outputs requested now."""
    outputs = st.lists(st.sampled_from(OUTPUTS), min_size=1, unique=True)
    before = draw(st.lists(outputs, max_size=2))
    fates = draw(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["foreign", "longer", "gone"]), max_size=6))
    return before, fates, draw(outputs), draw(st.booleans()), draw(st.booleans())


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(histories())
def test_predict_never_changes_a_byte_that_it_did_not_write(tmp_path, history):
    before, fates, outputs, same_folder, recursive = history
    shutil.rmtree(tmp_path / "d", ignore_errors=True)
    images = tmp_path / "d" / ("out" if same_folder else "images")
    out = tmp_path / "d" / "out"
    for seed, name in enumerate(("a.png", "b.png", "sub/a.png")):
        picture(images / name, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for some in before:
            segment(images, out=out, outputs=some, recursive=recursive)
        own = contents(out) if out.exists() else {}
        for name, fate in fates.items():
            path = out / name
            if fate == "gone" and path.is_file():
                path.unlink()
            elif fate != "gone" and not path.is_dir():
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                except FileExistsError:  # .b.part is a file or a folder
                    continue
                kept = path.read_bytes() if fate == "longer" and path.is_file() else b""
                path.write_bytes(kept + b'{"of": "the user"}')
        there = contents(tmp_path / "d")
        try:
            _, failures = segment(images, out=out, outputs=outputs, recursive=recursive)
        except InputError as error:
            assert contents(tmp_path / "d") == there, error  # refused before any work
            return
    now = contents(tmp_path / "d")
    for name, content in there.items():
        if now.get(name) != content:  # only files that nucseg rewrites, and only if they were unchanged
            assert Path(name).name == "summary.csv" or name.endswith(".json"), name
            assert own[Path(name).relative_to("out").as_posix()] == content, name
    broken = {name for name, fate in fates.items() if fate != "gone"}  # images or label maps that are now damaged
    # without its record, a label map of nucseg's own is taken for an image, and it is none
    broken |= {name.removesuffix(".json") + ".labels.tif" for name in fates if name.endswith(".json")}
    for path in failures:
        stem = path.relative_to(images).as_posix()
        assert stem in broken or {stem.replace(".png", end) for end in (".labels.tif", ".geojson")} & broken
    for stem in ("a", "b", *(["sub/a"] if recursive else [])):
        if images / f"{stem}.png" not in failures:
            assert {f"out/{stem}{ENDINGS[name]}" for name in outputs} <= now.keys()


# ---------------------------------------------------------------- one by one


@pytest.mark.filterwarnings("ignore:.*not images and skipped")
@pytest.mark.parametrize("name", ["a.geojson", "a.rois.zip", "summary.csv", "a.json", "a.labels.tif", ".a.part"])
def test_foreign_files_are_refused_before_any_work(tmp_path, name, monkeypatch):
    picture(tmp_path / "a.png")
    (tmp_path / name).write_text("the user's")
    monkeypatch.setattr("nucseg.inference.segmenter.predict", None)  # would be called, if anything were segmented
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"{name}' was not (written|made) by nucseg predict.*(move|--out)"):
        segment(tmp_path, out=tmp_path)
    assert contents(tmp_path) == before


def test_a_correction_is_kept_and_what_is_missing_is_made_from_it(tmp_path, monkeypatch):
    image, out = picture(tmp_path / "a.png"), tmp_path / "out"
    segment(image, out=out)
    labels = tifffile.imread(out / "a.labels.tif")
    corrected = np.where(labels == 1, 0, labels)
    tifffile.imwrite(out / "a.labels.tif", corrected)
    (out / "a.overlay.png").unlink(), (out / "a.geojson").unlink()
    before = contents(out)
    monkeypatch.setattr("nucseg.inference.segmenter.predict", None)
    with pytest.warns(UserWarning, match=r"a\.labels\.tif' has been changed.*kept"):
        segment(image, out=out)
    now = contents(out)
    assert {name for name in now if now[name] != before.get(name)} == {"a.overlay.png", "a.geojson", "a.json"}
    ids = {f["properties"]["measurements"]["area_px"] for f in json.loads(now["a.geojson"])["features"]}
    assert ids == {float(n) for n in np.bincount(corrected.ravel())[1:] if n}
    assert len(json.loads(now["a.geojson"])["features"]) == labels.max() - 1


@pytest.mark.parametrize("first", [["labels"], ["geojson", "csv"]])
def test_outputs_are_added_without_segmenting_again(tmp_path, monkeypatch, first):
    image = picture(tmp_path / "a.png")
    segment(image, out=tmp_path / "at once")
    segment(image, out=tmp_path / "one by one", outputs=first)
    monkeypatch.setattr("nucseg.inference.segmenter.predict", None)
    segment(image, out=tmp_path / "one by one")
    one, other = contents(tmp_path / "at once"), contents(tmp_path / "one by one")
    for name in ENDINGS.values():
        assert one[f"a{name}"] == other[f"a{name}"], name
    record = read_record(tmp_path / "one by one" / "a.json")
    for name, digest in record["files"].items():
        assert hashlib.sha256(other[f"a{ENDINGS[name]}"]).hexdigest() == digest


def test_the_ids_of_nuclei_differ_between_settings(tmp_path):
    image = picture(tmp_path / "a.png")
    ids = []
    for number, how in enumerate((HOW, Segmenter([Stub()], min_area=4), HOW)):
        predict_files([image], tmp_path / str(number), how, ["geojson"], progress=False)
        about = json.loads((tmp_path / str(number) / "a.geojson").read_text())
        ids.append({one["id"] for one in about["features"]})
    assert ids[0] == ids[2] and not ids[0] & ids[1]


def test_a_changed_record_is_not_written_over(tmp_path):
    image, out = picture(tmp_path / "a.png"), tmp_path / "out"
    segment(image, out=out, outputs=["labels"])
    about = json.loads((out / "a.json").read_text()) | {"note": "checked by eye"}
    (out / "a.json").write_text(json.dumps(about))
    segment(image, out=out, outputs=["labels"])  # nothing to do
    with pytest.raises(InputError, match=r"a\.json' has been changed"):
        segment(image, out=out)
    assert json.loads((out / "a.json").read_text())["note"] == "checked by eye"


# ---------------------------------------------------------------- which images


def names(paths, **options):
    return [job.name for job in find_images(paths, **options)]


def test_what_is_skipped_is_named_and_counted(tmp_path):
    picture(tmp_path / "a.png"), picture(tmp_path / "more" / "b.png")
    for name in ("scan.czi", "notes.docx", "Thumbs.db", ".hidden.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning) as said:
        assert names([tmp_path]) == ["a.png"]
    words = [str(one.message) for one in said]
    assert "2 files are not images and skipped: notes.docx, scan.czi" in words[0]
    assert "1 subfolder not entered (more); pass --recursive" in words[1]


def test_every_ending_is_found_and_subfolders_on_request(tmp_path, recwarn):
    for name in ("a.svs", "b.NDPI", "c.ome.tif", "d.jp2", "e/f.PNG", "e/g/h.mrxs"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert names([tmp_path], recursive=True) == ["a.svs", "b.NDPI", "c.ome.tif", "d.jp2", "e/f.PNG", "e/g/h.mrxs"]
    assert not recwarn


def test_subfolders_keep_their_places(tmp_path):
    for name in ("a.png", "x/a.png"):
        picture(tmp_path / "in" / name)
    summary, failures = segment(tmp_path / "in", out=tmp_path / "out", outputs=["csv"], recursive=True)
    assert not failures and list(summary["image"]) == ["a.png", "x/a.png"]
    assert set(contents(tmp_path / "out")) == {
        "summary.csv", "a.json", "a.nuclei.csv", "x/a.json", "x/a.nuclei.csv"
    }  # fmt: skip


def test_wildcards_that_no_shell_expanded(tmp_path):
    for name in ("a1.png", "a2.png", "b.png"):
        picture(tmp_path / name)
    assert names([str(tmp_path / "a*.png")]) == ["a1.png", "a2.png"]
    picture(tmp_path / "x[1].png")
    assert names([str(tmp_path / "x[1].png")]) == ["x[1].png"]  # a name, not a pattern
    with pytest.raises(InputError, match=r"No file matches .*c\*\.png"):
        names([str(tmp_path / "c*.png")])


@pytest.mark.skipif(os.name == "nt", reason="shorter names")
def test_names_too_long_for_their_results_are_refused_first(tmp_path):
    picture(tmp_path / ("n" * 220 + ".png"))
    assert segment(tmp_path / ("n" * 220 + ".png"), out=tmp_path / "out")[1] == {}
    picture(tmp_path / ("n" * 240 + ".png"))
    with pytest.raises(InputError, match="too long by"):
        find_images([tmp_path / ("n" * 240 + ".png")])


@pytest.mark.parametrize("error", [MemoryError(), type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")])
def test_an_image_that_does_not_fit_into_memory_is_one_sentence(tmp_path, monkeypatch, error):
    first, second = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", 1)
    maps = Segmenter.maps

    def full(self, images, *rest):
        if (images[0][:8] == np.asarray(Image.open(first))[:8]).all():
            raise error
        return maps(self, images, *rest)

    monkeypatch.setattr(Segmenter, "maps", full)
    summary, failures = segment(first, second, out=tmp_path / "out", outputs=["csv"])
    assert list(summary["image"]) == ["b.png"]
    assert list(failures) == [first] and "does not fit into memory" in failures[first]
