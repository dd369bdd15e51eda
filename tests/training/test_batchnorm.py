import dataclasses

import pytest
import torch
from blobs import Blobs
from torch import nn

from nucseg.config import Config
from nucseg.errors import InputError
from nucseg.model.adapters import read_adapter
from nucseg.model.network import build_model, load_model
from nucseg.training.batchnorm import estimate_statistics
from nucseg.training.loop import train

SMALL = Config(base="random", size=64, rank=2, alpha=2, batch_size=4, epochs=2, device="cpu", lora_target="qkv")
ESTIMATED = dataclasses.replace(SMALL, norm_statistics="training")


def batches(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=generator) for _ in range(n)]


def test_statistics_are_the_mean_over_batches_of_what_enters_the_layer():
    model = build_model(ESTIMATED)
    first = next(iter(model.encoder_norms().values()))
    entered = []
    first.register_forward_hook(lambda layer, given, out: entered.append(given[0].detach()))
    estimate_statistics(model, batches(2))
    assert len(entered) == 2
    by_hand = torch.stack([x.transpose(0, 1).flatten(1).mean(1) for x in entered]).mean(0)
    torch.testing.assert_close(first.running_mean, by_hand)
    by_hand = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in entered]).mean(0)
    torch.testing.assert_close(first.running_var, by_hand)
    assert first.momentum == 0.1
    assert not model.training


def test_the_statistics_of_a_trained_head_can_be_estimated_too():
    config = dataclasses.replace(ESTIMATED, head="instance", head_start="fresh", head_norm="batch")
    model = build_model(config)
    layers = [layer for layer in model.head.modules() if isinstance(layer, nn.BatchNorm2d)]
    before = [layer.running_mean.clone() for layer in layers]
    estimate_statistics(model, batches(2))
    assert layers and all(map(torch.equal, before, [layer.running_mean for layer in layers]))
    entered = []
    layers[0].register_forward_hook(lambda layer, given, out: entered.append(given[0].detach()))
    estimate_statistics(model, batches(2), head=True)
    by_hand = torch.stack([x.transpose(0, 1).flatten(1).mean(1) for x in entered]).mean(0)
    torch.testing.assert_close(layers[0].running_mean, by_hand)
    assert layers[0].momentum == 0.1


def test_estimated_statistics_travel_with_the_adapter_and_stay_fixed_in_training(tmp_path):
    train(ESTIMATED, Blobs(), tmp_path / "run", progress=False)
    path = tmp_path / "run" / "best.safetensors"
    names = {name for name in read_adapter(path)[0] if "running_" in name}
    model, base = load_model(path), build_model(SMALL)
    assert len(names) == 2 * len(model.encoder_norms()) > 0
    changed = [not torch.equal(model.state_dict()[name], base.state_dict()[name]) for name in names]
    assert all(changed)
    # as in the first epoch, whatever was trained since
    counters = {layer.num_batches_tracked.item() for layer in model.encoder_norms().values()}
    assert len(counters) == 1


def test_a_resumed_run_keeps_its_statistics(tmp_path):
    whole = train(ESTIMATED, Blobs(), tmp_path / "whole", progress=False)
    train(dataclasses.replace(ESTIMATED, max_hours=1e-9), Blobs(), tmp_path / "parts", progress=False)
    parts = train(ESTIMATED, Blobs(), tmp_path / "parts", progress=False)
    assert parts["dice"].equals(whole["dice"])


def test_trained_batchnorm_needs_no_estimate():
    with pytest.raises(InputError, match="norm_statistics"):
        build_model(dataclasses.replace(ESTIMATED, lora_target="full"))
