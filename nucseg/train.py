"""Training: one configuration, one loop, one folder a run. It reads from top to bottom.

Everything random is drawn from (seed, epoch, image), never from a stream that runs on. A run that was killed
therefore goes on from its last whole epoch exactly as if it had never stopped.
"""

import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import nucseg
from nucseg import augment, instances
from nucseg.config import apply, option, options
from nucseg.data import Dataset, NuInsSeg, Split, folds, leave_one_tissue_out, report_folds
from nucseg.errors import InputError, TrainingError
from nucseg.evaluate import SCORINGS, evaluate
from nucseg.files import sha256, write_atomic, write_json
from nucseg.losses import dice_focal_loss
from nucseg.model import ModelConfig, NucleiModel, build_model, load_model, pick_device, save_model
from nucseg.synth import Synthetic

PROTOCOLS: dict[str, Callable[[Dataset], list[Split]]] = {
    "benchmark": folds,
    "report": report_folds,
    "leave-one-tissue-out": leave_one_tissue_out,
}


@dataclass(frozen=True)
class Config(ModelConfig):
    """A run, whole: model, data, optimisation, scoring. Presets list only what differs from these defaults."""

    data: str = option("synthetic", "synthetic (made as it is needed) or nuinsseg (--root says where it lies)")
    data_note: str = option("", "what is special about this copy of the data, kept with the results")
    synthetic_per_tissue: int = option(2, "synthetic images a tissue")
    protocol: str = option("benchmark", "folds: benchmark, report (its test set overlaps), leave-one-tissue-out")
    fold: int = option(0, "which fold is the test part, from 0")
    train_images: int = option(0, "train on that many of the fold's training images, 0 for all: a budget")
    val_images: int = option(0, "validate on that many, 0 for all: a budget")
    crop: int = option(0, "px of the encoder's view, random square to train on, 0 for the whole image: a budget")
    augmentation: str = option("flip_and_rotate", "flip_and_rotate (the report's), histology (see augment) or none")
    epochs: int = option(50, "passes over the training images at most; the report's")
    patience: int = option(15, "epochs without a better validation score before stopping; the report's")
    monitor: str = option("dice", "validation score that chooses the checkpoint; the report's")
    batch: int = option(4, "images a step; the report's")
    lr: float = option(3e-4, "AdamW's learning rate; the report's")
    min_lr: float = option(1e-6, "learning rate at the end of a cosine cycle; in the report's code")
    cycles: int = option(1, "cosine cycles, each a warm restart; the report's text has restarts, its code ran one")
    weight_decay: float = option(1e-4, "AdamW's weight decay; in the report's code")
    clip: float = option(1.0, "largest norm of the gradient; in the report's code")
    dice_weight: float = option(0.5, "share of Dice in the loss, focal has the rest; the report's")
    focal_alpha: float = option(0.25, "focal loss: weight of the foreground; in the report's code")
    focal_gamma: float = option(2.0, "focal loss: how much easy pixels are played down; in the report's code")
    depth_weight: float = option(1.0, "weight of the depth's cross entropy beside it, with head instance")
    threshold: float = option(0.5, "foreground probability above which a pixel is a nucleus")
    scoring: str = option("benchmark", "benchmark (own size, 50 px and more) or report (encoder's size, all)")
    seed: int = option(0, "of the head's and LoRA's weights, the order of images, augmentation and dropout")
    device: str = option("auto", "auto (CUDA, MPS, CPU in that order), cpu, cuda, cuda:1, mps")
    workers: int = option(0, "processes that load images; 0 loads in the main one")

    def check(self) -> None:
        """Raise ``InputError`` for a value that no run can use."""
        super().check()
        for name, known in {
            "data": ("synthetic", "nuinsseg"),
            "protocol": tuple(PROTOCOLS),
            "augmentation": ("flip_and_rotate", "histology", "none"),
            "monitor": ("dice", "iou", "aji", "pq"),
            "scoring": tuple(SCORINGS),
        }.items():
            if getattr(self, name) not in known:
                raise InputError(f"Option {name} = {getattr(self, name)!r} is not known: choose {', '.join(known)}.")
        for name in ("epochs", "patience", "batch", "cycles", "lr", "clip", "synthetic_per_tissue"):
            if not getattr(self, name) > 0:
                raise InputError(f"Option {name} = {getattr(self, name)} must be above 0.")
        for name in (
            "fold",
            "train_images",
            "val_images",
            "crop",
            "workers",
            "min_lr",
            "weight_decay",
            "focal_gamma",
        ):
            if not getattr(self, name) >= 0:
                raise InputError(f"Option {name} = {getattr(self, name)} must not be below 0.")
        if self.crop % 64 or self.crop > self.size:
            raise InputError(f"Option crop = {self.crop} must be a multiple of 64, up to size = {self.size}.")
        for name in ("dice_weight", "focal_alpha", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"Option {name} = {getattr(self, name)} must lie between 0 and 1.")


PRESETS: dict[str, dict[str, Any]] = {
    # The report's system, scored as the benchmark scores. The unused classifier is adapted as in its code.
    "report": {"data": "nuinsseg", "unused_head": True},
    # The same system under the report's own protocol: a fixed test set that overlaps the training folds.
    "report-protocol": {"data": "nuinsseg", "unused_head": True, "protocol": "report", "scoring": "report"},
    # The base 'offline', from random weights; see pretrain.py. BatchNorm trains along, so the batch is larger.
    "pretrain": {
        "base": "random",
        "where": "full",
        "head": "instance",
        "size": 512,
        "crop": 256,
        "augmentation": "histology",
        "lr": 1e-3,
        "weight_decay": 0.01,
        "batch": 8,
        "epochs": 40,
        "patience": 40,
        "monitor": "pq",
        "val_images": 40,
    },
    # A minute or two on two CPU cores with 256 px images: the live chapter of the book.
    "quick": {
        "base": "random",
        "size": 512,
        "crop": 128,
        "lr": 3e-3,
        "epochs": 20,
        "batch": 4,
        "dropout": 0.0,
        "val_images": 4,
    },
}


def preset(name: str) -> Config:
    """A named configuration. Raises ``InputError`` for an unknown name."""
    if name not in PRESETS:
        raise InputError(f"Preset {name!r} is not known: choose one of {', '.join(PRESETS)}.")
    return apply(Config(), PRESETS[name], f"preset {name}")


def open_dataset(config: Config, root: str | Path | None = None) -> Dataset:
    """The dataset that a config names. ``root``: the folder of NuInsSeg. ``InputError`` if it is missing."""
    if config.data == "synthetic":
        return Synthetic(n_per_tissue=config.synthetic_per_tissue, seed=config.seed)
    if root is None:
        raise InputError("Data 'nuinsseg' needs its folder: give --root, or set NUCSEG_DATA to it.")
    return NuInsSeg(root)


def select_split(config: Config, dataset: Dataset) -> Split:
    """The config's split, its training and validation parts cut to the config's budget by a seeded draw."""
    splits = PROTOCOLS[config.protocol](dataset)
    if config.fold >= len(splits):
        raise InputError(f"Fold {config.fold} does not exist: the protocol {config.protocol!r} has {len(splits)}.")
    split = splits[config.fold]
    rng = np.random.default_rng([config.seed, config.fold])

    def some(indices: tuple[int, ...], count: int) -> tuple[int, ...]:
        order = rng.permutation(len(indices))[: count or len(indices)]
        return tuple(indices[i] for i in sorted(order))

    return Split(split.name, some(split.train, config.train_images), some(split.val, config.val_images), split.test)


# ---------------------------------------------------------------- batches


class _TrainingImages(torch.utils.data.Dataset):
    """Keys are (epoch, index): what comes out depends on them and the seed alone, in any process."""

    def __init__(self, dataset: Dataset, config: Config):
        self.dataset, self.config = dataset, config

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(3, S, S) uint8 image and (C, S, S) target maps; S is ``crop``, or ``size`` where there is none.

        A crop is seen at the scale at which the whole image would be: ``size / longer side``.
        """
        _, index = key
        config, rng = self.config, np.random.default_rng([self.config.seed, *key])
        sample = self.dataset[index]
        if config.crop:
            scale = config.size / max(sample.labels.shape)
            scale *= augment.zoom(rng) if config.augmentation == "histology" else 1
            sample = augment.crop(sample, max(1, round(config.crop / scale)), rng)
        sample = augment.resize(sample, config.crop or config.size)
        if config.augmentation != "none":
            sample = getattr(augment, config.augmentation)(sample, rng)
        image = torch.from_numpy(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))
        encode = instances.encode if config.head == "instance" else instances.foreground
        return image, torch.from_numpy(encode(sample.labels))


def batch_keys(config: Config, indices: tuple[int, ...], epoch: int) -> list[list[tuple[int, int]]]:
    """The epoch's batches as lists of (epoch, image index), shuffled by (seed, epoch)."""
    order = np.random.default_rng([config.seed, epoch]).permutation(len(indices))
    keys = [(epoch, indices[i]) for i in order]
    return [keys[i : i + config.batch] for i in range(0, len(keys), config.batch)]


def learning_rate(config: Config, progress: float) -> float:
    """Cosine annealing with warm restarts (Loshchilov & Hutter 2017): the rate at ``progress`` 0..1 of the run."""
    within = (progress * config.cycles) % 1.0
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * within))


# ---------------------------------------------------------------- the loop


def train_epoch(
    model: NucleiModel,
    optimiser: torch.optim.Optimizer,
    dataset: Dataset,
    indices: tuple[int, ...],
    config: Config,
    epoch: int,
    progress: bool = True,
) -> float:
    """One pass over the training images; returns the mean loss. ``TrainingError`` for a non-finite loss."""
    device = model.mean.device
    torch.manual_seed(config.seed * 100_003 + epoch)  # dropout's
    model.train()
    batches = batch_keys(config, indices, epoch)
    loader = DataLoader(
        _TrainingImages(dataset, config),
        batch_sampler=batches,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    total = 0.0
    bar = tqdm(loader, desc=f"epoch {epoch + 1}/{config.epochs}", unit="step", disable=not progress, leave=False)
    for step, (images, targets) in enumerate(bar):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, (epoch + step / len(batches)) / config.epochs)
        # bfloat16 has float32's range, so there is no loss to scale; older cards and the CPU stay in float32
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda" and torch.cuda.is_bf16_supported()):
            logits = model(images.to(device, non_blocking=True))
        loss = _loss(logits, targets.to(device, non_blocking=True), config)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"The loss is {loss.item()} in epoch {epoch + 1}, step {step + 1}: training stopped. The last whole "
                f"epoch is kept; lower lr (now {config.lr:g}) or alpha (now {config.alpha:g}) in a new folder."
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(_trainable(model), config.clip)
        optimiser.step()
        total += loss.item() * len(images)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return total / len(indices)


def _loss(logits: Tensor, targets: Tensor, config: Config) -> Tensor:
    """Dice and focal for the foreground, and cross entropy for the depth where the head predicts it (scalar)."""
    loss = dice_focal_loss(logits[:, :1], targets[:, :1], config.dice_weight, config.focal_alpha, config.focal_gamma)
    if logits.shape[1] > 1:  # a soft target: cross entropy is least where the sigmoid equals it
        depth = F.binary_cross_entropy_with_logits(logits[:, 1:].float(), targets[:, 1:])
        loss = loss + config.depth_weight * depth
    return loss


def _trainable(model: NucleiModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    config: Config, dataset: Dataset, folder: str | Path, *, progress: bool = True, command: str = ""
) -> pd.DataFrame:
    """Train one run in ``folder`` and score its best checkpoint on the test part; returns the scores.

    Written there: ``last.pt`` (to resume), ``best.safetensors`` (the adapter of the best validation score),
    ``history.csv`` (a row an epoch), and at the end ``scores.csv`` (a row a test image) and ``run.json``.
    A finished run is not repeated; a broken one goes on after its last whole epoch.

    Raises ``InputError`` for a config that does not fit or a folder that holds another run, ``TrainingError``
    for a loss that is not finite.
    """
    config.check()
    folder = Path(folder)
    if (folder / "run.json").exists():
        _same_run(_read_json(folder / "run.json")["config"], config, folder)
        return pd.read_csv(folder / "scores.csv")
    began, device, split = time.monotonic(), pick_device(config.device), select_split(config, dataset)
    if not (split.train and split.val and split.test):
        raise InputError(f"Fold {config.fold} leaves a part without images: use more images.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # the head's and LoRA's initial weights
        model = build_model(config).to(device)
    optimiser = torch.optim.AdamW(_trainable(model), lr=config.lr, weight_decay=config.weight_decay)
    folder.mkdir(parents=True, exist_ok=True)
    history, spent = _resume(folder / "last.pt", config, model, optimiser, device)

    best = max((row[f"val_{config.monitor}"] for row in history), default=-math.inf)
    while len(history) < config.epochs and _epochs_since_best(history, config.monitor) < config.patience:
        epoch, start = len(history), time.monotonic()
        loss = train_epoch(model, optimiser, dataset, split.train, config, epoch, progress)
        scores = evaluate(
            model, dataset, split.val, scoring=config.scoring, threshold=config.threshold, progress=progress
        )
        row = {"epoch": epoch + 1, "lr": optimiser.param_groups[0]["lr"], "train_loss": loss}
        row |= {f"val_{name}": float(scores[name].mean()) for name in ("dice", "iou", "aji", "pq")}
        history.append(row | {"seconds": round(time.monotonic() - start, 2)})
        if row[f"val_{config.monitor}"] > best:
            best = row[f"val_{config.monitor}"]
            save_model(folder / "best.safetensors", model)
        _save_state(folder / "last.pt", config, model, optimiser, history, spent + time.monotonic() - began)
        with write_atomic(folder / "history.csv") as part:
            pd.DataFrame(history).to_csv(part, index=False)
        if progress:
            tqdm.write(", ".join(f"{k} {v:.4g}" for k, v in history[-1].items()))

    model = load_model(folder / "best.safetensors", config.base).to(device)
    scores = evaluate(
        model,
        dataset,
        split.test,
        fold=split.name,
        scoring=config.scoring,
        threshold=config.threshold,
        progress=progress,
    )
    with write_atomic(folder / "scores.csv") as part:
        scores.to_csv(part, index=False, float_format="%.6f")
    about = describe(config, dataset, split, model, folder, command)
    write_json(folder / "run.json", about | {"seconds": round(spent + time.monotonic() - began, 1)})
    return scores


def _epochs_since_best(history: list[dict], monitor: str) -> int:
    values = [row[f"val_{monitor}"] for row in history]
    return len(values) - 1 - int(np.argmax(values)) if values else 0


def _save_state(path: Path, config: Config, model: NucleiModel, optimiser, history: list[dict], seconds: float) -> None:
    state = {
        "config": asdict(config),
        "model": model.adapter_state(),
        "optimiser": optimiser.state_dict(),
        "history": history,
        "seconds": seconds,
    }
    with write_atomic(path) as part:
        torch.save(state, part)


def _resume(path: Path, config: Config, model: NucleiModel, optimiser, device) -> tuple[list[dict], float]:
    """Put the state of the last whole epoch back: (history so far, seconds spent so far)."""
    if not path.exists():
        return [], 0.0
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged file
        raise InputError(
            f"{path}: the checkpoint to resume from is damaged; delete the folder to start again."
        ) from error
    _same_run(state["config"], config, path.parent)
    model.load_adapter_state(state["model"], str(path))
    optimiser.load_state_dict(state["optimiser"])
    return state["history"], state["seconds"]


# what may differ between two sittings of one run, because it does not change what is computed
_FREE = {"device", "workers", "data_note"}


def _same_run(stored: dict[str, Any], config: Config, folder: Path) -> None:
    mine = asdict(config)
    for name in options(Config):
        known = Path(str(mine[name])).name if name == "base" else mine[name]
        if name not in _FREE and stored.get(name) not in (mine[name], known):
            raise InputError(
                f"{folder}: holds a run with {name} = {stored.get(name)!r}, not {mine[name]!r}; choose another folder."
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); delete the folder to start again.") from error


# ---------------------------------------------------------------- provenance


def describe(
    config: Config, dataset: Dataset, split: Split, model: NucleiModel, folder: Path, command: str = ""
) -> dict[str, Any]:
    """What ``run.json`` says of a run: enough to know what was measured, and to measure it again.

    No path of the machine is kept: of a base that is a file, only the name and the hash.
    """
    stored = asdict(config) | {"base": model.base_name}
    return {
        "config": stored,
        "command": command or command_line(config, folder),
        "split": {
            "name": split.name,
            "train": len(split.train),
            "val": len(split.val),
            "test": len(split.test),
            "sha256": split.file_list_hash(dataset),
        },
        "base": {"name": model.base_name, "sha256": model.base_sha256},
        "adapter_sha256": sha256(folder / "best.safetensors"),
        "data": {"name": config.data, "images": len(dataset), "note": config.data_note},
        "device": device_name(model.mean.device),
        "peak_memory_mib": peak_memory_mib(model.mean.device),
        "versions": {
            "nucseg": nucseg.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line(config: Config, folder: Path) -> str:
    """The ``nucseg train`` command that repeats a run; NuInsSeg's folder is expected in NUCSEG_DATA."""
    parts = Path(folder).parts  # from "results" on, or the last: nothing of the machine's own folders
    parts = parts[parts.index("results") :] if "results" in parts else parts[-1:]
    words = ["nucseg", "train", "--out", "/".join(parts)]
    for name, default in asdict(Config()).items():
        value = getattr(config, name)
        if value != default:
            flag = name.replace("_", "-")
            words += [f"--{flag if value is not False else 'no-' + flag}"]
            words += [] if isinstance(value, bool) else [Path(value).name if name == "base" else str(value)]
    return shlex.join(words)


def device_name(device: torch.device) -> str:
    """A device in words: the card's name, or the CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        "Apple GPU (MPS)" if device.type == "mps" else f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    )


def peak_memory_mib(device: torch.device) -> int:
    """The most memory used so far, MiB: the card's where there is one, else this process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    if sys.platform == "win32":
        return 0  # not known there without another dependency
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def commit() -> str:
    """The commit of the checkout that nucseg runs from, with ``-dirty`` after it if it was changed; else ''."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return revision.stdout.strip() + ("-dirty" if status.stdout.strip() else "")
