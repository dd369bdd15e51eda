"""How long a study would take on a graphics card, by arithmetic: operations divided by an assumed rate."""

from collections.abc import Sequence
from dataclasses import fields
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from nucseg.config import Config, ModelConfig
from nucseg.model.network import build_model
from nucseg.studies.study import Task

# Assumed floating-point operations per second in training, by budget: an eighth of the peak in float16 that NVIDIA's
# data sheet gives for the T4 (65e12). Small networks rarely reach more. Nothing here was measured.
RATES = {"t4": 65e12 / 8}
BACKWARD = 2.0  # operations of the backward pass over those of the forward pass; less where layers are frozen


def operations(config: Config, train: int, val: int, test: int) -> float:
    """Floating-point operations of a run: training windows three times a forward pass, validation and test once.

    ``train``, ``val``, ``test``: numbers of images. Assumes square images, and that no epoch is skipped by early
    stopping. Loading and decoding are not counted.
    """
    forward = _forward(config, config.size)
    window = _forward(config, config.crop) if config.crop else forward
    return config.epochs * (train * window * (1 + BACKWARD) + val * forward) + test * forward


def hours(tasks: Sequence[Task], budget: str, images: int = 665, folds: int = 5) -> float:
    """Estimated hours of a study's runs, one after the other, at the rate of `RATES`.

    ``images``, ``folds``: the size of the dataset and the number of folds; 15% of the images outside a test fold
    validate, as in `data.splits.folds`.
    """
    total = 0.0
    for config, _ in tasks:
        rest = images - images // folds
        val = round(0.15 * rest)
        counts = (rest - val, val, images // folds)
        chosen = (config.train_images, config.val_images, config.test_images)
        train, val, test = (min(n, k) if k else n for n, k in zip(counts, chosen, strict=True))
        total += operations(config, train, val, test)
    return total / RATES[budget] / 3600


def _forward(config: Config, side: int) -> float:
    """Operations of a forward pass over a square of ``side`` px."""
    model = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
    return _count(ModelConfig(**model | {"base": "random"}), side)


@cache
def _count(config: ModelConfig, side: int) -> float:
    model = build_model(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side, dtype=torch.uint8))
    return float(counter.get_total_flops())
