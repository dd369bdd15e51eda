"""Training: one configuration, one loop, one folder a run. It reads from top to bottom.

Everything random is drawn from (seed, epoch, image), never from a stream that runs on. A run that was killed
therefore goes on from its last whole epoch exactly as if it had never stopped.
"""

import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from nucseg import augment, instances
from nucseg.config import options
from nucseg.data import Dataset, InMemory, NuInsSeg, Split, content_hash
from nucseg.errors import InputError, TrainingError
from nucseg.evaluate import evaluate
from nucseg.files import only_one, sha256, write_atomic, write_json
from nucseg.lora import check_base, read_adapter
from nucseg.losses import dice_focal_loss
from nucseg.model import NucleiModel, build_model, load_model, pick_device, place, save_model
from nucseg.presets import PROTOCOLS, Config
from nucseg.provenance import commit, describe
from nucseg.synth import Synthetic
from nucseg.tables import read_run
from nucseg.weights import adapter_path, resolve_base


def open_dataset(config: Config, root: str | Path | None = None) -> Dataset:
    """The dataset that a config names. ``root``: the folder of NuInsSeg. ``InputError`` if it is missing."""
    if config.data == "synthetic":
        return Synthetic(n_per_tissue=config.synthetic_per_tissue, seed=config.seed)
    if config.data == "own":
        raise InputError("Data 'own' is for nucseg finetune FOLDER, which opens the folder itself.")
    if root is None:
        raise InputError("Data 'nuinsseg' needs its folder: give --root, or set NUCSEG_DATA to it.")
    dataset = NuInsSeg(root)
    return dataset if config.workers else InMemory(dataset)


def select_split(config: Config, dataset: Dataset) -> Split:
    """The config's split, its parts cut to the config's budget by a seeded draw."""
    splits = PROTOCOLS[config.protocol](dataset)
    if config.fold >= len(splits):
        raise InputError(f"Fold {config.fold} does not exist: the protocol {config.protocol!r} has {len(splits)}.")
    split = splits[config.fold]
    rng = np.random.default_rng([config.seed, config.fold])

    def some(indices: tuple[int, ...], count: int) -> tuple[int, ...]:
        order = rng.permutation(len(indices))[: count or len(indices)]
        return tuple(indices[i] for i in sorted(order))

    train, val = some(split.train, config.train_images), some(split.val, config.val_images)
    return Split(split.name, train, val, some(split.test, config.test_images))


# ---------------------------------------------------------------- batches


class _TrainingImages(torch.utils.data.Dataset):
    """Keys are (epoch, index): what comes out depends on them and the seed alone, in any process."""

    def __init__(self, dataset: Dataset, config: Config):
        self.dataset, self.config = dataset, config

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(3, S, S) uint8 image and (C, S, S) target maps; S is ``crop``, or ``size`` where there is none.

        A crop is seen at the scale at which the whole image would be: ``size / field``, or ``/ longer side``.
        """
        _, index = key
        config, rng = self.config, np.random.default_rng([self.config.seed, *key])
        sample = self.dataset[index]
        if config.crop:
            scale = config.size / (config.field or max(sample.labels.shape))
            scale *= augment.zoom(rng) if config.augmentation == "histology" else 1
            sample = augment.crop(sample, max(1, round(config.crop / scale)), rng)
        sample = augment.resize(sample, config.crop or config.size)
        if config.augmentation != "none":
            sample = getattr(augment, config.augmentation)(sample, rng)
        image = torch.from_numpy(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))
        if (
            config.head == "instance" and config.without != "depth"
        ):  # the depth is meant for 512 px images; it scales along
            targets = instances.encode(sample.labels, instances.DEPTH_PX * config.size / 512)
        else:
            targets = instances.foreground(sample.labels)
        return image, torch.from_numpy(targets)


def batch_keys(config: Config, indices: tuple[int, ...], epoch: int) -> list[list[tuple[int, int]]]:
    """The epoch's batches as lists of (epoch, image index), shuffled by (seed, epoch)."""
    order = np.random.default_rng([config.seed, epoch]).permutation(len(indices))
    keys = [(epoch, indices[i]) for i in order]
    return [keys[i : i + config.batch] for i in range(0, len(keys), config.batch)]


def learning_rate(config: Config, progress: float) -> float:
    """Cosine annealing with warm restarts (Loshchilov & Hutter 2017): the rate at ``progress`` 0..1 of the run.

    Over the first ``warmup`` of the run it rises in a straight line to what the cosine is there.
    """
    rise = min(1.0, progress / config.warmup) if config.warmup else 1.0
    within = (progress * config.cycles) % 1.0
    return rise * (config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * within)))


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
        logits, stages = model.with_stages(images.to(device, non_blocking=True))
        targets = targets.to(device, non_blocking=True)
        loss = _loss(logits, targets, config)
        if stages:
            small = F.avg_pool2d(targets, 2)  # the stage heads' stride
            loss = loss + config.stage_weight * sum(_loss(stage, small, config) for stage in stages)
        if not torch.isfinite(loss):
            raise TrainingError(_diverged(f"The loss is {loss.item()}", epoch, step, config))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(_trainable(model), config.clip)
        if not torch.isfinite(norm):
            raise TrainingError(_diverged(f"The gradient is {norm.item()}", epoch, step, config))
        optimiser.step()
        total += loss.item() * len(images)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return total / len(indices)


def _diverged(what: str, epoch: int, step: int, config: Config) -> str:
    return (
        f"{what} in epoch {epoch + 1}, step {step + 1}: training stopped. The last whole epoch is kept; lower lr "
        f"(now {config.lr:g}) or alpha (now {config.alpha:g}) in a new folder."
    )


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

    Raises ``InputError`` for a config that does not fit or a folder that holds another run, ``Busy`` where another
    process works in the folder, ``TrainingError`` for a loss that is not finite.
    """
    config.check()
    config, folder = replace(config, base=resolve_base(config.base)), Path(folder)
    if finished(config, folder):
        _same_sources(config, dataset, folder)
        return read_run(folder).scores
    began, code, device = time.monotonic(), commit(), pick_device(config.device)
    split = select_split(config, dataset)
    if not (split.train and split.val and split.test):
        raise InputError(f"Fold {config.fold} leaves a part without images: use more images.")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # the head's and LoRA's initial weights
        model = build_model(config)
    if config.start:
        start_from(model, config.start)
    model = place(model, device, config.precision)
    with only_one(folder):
        if finished(config, folder):  # by another process, since it was first asked
            return read_run(folder).scores
        seconds = _epochs(model, config, dataset, split, folder, began, progress)
        start = model.start_sha256
        model = place(load_model(folder / "best.safetensors", config.base), device, config.precision)
        model.start_sha256 = start
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
        about = describe(config, dataset, split, model, folder, command) | {"commit": code}
        write_json(folder / "run.json", about | {"seconds": round(seconds + time.monotonic() - began, 1)})
    return scores


def start_from(model: NucleiModel, adapter: str | Path) -> None:
    """Put an adapter's weights into a model of the same make. ``InputError`` where base, names or shapes differ."""
    path = adapter_path(adapter)
    tensors, _, base_sha256 = read_adapter(path)
    check_base(path, base_sha256, model.base_sha256, model.base_name)
    model.load_adapter_state(tensors, str(path))
    model.start_sha256 = sha256(path)


def _epochs(
    model: NucleiModel, config: Config, dataset: Dataset, split: Split, folder: Path, began: float, progress: bool
) -> float:
    """All epochs that are still to be trained; returns the seconds that earlier sittings took."""
    optimiser = torch.optim.AdamW(_trainable(model), lr=config.lr, weight_decay=config.weight_decay)
    identity = {"base": model.base_sha256, "split": split.file_list_hash(dataset), "start": model.start_sha256}
    identity["images and masks"] = content_hash(dataset)
    history, spent = _resume(folder / "last.pt", config, identity, model, optimiser)
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
        seconds = spent + time.monotonic() - began
        _save_state(folder / "last.pt", config, identity, model, optimiser, history, seconds)
        _write_history(folder, history)
        if progress:
            tqdm.write(", ".join(f"{k} {v:.4g}" for k, v in history[-1].items()))
    _write_history(folder, history)  # once more, for a run that was killed between the two writes above
    return spent


def _epochs_since_best(history: list[dict], monitor: str) -> int:
    values = [row[f"val_{monitor}"] for row in history]
    return len(values) - 1 - int(np.argmax(values)) if values else 0


def _write_history(folder: Path, history: list[dict]) -> None:
    with write_atomic(folder / "history.csv") as part:
        pd.DataFrame(history).to_csv(part, index=False)


def _save_state(
    path: Path, config: Config, identity: dict, model: NucleiModel, optimiser, history: list[dict], seconds: float
) -> None:
    state = {
        "config": asdict(config),
        "identity": identity,
        "model": model.adapter_state(),
        "optimiser": optimiser.state_dict(),
        "history": history,
        "seconds": seconds,
    }
    with write_atomic(path) as part:
        torch.save(state, part)


def _resume(
    path: Path, config: Config, identity: dict, model: NucleiModel, optimiser: torch.optim.Optimizer
) -> tuple[list[dict], float]:
    """Put the state of the last whole epoch back: (history so far, seconds spent so far)."""
    if not path.exists():
        return [], 0.0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged file
        raise InputError(
            f"{path}: the checkpoint to resume from is damaged; delete the folder to start again."
        ) from error
    _same_config(state["config"], config, path.parent)
    for what, mine in identity.items():
        if state.get("identity", identity).get(what, mine) != mine:
            raise InputError(f"{path.parent}: holds a run with another {what}; choose another folder.")
    model.load_adapter_state(state["model"], str(path))
    optimiser.load_state_dict(state["optimiser"])
    return state["history"], state["seconds"]


# what may differ between two sittings of one run, because it does not change what is computed
_FREE = {"device", "workers", "data_note"}


def finished(config: Config, folder: str | Path) -> bool:
    """Whether ``folder`` holds this run, finished. ``InputError`` if it holds another one, or a damaged one."""
    folder = Path(folder)
    if not (folder / "run.json").exists():
        return False
    about = read_run(folder).about
    _same_config(about["config"], config, folder)
    if Path(config.base).is_file():
        if sha256(config.base) != about["base"]["sha256"]:
            raise InputError(f"{folder}: holds a run with another base; choose another folder.")
    elif resolve_base(config.base) != about["base"]["name"]:
        raise InputError(f"{folder}: holds a run with base = {about['base']['name']!r}; choose another folder.")
    return True


def _same_sources(config: Config, dataset: Dataset, folder: Path) -> None:
    """Raise ``InputError`` unless a finished run had these images, masks and adapter to start from."""
    about = read_run(folder).about
    start = sha256(adapter_path(config.start)) if config.start else ""
    pairs = {
        "list of images": (about["split"]["sha256"], select_split(config, dataset).file_list_hash(dataset)),
        "adapter to start from": (about.get("start_sha256", ""), start),
        "content of images or masks": (about["data"].get("sha256", ""), content_hash(dataset)),
    }
    for what, (then, now) in pairs.items():
        if then and now and then != now:
            raise InputError(f"{folder}: holds a finished run with another {what}; choose another folder.")


def _same_config(stored: dict[str, Any], config: Config, folder: Path) -> None:
    """Raise ``InputError`` unless the options agree; one that is newer than the run had its default then."""
    mine = asdict(config)
    for name, field in options(Config).items():
        then = stored.get(name, field.default)
        if name not in _FREE | {"base", "start"} and then != mine[name]:
            raise InputError(
                f"{folder}: holds a run with {name} = {then!r}, not {mine[name]!r}; choose another folder."
            )
