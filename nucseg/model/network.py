"""The model: MobileSAM's image encoder with LoRA and a head, its files, devices and predictions."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from nucseg.config import CHOICES, ModelConfig
from nucseg.errors import InputError
from nucseg.instances import CHANNELS
from nucseg.model import adapters, lora
from nucseg.model.bases import INSTANCE_HEAD, Base, load_base
from nucseg.model.heads import _HEADS, LOSE, InstanceHead, MaskDecoderHead, StageHeads
from nucseg.model.sam import PIXEL_MEAN, PIXEL_STD, Encoder, part, sam_parameters

# Layers that never run: the encoder's classifier, and the decoder's branches for several masks and their scores
ENCODER_UNUSED = ("head",)
DECODER_UNUSED = ("iou_prediction_head", *(f"output_hypernetworks_mlps.{i}" for i in (1, 2, 3)))

PLAIN = 8  # grey levels (0..255): an image whose channels have no wider range shows at most noise
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class NucleiModel(nn.Module):
    """A frozen MobileSAM encoder with LoRA, and a head: uint8 images in, logits of the same size out."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, encoder: Encoder | None = None):
        super().__init__()
        self.config = config
        self.encoder = encoder or Encoder()
        self.head = (
            InstanceHead(config.without, LOSE if config.stages else 0, config.head_width, config.head_norm)
            if config.head == "instance"
            else _HEADS[config.head]()
        )
        self.stage_heads = StageHeads() if config.stages else None
        self.base_name = ""
        self.base_sha256 = ""
        self.adapter_name = self.adapter_sha256 = self.start_sha256 = ""  # set when an adapter is loaded
        self.decoding: dict[str, Any] = {}  # empty unless tuned for this adapter; see inference.decoding
        self.precision = "float32"  # set by `place`
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 RGB, sides multiples of 64 -> (B, C, H, W) logits.

        Raises ``InputError`` for any other dtype, because normalised floats would be normalised twice.
        """
        return self.with_stages(images)[0]

    def with_stages(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits of ``forward`` and, in training, those of the stage heads, at stride 2."""
        if images.dtype != torch.uint8:
            raise InputError(
                f"The model takes uint8 RGB images, 0..255, not {images.dtype}: it normalises them itself."
            )
        x = (images.float() - self.mean) / self.std
        with torch.autocast(x.device.type, _AUTOCAST.get(self.precision), enabled=self.precision in _AUTOCAST):
            features = self.encoder.features(x)
            logits = self.head((x, *features))
            stages = self.stage_heads(features) if self.stage_heads and self.training else []
        return F.interpolate(logits.float(), size=images.shape[-2:], mode="bilinear", align_corners=False), stages

    @property
    def n_maps(self) -> int:
        """Number of maps that the model predicts: one for each of `instances.CHANNELS`, or the foreground alone."""
        return len(CHANNELS) if self.config.head == "instance" and self.config.without != "distance" else 1

    def train(self, mode: bool = True) -> "NucleiModel":
        """Set the mode, but keep a frozen encoder's BatchNorm in eval mode, which preserves its running statistics."""
        super().train(mode)
        if self.config.lora_target != "full":
            for module in self.encoder.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def encoder_norms(self) -> dict[str, nn.BatchNorm2d]:
        """Return the encoder's BatchNorm layers by their names in the model."""
        modules = self.encoder.named_modules(prefix="encoder")
        return {name: module for name, module in modules if isinstance(module, nn.BatchNorm2d)}

    def adapter_state(self) -> dict[str, Tensor]:
        """Return all tensors that differ from the base: trained parameters, and statistics of BatchNorm layers.

        The latter are those of trained layers, and with ``norm_statistics = "training"`` the encoder's, too.
        """
        keep = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        estimated = self.encoder_norms() if self.config.norm_statistics == "training" else {}
        for name, module in self.named_modules():
            if not isinstance(module, nn.BatchNorm2d):
                continue
            if name in estimated or any(p.requires_grad for p in module.parameters()):
                keep |= {f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False)}
        return {name: tensor for name, tensor in self.state_dict().items() if name in keep}

    def load_adapter_state(self, tensors: dict[str, Tensor], source: str = "adapter") -> None:
        """Load an adapter's tensors. Raises ``InputError`` unless their names and shapes are exactly the model's."""
        expected = {name: tensor.shape for name, tensor in self.adapter_state().items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if wrong:
            raise InputError(f"{source}: does not fit this model ({len(wrong)} tensors differ, {wrong[0]} first).")
        self.load_state_dict(tensors, strict=False)
        self.train(self.training)  # TinyViT caches its attention biases when it enters eval mode


def build_model(config: ModelConfig, base: Base | None = None, encoder: Encoder | None = None) -> NucleiModel:
    """Build the model on its base, inject LoRA and freeze the rest; in eval mode, on the CPU.

    ``base``: the base if it is already loaded. ``encoder``: an encoder to load it into; None: a new one, which draws
    random numbers before the head does, so that a seed gives the head's initial weights.
    Raises ``InputError`` for a configuration that cannot be built.
    """
    config.check()
    base = base or load_base(config.base, config.base_seed)
    model = NucleiModel(config, encoder)
    model.base_name, model.base_sha256 = base.name, base.sha256
    model.encoder.load_state_dict(part(base.stored, "image_encoder."))
    model.encoder.requires_grad_(config.lora_target == "full")
    trained_head = part(base.stored, INSTANCE_HEAD)
    if isinstance(model.head, InstanceHead) and trained_head and config.head_start == "base":
        if config.without == "distance":
            trained_head |= {name: trained_head[name][:1] for name in ("out.weight", "out.bias")}
        # a base trained with another norm has no running statistics, so the head keeps its own
        model.head.load_state_dict(model.head.state_dict() | trained_head)
    if isinstance(model.head, MaskDecoderHead):
        model.head.prompt_encoder.load_state_dict(part(base.state, "prompt_encoder."))
        model.head.mask_decoder.load_state_dict(part(base.state, "mask_decoder."))
        model.head.requires_grad_(config.lora_target == "full")
    skip = (*(() if config.unused_head else ENCODER_UNUSED), *(("neck",) if config.head == "instance" else ()))
    if config.lora_target == "norms":
        _train_norms_and_biases(model.encoder, skip)
    if config.lora_target in lora.TARGETS:
        target = config.lora_target
        lora.inject(
            model.encoder, config.rank, config.alpha, config.dropout, target, skip, config.lora_conv, config.dora
        )
    if config.decoder_lora_target != "none":
        decoder = model.head.get_submodule("mask_decoder")
        lora.inject(decoder, config.rank, config.alpha, config.dropout, config.decoder_lora_target, DECODER_UNUSED)
    return model.eval()


def _train_norms_and_biases(encoder: nn.Module, skip: tuple[str, ...]) -> None:
    """Unfreeze the norms' weights and all biases, as in BitFit (Ben Zaken et al. 2022), except under ``skip``."""
    for path, module in encoder.named_modules():
        if not path.startswith((*skip, "norm_head")):
            for name, parameter in module.named_parameters(recurse=False):
                parameter.requires_grad_(name == "bias" or (name == "weight" and "Norm" in type(module).__name__))


def save_model(path: str | Path, model: NucleiModel) -> None:
    """Write the model's adapter file: LoRA and head, with the base's name and hash."""
    config = {field.name: getattr(model.config, field.name) for field in fields(ModelConfig)}
    config |= {"base": model.base_name}
    adapters.save_adapter(path, model.adapter_state(), config, model.base_sha256, model.decoding)


def load_model(path: str | Path, base: Base | str | None = None) -> NucleiModel:
    """Build the model that an adapter file belongs to, in eval mode.

    ``base``: needed only if the adapter's base is your own file: its path, or the loaded base.
    Raises ``InputError`` for a damaged adapter, another base, or tensors that do not fit.
    """
    tensors, stored, base_sha256 = adapters.read_adapter(path)
    if not stored.keys() <= {field.name for field in fields(ModelConfig)}:  # fields added later take their defaults
        raise InputError(f"{path}: written by another version of nucseg (its configuration has other fields).")
    config = ModelConfig(**stored)
    if not isinstance(base, Base):
        base = load_base(base or config.base, config.base_seed)
    adapters.check_base(path, base_sha256, base.sha256, base.name)
    model = build_model(config, base, Encoder.without_weights())
    model.load_adapter_state(tensors, str(path))
    model.decoding = adapters.read_decoding(path)
    return model


def parameter_ledger(model: NucleiModel) -> dict[str, int]:
    """Count parameters as the report does, over all of MobileSAM.

    ``base``: MobileSAM's own (encoder, prompt encoder, mask decoder), whether this head uses them or not.
    ``lora``, ``head``: added parameters. ``trainable``: those that are trained. ``total``: base + lora + head.
    """
    base = sam_parameters()
    added_lora = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
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
    """Return a device by name; ``auto`` is CUDA, MPS or the CPU, in that order.

    Raises ``InputError`` if the device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"Device {name!r} is not available here: choose 'cpu' or 'auto'.") from error
    return device


def place(model: NucleiModel, device: torch.device, precision: str = "auto") -> NucleiModel:
    """Move the model to a device, in a memory layout and precision that are fast there; return the model.

    ``precision``: float32, bfloat16, float16 or auto. auto is bfloat16 if the device supports it (CUDA cards from
    Ampere on, processors with AVX512-BF16), float16 on older CUDA cards, and float32 otherwise. Scores in 16 bits
    differ from those in float32 in the third decimal. float16 has a small range, so training scales the loss.
    Raises ``InputError`` for an unknown precision.
    """
    if precision not in CHOICES["precision"]:
        raise InputError(f"Precision {precision!r} is not known: choose one of {', '.join(CHOICES['precision'])}.")
    if precision == "auto":
        fallback = "float16" if device.type == "cuda" else "float32"
        precision = "bfloat16" if _computes_in_bfloat16(device) else fallback
    model.precision = precision
    if device.type == "mps":  # its convolutions are faster in the default layout
        return model.to(device)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public function for this; without the instructions bfloat16 is slower than float32
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def is_plain(image: np.ndarray) -> bool:
    """Whether no channel of an (H, W, 3) uint8 image has a range above `PLAIN`."""
    # nearly every image has it already in one pixel of a hundred
    return all(np.ptp(image[::step, ::step], axis=(0, 1)).max(initial=0) <= PLAIN for step in (10, 1))


@torch.no_grad()
def predict(model: NucleiModel, image: np.ndarray, scale: float | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of any size -> (C, H, W) float32 sigmoid of the model's logits, at the same size.

    The image is scaled by ``scale``; by default, ``config.field_px`` px (or the longer side, if that is 0) become
    ``config.size`` px. Sides are padded by reflection to multiples of 64 px, and the padding is removed afterwards.
    The model keeps its mode and device: call ``model.eval()`` first. Plain images (`PLAIN`) get empty maps without
    running the network.
    """
    height, width = image.shape[:2]
    if is_plain(image):
        return np.zeros((model.n_maps, height, width), np.float32)
    scale = scale or model.config.size / (model.config.field_px or max(height, width))
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    scaled = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))
    padded = np.pad(scaled, ((0, -rows % 64), (0, -columns % 64), (0, 0)), mode="symmetric")
    images = torch.from_numpy(padded).permute(2, 0, 1)[None].to(model.mean.device)
    logits = model(images)[:, :, :rows, :columns]
    logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
    return torch.sigmoid(logits)[0].cpu().numpy()
