import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from bbbc038 import write_bbbc038
from blobs import Blobs
from safetensors import safe_open
from safetensors.torch import save_file

from nucseg.config import ModelConfig, preset
from nucseg.data import mixture
from nucseg.data.datasets import Joined, Sample, Tiles
from nucseg.data.mixture import PretrainingImages
from nucseg.errors import InputError
from nucseg.model.bases import offline_base, random_base
from nucseg.model.heads import InstanceHead, StageHeads
from nucseg.model.network import build_model, load_model
from nucseg.training import pretrain as pretraining
from nucseg.training.loop import learning_rate, train
from nucseg.training.pretrain import pretrain


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


class Parts(Blobs):
    """Blobs with a part each, different in every epoch."""

    def __init__(self, count: int = 12):
        super().__init__(count)
        self.table["part"] = ["train"] * (count - 2) + ["val", "test"]

    def draw(self, epoch, index):
        return self[(index + epoch) % (self.count - 2)]


SMALL = {"size": 64, "field_px": 64, "crop": 64, "epochs": 1, "batch_size": 4, "device": "cpu", "num_workers": 0}


def small(**changes):
    return dataclasses.replace(preset("pretrain"), **SMALL | changes)


def test_the_base_is_the_trained_encoder_and_head_in_half_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "PretrainingImages", lambda folder, seed: Parts(10))
    path = pretrain("nowhere", tmp_path / "run", small(), progress=False)
    assert path.stat().st_size < 13e6
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (
        about["command"].startswith("nucseg pretrain --bbbc038 BBBC038 --out run ") and "--size 64" in about["command"]
    )
    with safe_open(path, "pt") as handle:
        card = handle.metadata()
    assert card["epochs"] == "1 of 1 planned" and card["seed"] == "0" and card["edition"] == "2"
    assert "50 images" in card["held out"] and "synthetic 50%" in card["data"] and float(card["seconds"]) > 0
    assert set(json.loads(card["scores on held out"])) == {"pq", "dice"}
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
    with pytest.raises(InputError, match="protocol 'parts'"):
        pretrain("nowhere", "out", dataclasses.replace(preset("pretrain"), protocol="benchmark"))


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_weights(tmp_path, monkeypatch):
    """On the stream itself: synthetic and BBBC038-like images, drawn afresh in each epoch."""
    folder = write_bbbc038(tmp_path / "bbbc038", ["01d44a26f668", "0121d6759c5a"])
    monkeypatch.setattr(mixture, "SIZE", 96)
    config = small(epochs=3, train_images=8)

    def data():
        return PretrainingImages(folder, 0, windows=20, validation=1)

    train(config, data(), tmp_path / "whole", progress=False)

    class Killed(Exception):
        pass

    interrupted = data()
    draw = interrupted.draw

    def dies_in_the_second_epoch(epoch, index):
        if epoch == 1 and len(interrupted._drawn) > 1:
            raise Killed
        return draw(epoch, index)

    interrupted.draw = dies_in_the_second_epoch
    with pytest.raises(Killed):
        train(config, interrupted, tmp_path / "broken", progress=False)
    assert len(pd.read_csv(tmp_path / "broken" / "history.csv")) == 1
    train(config, data(), tmp_path / "broken", progress=False)
    whole, broken = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "broken"))
    assert all(torch.equal(tensor, broken["model"][name]) for name, tensor in whole["model"].items())
    losses = [[row["train_loss"] for row in state["history"]] for state in (whole, broken)]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_time_limit_ends_the_run_cleanly_and_a_longer_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "PretrainingImages", lambda folder, seed: Parts(10))
    config = small(epochs=3)
    path = pretrain("nowhere", tmp_path / "run", dataclasses.replace(config, max_hours=1e-6), progress=False)
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 1
    with safe_open(path, "pt") as handle:
        assert handle.metadata()["epochs"] == "1 of 3 planned"
    pretrain("nowhere", tmp_path / "run", dataclasses.replace(config, max_hours=1e-6), progress=False)
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 1
    pretrain("nowhere", tmp_path / "run", dataclasses.replace(config, max_hours=1.0), progress=False)
    pretrain("nowhere", tmp_path / "free", config, progress=False)
    runs = [pd.read_csv(tmp_path / name / "history.csv").drop(columns="seconds") for name in ("run", "free")]
    pd.testing.assert_frame_equal(*runs)


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
