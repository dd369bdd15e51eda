"""Estimating the statistics of BatchNorm layers on the training images."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nucseg.model.network import NucleiModel


@torch.no_grad()
def estimate_statistics(model: NucleiModel, batches: Iterable[Tensor], *, head: bool = False) -> None:
    """Replace the running means and variances of the encoder's BatchNorm layers by those of ``batches``.

    Adaptive batch normalisation (Li et al. 2016, "Revisiting batch normalization for practical domain adaptation"): the
    weights stay, and the statistics move from the images of the base to those of the task. Each is the plain mean over
    the batches, (B, 3, S, S) uint8 images each. The model's mode and device are kept.

    ``head``: the layers of the head as well, for a head that is already trained.
    """
    training, layers = model.training, list(model.encoder_norms().values())
    if head:
        layers += [layer for layer in model.head.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.momentum = None  # a plain mean, not a moving one
        layer.reset_running_stats()
        layer.train()
    for images in batches:
        model(images.to(model.mean.device))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.train(training)
