"""The heads that turn the encoder's features into target maps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nucseg.instances import CHANNELS
from nucseg.model.sam import build_sam

LOSE = 0.25  # probability that an input of the instance head is dropped, in pretraining with stage heads


class LinearHead(nn.Module):
    """The report's head: a 1x1 convolution from 256 channels to one logit, on the stride-16 grid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(256, 1, kernel_size=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, 256, h, w), the last of ``features`` -> (B, 1, h, w) logits."""
        return self.conv(features[-1])


class MaskDecoderHead(nn.Module):
    """MobileSAM's own mask decoder without a prompt: one mask of all nuclei, on the stride-4 grid."""

    def __init__(self) -> None:
        super().__init__()
        sam = build_sam()
        self.prompt_encoder: Any = sam.prompt_encoder
        self.mask_decoder: Any = sam.mask_decoder

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, 256, h, w), the last of ``features`` -> (B, 1, 4h, 4w) logits."""
        embedding = features[-1]
        grid = embedding.shape[-2:]
        position = self.prompt_encoder.pe_layer(grid)[None]  # (1, 256, h, w)
        dense = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, *grid)
        sparse = embedding.new_zeros(1, 0, embedding.shape[1])  # no points, no boxes
        # one image at a time: the decoder repeats images per prompt, not per batch entry
        masks = [
            self.mask_decoder(
                image_embeddings=one[None],
                image_pe=position,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )[0]
            for one in embedding
        ]
        return torch.cat(masks)


class InstanceHead(nn.Module):
    """A small pyramid: stride-16, -8 and -4 features summed from coarse to fine, then a thin stem at stride 2.

    It predicts the target maps of `instances.encode`, one channel each. The stem sees the image itself, because narrow
    gaps between touching nuclei are lost at stride 4.

    ``width``: channels of the pyramid, a multiple of 32; the stem has half as many. ``norm``: see `NORMS`.
    """

    def __init__(self, without: str = "", lose: float = 0.0, width: int = 64, norm: str = "group") -> None:
        super().__init__()
        self.without = without
        self.lose = lose
        self.coarse = nn.Conv2d(320, width, 1)
        self.middle = nn.Conv2d(128, width, 1)
        self.fine = nn.Conv2d(64, width, 1)
        stem = width // 2
        self.join_middle = _block(width, width, norm)
        self.join_fine = _block(width, width, norm)
        self.stem = nn.Sequential(_block(3, stem // 2, norm, stride=2), _block(stem // 2, stem, norm))
        self.join_stem = nn.Sequential(_block(width + stem, 48, norm), _block(48, 48, norm))
        self.out = nn.Conv2d(48, len(CHANNELS) - (without == "distance"), 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(x, stride 4, stride 8, stride 16, neck) -> (B, C, H/2, W/2) logits; C is 1 without the distance map."""
        x, fine, middle, coarse, _ = features
        # an ablated input is replaced by zeros, so that all variants have the same number of parameters
        y = self.join_middle(self._or_zero("middle", self.middle(middle)) + _double(self.coarse(coarse)))  # (B, w, H/8)
        y = self.join_fine(self._or_zero("fine", self.fine(fine)) + _double(y))  # (B, width, H/4, W/4)
        y = torch.cat([_double(y), self._or_zero("stem", self.stem(x))], dim=1)  # (B, width + stem, H/2, W/2)
        return self.out(self.join_stem(y))

    def _or_zero(self, piece: str, y: Tensor) -> Tensor:
        if self.training and self.lose:  # drawn per image, so that the head learns to work without this input
            y = y * (torch.rand(len(y), 1, 1, 1, device=y.device) >= self.lose)
        return torch.zeros_like(y) if piece == self.without else y


class StageHeads(nn.Module):
    """Deep supervision (Lee et al. 2015): predicts the target maps from each of the encoder's feature maps alone.

    Each head is a 1x1 convolution and a pixel shuffle to stride 2. It sees no neighbouring feature, so each feature has
    to hold the answer itself. Without these heads, the stem and the stride-4 features do all the work in pretraining,
    and the transformer learns nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        channels, strides = (64, 128, 320, 256), (4, 8, 16, 16)
        self.convs = nn.ModuleList(
            nn.Conv2d(c, len(CHANNELS) * (s // 2) ** 2, 1) for c, s in zip(channels, strides, strict=True)
        )
        self.scales = [s // 2 for s in strides]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The feature maps of ``Encoder.features`` -> (B, C, H/2, W/2) logits for each of them."""
        return [
            F.pixel_shuffle(conv(y), scale) for conv, y, scale in zip(self.convs, features, self.scales, strict=True)
        ]


class LayerNorm2d(nn.LayerNorm):
    """SAM's normalisation of each pixel over its channels: (B, C, H, W) -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over dimension 1."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GroupNorm32(nn.GroupNorm):
    """GroupNorm computed in float32: on a CPU its backward pass takes half the time of one in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise groups of channels over the whole map; the result has the dtype of ``x``."""
        return super().forward(x.float()).to(x.dtype)


# "group": statistics of the whole field (Wu & He 2018), so that a nucleus's maps depend on the rest of the field.
# "layer": statistics of one pixel. "batch": statistics of the training images, stored in the adapter. With the last
# two, a nucleus's maps do not depend on its field.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda channels: GroupNorm32(8, channels),
    "layer": LayerNorm2d,
    "batch": nn.BatchNorm2d,
}


def _block(inputs: int, outputs: int, norm: str, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), NORMS[norm](outputs), nn.GELU())


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


_HEADS: dict[str, type[nn.Module]] = {
    "linear": LinearHead,
    "mask_decoder": MaskDecoderHead,
    "instance": InstanceHead,
}
