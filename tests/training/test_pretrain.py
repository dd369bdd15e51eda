import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from blobs import Blobs
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from nucseg.config import ModelConfig, preset
from nucseg.data.datasets import ImageFolder, Joined, Sample, Tiles
from nucseg.errors import InputError
from nucseg.model.bases import offline_base, random_base
from nucseg.model.heads import InstanceHead, StageHeads
from nucseg.model.network import build_model, load_model
from nucseg.training import pretrain as pretraining
from nucseg.training.loop import learning_rate
from nucseg.training.pretrain import HELD_OUT, pretrain, pretraining_data


class Sizes:
    """Three images: small, 600 x 300 px, and one of a tissue that is not asked for."""

    table = pd.DataFrame({"tissue": ["a", "a", "b"], "stem": ["small", "large", "other"]})
    shapes = ((200, 320), (600, 300), (64, 64))

    def __len__(self):
        return 3

    def __getitem__(self, index):
        height, width = self.shapes[index]
        labels = np.arange(height * width, dtype=np.int32).reshape(height, width)
        return Sample(np.zeros((height, width, 3), np.uint8), labels, *self.table.iloc[index])


def test_tiles_by_hand():
    tiles = Tiles(Sizes(), ("a",))
    assert list(tiles.table["stem"]) == ["small", "large_0_0", "large_256_0"]
    assert [tiles[i].labels.shape for i in range(3)] == [(200, 320), (256, 256), (256, 256)]
    assert tiles[2].labels[0, 0] == 256 * 300 and tiles[2].stem == "large_256_0"


def test_joined_datasets_keep_their_order():
    both = Joined(Blobs(2), Tiles(Sizes(), ("b",)))
    assert len(both) == len(both.table) == 3
    assert [both[i].stem for i in range(3)] == list(both.table["stem"])


def test_the_held_out_tissues_are_not_among_the_pretraining_images(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder / "histology").mkdir(parents=True)
    Image.fromarray(Blobs()[0].image).save(tmp_path / "images" / "histology" / "x.png")
    Image.fromarray(Blobs()[0].labels.astype(np.uint16)).save(tmp_path / "masks" / "histology" / "x.png")
    assert len(ImageFolder(tmp_path / "images", tmp_path / "masks")) == 1
    data = pretraining_data(tmp_path, per_tissue=1)
    assert set(data.table["tissue"]).isdisjoint(HELD_OUT)
    assert set(data.table["tissue"]) >= {"histology", "human bladder"} and len(data) == 31 - len(HELD_OUT) + 1


def test_the_base_is_the_trained_encoder_and_head_in_half_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "pretraining_data", lambda folder: Blobs(10))
    small = {"size": 64, "crop": 64, "epochs": 1, "batch_size": 4, "val_images": 1, "device": "cpu"}
    config = dataclasses.replace(preset("pretrain"), **small)
    path = pretrain("nowhere", tmp_path / "run", config, progress=False)
    assert path.stat().st_size < 13e6
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (
        about["command"].startswith("nucseg pretrain --bbbc038 BBBC038 --out run ") and "--size 64" in about["command"]
    )
    trained = load_model(tmp_path / "run" / "best.safetensors")
    parts = {"image_encoder.": trained.encoder, "instance_head.": trained.head}
    expected = {prefix + name: t for prefix, module in parts.items() for name, t in module.state_dict().items()}
    with safe_open(path, "pt") as handle:
        assert "not MobileSAM" in handle.metadata()["what"]
        assert set(handle.keys()) == set(expected)
        for name, tensor in expected.items():
            stored = handle.get_tensor(name)
            assert stored.dtype in (torch.float16, torch.int64)
            torch.testing.assert_close(stored.float(), tensor.float(), rtol=1e-3, atol=1e-6)
    base = offline_base(path)
    assert base.name == "offline.safetensors" and len(base.sha256) == 64
    assert {n for n in base.state if not n.startswith("instance_head.")} == set(random_base(0).state)
    config = ModelConfig(base="offline", size=64, rank=1, head="instance")
    model = build_model(config, base)
    assert model.base_name == "offline.safetensors"
    for name, tensor in model.head.state_dict().items():
        assert torch.equal(tensor, base.state[f"instance_head.{name}"])
    fresh = build_model(dataclasses.replace(config, head_start="fresh"), base).head.state_dict()
    assert not torch.equal(fresh["out.weight"], base.state["instance_head.out.weight"])
    single = build_model(dataclasses.replace(config, without="distance"), base).head.state_dict()
    assert torch.equal(single["out.weight"], base.state["instance_head.out.weight"][:1])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read"):
        offline_base(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="not an encoder"):
        offline_base(path)


def test_pretraining_is_of_the_whole_encoder():
    with pytest.raises(InputError, match="whole encoder"):
        pretrain("nowhere", "out", dataclasses.replace(preset("pretrain"), lora_target="all"))


def test_stage_heads_see_one_stage_each_and_no_neighbour():
    config = dataclasses.replace(preset("pretrain"), size=64, crop=0)
    model = build_model(config).train()
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    logits, stages = model.with_stages(image)
    assert logits.shape == (2, 2, 64, 64) and [s.shape for s in stages] == [(2, 2, 32, 32)] * 4
    heads = StageHeads()
    features = [torch.zeros(1, c, 64 // s, 64 // s) for c, s in ((64, 4), (128, 8), (320, 16), (256, 16))]
    before = heads(features)
    features[2][0, :, 1, 2] = 1.0  # one feature of stride 16 speaks for 16 x 16 px of the image: 8 x 8 of the maps
    changed = [(a != b).any(dim=1)[0] for a, b in zip(heads(features), before, strict=True)]
    assert [int(c.sum()) for c in changed] == [0, 0, 64, 0] and changed[2][8:16, 16:24].all()
    assert model.eval().with_stages(image)[1] == []


def test_lost_pieces_are_whole_images_in_training_only():
    head = InstanceHead(lose=0.5).train()
    y = torch.ones(400, 2, 3, 3)
    kept = head._or_zero("stem", y).mean((1, 2, 3))
    assert set(kept.tolist()) == {0.0, 1.0} and 0.35 < kept.mean() < 0.65
    assert head.eval()._or_zero("stem", y).equal(y)


def test_the_learning_rate_warms_up_and_then_follows_the_cosine():
    config = dataclasses.replace(preset("pretrain"), warmup=0.1)
    plain = dataclasses.replace(config, warmup=0.0)
    assert learning_rate(config, 0.0) == 0
    assert learning_rate(config, 0.05) == pytest.approx(learning_rate(plain, 0.05) / 2)
    assert learning_rate(config, 0.5) == learning_rate(plain, 0.5)
