"""LoRA (Hu et al. 2021, arXiv:2106.09685) on any ``nn.Linear`` and ``nn.Conv2d``.

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

# The target modules, as patterns of their names, which are TinyViT's (image encoder) and SAM's (mask decoder).
TARGETS: dict[str, str] = {
    "all": r".",  # every layer, as in the report's code
    "attention": r"\.(qkv|proj|[qkv]_proj|out_proj)$",  # as in the report's text
    "qkv": r"\.(qkv|[qkv]_proj)$",  # the choice of the LoRA paper
    "mlp": r"\.mlp\.(fc1|fc2|lin1|lin2)$",
    "late": r"^layers\.[23]\.",  # the last two of the encoder's four stages
}


class LoRALayer(nn.Module):
    """Base class of LoRA on Linear layers and convolutions: the frozen layer, the rank, merging and unmerging.

    Subclasses set ``lora_A`` (Kaiming-uniform) and ``lora_B`` (zero, so that the layer initially equals the frozen
    one), and compute `delta` and the low-rank branch. ``scaling = alpha / r``.

    Raises ``InputError`` for a rank outside 1..``largest``, a non-positive or non-finite alpha, or a dropout outside
    [0, 1).
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, frozen: nn.Module, largest: int, what: str, r: int, alpha: float, dropout: float):
        super().__init__()
        if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= largest:
            raise InputError(
                f"LoRA rank {r!r} does not fit a layer of {what}: choose a whole number from 1 to {largest}."
            )
        if not (math.isfinite(alpha) and alpha > 0):
            raise InputError(f"LoRA alpha {alpha!r} must be a finite number above 0.")
        if not 0 <= dropout < 1:
            raise InputError(f"LoRA dropout {dropout!r} must be at least 0 and below 1.")
        self.linear: Any = frozen.requires_grad_(False)  # one name for both kinds, because adapter tests rely on it
        self.r = r
        self.scaling = alpha / r
        self.lora_dropout = nn.Dropout(dropout)
        self._frozen_weight: Tensor | None = None  # W0, kept while merged, so that unmerging is exact

    def _add_parameters(self, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
        weight = self.linear.weight
        self.lora_A = nn.Parameter(torch.empty(shape_a, device=weight.device, dtype=weight.dtype))
        self.lora_B = nn.Parameter(torch.zeros(shape_b, device=weight.device, dtype=weight.dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def merged(self) -> bool:
        """Whether the update is currently folded into the frozen weight."""
        return self._frozen_weight is not None

    def delta(self) -> Tensor:
        """The update of the weight, in the weight's shape."""
        raise NotImplementedError

    def update(self, x: Tensor) -> Tensor:
        """The low-rank branch's output for the layer's input ``x``, in the shape of the layer's output."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The frozen layer's output plus the update's, in the frozen layer's shapes."""
        result = self.linear(x)
        return result if self.merged else result + self.scaling * self.update(self.lora_dropout(x))

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the weight, so that the layer costs no more than a plain one. Idempotent.

        Raises ``InputError`` if the update is not finite.
        """
        if self.merged:
            return
        delta = self.delta()
        if not torch.isfinite(delta).all():
            raise InputError("LoRA weights are not finite, so they are not merged: train again with a lower lr.")
        self._frozen_weight = self.linear.weight.detach().clone()
        self.linear.weight += delta

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the frozen weight exactly. Idempotent."""
        if self._frozen_weight is not None:
            self.linear.weight.copy_(self._frozen_weight)
            self._frozen_weight = None

    def extra_repr(self) -> str:
        """The rank and the scaling, for ``print(model)``."""
        return f"r={self.r}, scaling={self.scaling:g}, merged={self.merged}"


class _Adapted(torch.autograd.Function):
    """``(W0 + s B A) x + b`` with gradients for x, A and B, but none for W0 and b, which are frozen.

    Plain autograd would need two more passes over the tokens for the update, or the gradient of the whole weight.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 a small update would vanish by rounding
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


class LoRALinear(LoRALayer):
    """A frozen ``nn.Linear`` plus a trainable low-rank update: ``W0 x + b + scaling * B A dropout(x)``.

    ``lora_A``: (r, in_features). ``lora_B``: (out_features, r). Errors as in `LoRALayer`; the largest rank is
    min(in_features, out_features).
    """

    def __init__(self, linear: nn.Linear, r: int, alpha: float, dropout: float = 0.0):
        inputs, outputs = linear.in_features, linear.out_features
        super().__init__(linear, min(inputs, outputs), f"{inputs} -> {outputs}", r, alpha, dropout)
        self._add_parameters((r, inputs), (outputs, r))

    def delta(self) -> Tensor:
        """The update of the weight, ``scaling * B A``: (out_features, in_features)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def update(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., r) -> (..., out_features)."""
        return F.linear(F.linear(x, self.lora_A), self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.merged or (self.training and self.lora_dropout.p):
            return super().forward(x)
        # (W0 + s B A) x: one product of the small matrices
        return _Adapted.apply(x, self.linear.weight, self.linear.bias, self.lora_A, self.lora_B, self.scaling)


class DoRALinear(LoRALinear):
    """DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5): LoRA changes the direction of each row of the weight, and
    ``lora_magnitude``, (out_features,), is the trained norm of that row.

    ``W' = m (W0 + scaling B A) / ||W0 + scaling B A||``, norms over each row, without gradient through the norm (their
    section 4.3). It starts at ``W0``. There is no dropout. Errors as in `LoRALayer`.
    """

    def __init__(self, linear: nn.Linear, r: int, alpha: float):
        super().__init__(linear, r, alpha)
        self.lora_magnitude = nn.Parameter(linear.weight.detach().norm(dim=1))

    def adapted(self) -> Tensor:
        """The adapted weight W': (out_features, in_features)."""
        direction = self.linear.weight + super().delta()
        return (self.lora_magnitude / direction.detach().norm(dim=1)).unsqueeze(1) * direction

    def delta(self) -> Tensor:
        """The update of the weight, ``W' - W0``: (out_features, in_features)."""
        return self.adapted() - self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.merged:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 a small update would vanish by rounding
            weight = self.adapted()
        return F.linear(x, weight, self.linear.bias)


class LoRAConv2d(LoRALayer):
    """A frozen ``nn.Conv2d`` plus a convolution to r channels and a 1x1 convolution from them, as in peft.

    ``lora_A``: (r, in_channels, kh, kw), with the frozen layer's stride, padding and dilation. ``lora_B``:
    (out_channels, r, 1, 1). For a 1x1 convolution this is `LoRALinear` over the pixels. Errors as in `LoRALayer`; the
    largest rank is min(in_channels * kh * kw, out_channels). Grouped convolutions are refused, because a depthwise
    kernel has no rank to reduce.
    """

    def __init__(self, conv: nn.Conv2d, r: int, alpha: float, dropout: float = 0.0):
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise InputError("LoRA on a grouped or non-zero-padded convolution is not supported: leave that layer out.")
        patch, outputs = conv.weight[0].numel(), conv.out_channels
        super().__init__(conv, min(patch, outputs), f"{patch} -> {outputs}", r, alpha, dropout)
        self._add_parameters((r, *conv.weight.shape[1:]), (outputs, r, 1, 1))

    def delta(self) -> Tensor:
        """The update of the weight, ``scaling * B A``: (out_channels, in_channels, kh, kw)."""
        return self.scaling * (self.lora_B.flatten(1) @ self.lora_A.flatten(1)).view_as(self.linear.weight)

    def update(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, r, h, w) -> (B, out_channels, h, w)."""
        conv = self.linear
        return F.conv2d(F.conv2d(x, self.lora_A, None, conv.stride, conv.padding, conv.dilation), self.lora_B)


def inject(
    model: nn.Module,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    lora_target: str = "all",
    skip: Sequence[str] = (),
    conv: bool = False,
    dora: bool = False,
) -> list[str]:
    """Wrap the target modules of ``model`` in `LoRALinear`; return their names.

    ``lora_target`` is a key of ``TARGETS``. ``skip``: prefixes of names to leave out, such as layers that
    never run. ``conv``: wrap convolutions too (`LoRAConv2d`), except depthwise ones. ``dora``: wrap Linear layers in
    `DoRALinear` instead, without dropout. The weights of these layers are frozen; freezing the rest is the caller's.

    Raises ``InputError`` for unknown target modules, a pattern that matches no layer, a rank that does not fit, or a
    model that is already wrapped. The model is then left unchanged.
    """
    if lora_target not in TARGETS:
        raise InputError(f"LoRA target {lora_target!r} is not known: choose one of {', '.join(TARGETS)}.")
    if any(isinstance(module, LoRALayer) for module in model.modules()):
        raise InputError("The model already has LoRA layers: build a new one before injecting again.")
    pattern = re.compile(TARGETS[lora_target])
    names = [
        name
        for name, module in model.named_modules()
        if _takes_lora(module, conv) and pattern.search(name) and not name.startswith(tuple(skip))
    ]
    if not names:
        raise InputError(f"LoRA target {lora_target!r} matches no Linear layer of this model.")
    # all are built before any is inserted, so that the model is unchanged if the rank does not fit all of them
    wrapped: dict[str, LoRALayer] = {}
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            assert isinstance(layer, nn.Conv2d)
            wrapped[name] = LoRAConv2d(layer, r, alpha, dropout)
        elif dora:
            wrapped[name] = DoRALinear(layer, r, alpha)
        else:
            wrapped[name] = LoRALinear(layer, r, alpha, dropout)
    for name, new in wrapped.items():
        parent, _, child = name.rpartition(".")
        new.train(model.training)
        setattr(model.get_submodule(parent), child, new)
    return names


def _takes_lora(module: nn.Module, conv: bool) -> bool:
    return isinstance(module, nn.Linear) or (conv and isinstance(module, nn.Conv2d) and module.groups == 1)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The model's LoRA layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def merge(model: nn.Module) -> None:
    """Merge every LoRA layer of the model."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Unmerge every LoRA layer of the model."""
    for layer in lora_layers(model).values():
        layer.unmerge()
