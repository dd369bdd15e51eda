"""The exponential moving average of a run's weights, which is scored and saved in place of the raw weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nucseg.model.network import NucleiModel


class WeightAverage:
    """Average of all that the adapter holds, ``average += (1 - decay) * (weights - average)`` after each step.

    At first the decay is lower, ``(1 + step) / (10 + step)``, so that the random initial weights are soon forgotten
    (as in TensorFlow's ``ExponentialMovingAverage``). Whole numbers, such as BatchNorm's counters, are copied.

    ``decay``: 0 up to, but not including, 1. About the last ``1 / (1 - decay)`` steps count.
    """

    def __init__(self, model: NucleiModel, decay: float):
        self.decay = decay
        self.steps = 0
        self.tensors: dict[str, Tensor] = {name: t.detach().clone() for name, t in model.adapter_state().items()}

    @torch.no_grad()
    def update(self, model: NucleiModel) -> None:
        """Take the model's present weights into the average; call it after each step of the optimiser."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, tensor in model.adapter_state().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor, 1 - decay)
            else:
                self.tensors[name].copy_(tensor)

    @contextmanager
    def applied(self, model: NucleiModel) -> Iterator[None]:
        """Give the model the average for the time of a ``with`` block, and its own weights back afterwards."""
        own = {name: tensor.detach().clone() for name, tensor in model.adapter_state().items()}
        model.load_adapter_state(self.tensors)
        try:
            yield
        finally:
            model.load_adapter_state(own)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for `load_state`."""
        return {"steps": self.steps, "tensors": self.tensors}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave; the tensors go to the devices that they are on here."""
        self.steps = state["steps"]
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])
