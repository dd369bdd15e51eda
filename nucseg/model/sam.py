"""MobileSAM as built by its authors, and its image encoder for any input size."""

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nucseg.errors import InputError

with warnings.catch_warnings():  # mobile_sam uses old names of timm, and registers models that timm has too
    warnings.filterwarnings("ignore", message="Importing from timm.models", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Overwriting tiny_vit_", category=UserWarning)
    from mobile_sam import build_sam_vit_t
    from mobile_sam.modeling import TinyViT
    from mobile_sam.modeling.tiny_vit_sam import TinyViTBlock


# SAM's normalisation of 0..255 RGB
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """Silence warnings about sizes that become constants in tracing: each size is traced separately."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="`torch.jit", category=FutureWarning)
        yield


def build_sam() -> nn.Module:
    """MobileSAM (``vit_t``) as built by its authors, with random weights, in eval mode."""
    return build_sam_vit_t()


class _Undrawn(TorchFunctionMode):
    """Build layers without drawing their random weights, which takes a third of the time: they are zero instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("kaiming_uniform_", "uniform_", "normal_", "erfinv_"):
            tensor = args[0] if args else kwargs["tensor"]
            return tensor.detach().zero_()
        return func(*args, **(kwargs or {}))


@functools.cache
def _architecture() -> nn.Module:
    """MobileSAM without weights: built once, because its tables of attention offsets take long."""
    with torch.random.fork_rng(devices=[]), _Undrawn():  # one buffer is drawn nevertheless
        return build_sam()


@functools.cache
def sam_shapes() -> dict[str, torch.Size]:
    """The shape of every entry of MobileSAM's state dict, by name."""
    return {name: tensor.shape for name, tensor in _architecture().state_dict().items()}


@functools.cache
def sam_parameters() -> int:
    """Number of parameters of MobileSAM: image encoder, prompt encoder and mask decoder."""
    return sum(parameter.numel() for parameter in _architecture().parameters())


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state dict under ``prefix``, without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


class Encoder(TinyViT):
    """MobileSAM's image encoder (TinyViT-5M) for sides of any multiple of 16 px, with the same weights.

    The layers are the original's. The forward pass is rewritten so that the grid follows the input and maps stay
    (B, H, W, C) in memory: the original copies between tokens and maps twice per block, and computes with padded
    windows. At 1024 px the output equals ``mobile_sam``'s.
    """

    def __init__(self) -> None:
        # the arguments of mobile_sam.build_sam.build_sam_vit_t
        super().__init__(
            img_size=1024,
            in_chans=3,
            num_classes=1000,
            embed_dims=[64, 128, 160, 320],
            depths=[2, 2, 6, 2],
            num_heads=[2, 4, 5, 10],
            window_sizes=[7, 7, 14, 7],
            mlp_ratio=4.0,
            drop_rate=0.0,
            drop_path_rate=0.0,
            use_checkpoint=False,
            mbconv_expand_ratio=4.0,
            local_conv_size=3,
            layer_lr_decay=0.8,
        )

    @classmethod
    def without_weights(cls) -> "Encoder":
        """An encoder to load weights into: in a fraction of the time, and without drawing random numbers."""
        encoder = copy.deepcopy(_architecture().get_submodule("image_encoder"))
        encoder.__class__ = cls  # the same layers; only the forward pass differs
        return cast(Encoder, encoder)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, H, W) normalised -> features of stride 4, 8, 16 and the neck's output of stride 16.

        Channels 64, 128, 320 and 256. The first three are taken before each stage's downsampling.
        Raises ``InputError`` unless H and W are multiples of 16.
        """
        height, width = x.shape[-2:]
        if height % 16 or width % 16:
            raise InputError(f"The encoder takes sides that are multiples of 16 px, not {height} x {width}.")
        x = self.patch_embed(x)  # (B, 64, H/4, W/4)
        stages = []
        for layer in self.layers:
            for block in layer.blocks:
                x = _block(block, x) if isinstance(block, TinyViTBlock) else block(x)
            stages.append(x)
            if layer.downsample is not None:
                x = _downsample(layer.downsample, x)
        fine, middle, _, coarse = stages
        return fine, middle, coarse, self.neck(coarse)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, 256, H/16, W/16), the embedding that SAM's decoder takes."""
        return self.features(x)[-1]


def _downsample(layer: Any, x: Tensor) -> Tensor:
    """``PatchMerging`` without the conversion to tokens: (B, C, H, W) -> (B, C', H/2 or H, W/2 or W)."""
    return layer.conv3(layer.act(layer.conv2(layer.act(layer.conv1(x)))))


def _block(block: Any, x: Tensor) -> Tensor:
    """One transformer block on maps: (B, C, H, W) -> the same, channels last in memory."""
    x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
    x = x + _attention(block.attn, x, block.window_size)
    x = block.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return (x + block.mlp(x)).permute(0, 3, 1, 2)


def _attention(attention: Any, x: Tensor, window: int) -> Tensor:
    """Attention within windows of ``window`` x ``window`` tokens: (B, H, W, C) -> (B, H, W, C).

    If the last windows extend beyond the map, the original pads it with tokens of zeros. They all become the same
    vector, which is therefore computed once, as a key and a value for the others.
    """
    _, height, width, _ = x.shape
    qkv = attention.qkv(attention.norm(x))
    whole, below, right = qkv, -height % window, -width % window
    if below or right:
        filling = attention.qkv(attention.norm.bias).to(qkv.dtype).expand(x.shape[0], height + below, width + right, -1)
        whole = torch.cat([qkv, filling[:, :height, width:]], dim=2) if right else qkv
        whole = torch.cat([whole, filling[:, height:]], dim=1) if below else whole
    heads, parts = attention.num_heads, [attention.key_dim, attention.key_dim, attention.d]
    q, k, v = whole.unflatten(-1, (heads, -1)).split(parts, dim=-1)  # (B, H, W, heads, d)
    bias = attention.attention_biases[:, attention.attention_bias_idxs] if attention.training else attention.ab
    bands = [
        torch.cat(
            [
                _windows(q[:, y, x], k[:, y_all, x_all], v[:, y_all, x_all], bias, window, attention.scale)
                for x, x_all in _bands(width, window)
            ],
            dim=2,
        )
        for y, y_all in _bands(height, window)
    ]
    return attention.proj(torch.cat(bands, dim=1))


def _bands(length: int, window: int) -> list[tuple[slice, slice]]:
    """Slices of a side: the part covered by whole windows and the rest, each with the extent of its windows."""
    whole, up = length - length % window, length + -length % window
    bands = [(slice(0, whole), slice(0, whole)), (slice(whole, length), slice(whole, up))]
    return [band for band in bands if band[0].start < band[0].stop]


def _windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int, scale: float) -> Tensor:
    """Queries (B, h, w, heads, d), keys and values (B, H, W, heads, d) of the same windows -> (B, h, w, heads * d)."""
    batch, height, width, heads, _ = q.shape
    rows, columns = k.shape[1] // window, k.shape[2] // window
    tall, wide = height // rows, width // columns

    def split(tokens: Tensor, tall: int, wide: int) -> Tensor:  # -> (B, rows, columns, heads, tall * wide, d)
        tokens = tokens.unflatten(2, (columns, wide)).unflatten(1, (rows, tall))
        return tokens.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)

    bias = bias.view(heads, window, window, -1)[:, :tall, :wide].flatten(1, 2)
    weights = (split(q, tall, wide) * scale) @ split(k, window, window).transpose(-2, -1) + bias
    out = weights.softmax(dim=-1) @ split(v, window, window)  # (B, rows, columns, heads, tall * wide, d)
    return out.unflatten(4, (tall, wide)).permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, -1)
