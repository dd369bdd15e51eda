"""A run's whole configuration, field by field with its reason, and the named configurations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nucseg.config import apply, option
from nucseg.data import Dataset, Split, folds, leave_one_tissue_out, own_images, report_folds
from nucseg.errors import InputError
from nucseg.evaluate import SCORINGS
from nucseg.model import PRECISIONS, ModelConfig

PROTOCOLS: dict[str, Callable[[Dataset], list[Split]]] = {
    "benchmark": folds,
    "report": report_folds,
    "leave-one-tissue-out": leave_one_tissue_out,
    "own": own_images,
}


@dataclass(frozen=True)
class Config(ModelConfig):
    """A run, whole: model, data, optimisation, scoring. Presets list only what differs from these defaults."""

    start: str = option("", "adapter to go on from, a name or a file, with the same model; empty: from the base")
    data: str = option("synthetic", "synthetic (made as it is needed), nuinsseg (in --root) or own (see finetune)")
    data_note: str = option("", "what is special about this copy of the data, kept with the results")
    synthetic_per_tissue: int = option(2, "synthetic images a tissue")
    protocol: str = option("benchmark", "folds: benchmark, report (its test set overlaps), leave-one-tissue-out, own")
    fold: int = option(0, "which fold is the test part, from 0")
    train_images: int = option(0, "train on that many of the fold's training images, 0 for all: a budget")
    val_images: int = option(0, "validate on that many, 0 for all: a budget")
    test_images: int = option(0, "score on that many of the fold's test images, 0 for all: a budget")
    crop: int = option(0, "px of the encoder's view, random square to train on, 0 for the whole image: a budget")
    augmentation: str = option("flip_and_rotate", "flip_and_rotate (the report's), histology (see augment) or none")
    epochs: int = option(50, "passes over the training images at most; the report's")
    patience: int = option(15, "epochs without a better validation score before stopping; the report's")
    monitor: str = option("dice", "validation score that chooses the checkpoint; the report's")
    batch: int = option(4, "images a step; the report's")
    lr: float = option(3e-4, "AdamW's learning rate; the report's")
    min_lr: float = option(1e-6, "learning rate at the end of a cosine cycle; in the report's code")
    cycles: int = option(1, "cosine cycles, each a warm restart; the report's text has restarts, its code ran one")
    warmup: float = option(0.0, "share of the run over which the learning rate rises from 0")
    weight_decay: float = option(1e-4, "AdamW's weight decay; in the report's code")
    clip: float = option(1.0, "largest norm of the gradient; in the report's code")
    dice_weight: float = option(0.5, "share of Dice in the loss, focal has the rest; the report's")
    focal_alpha: float = option(0.25, "focal loss: weight of the foreground; in the report's code")
    focal_gamma: float = option(2.0, "focal loss: how much easy pixels are played down; in the report's code")
    depth_weight: float = option(1.0, "weight of the depth's cross entropy beside it, with head instance")
    stage_weight: float = option(0.25, "weight of the loss of each stage's own maps, with stages")
    threshold: float = option(0.5, "foreground probability above which a pixel is a nucleus")
    scoring: str = option("benchmark", "benchmark (own size, 50 px and more) or report (encoder's size, all)")
    seed: int = option(0, "of the head's and LoRA's weights, the order of images, augmentation and dropout")
    device: str = option("auto", "auto (CUDA, MPS, CPU in that order), cpu, cuda, cuda:1, mps")
    precision: str = option("auto", "auto (bfloat16 where the device computes in it), float32 or bfloat16")
    workers: int = option(0, "processes that load images; 0 loads in the main one")

    def check(self) -> None:
        """Raise ``InputError`` for a value that no run can use."""
        super().check()
        for name, known in {
            "data": ("synthetic", "nuinsseg", "own"),
            "protocol": tuple(PROTOCOLS),
            "augmentation": ("flip_and_rotate", "histology", "none"),
            "monitor": ("dice", "iou", "aji", "pq"),
            "scoring": tuple(SCORINGS),
            "precision": PRECISIONS,
        }.items():
            if getattr(self, name) not in known:
                raise InputError(f"Option {name} = {getattr(self, name)!r} is not known: choose {', '.join(known)}.")
        for name in ("epochs", "patience", "batch", "cycles", "lr", "clip", "synthetic_per_tissue"):
            if not getattr(self, name) > 0:
                raise InputError(f"Option {name} = {getattr(self, name)} must be above 0.")
        for name in (
            "seed",
            "base_seed",
            "fold",
            "train_images",
            "val_images",
            "test_images",
            "crop",
            "workers",
            "min_lr",
            "stage_weight",
            "weight_decay",
            "focal_gamma",
        ):
            if not getattr(self, name) >= 0:
                raise InputError(f"Option {name} = {getattr(self, name)} must not be below 0.")
        if self.crop % 64 or self.crop > self.size:
            raise InputError(f"Option crop = {self.crop} must be a multiple of 64, up to size = {self.size}.")
        for name in ("dice_weight", "focal_alpha", "threshold", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"Option {name} = {getattr(self, name)} must lie between 0 and 1.")


PRESETS: dict[str, dict[str, Any]] = {
    # The report's system, scored as the benchmark scores. The unused classifier is adapted as in its code.
    "report": {"data": "nuinsseg", "unused_head": True},
    # The same system under the report's own protocol: a fixed test set that overlaps the training folds.
    "report-protocol": {"data": "nuinsseg", "unused_head": True, "protocol": "report", "scoring": "report"},
    # Beyond the report: native resolution, a head that parts touching nuclei, histology's own augmentation.
    "instance": {
        "data": "nuinsseg",
        "head": "instance",
        "size": 512,
        "augmentation": "histology",
        "dropout": 0.0,  # drawing its masks takes a fifth of a step on a CPU
        "lr": 1e-3,
        "batch": 8,
        "epochs": 60,
        "patience": 20,
        "monitor": "pq",
    },
    # The base 'offline', from random weights; see pretrain.py. BatchNorm trains along, so the batch is larger.
    "pretrain": {
        "base": "random",
        "where": "full",
        "head": "instance",
        "stages": True,
        "size": 512,
        "crop": 256,
        "augmentation": "histology",
        "lr": 1e-3,
        "warmup": 0.03,
        "weight_decay": 0.01,
        "batch": 8,
        "epochs": 40,
        "patience": 40,
        "monitor": "pq",
        "val_images": 40,
    },
    # An adapter that goes on learning from a few images of one's own; see finetune.py.
    "finetune": {
        "data": "own",
        "protocol": "own",
        "head": "instance",
        "augmentation": "histology",
        "dropout": 0.0,
        "lr": 5e-4,
        "batch": 4,
        "patience": 20,
        "monitor": "pq",
    },
    # A minute on two CPU cores with 20 images of 256 px: the live chapter of the book. The head starts fresh, so
    # that there is something to see.
    "quick": {
        "base": "offline",
        "head": "instance",
        "head_start": "fresh",
        "size": 256,
        "augmentation": "histology",
        "dropout": 0.0,
        "lr": 2e-3,
        "epochs": 10,
        "batch": 4,
        "monitor": "pq",
        "val_images": 4,
    },
}


def preset(name: str) -> Config:
    """A named configuration. Raises ``InputError`` for an unknown name."""
    if name not in PRESETS:
        raise InputError(f"Preset {name!r} is not known: choose one of {', '.join(PRESETS)}.")
    return apply(Config(), PRESETS[name], f"preset {name}")
