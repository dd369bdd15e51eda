"""MobileSAM's image encoder at any size, the heads on it, and the two put together with LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from nucseg import lora
from nucseg.config import option
from nucseg.errors import InputError
from nucseg.instances import CHANNELS
from nucseg.sam import PIXEL_MEAN, PIXEL_STD, Encoder, build_sam, part, sam_parameters
from nucseg.weights import INSTANCE_HEAD, Base, load_base

PRECISIONS = ("auto", "float32", "bfloat16")
FIELD = 512  # px, the side of NuInsSeg's images; what nothing says the size of is taken to be like them
HEADS = ("linear", "mask_decoder", "instance")
LOSE = 0.25  # how often a piece is missing in pretraining with stage heads
PIECES = ("depth", "stem", "fine", "middle")  # of the instance head: its second map, and features by stride
# Layers that never run here: the encoder's classifier, and the decoder's branches for several masks and scores
ENCODER_UNUSED = ("head",)
DECODER_UNUSED = ("iou_prediction_head", *(f"output_hypernetworks_mlps.{i}" for i in (1, 2, 3)))


@dataclass(frozen=True)
class ModelConfig:
    """What the model is made of; each default with its reason."""

    base: str = option(
        "auto", "base: mobile_sam (downloaded once), offline, random, a path; auto: the first that is here"
    )
    base_seed: int = option(0, "seed of the base 'random'; unused by the others")
    size: int = option(1024, "px, longer side that the encoder sees; 1024 is SAM's own and the report's")
    field: int = option(0, "px of an image that are seen as `size` px; 0: its longer side, whatever that is")
    um_per_px: float = option(0.0, "um per px of the training images, 0 where it is not known")
    head: str = option(
        "linear", "linear (the report's 1x1 convolution), mask_decoder (SAM's, without prompts) or instance"
    )
    where: str = option("all", "LoRA placement: all, attention, qkv, mlp, late; none (head only); full (no LoRA)")
    rank: int = option(8, "LoRA rank; 8 is the report's")
    alpha: float = option(8.0, "LoRA alpha; 8 at rank 8 is a scaling of 1, the report's")
    dropout: float = option(0.1, "dropout of the LoRA input; in the report's code, not in its text")
    unused_head: bool = option(False, "adapt the encoder's classifier too; it never runs, but the report counts it")
    decoder_where: str = option("none", "LoRA placement in the mask decoder, with head mask_decoder")
    head_start: str = option("base", "instance head: base (as the base was trained with, where it has one) or fresh")
    stages: bool = option(False, "pretraining: predict from each of the encoder's stages alone too, and lose pieces")
    without: str = option("", "leave this piece of the instance head out, to see what it brings: " + ", ".join(PIECES))

    @property
    def nucleus_scale(self) -> float:
        """How large nuclei are in its images, in px, against NuInsSeg's, as ``field`` says; 1 where that is 0."""
        return self.field / FIELD if self.field else 1.0

    def check(self) -> None:
        """Raise ``InputError`` for a field that no model can be built from."""
        if self.head not in HEADS:
            raise InputError(f"Head {self.head!r} is not known: choose one of {', '.join(HEADS)}.")
        if self.size % 64 or not 64 <= self.size <= 1024:
            raise InputError(f"Size {self.size} px does not fit the encoder: choose a multiple of 64 from 64 to 1024.")
        if self.field < 0 or not self.um_per_px >= 0:
            raise InputError(f"Options field = {self.field} and um_per_px = {self.um_per_px} must not be below 0.")
        known = (*lora.PLACEMENTS, "none", "full")
        if self.where not in known:
            raise InputError(f"Placement {self.where!r} is not known: choose one of {', '.join(known)}.")
        if self.head == "mask_decoder" and self.where == self.decoder_where == "none":
            raise InputError("Head 'mask_decoder' without LoRA leaves nothing to train: set where or decoder_where.")
        if self.without and (self.without not in PIECES or self.head != "instance"):
            raise InputError(
                f"Option without = {self.without!r} needs the head 'instance' and one of {', '.join(PIECES)}."
            )
        if self.stages and (self.head != "instance" or self.where != "full"):
            raise InputError("Option stages is for pretraining: it needs the head 'instance' and where = 'full'.")
        if self.head_start not in ("base", "fresh"):
            raise InputError(f"Option head_start = {self.head_start!r} is not known: choose base or fresh.")
        if self.decoder_where != "none" and self.head != "mask_decoder":
            raise InputError("Option decoder_where needs the head 'mask_decoder': set head, or leave it 'none'.")


class LinearHead(nn.Module):
    """The report's head: a 1x1 convolution from 256 channels to one logit, on the stride-16 grid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(256, 1, kernel_size=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, 256, h, w), the last of ``features`` -> (B, 1, h, w) logits."""
        return self.conv(features[-1])


class MaskDecoderHead(nn.Module):
    """MobileSAM's own mask decoder without any prompt: one mask of all nuclei, on a stride-4 grid."""

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
        # one image at a time: the decoder repeats its images once a prompt, not once a batch entry
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

    It predicts the target maps of ``instances.encode``, one channel each. The stem sees the image itself: at
    stride 4 two nuclei that touch along a few px can no longer be told apart.
    """

    def __init__(self, without: str = "", lose: float = 0.0, width: int = 64, stem: int = 32) -> None:
        super().__init__()
        self.without = without
        self.lose = lose
        self.coarse = nn.Conv2d(320, width, 1)
        self.middle = nn.Conv2d(128, width, 1)
        self.fine = nn.Conv2d(64, width, 1)
        self.join_middle = _block(width, width)
        self.join_fine = _block(width, width)
        self.stem = nn.Sequential(_block(3, stem // 2, stride=2), _block(stem // 2, stem))
        self.join_stem = nn.Sequential(_block(width + stem, 48), _block(48, 48))
        self.out = nn.Conv2d(48, len(CHANNELS) - (without == "depth"), 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(x, stride 4, stride 8, stride 16, neck) -> (B, C, H/2, W/2) logits; C is 1 without the depth."""
        x, fine, middle, coarse, _ = features
        # a piece that is left out is multiplied by nothing and learns nothing, so that all variants are as large
        y = self.join_middle(self._or_zero("middle", self.middle(middle)) + _double(self.coarse(coarse)))  # (B, w, H/8)
        y = self.join_fine(self._or_zero("fine", self.fine(fine)) + _double(y))  # (B, width, H/4, W/4)
        y = torch.cat([_double(y), self._or_zero("stem", self.stem(x))], dim=1)  # (B, width + stem, H/2, W/2)
        return self.out(self.join_stem(y))

    def _or_zero(self, piece: str, y: Tensor) -> Tensor:
        if self.training and self.lose:  # image by image: the others have to do without it
            y = y * (torch.rand(len(y), 1, 1, 1, device=y.device) >= self.lose)
        return torch.zeros_like(y) if piece == self.without else y


class StageHeads(nn.Module):
    """Deep supervision (Lee et al. 2015): the same maps from each of the encoder's features alone, without a neighbour.

    A 1x1 convolution and a pixel shuffle to stride 2, so that what is not in a feature cannot be made up for. Where
    only the whole head is trained, stem and stride 4 do all the work and the transformer learns nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        channels, strides = (64, 128, 320, 256), (4, 8, 16, 16)
        self.convs = nn.ModuleList(
            nn.Conv2d(c, len(CHANNELS) * (s // 2) ** 2, 1) for c, s in zip(channels, strides, strict=True)
        )
        self.scales = [s // 2 for s in strides]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The features of ``Encoder.features`` -> as many (B, C, H/2, W/2) logits."""
        return [
            F.pixel_shuffle(conv(y), scale) for conv, y, scale in zip(self.convs, features, self.scales, strict=True)
        ]


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    # GroupNorm: batches are small, and an adapter then carries no running statistics
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.GELU())


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


_HEADS: dict[str, type[nn.Module]] = {
    "linear": LinearHead,
    "mask_decoder": MaskDecoderHead,
    "instance": InstanceHead,
}


class NucleiModel(nn.Module):
    """Frozen MobileSAM encoder with LoRA, and a head: uint8 images in, logits out at the same size."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder()
        head = InstanceHead(config.without, LOSE if config.stages else 0) if config.head == "instance" else None
        self.head = head or _HEADS[config.head]()
        self.stage_heads = StageHeads() if config.stages else None
        self.base_name = ""
        self.base_sha256 = ""
        self.adapter_name = self.adapter_sha256 = self.start_sha256 = ""  # set by who loads one
        self.precision = "float32"  # `place` sets what the device is fast in
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 RGB, sides multiples of 64 -> (B, C, H, W) logits.

        Raises ``InputError`` for another dtype: normalised floats would be normalised a second time.
        """
        return self.with_stages(images)[0]

    def with_stages(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As ``forward``, and the logits of the stage heads at stride 2, where there are any."""
        if images.dtype != torch.uint8:
            raise InputError(
                f"The model takes uint8 RGB images, 0..255, not {images.dtype}: it normalises them itself."
            )
        x = (images.float() - self.mean) / self.std
        # bfloat16 has float32's range, so there is no loss to scale
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            features = self.encoder.features(x)
            logits = self.head((x, *features))
            stages = self.stage_heads(features) if self.stage_heads and self.training else []
        return F.interpolate(logits.float(), size=images.shape[-2:], mode="bilinear", align_corners=False), stages

    @property
    def n_maps(self) -> int:
        """How many maps the model predicts: `instances.CHANNELS`, or the foreground alone."""
        return len(CHANNELS) if self.config.head == "instance" and self.config.without != "depth" else 1

    def train(self, mode: bool = True) -> "NucleiModel":
        """As usual, but a frozen encoder's BatchNorm stays in eval mode, so its running statistics never drift."""
        super().train(mode)
        if self.config.where != "full":
            for module in self.encoder.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def adapter_state(self) -> dict[str, Tensor]:
        """All that differs from the base: the trained parameters, and BatchNorm buffers that were trained along."""
        keep = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        for name, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d) and any(p.requires_grad for p in module.parameters()):
                keep |= {f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False)}
        return {name: tensor for name, tensor in self.state_dict().items() if name in keep}

    def load_adapter_state(self, tensors: dict[str, Tensor], source: str = "adapter") -> None:
        """Put an adapter's tensors in place. Raises ``InputError`` unless names and shapes are just its own."""
        expected = {name: tensor.shape for name, tensor in self.adapter_state().items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if wrong:
            raise InputError(f"{source}: does not fit this model ({len(wrong)} tensors differ, {wrong[0]} first).")
        self.load_state_dict(tensors, strict=False)
        self.train(self.training)  # TinyViT caches its attention biases on the way into eval mode


def build_model(config: ModelConfig, base: Base | None = None) -> NucleiModel:
    """Build the model on its base, inject LoRA, freeze the rest; in eval mode, on the CPU.

    ``base`` may be given where it is loaded already. Raises ``InputError`` for a config that does not fit.
    """
    config.check()
    base = base or load_base(config.base, config.base_seed)
    model = NucleiModel(config)
    model.base_name, model.base_sha256 = base.name, base.sha256
    model.encoder.load_state_dict(part(base.state, "image_encoder."))
    model.encoder.requires_grad_(config.where == "full")
    trained_head = part(base.state, INSTANCE_HEAD)
    if isinstance(model.head, InstanceHead) and trained_head and config.head_start == "base":
        if config.without == "depth":
            trained_head |= {name: trained_head[name][:1] for name in ("out.weight", "out.bias")}
        model.head.load_state_dict(trained_head)
    if isinstance(model.head, MaskDecoderHead):
        model.head.prompt_encoder.load_state_dict(part(base.state, "prompt_encoder."))
        model.head.mask_decoder.load_state_dict(part(base.state, "mask_decoder."))
        model.head.requires_grad_(config.where == "full")
    if config.where not in ("none", "full"):
        skip = () if config.unused_head else ENCODER_UNUSED
        lora.inject(model.encoder, config.rank, config.alpha, config.dropout, config.where, skip)
    if config.decoder_where != "none":
        decoder = model.head.get_submodule("mask_decoder")
        lora.inject(decoder, config.rank, config.alpha, config.dropout, config.decoder_where, DECODER_UNUSED)
    return model.eval()


def save_model(path: str | Path, model: NucleiModel) -> None:
    """Write the model's adapter file (LoRA and head; the base is only named and hashed)."""
    config = {field.name: getattr(model.config, field.name) for field in fields(ModelConfig)}
    lora.save_adapter(path, model.adapter_state(), config | {"base": model.base_name}, model.base_sha256)


def load_model(path: str | Path, base: Base | str | None = None) -> NucleiModel:
    """Build the model that an adapter file belongs to, in eval mode.

    ``base``: only needed where the adapter's base is a file of yours: its path, or the loaded base.
    Raises ``InputError`` for a damaged adapter, another base, or tensors that do not fit.
    """
    tensors, stored, base_sha256 = lora.read_adapter(path)
    if not stored.keys() <= {field.name for field in fields(ModelConfig)}:  # one that is newer had its default then
        raise InputError(f"{path}: written by another version of nucseg (its configuration has other fields).")
    config = ModelConfig(**stored)
    if not isinstance(base, Base):
        base = load_base(base or config.base, config.base_seed)
    lora.check_base(path, base_sha256, base.sha256, base.name)
    model = build_model(config, base)
    model.load_adapter_state(tensors, str(path))
    return model


def parameter_ledger(model: NucleiModel) -> dict[str, int]:
    """Count parameters as the report does, over the whole of MobileSAM.

    ``base``: MobileSAM's own (encoder, prompt encoder, mask decoder), whether this head uses them or not.
    ``lora``, ``head``: what was added. ``trainable``: what the optimiser sees. ``total``: base + lora + head.
    """
    base = sam_parameters()
    added_lora = sum(l.lora_A.numel() + l.lora_B.numel() for l in lora.lora_layers(model).values())  # noqa: E741
    head = 0 if isinstance(model.head, MaskDecoderHead) else sum(p.numel() for p in model.head.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "base": base,
        "lora": added_lora,
        "head": head,
        "trainable": trainable,
        "total": base + added_lora + head,
    }


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU; any of torch's names works. ``InputError`` if it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"Device {name!r} is not available here: choose 'cpu' or 'auto'.") from error
    return device


def place(model: NucleiModel, device: torch.device, precision: str = "auto") -> NucleiModel:
    """Put the model on a device, in the memory layout and the precision that it is fast in; returns the model.

    ``precision``: float32, bfloat16, or auto, which is bfloat16 where the device computes in it: CUDA cards from
    Ampere on and processors with AVX512-BF16. Scores then differ from float32's in the third decimal.
    """
    if precision not in PRECISIONS:
        raise InputError(f"Precision {precision!r} is not known: choose one of {', '.join(PRECISIONS)}.")
    if precision == "auto":
        precision = "bfloat16" if _computes_in_bfloat16(device) else "float32"
    model.precision = precision
    if device.type == "mps":  # its convolutions take the other layout
        return model.to(device)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public question for it; without the instructions bfloat16 is slower than float32
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


@torch.no_grad()
def predict(model: NucleiModel, image: np.ndarray, scale: float | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of any size -> (C, H, W) float32 sigmoid of the model's logits, at the same size.

    The image is scaled by ``scale``, by default so that ``config.field`` px, or its longer side where that is 0,
    become ``config.size`` px. The rest up to a multiple of 64 is filled by reflection and
    cut away again. The model is used in the mode and on the device it is in: call ``model.eval()`` first.
    """
    height, width = image.shape[:2]
    scale = scale or model.config.size / (model.config.field or max(height, width))
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    scaled = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))
    padded = np.pad(scaled, ((0, -rows % 64), (0, -columns % 64), (0, 0)), mode="symmetric")
    images = torch.from_numpy(padded).permute(2, 0, 1)[None].to(model.mean.device)
    logits = model(images)[:, :, :rows, :columns]
    logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
    return torch.sigmoid(logits)[0].cpu().numpy()
