"""LoRA (Hu et al. 2021, arXiv:2106.09685) on any ``nn.Linear``, and the adapter files that hold it.

The names are the paper's and microsoft/LoRA's: ``r``, ``alpha``, ``lora_A``, ``lora_B``, ``scaling``.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nucseg.errors import InputError

# A placement says which Linear layers get a low-rank update, by the end (or the start) of their name.
# The names are TinyViT's (the image encoder) and SAM's (the mask decoder).
TARGETS: dict[str, str] = {
    "all": r".",  # what the report's code does: every Linear
    "attention": r"\.(qkv|proj|[qkv]_proj|out_proj)$",  # what the report's text says
    "qkv": r"\.(qkv|[qkv]_proj)$",  # the paper's own choice
    "mlp": r"\.mlp\.(fc1|fc2|lin1|lin2)$",
    "late": r"^layers\.[23]\.",  # the last two of the encoder's four stages
}


class LoRALinear(nn.Module):
    """A frozen ``nn.Linear`` plus a trainable low-rank update: ``W0 x + b + scaling * B A dropout(x)``.

    ``lora_A``: (r, in_features), Kaiming-uniform. ``lora_B``: (out_features, r), zero, so that the layer
    equals the frozen one before the first step. ``scaling = alpha / r``.

    Raises ``InputError`` for a rank outside 1..min(in_features, out_features), a non-positive or
    non-finite alpha, or a dropout outside [0, 1).
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, linear: nn.Linear, r: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        largest = min(linear.in_features, linear.out_features)
        if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= largest:
            raise InputError(
                f"LoRA rank {r!r} does not fit a layer of {linear.in_features} -> {linear.out_features}: "
                f"choose a whole number from 1 to {largest}."
            )
        if not (math.isfinite(alpha) and alpha > 0):
            raise InputError(f"LoRA alpha {alpha!r} must be a finite number above 0.")
        if not 0 <= dropout < 1:
            raise InputError(f"LoRA dropout {dropout!r} must be at least 0 and below 1.")
        self.linear = linear.requires_grad_(False)
        self.r = r
        self.scaling = alpha / r
        weight = linear.weight
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, device=weight.device, dtype=weight.dtype))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, device=weight.device, dtype=weight.dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_dropout = nn.Dropout(dropout)
        self._frozen_weight: Tensor | None = None  # W0, kept while merged, so that unmerging is exact

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the frozen weight at the moment."""
        return self._frozen_weight is not None

    def delta(self) -> Tensor:
        """The update of the weight, ``scaling * B A``: (out_features, in_features)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.merged:
            return self.linear(x)
        if not (self.training and self.lora_dropout.p):  # (W0 + s B A) x: one product of the small matrices
            return _Adapted.apply(x, self.linear.weight, self.linear.bias, self.lora_A, self.lora_B, self.scaling)
        # (..., in) -> (..., r) -> (..., out)
        return self.linear(x) + self.scaling * F.linear(F.linear(self.lora_dropout(x), self.lora_A), self.lora_B)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the weight: the layer then costs what a plain Linear costs. Idempotent."""
        if self.merged:
            return
        delta = self.delta()
        if not torch.isfinite(delta).all():
            raise InputError("LoRA weights are not finite, so they are not merged: train again with a lower lr.")
        self._frozen_weight = self.linear.weight.detach().clone()
        self.linear.weight += delta

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the frozen weight back, bit for bit. Idempotent."""
        if self._frozen_weight is not None:
            self.linear.weight.copy_(self._frozen_weight)
            self._frozen_weight = None

    def extra_repr(self) -> str:
        """The rank and the scaling, for ``print(model)``."""
        return f"r={self.r}, scaling={self.scaling:g}, merged={self.merged}"


class _Adapted(torch.autograd.Function):
    """``(W0 + s B A) x + b`` with gradients for x, A and B, but none for W0 and b, which are frozen.

    Plain autograd would take two passes more over the tokens for the update, or the gradient of the whole weight.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 a small update would be rounded away
            adapted = torch.addmm(weight, b, a, alpha=scaling)
        out = F.linear(x, adapted, bias)
        ctx.save_for_backward(x, adapted.to(out.dtype), a, b)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, adapted, a, b = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, b.shape[0]).to(adapted.dtype)  # (N, out)
        tokens = x.reshape(-1, a.shape[1]).to(adapted.dtype)  # (N, in)
        for_x = (gradient @ adapted).view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        for_a = (gradient @ b.to(adapted.dtype)).t() @ tokens  # (r, in)
        for_b = gradient.t() @ (tokens @ a.to(adapted.dtype).t())  # (out, r)
        return for_x, None, None, ctx.scaling * for_a.to(a.dtype), ctx.scaling * for_b.to(b.dtype), None


def inject(
    model: nn.Module,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    lora_target: str = "all",
    skip: Sequence[str] = (),
) -> list[str]:
    """Wrap the Linear layers of ``model`` that the placement names in ``LoRALinear``; return their names.

    ``lora_target`` is a key of ``TARGETS``. ``skip`` lists prefixes of names to leave alone (layers that never
    run would be trained in vain). The layers' weights are frozen; freezing the rest is the caller's choice.

    Raises ``InputError`` for an unknown placement, one that matches no layer, a rank that does not fit, or
    a model that is wrapped already. Nothing is changed then.
    """
    if lora_target not in TARGETS:
        raise InputError(f"LoRA placement {lora_target!r} is not known: choose one of {', '.join(TARGETS)}.")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise InputError("The model has LoRA layers already: build a fresh one before injecting again.")
    pattern = re.compile(TARGETS[lora_target])
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and pattern.search(name) and not name.startswith(tuple(skip))
    ]
    if not names:
        raise InputError(f"LoRA placement {lora_target!r} matches no Linear layer of this model.")
    # all are made before one is put in place, so that a rank that fits only some leaves the model whole
    wrapped = {name: LoRALinear(model.get_submodule(name), r, alpha, dropout) for name in names}  # type: ignore[arg-type]
    for name, layer in wrapped.items():
        parent, _, child = name.rpartition(".")
        layer.train(model.training)
        setattr(model.get_submodule(parent), child, layer)
    return names


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRA layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge(model: nn.Module) -> None:
    """Merge every LoRA layer of the model."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Unmerge every LoRA layer of the model."""
    for layer in lora_layers(model).values():
        layer.unmerge()
