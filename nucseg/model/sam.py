"""MobileSAM as its authors build it, and its image encoder at any input size."""

import functools
import warnings

import torch
from torch import Tensor, nn

from nucseg.errors import InputError

with warnings.catch_warnings():  # mobile_sam uses old names of timm, and registers models that timm has as well
    warnings.filterwarnings("ignore", message="Importing from timm.models", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Overwriting tiny_vit_", category=UserWarning)
    from mobile_sam import build_sam_vit_t
    from mobile_sam.modeling import TinyViT


# SAM's normalisation of 0..255 RGB
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def build_sam() -> nn.Module:
    """MobileSAM (``vit_t``) as its authors build it, with random weights, in eval mode."""
    return build_sam_vit_t()


@functools.cache
def sam_shapes() -> dict[str, torch.Size]:
    """The shape of every entry of MobileSAM's state dict, by name."""
    with torch.random.fork_rng(devices=[]):  # building draws random numbers: keep the caller's generator as it was
        return {name: tensor.shape for name, tensor in build_sam().state_dict().items()}


@functools.cache
def sam_parameters() -> int:
    """Number of parameters of MobileSAM: image encoder, prompt encoder and mask decoder."""
    with torch.random.fork_rng(devices=[]):
        return sum(parameter.numel() for parameter in build_sam().parameters())


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state dict under ``prefix``, without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


class Encoder(TinyViT):
    """MobileSAM's image encoder (TinyViT-5M) for any input of multiples of 64 px, under the same weights.

    The layers run at any size. The original only fixes the size of the grid, which is set here from the input. At
    1024 px the output equals that of ``mobile_sam``.
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

    def _set_grid(self, height: int, width: int) -> None:
        for i, layer in enumerate(self.layers):
            stride = (4, 8, 16, 16)[i]
            grid = (height // stride, width // stride)
            for module in (layer, layer.downsample, *layer.blocks):
                if hasattr(module, "input_resolution"):
                    module.input_resolution = grid

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, H, W) normalised -> features of stride 4, 8, 16 and the neck's output of stride 16.

        Channels 64, 128, 320 and 256. The first three are taken before each stage's downsampling.
        Raises ``InputError`` unless H and W are multiples of 64.
        """
        height, width = x.shape[-2:]
        if height % 64 or width % 64:
            raise InputError(f"The encoder takes sides that are multiples of 64 px, not {height} x {width}.")
        self._set_grid(height, width)
        x = self.patch_embed(x)  # (B, 64, H/4, W/4)
        stages = []
        for layer in self.layers:
            for block in layer.blocks:
                x = block(x)
            stages.append(x)
            if layer.downsample is not None:
                x = layer.downsample(x)  # (B, H/s * W/s, C)
        fine, middle, _, coarse = stages
        middle = self._to_map(middle, height // 8, width // 8)
        coarse = self._to_map(coarse, height // 16, width // 16)
        return fine, middle, coarse, self.neck(coarse)

    @staticmethod
    def _to_map(tokens: Tensor, height: int, width: int) -> Tensor:
        # (B, N, C) -> (B, C, H, W)
        return tokens.view(tokens.shape[0], height, width, -1).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, 256, H/16, W/16), the embedding that SAM's decoder takes."""
        return self.features(x)[-1]
