"""Engines compute what the model computes, and the grid makes fields and the whole image agree."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from nucseg.config import ModelConfig
from nucseg.data.synth import generate
from nucseg.errors import InputError
from nucseg.inference import engines, segmenter
from nucseg.inference.engines import OpenVINOEngine, TorchEngine, engine_for, resolve
from nucseg.inference.segmenter import Segmenter
from nucseg.metrics import score
from nucseg.model import lora
from nucseg.model.merged import merged
from nucseg.model.network import NucleiModel, build_model, predict


def trained(std: float = 0.02, **config) -> NucleiModel:
    """A model whose LoRA is not zero."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(**({"base": "offline", "head": "instance", "size": 512, "rank": 4} | config)))
    for layer in lora.lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=std)
    return model


class PixelNorm(nn.LayerNorm):
    """A norm over the channels of each pixel, so that no pixel depends on the rest of the field."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def with_norm(model: NucleiModel, norm: type[nn.Module]) -> NucleiModel:
    """The model with the head's GroupNorm layers replaced by another norm."""
    for name, module in list(model.head.named_modules()):
        if isinstance(module, nn.GroupNorm):
            parent, _, child = name.rpartition(".")
            setattr(model.head.get_submodule(parent), child, norm(module.num_channels).eval())
    return model


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (2, 64, 128, 3), dtype=np.uint8)


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "instance", "mask_decoder"])
def test_merged_is_the_model_without_lora_and_batch_norm(head, images):
    own = trained(head=head)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    expected = torch.sigmoid(own(batch))
    network = merged(own)
    assert (network(batch) - expected).abs().max() < 1e-4
    assert not any(isinstance(m, nn.BatchNorm2d | lora.LoRALinear) for m in network.modules())
    assert lora.lora_layers(own) and not any(layer.merged for layer in lora.lora_layers(own).values())
    assert torch.equal(torch.sigmoid(own(batch)), expected)  # the model itself is as it was


@torch.no_grad()
def test_batch_norm_of_a_head_is_folded_too(images):
    own = with_norm(trained(), nn.BatchNorm2d)
    for module in own.head.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert (merged(own)(batch) - torch.sigmoid(own(batch))).abs().max() < 1e-4


def test_torch_computes_what_the_model_computes(model, images):
    found = TorchEngine(model)(images)
    for image, maps in zip(images, found, strict=True):
        np.testing.assert_allclose(maps, predict(model, np.ascontiguousarray(image), 1), atol=1e-4)


def test_openvino_computes_what_torch_computes(model):
    pytest.importorskip("openvino")
    sample = generate("human liver", 0, size=128)
    ours, theirs = (engine(model)(sample.image[None]) for engine in (TorchEngine, OpenVINOEngine))
    assert ours.shape == theirs.shape == (1, 2, 128, 128)
    np.testing.assert_allclose(theirs, ours, atol=2e-3)
    labels = [Segmenter([model], engine=name).segment(sample.image) for name in ("torch", "openvino")]
    assert score(*labels).aji >= 0.99


def test_an_engine_is_kept_until_the_model_changes(model):
    first = engine_for(model, "torch")
    assert engine_for(model, "torch") is first
    with torch.no_grad():
        next(iter(lora.lora_layers(model).values())).lora_B.add_(1e-6)
    assert engine_for(model, "torch") is not first


def test_which_engine_auto_is(model, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert resolve("auto", model) == "torch"
    with pytest.raises(InputError, match="pip install"):
        OpenVINOEngine(model)
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    assert resolve("auto", model) == "openvino"
    with pytest.raises(InputError, match="not known"):
        resolve("tensorrt", model)
    with pytest.raises(InputError, match="not known"):
        Segmenter([model], engine="tensorrt").check()


def test_auto_takes_torch_for_an_image_of_one_field(model, monkeypatch):
    asked = []
    monkeypatch.setattr(engines, "engine_for", lambda model, name: asked.append(name) or TorchEngine(model))
    Segmenter([model]).segment(np.random.default_rng(0).integers(60, 180, (64, 64, 3), dtype=np.uint8))
    assert asked == ["torch"]


@pytest.mark.parametrize(("limit", "engine"), [(100_000, "torch"), (40_000, "auto")])
def test_auto_compiles_for_images_of_many_pixels(model, monkeypatch, limit, engine):
    asked = []

    def fake(self, images, model, scale, engine, side):
        asked.append(engine)
        return [np.zeros((2, *image.shape[:2]), np.float32) for image in images]

    monkeypatch.setattr(segmenter, "MANY_PX", limit)
    monkeypatch.setattr(Segmenter, "maps", fake)
    monkeypatch.setattr(Segmenter, "scale", lambda self, model: 1.0)
    image, maps = np.full((256, 256, 3), 90, np.uint8), np.zeros((2, 256, 256), np.uint8)
    with segmenter.open_slide(image) as slide:
        list(Segmenter([model]).predict_rows(slide, maps, progress=False))
    assert set(asked) == {engine}


def test_fields_and_the_whole_image_agree(monkeypatch):
    own = with_norm(trained(std=0.1), PixelNorm)  # a strong LoRA: where attention windows are cut matters
    monkeypatch.setattr(segmenter, "SIDES", (448,))
    image = np.concatenate([generate(t, 0, size=512).image for t in ("human liver", "mouse kidney")], axis=1)[
        :448, :896
    ]
    maps = np.zeros((2, 448, 896), np.uint8)
    how = Segmenter([own])
    assert len(how.layout((448, 896))[1]) == 3
    with segmenter.open_slide(image) as slide:
        list(how.predict_rows(slide, maps, progress=False))
    whole = TorchEngine(own)(image[None])[0]
    difference = np.abs(maps / 255 - np.rint(255 * whole) / 255)
    assert np.quantile(difference, 0.999) < 0.05 and difference.mean() < 1e-3
    shifted = np.roll(image, 56, axis=1)  # off the grid the windows cut elsewhere
    off = np.roll(TorchEngine(own)(shifted[None])[0], -56, axis=2)[:, :, 112:784]
    assert np.abs(off - whole[:, :, 112:784]).mean() > 2 * difference[:, :, 112:784].mean()


def test_fields_at_the_images_end_see_what_the_whole_image_shows(monkeypatch):
    own = with_norm(trained(std=0.1), PixelNorm)
    monkeypatch.setattr(segmenter, "SIDES", (448,))
    image = generate("human liver", 0, size=640).image[:448]  # the last field shows 416 of its 448 px
    maps = np.zeros((2, 448, 640), np.uint8)
    how = Segmenter([own], engine="torch")
    with segmenter.open_slide(image) as slide:
        list(how.predict_rows(slide, maps, progress=False))
    whole = TorchEngine(own)(image[None])[0]
    end = np.abs(maps / 255 - whole)[:, :, 540:]
    assert end.max() < 0.05 and end.mean() < 2e-3


def test_openvino_gets_fields_of_one_size(monkeypatch, model):
    sides = []

    def fake(self, images, model, scale, engine, side):
        sides.append(side)
        return [np.zeros((2, *image.shape[:2]), np.float32) for image in images]

    monkeypatch.setattr(segmenter, "SIDES", (448,))
    monkeypatch.setattr(segmenter.engines, "resolve", lambda name, model: name)
    monkeypatch.setattr(Segmenter, "maps", fake)
    monkeypatch.setattr(Segmenter, "scale", lambda self, model: 1.0)
    monkeypatch.setattr(segmenter, "_normalises", lambda model: False)
    image, maps = np.full((448, 640, 3), 90, np.uint8), np.zeros((2, 448, 640), np.uint8)
    for engine in ("openvino", "torch"):
        with segmenter.open_slide(image) as slide:
            list(Segmenter([model], engine=engine).predict_rows(slide, maps, progress=False))
    assert sides == [(448, 448), (448, 448), (448, 448), (448, 416)]


def test_fields_of_an_image_go_through_a_gpu_together(monkeypatch, model):
    class Device:
        type = "cuda"

    class OnGPU:
        def __init__(self):
            self.config, self.n_maps, self.head = dataclasses.replace(model.config, size=224), 2, nn.Identity()
            self.mean = type("Mean", (), {"device": Device()})

    batches = []

    def fake(self, images, *rest):
        batches.append(len(images))
        return [np.stack([image[..., 0]] * 2) / 255 for image in images]

    monkeypatch.setattr(segmenter, "SIDES", (448,))
    monkeypatch.setattr(segmenter, "BATCH_PX", 3 * 448 * 448)
    monkeypatch.setattr(Segmenter, "maps", fake)
    monkeypatch.setattr(Segmenter, "scale", lambda self, model: 1.0)
    image = np.random.default_rng(0).integers(0, 200, (448, 1400, 3), dtype=np.uint8)
    image[:, 300:] = np.maximum(image[:, 300:], 9)  # nothing is black
    maps = np.zeros((2, 448, 1400), np.uint8)
    with segmenter.open_slide(image) as slide:
        list(Segmenter([OnGPU()]).predict_rows(slide, maps, progress=False))
    assert sum(batches) == 6 and max(batches) == 3
    np.testing.assert_array_equal(maps[0], image[..., 0])


def test_fields_that_differ_in_padding_alone_are_not_batched_together(monkeypatch):
    sides = []

    def fake(self, images, model, scale, engine, side):
        sides.append((len(images), side))
        return [np.zeros((2, *image.shape[:2]), np.float32) for image in images]

    monkeypatch.setattr(segmenter, "SIDES", (448,))
    monkeypatch.setattr(Segmenter, "maps", fake)
    monkeypatch.setattr(Segmenter, "scale", lambda self, model: 1.0)
    monkeypatch.setattr(segmenter, "_normalises", lambda model: False)
    gpu = type("Model", (), {"mean": type("Mean", (), {"device": torch.device("cuda")})(), "n_maps": 2})()
    image, maps = np.full((448, 672, 3), 90, np.uint8), np.zeros((2, 448, 672), np.uint8)
    with segmenter.open_slide(image) as slide:  # the last field shows 448 px, too, and is padded to 480
        list(Segmenter([gpu], engine="torch").predict_rows(slide, maps, progress=False))
    assert sides == [(1, (448, 448)), (1, (448, 480))]
