"""Exponential moving average of a run's weights, scored and saved in place of the raw weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nucseg.model.network import NucleiModel


class WeightAverage:
    """Moving average of all tensors of an adapter: ``average += (1 - decay) * (weights - average)`` after each step.

    At first the decay is lower, ``(1 + step) / (10 + step)``, so that the random initial weights are soon forgotten
    (as in TensorFlow's ``ExponentialMovingAverage``). Integers, such as BatchNorm's counters, are copied.

    ``decay``: 0 up to, but not including, 1; the average spans about the last ``1 / (1 - decay)`` steps.
    """

    def __init__(self, model: NucleiModel, decay: float):
        self.decay = decay
        self.steps = 0
        self.tensors: dict[str, Tensor] = {name: t.detach().clone() for name, t in model.adapter_state().items()}

    @torch.no_grad()
    def update(self, model: NucleiModel) -> None:
        """Update the average with the model's current weights; call it after each optimiser step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, tensor in model.adapter_state().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor, 1 - decay)
            else:
                self.tensors[name].copy_(tensor)

    @contextmanager
    def applied(self, model: NucleiModel) -> Iterator[None]:
        """Use the average as the model's weights within a ``with`` block, and then restore its own."""
        own = {name: tensor.detach().clone() for name, tensor in model.adapter_state().items()}
        model.load_adapter_state(self.tensors)
        try:
            yield
        finally:
            model.load_adapter_state(own)

    def state(self) -> dict[str, Any]:
        """Return the state to store in a checkpoint, for `load_state`."""
        return {"steps": self.steps, "tensors": self.tensors}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `state`; tensors are moved to the current devices."""
        self.steps = state["steps"]
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])
