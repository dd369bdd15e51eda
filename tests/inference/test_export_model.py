"""Exported files give the model's maps, and what cannot be exported is refused before anything is written."""

import dataclasses
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nucseg.config import ModelConfig
from nucseg.data.synth import generate
from nucseg.errors import InputError
from nucseg.inference import export_model
from nucseg.inference.engines import TorchEngine
from nucseg.inference.export_model import decoding, export
from nucseg.inference.segmenter import Segmenter, load
from nucseg.instances import labels_from
from nucseg.metrics import score
from nucseg.model import lora
from nucseg.model.network import build_model, place

PAGE = Path(__file__).parents[2] / "book" / "export.md"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = build_model(ModelConfig(base="offline", head="instance", size=512, rank=2))
    for layer in lora.lora_layers(made).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    made.adapter_name = "test"
    return made


@pytest.fixture(scope="module")
def tile():
    return generate("human liver", 0, size=128).image


def nuclei(maps: np.ndarray) -> np.ndarray:
    return labels_from(maps, 0.5, 50)


def test_torchscript(model, tile, tmp_path):
    [(path, difference)] = export(model, tmp_path, tile, ["torchscript"]).values()
    assert json.loads((tmp_path / "test.decoding.json").read_text()) == decoding(model)
    assert path.name == "test.torchscript.pt" and difference < 1e-4
    other = generate("mouse kidney", 1, size=128).image
    maps = torch.jit.load(str(path))(torch.from_numpy(other.transpose(2, 0, 1)[None].copy())).numpy()
    np.testing.assert_allclose(maps, TorchEngine(model)(other[None]), atol=1e-4)


def test_onnx(model, tile, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    [(path, difference)] = export(model, tmp_path, tile, ["onnx"]).values()
    assert path.name == "test.onnx" and difference < 1e-4
    other = generate("mouse kidney", 1, size=128).image
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [maps] = session.run(["maps"], {"image": other.transpose(2, 0, 1)[None]})
    expected = TorchEngine(model)(other[None])
    np.testing.assert_allclose(maps, expected, atol=1e-4)
    assert score(nuclei(expected[0]), nuclei(maps[0])).aji >= 0.99


def test_the_code_of_the_books_page_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    if not PAGE.exists():
        pytest.skip("the book is not part of an installed package")
    trained = place(load(device="cpu"), torch.device("cpu"), "float32")
    image = generate("human liver", 0, size=256).image
    side = round(256 * Segmenter([trained]).scale(trained))
    assert side % 64 == 0  # so that nucseg.segment does not pad the image
    view = np.asarray(Image.fromarray(image).resize((side, side)))
    export(trained, tmp_path / "exported", view, ["onnx", "torchscript"])
    Image.fromarray(image).save(tmp_path / "tile.png")
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(first, names)
    exec(second, names)
    assert names["same"].shape == (1, 2, side, side) and names["maps"].shape == (2, 256, 256)
    resized = [Image.fromarray(one).resize((256, 256), Image.Resampling.BILINEAR) for one in names["same"][0]]
    np.testing.assert_allclose(np.stack(resized), names["maps"], atol=1e-4)
    expected = Segmenter([trained], min_confidence=0).segment(image)
    assert capsys.readouterr().out == f"{names['labels'].max()} nuclei\n"
    assert expected.max() > 0 and score(expected, names["labels"]).aji >= 0.98  # maps in steps of 1/255 there


def test_bioimageio(model, tile, tmp_path):
    pytest.importorskip("onnx")
    core = pytest.importorskip("bioimageio.core")
    try:
        written = export(model, tmp_path, tile)
    except Exception as error:  # bioimageio.spec does not work with every pydantic
        if "serializer" in str(error):
            pytest.skip(f"this bioimageio.spec does not work with this pydantic: {str(error)[:200]}")
        raise
    path, difference = written["bioimageio"]
    assert difference < 1e-4
    assert core.test_model(path).status == "passed"
    with zipfile.ZipFile(path) as package:
        text = package.read(next(name for name in package.namelist() if name.endswith(".yaml"))).decode()
    assert "ridge" in text and "min_area_px" in text


def test_the_decoding_is_what_predict_does(model):
    small = build_model(dataclasses.replace(model.config, field_px=256))
    values = decoding(small)
    assert values == json.loads(json.dumps(values))
    assert values["channels"] == ["foreground", "distance"]
    assert (values["min_area_px"], values["smooth_px"], values["scale"]) == (12, 1.0, 2.0)


def test_what_cannot_be_exported_is_refused(model, tile, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="not known"):
        export(model, tmp_path, tile, ["tflite"])
    with pytest.raises(InputError, match="multiples of 16"):
        export(model, tmp_path, tile[:100], ["torchscript"])
    monkeypatch.setattr(export_model, "_installed", lambda name: False)
    with pytest.raises(InputError, match=r"nucseg\[export\]"):
        export(model, tmp_path, tile, ["onnx"])
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_is_not_kept(model, tile, tmp_path, monkeypatch):
    monkeypatch.setattr(export_model, "AGREE", -1.0)
    with pytest.raises(InputError, match="not kept"):
        export(model, tmp_path, tile, ["torchscript"])
    assert not list(tmp_path.iterdir())
