"""The configuration of a run, with the reason for each default; the named presets; and TOML files of options.

Nothing here imports PyTorch, so that the command line can show its options at once.
"""

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nucseg.errors import InputError

T = TypeVar("T")
FIELD = 512  # px, side of NuInsSeg's images; images of unknown pixel size are assumed to match
PIECES = ("distance", "stem", "fine", "middle")  # inputs and outputs of the instance head that can be ablated
# The allowed values of each option. The functions behind them are in dictionaries with the same keys, next to the
# code that uses them: model.lora.TARGETS, data.augment.AUGMENTATIONS, data.splits.PROTOCOLS and
# inference.evaluate.SCORINGS. They are listed here so that this module does not import PyTorch.
LORA_TARGETS = ("all", "attention", "qkv", "mlp", "late")
CHOICES: dict[str, tuple[str, ...]] = {
    "head": ("linear", "mask_decoder", "instance"),
    "lora_target": (*LORA_TARGETS, "norms", "none", "full"),
    "decoder_lora_target": (*LORA_TARGETS, "none"),
    "head_start": ("base", "fresh"),
    "head_norm": ("group", "layer", "batch"),
    "norm_statistics": ("base", "training"),
    "without": ("", *PIECES),
    "data": ("synthetic", "nuinsseg", "own"),
    "protocol": ("benchmark", "report", "leave-one-tissue-out", "own", "all", "parts"),
    "augmentation": ("flip_and_rotate", "histology", "geometry", "strong", "none"),
    "monitor": ("dice", "iou", "aji", "pq"),
    "scoring": ("benchmark", "report"),
    "score_part": ("test", "val"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
}
GROUPS = ("model", "LoRA", "data", "optimisation", "scoring", "machine")  # option groups, in the order of --help


def option(default: T, group: str, why: str) -> T:
    """Declare a configuration field: its default, its group in ``--help``, and its help text (``why``)."""
    return dataclasses.field(default=default, metadata={"why": why, "group": group})


def options(cls: type) -> dict[str, "dataclasses.Field[Any]"]:
    """The fields of a configuration class by name."""
    return {field.name: field for field in dataclasses.fields(cls)}


def apply(config: T, changes: dict[str, Any], source: str) -> T:
    """Return ``config`` with ``changes``.

    A whole number is accepted where a float is expected; nothing else is converted. Raises ``InputError``, naming
    ``source``, for an unknown option or a value of the wrong type.
    """
    known = options(type(config))
    for name, value in changes.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise InputError(f"{source}: there is no option {name!r}; {hint}")
        wanted = type(getattr(config, name))
        if wanted is float and type(value) is int:
            changes = changes | {name: float(value)}
        elif type(value) is not wanted:
            raise InputError(f"{source}: option {name!r} takes a {wanted.__name__}, not {value!r}.")
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file, with or without a byte order mark. Raises ``InputError`` if it is missing or malformed."""
    try:
        return tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: the configuration file cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML ({error}).") from error


@dataclass(frozen=True)
class ModelConfig:
    """The parts of a model. An adapter file stores these fields."""

    base: str = option(
        "auto",
        "model",
        "base checkpoint: mobile_sam, offline, broad, random or a path; auto: mobile_sam if cached, else offline",
    )
    base_seed: int = option(0, "model", "seed of the base 'random'")
    size: int = option(1024, "model", "longer side of the encoder's input image, px; 1024 is SAM's and the report's")
    field_px: int = option(
        0, "model", "side of the image area that is scaled to --size, in image pixels (0: whole image)"
    )
    um_per_px: float = option(0.0, "model", "pixel size of the training images, µm/px (0: unknown)")
    head: str = option("linear", "model", "linear (the report's 1 × 1 convolution), mask_decoder (SAM's) or instance")
    lora_target: str = option(
        "all",
        "LoRA",
        "LoRA target modules: all, attention, qkv, mlp, late; without LoRA: norms (and biases), none (head only), full",
    )
    rank: int = option(8, "LoRA", "LoRA rank; the report's")
    alpha: float = option(8.0, "LoRA", "LoRA alpha, which scales the update by alpha / rank; the report's")
    dropout: float = option(0.1, "LoRA", "dropout on the input of LoRA; in the report's code, not in its text")
    lora_conv: bool = option(False, "LoRA", "adapt the encoder's convolutions as well, except depthwise ones")
    dora: bool = option(False, "LoRA", "DoRA: train the norm of each row of an adapted Linear layer's weight as well")
    unused_head: bool = option(
        False, "LoRA", "adapt the encoder's unused classifier as well, as the report's code does"
    )
    decoder_lora_target: str = option(
        "none", "LoRA", "LoRA target modules in the mask decoder, with --head mask_decoder"
    )
    head_start: str = option("base", "model", "initial weights of the instance head: base (if it has them) or fresh")
    head_norm: str = option(
        "group", "model", "normalisation in the instance head: group (over the field), layer (per pixel) or batch"
    )
    norm_statistics: str = option(
        "base",
        "model",
        "statistics of the encoder's BatchNorm layers: base, or training (estimated on the training images)",
    )
    head_width: int = option(64, "model", "channels of the instance head; other than 64 needs --head-start fresh")
    stages: bool = option(False, "model", "pretraining only: deep supervision, and random dropping of head inputs")
    without: str = option("", "model", f"ablate one part of the instance head: {', '.join(PIECES)}")

    @property
    def nucleus_scale(self) -> float:
        """Size of the nuclei in the model's images over their size in NuInsSeg, both in px; 1 if ``field_px`` is 0."""
        return self.field_px / FIELD if self.field_px else 1.0

    def check(self) -> None:
        """Raise ``InputError`` if no model can be built from this configuration."""
        _check_choices(self)
        if self.size % 64 or not 64 <= self.size <= 1024:
            raise InputError(f"Size {self.size} px does not fit the encoder: choose a multiple of 64 from 64 to 1024.")
        if self.field_px < 0 or not self.um_per_px >= 0:
            raise InputError(
                f"Options field_px = {self.field_px} and um_per_px = {self.um_per_px} must not be below 0."
            )
        if self.head == "mask_decoder" and self.lora_target == self.decoder_lora_target == "none":
            raise InputError(
                "Head 'mask_decoder' without LoRA has nothing to train: set lora_target or decoder_lora_target."
            )
        if self.head_width % 32 or not 32 <= self.head_width <= 256:
            raise InputError(f"Option head_width = {self.head_width} must be a multiple of 32 from 32 to 256.")
        if self.head_width != 64 and self.head_start == "base":
            raise InputError("A base's head has head_width = 64: set head_start = 'fresh' for another width.")
        if self.lora_conv and self.lora_target not in ("all", "late"):
            raise InputError(
                "Option lora_conv needs lora_target = 'all' or 'late': the other targets include no convolution."
            )
        if self.dora and (self.lora_conv or self.dropout or self.lora_target not in LORA_TARGETS):
            raise InputError("Option dora needs LoRA on Linear layers alone: lora_conv = false and dropout = 0.")
        if self.without and self.head != "instance":
            raise InputError(f"Option without = {self.without!r} needs the head 'instance'.")
        if self.norm_statistics == "training" and self.lora_target == "full":
            raise InputError("With lora_target = 'full' BatchNorm is trained: leave norm_statistics = 'base'.")
        if self.stages and (self.head != "instance" or self.lora_target != "full"):
            raise InputError("Option stages is for pretraining: it needs head = 'instance' and lora_target = 'full'.")
        if self.decoder_lora_target != "none" and self.head != "mask_decoder":
            raise InputError("Option decoder_lora_target needs the head 'mask_decoder': set head, or leave it 'none'.")


@dataclass(frozen=True)
class Config(ModelConfig):
    """The configuration of a run: model, data, optimisation, scoring, machine. Presets list only their changes."""

    start: str = option(
        "", "model", "adapter to start from: name or file, same model options (empty: start from the base)"
    )
    data: str = option("synthetic", "data", "synthetic (generated), nuinsseg (in --root) or own (see finetune)")
    data_note: str = option("", "data", "remark on this copy of the data, recorded with the results")
    synthetic_per_tissue: int = option(2, "data", "number of synthetic images per tissue")
    protocol: str = option(
        "benchmark",
        "data",
        "splits: benchmark, report (its test set overlaps training), leave-one-tissue-out, own, all, parts",
    )
    fold: int = option(1, "data", "test fold, counted from 1")
    train_images: int = option(0, "data", "number of training images (0: all)")
    val_images: int = option(0, "data", "number of validation images (0: all)")
    test_images: int = option(0, "data", "number of test images (0: all)")
    crop: int = option(0, "data", "side of the random training crop, in encoder pixels (0: whole image)")
    augmentation: str = option(
        "flip_and_rotate", "data", "flip_and_rotate (the report's), histology, geometry, strong or none"
    )
    epochs: int = option(50, "optimisation", "largest number of epochs; the report's")
    patience: int = option(15, "optimisation", "epochs without a better validation score before stopping; the report's")
    monitor: str = option("dice", "optimisation", "validation score that selects the checkpoint; the report's")
    batch_size: int = option(4, "optimisation", "images per step; the report's")
    max_hours: float = option(
        0.0, "optimisation", "time limit: stop after the last whole epoch that ends within it, h (0: none)"
    )
    lr: float = option(3e-4, "optimisation", "learning rate of AdamW; the report's")
    min_lr: float = option(1e-6, "optimisation", "learning rate at the end of a cosine cycle; in the report's code")
    cycles: int = option(
        1, "optimisation", "cosine cycles, with warm restarts; the report's text has restarts, its code ran one"
    )
    warmup: float = option(0.0, "optimisation", "fraction of the run over which the learning rate rises from 0")
    weight_decay: float = option(1e-4, "optimisation", "weight decay of AdamW; in the report's code")
    grad_clip: float = option(1.0, "optimisation", "largest norm of the gradient; in the report's code")
    dice_weight: float = option(0.5, "optimisation", "weight of the Dice loss; focal loss gets the rest; the report's")
    focal_alpha: float = option(0.25, "optimisation", "focal loss: weight of the foreground; in the report's code")
    focal_gamma: float = option(2.0, "optimisation", "focal loss: down-weighting of easy pixels; in the report's code")
    distance_weight: float = option(
        1.0, "optimisation", "weight of the distance map's cross-entropy, with --head instance"
    )
    border_weight: float = option(0.0, "optimisation", "extra weight of pixels at outlines, in the losses of both maps")
    valley_weight: float = option(
        0.0, "optimisation", "extra weight of pixels between touching nuclei, in the losses of both maps"
    )
    ema: float = option(
        0.0, "optimisation", "decay per step of the moving average of the weights that is scored and saved (0: none)"
    )
    stage_weight: float = option(0.25, "optimisation", "weight of each stage's own loss, with --stages")
    threshold: float = option(0.5, "scoring", "foreground probability above which a pixel is nucleus")
    scoring: str = option(
        "benchmark",
        "scoring",
        "benchmark (image's own size, objects of 50 px or more) or report (encoder's size, all objects)",
    )
    tune_decoding: bool = option(
        False, "scoring", "after training, choose the decoding and fit the object confidence on all validation images"
    )
    score_part: str = option("test", "scoring", "images scored at the end: test, or val (the whole validation part)")
    seed: int = option(0, "machine", "seed of new weights, image order, augmentation and dropout")
    device: str = option("auto", "machine", "auto (CUDA, MPS or CPU, in that order), cpu, cuda, cuda:1, mps")
    precision: str = option(
        "auto", "machine", "auto (bfloat16 if the device supports it), float32, bfloat16 or float16"
    )
    num_workers: int = option(0, "machine", "number of processes that load images (0: a thread of the main process)")

    def check(self) -> None:
        """Raise ``InputError`` if no run can use this configuration."""
        super().check()
        for name in ("epochs", "patience", "batch_size", "cycles", "lr", "grad_clip", "synthetic_per_tissue", "fold"):
            if not getattr(self, name) > 0:
                raise InputError(f"Option {name} = {getattr(self, name)} must be above 0.")
        for name in (
            "seed",
            "base_seed",
            "train_images",
            "val_images",
            "test_images",
            "crop",
            "num_workers",
            "max_hours",
            "min_lr",
            "stage_weight",
            "border_weight",
            "valley_weight",
            "weight_decay",
            "focal_gamma",
        ):
            if not getattr(self, name) >= 0:
                raise InputError(f"Option {name} = {getattr(self, name)} must not be below 0.")
        if self.crop % 64 or self.crop > self.size:
            raise InputError(f"Option crop = {self.crop} must be a multiple of 64, up to size = {self.size}.")
        if self.tune_decoding and (self.head != "instance" or self.without == "distance"):
            raise InputError("Option tune_decoding needs the head 'instance' with its distance map.")
        if not 0 <= self.ema < 1:
            raise InputError(f"Option ema = {self.ema} must be at least 0 and below 1.")
        for name in ("dice_weight", "focal_alpha", "threshold", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"Option {name} = {getattr(self, name)} must lie between 0 and 1.")


def _check_choices(config: ModelConfig) -> None:
    for name, known in CHOICES.items():
        value = getattr(config, name, known[0])  # a ModelConfig lacks some of these fields
        if value not in known:
            raise InputError(f"Option {name} = {value!r} is not known: choose one of {', '.join(filter(None, known))}.")


PRESETS: dict[str, dict[str, Any]] = {
    # The report's system under the benchmark's scoring. The unused classifier is adapted, as in the report's code.
    "report": {"data": "nuinsseg", "unused_head": True},
    # The same system under the report's own protocol: a fixed test set that overlaps the training folds.
    "report-protocol": {"data": "nuinsseg", "unused_head": True, "protocol": "report", "scoring": "report"},
    # Beyond the report: native resolution, a head that separates touching nuclei, augmentation for histology.
    "instance": {
        "data": "nuinsseg",
        "head": "instance",
        "size": 512,
        "augmentation": "histology",
        "dropout": 0.0,  # sampling its masks takes a fifth of the time of a step on a CPU
        "lr": 1e-3,
        "batch_size": 8,
        "epochs": 60,
        "patience": 20,
        "monitor": "pq",
    },
    # The instance head at its best: about 4,500 steps of four crops each, decoding tuned on validation images.
    "best": {
        "data": "nuinsseg",
        "head": "instance",
        "size": 512,
        "crop": 256,
        "augmentation": "histology",
        "dropout": 0.0,
        "lr": 1e-3,
        "batch_size": 4,
        "epochs": 40,
        "patience": 40,
        "monitor": "pq",
        "val_images": 40,
        # chosen on validation parts, results/recipe; moving averages and stronger geometry brought nothing there
        "lora_conv": True,
        "border_weight": 1.0,
        "valley_weight": 2.0,
        # a nucleus looks the same whatever else lies in view, which the group norm of other presets cannot promise
        "head_norm": "batch",
        "norm_statistics": "training",
        "tune_decoding": True,
    },
    # The base 'offline', from random weights; see training/pretrain.py. BatchNorm is trained, so the batch is larger.
    "pretrain": {
        "base": "random",
        "lora_target": "full",
        "head": "instance",
        "stages": True,
        "protocol": "parts",
        "size": 512,
        "field_px": 512,  # one scale for all images, whatever their size
        "crop": 256,
        "augmentation": "histology",
        "lr": 1e-3,
        "warmup": 0.03,
        "weight_decay": 0.01,
        "batch_size": 8,
        "epochs": 60,  # of 960 crops each
        "patience": 60,
        "monitor": "pq",
        "num_workers": 1,  # generates the next images during a step
    },
    # Fine-tuning of a pretrained adapter on a few annotated images; see training/finetune.py.
    "finetune": {
        "data": "own",
        "protocol": "own",
        "head": "instance",
        "augmentation": "histology",
        "dropout": 0.0,
        "lr": 5e-4,
        "batch_size": 4,
        "patience": 20,
        "monitor": "pq",
    },
    # The book's live chapter: 20 images of 256 px, one minute on two CPU cores. The head starts from random weights,
    # so that its learning is visible.
    "quick": {
        "base": "offline",
        "head": "instance",
        "head_start": "fresh",
        "size": 256,
        "augmentation": "histology",
        "dropout": 0.0,
        "lr": 2e-3,
        "epochs": 10,
        "batch_size": 4,
        "monitor": "pq",
        "val_images": 4,
    },
}


def preset(name: str) -> Config:
    """Return a named configuration. Raises ``InputError`` for an unknown name.

    >>> preset("instance").head, preset("report").rank
    ('instance', 8)
    """
    if name not in PRESETS:
        raise InputError(f"Preset {name!r} is not known: choose one of {', '.join(PRESETS)}.")
    return apply(Config(), PRESETS[name], f"preset {name}")
