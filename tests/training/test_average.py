import contextlib
import dataclasses
import math

import pandas as pd
import torch
from blobs import Blobs

from nucseg.config import Config
from nucseg.model.adapters import read_adapter
from nucseg.model.network import build_model
from nucseg.training import loop
from nucseg.training.average import WeightAverage
from nucseg.training.loop import train

SMALL = Config(
    base="random", size=64, rank=2, alpha=2, lr=3e-3, batch_size=4, epochs=2, device="cpu", lora_target="qkv", ema=0.6
)


def bias(model, value: float) -> None:
    with torch.no_grad():
        model.head.conv.bias.fill_(value)


def test_the_average_by_hand():
    model = build_model(SMALL)
    bias(model, 0.0)
    average = WeightAverage(model, decay=0.25)
    bias(model, 1.0)
    average.update(model)  # decay min(0.25, 2 / 11) = 2 / 11
    assert math.isclose(average.tensors["head.conv.bias"].item(), 9 / 11, rel_tol=1e-6)
    bias(model, 0.0)
    average.update(model)  # decay min(0.25, 3 / 12) = 0.25
    assert math.isclose(average.tensors["head.conv.bias"].item(), 9 / 11 / 4, rel_tol=1e-6)
    with average.applied(model):
        assert math.isclose(model.head.conv.bias.item(), 9 / 11 / 4, rel_tol=1e-6)
    assert model.head.conv.bias.item() == 0


def test_only_what_is_trained_is_averaged_and_counters_are_copied():
    model = build_model(
        dataclasses.replace(SMALL, head="instance", head_norm="batch", head_width=32, head_start="fresh")
    )
    average = WeightAverage(model, 0.5)
    assert set(average.tensors) == set(model.adapter_state())
    model.train()(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    average.update(model)
    counters = {t.item() for name, t in average.tensors.items() if name.endswith("num_batches_tracked")}
    assert counters == {1}


def test_a_run_is_scored_by_its_average_and_resumes_to_the_same_numbers(tmp_path, monkeypatch):
    whole = train(SMALL, Blobs(), tmp_path / "whole", progress=False)
    train(dataclasses.replace(SMALL, epochs=1), Blobs(), tmp_path / "short", progress=False)
    raw = train(dataclasses.replace(SMALL, ema=0.0), Blobs(), tmp_path / "raw", progress=False)
    assert not whole["dice"].equals(raw["dice"])

    real, calls = loop.train_epoch, []

    def broken(*arguments, **options):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "train_epoch", broken)
    with contextlib.suppress(KeyboardInterrupt):
        train(SMALL, Blobs(), tmp_path / "killed", progress=False)
    monkeypatch.setattr(loop, "train_epoch", real)
    pd.testing.assert_frame_equal(train(SMALL, Blobs(), tmp_path / "killed", progress=False), whole, atol=1e-6)
    (mine, *_), (theirs, *_) = (read_adapter(tmp_path / n / "best.safetensors") for n in ("killed", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
