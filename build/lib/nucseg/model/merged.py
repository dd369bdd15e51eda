"""A model for inference: LoRA merged into the weights, BatchNorm folded into the convolutions, maps as output."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nucseg.model import lora
from nucseg.model.network import NucleiModel


class Merged(nn.Module):
    """The network for inference and export, from uint8 images to target maps; created by `merged`."""

    def __init__(self, model: NucleiModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 RGB, sides multiples of 16 -> (B, C, H, W) float32 target maps, 0..1."""
        return torch.sigmoid(self.model(images))


def merged(model: NucleiModel) -> Merged:
    """Copy a model for inference; the model itself is unchanged.

    The maps equal the model's to 1e-4 and cost less, because LoRA layers become plain ones and BatchNorm disappears.
    """
    with torch.no_grad():
        own = copy.deepcopy(model).eval().requires_grad_(False)
        for name, layer in lora.lora_layers(own).items():
            layer.merge()
            _replace(own, name, layer.linear)
        for module in own.modules():
            if isinstance(module, nn.Sequential):
                _fold(module)
    return Merged(own)


def _fold(block: nn.Sequential) -> None:
    """Fold each BatchNorm of a block into the weights of the convolution before it."""
    children = list(block.named_children())
    for (first, convolution), (second, norm) in pairwise(children):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(block, first, fuse_conv_bn_eval(convolution, norm))
            setattr(block, second, nn.Identity())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
