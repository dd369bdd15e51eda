"""Thousands of damaged or hostile inputs: each gives a correct result or one clear sentence. See FAULTS.md."""

import contextlib
import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nucseg.config import Config, ModelConfig, apply, read_toml
from nucseg.errors import InputError
from nucseg.images.masks import read_labels
from nucseg.images.polygons import read_rois
from nucseg.images.slides import open_slide, read_image
from nucseg.model.adapters import read_adapter
from nucseg.model.network import build_model, load_model, save_model
from nucseg.studies.study import read_study

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns about damaged tags
many = settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def damage(draw, size):
    """A function that flips, cuts and doubles bytes."""
    changes = draw(st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, 255)), max_size=6))
    cut = draw(st.integers(0, size))
    keep_all = draw(st.booleans())

    def apply_to(raw):
        raw = bytearray(raw)
        for at, value in changes:
            raw[at % len(raw)] = value
        return bytes(raw if keep_all else raw[:cut])

    return apply_to


def encoded(kind, array):
    buffer = io.BytesIO()
    if kind == "tiff":
        tifffile.imwrite(buffer, array, compression="zlib", photometric="minisblack" if array.ndim == 2 else "rgb")
    else:
        Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


IMAGES = {kind: encoded(kind, np.full((20, 24, 3), 99, np.uint8)) for kind in ("png", "jpeg", "bmp", "tiff")}
MASKS = {kind: encoded(kind, np.arange(480, dtype=np.uint16).reshape(20, 24) // 97) for kind in ("png", "tiff")}


@many
@given(st.data())
@pytest.mark.parametrize("kind", IMAGES)
def test_a_damaged_image_is_read_or_refused(tmp_path, kind, data):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(data.draw(damage(len(IMAGES[kind])))(IMAGES[kind]))
    try:
        image = read_image(path)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


@many
@given(st.data())
@pytest.mark.parametrize("kind", MASKS)
def test_a_damaged_mask_is_read_or_refused(tmp_path, kind, data):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(data.draw(damage(len(MASKS[kind])))(MASKS[kind]))
    try:
        labels = read_labels(path)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert labels.dtype == np.int32 and labels.ndim == 2
        assert set(np.unique(labels)) - {0} == set(range(1, labels.max() + 1))


TOML = """preset = "instance"
[fixed]
size = 512
lr = 1e-3
[runs.a]
rank = 8
[grid]
fold = [0, 1]
"""


@many
@given(st.one_of(st.binary(max_size=60), damage(len(TOML)).map(lambda d: d(TOML.encode()))))
def test_any_toml_is_read_or_refused(tmp_path, raw):
    path = tmp_path / "a.toml"
    path.write_bytes(raw)
    for read in (lambda: apply(Config(), read_toml(path), str(path)), lambda: read_study(path)):
        try:
            read()
        except InputError as error:
            assert "\n" not in str(error).strip()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    save_model(path, build_model(ModelConfig(base="random", size=64, rank=1, lora_target="qkv")))
    return path.read_bytes()


@many
@given(data=st.data())
def test_a_damaged_adapter_is_refused(tmp_path, adapter, data):
    path = tmp_path / "a.safetensors"
    header = 8 + struct.unpack("<Q", adapter[:8])[0]
    raw = data.draw(damage(header))(adapter)  # in the header: a changed weight is a weight
    path.write_bytes(raw)
    try:
        _, config, base = read_adapter(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(config, dict) and isinstance(base, str)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_model_of_a_damaged_adapter_is_whole_or_refused(tmp_path, adapter, data):
    path = tmp_path / "a.safetensors"
    header = 8 + struct.unpack("<Q", adapter[:8])[0]
    path.write_bytes(data.draw(damage(header))(adapter))
    with contextlib.suppress(InputError):
        load_model(path)


def test_bombs_are_refused(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = tmp_path / "bomb.png"
    chunks = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    for read in (read_image, read_labels):
        with pytest.raises(InputError, match=r"bomb\.png"):
            read(bomb)
    with pytest.raises(InputError, match=r"bomb\.png"), open_slide(bomb):
        pass
    tiff = tmp_path / "bomb.tif"  # one strip that claims ten gigabytes
    tifffile.imwrite(tiff, np.zeros((8, 8, 3), np.uint8), photometric="rgb", compression="zlib")
    raw = bytearray(tiff.read_bytes())
    with tifffile.TiffFile(tiff) as file:
        tags = [file.pages.first.tags[name] for name in ("ImageWidth", "ImageLength", "RowsPerStrip")]
        places = [(tag.valueoffset, tag.dtype) for tag in tags]
    for at, kind in places:
        raw[at : at + 2] = struct.pack("<H", 60_000)
        assert kind in (3, 4)
    tiff.write_bytes(raw)
    with pytest.raises(InputError, match=r"bomb\.tif"), open_slide(tiff) as slide:
        slide.read(0, 0, 10, 10)
    with pytest.raises(InputError, match=r"bomb\.tif"):
        read_image(tiff)
    (tmp_path / "x.zip").write_bytes(b"PK\x05\x06" + bytes(18))  # an empty archive: no nuclei, no error
    assert not read_rois(tmp_path / "x.zip", (4, 4)).any()


def test_every_fault_of_the_table_has_its_test():
    folder = Path(__file__).parents[1]
    rows = re.findall(r"(test_\w+\.py)::(\w+) \|$", (folder / "FAULTS.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 15
    for file, name in rows:
        assert re.search(rf"def {name}\b", next(folder.rglob(file)).read_text(encoding="utf-8")), (file, name)
