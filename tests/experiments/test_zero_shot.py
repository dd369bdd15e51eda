"""Bases before any fine-tuning: what is scored is the base's own head, without LoRA."""

import pytest
import torch

from experiments.zero_shot import BASES, untrained
from nucseg.model.bases import INSTANCE_HEAD, load_base
from nucseg.model.lora import lora_layers
from nucseg.model.sam import part


@pytest.mark.parametrize("name", ["offline", "broad"])
def test_a_base_is_scored_with_its_own_head_and_nothing_else(name):
    base, norm, _ = BASES[name]
    model, config = untrained(base, norm)
    assert not lora_layers(model)
    pretrained = part(load_base(base).stored, INSTANCE_HEAD)
    own = {key: value.cpu() for key, value in model.head.state_dict().items()}
    assert all(torch.equal(own[key], pretrained[key].to(own[key].dtype)) for key in pretrained)
    assert pretrained and model.config.size == config.size == 512
