"""The training loop: one configuration and one folder per run.

All random numbers are drawn from (seed, epoch, image), never from shared generator state, so that a run resumed after
its last complete epoch gives the same result as an uninterrupted one.
"""

import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from nucseg import instances
from nucseg.config import Config
from nucseg.data import augment
from nucseg.data.datasets import Dataset, Fresh, InMemory, content_hash
from nucseg.data.from_config import select_split
from nucseg.data.prefetch import ahead
from nucseg.data.splits import Split
from nucseg.data.vague import fold_in, take_out
from nucseg.errors import InputError, TrainingError
from nucseg.files import only_one, sha256
from nucseg.inference.decoding import tune
from nucseg.inference.evaluate import evaluate, evaluate_and_record
from nucseg.model.adapters import adapter_path, check_base, read_adapter, read_decoding
from nucseg.model.bases import resolve_base
from nucseg.model.network import NucleiModel, build_model, load_model, pick_device, place, predict, save_model
from nucseg.records.provenance import command_line, commit
from nucseg.records.runs import read_run
from nucseg.training.average import WeightAverage
from nucseg.training.batchnorm import estimate_statistics
from nucseg.training.checkpoint import _ended, _resume, _same_sources, _save_state, _write_history, finished
from nucseg.training.losses import dice_focal_loss, distance_loss

STATISTICS_IMAGES, STATISTICS_BATCH = 160, 8  # for norm_statistics = "training"; seconds on a CPU


class _TrainingImages(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Training samples by (epoch, index); they depend only on this key and the seed, in any process."""

    def __init__(self, dataset: Dataset, config: Config):
        self.dataset, self.config = dataset, config

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return a (3, S, S) uint8 image and (C, S, S) target maps; S is ``crop``, or ``size`` if ``crop`` is 0.

        With ``border_weight`` or ``valley_weight``, and for your own images, the last of the C maps holds the pixel
        weights: 0 in areas that were not annotated.

        A crop has the same scale as the whole image: ``size / field_px``, or ``size / longer side``.
        """
        config, rng = self.config, np.random.default_rng([self.config.seed, *key])
        sample = self.dataset.draw(*key) if isinstance(self.dataset, Fresh) else self.dataset[key[1]]
        scale = config.size / (config.field_px or max(sample.labels.shape))
        if config.data == "own":
            sample = fold_in(sample)
        if config.augmentation in augment.WINDOWS:
            sample = augment.WINDOWS[config.augmentation](sample, config.crop or config.size, scale, rng)
        else:
            if config.crop:
                scale *= augment.zoom(rng) if config.augmentation == "histology" else 1
                sample = augment.crop(sample, max(1, round(config.crop / scale)), rng)
            sample = augment.resize(sample, config.crop or config.size)
            if config.augmentation != "none":
                sample = augment.AUGMENTATIONS[config.augmentation](sample, rng)
        if config.data == "own":
            sample = take_out(sample)
        image = torch.from_numpy(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))
        if config.head == "instance" and config.without != "distance":  # DISTANCE_PX applies to images of 512 px
            targets = instances.encode(sample.labels, instances.DISTANCE_PX * config.size / 512)
        else:
            targets = instances.foreground(sample.labels)
        weights = None
        if config.border_weight or config.valley_weight:
            weights = instances.pixel_weights(sample.labels, config.border_weight, config.valley_weight)
        if config.data == "own" and sample.vague is not None:
            annotated = ~sample.vague[None]
            weights = annotated if weights is None else weights * annotated
        if weights is not None:
            targets = np.concatenate([targets, weights.astype(np.float32)])
        return image, torch.from_numpy(targets)


def batch_keys(config: Config, indices: tuple[int, ...], epoch: int) -> list[list[tuple[int, int]]]:
    """Return the epoch's batches as lists of (epoch, image index), shuffled by (seed, epoch)."""
    order = np.random.default_rng([config.seed, epoch]).permutation(len(indices))
    keys = [(epoch, indices[i]) for i in order]
    return [keys[i : i + config.batch_size] for i in range(0, len(keys), config.batch_size)]


def learning_rate(config: Config, progress: float) -> float:
    """Return the learning rate at ``progress`` (0..1) of the run: cosine annealing with warm restarts.

    Follows Loshchilov & Hutter 2017. During the first fraction ``warmup`` of the run, the rate is also scaled linearly
    from 0 to 1.
    """
    rise = min(1.0, progress / config.warmup) if config.warmup else 1.0
    within = (progress * config.cycles) % 1.0
    return rise * (config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * within)))


def train_epoch(
    model: NucleiModel,
    optimiser: torch.optim.Optimizer,
    dataset: Dataset,
    indices: tuple[int, ...],
    config: Config,
    epoch: int,
    progress: bool = True,
    average: WeightAverage | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> float:
    """Train for one pass over the images; return the mean loss. Raises ``TrainingError`` for a non-finite loss.

    ``average``: updated after each step. ``scaler``: scales the loss, as float16 requires; steps with an overflowing
    gradient are then skipped, and the scale is halved.
    """
    scaler = scaler or torch.amp.GradScaler(model.mean.device.type, enabled=False)
    device = model.mean.device
    torch.manual_seed(config.seed * 100_003 + epoch)  # for dropout
    model.train()
    batches = batch_keys(config, indices, epoch)
    total = 0.0
    with closing(_load(_TrainingImages(dataset, config), batches, config.num_workers, device.type == "cuda")) as loader:
        bar = tqdm(
            loader,
            total=len(batches),
            desc=f"epoch {epoch + 1}/{config.epochs}",
            unit="step",
            disable=not progress,
            leave=False,
        )
        for step, (images, targets) in enumerate(bar):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config, (epoch + step / len(batches)) / config.epochs)
            logits, stages = model.with_stages(images.to(device, non_blocking=True))
            targets = targets.to(device, non_blocking=True)
            loss = _loss(logits, targets, config)
            if stages:
                small = F.avg_pool2d(targets, 2)  # to the stride of the stage heads
                loss = loss + config.stage_weight * sum(_loss(stage, small, config) for stage in stages)
            if not torch.isfinite(loss):
                raise TrainingError(_diverged(f"The loss is {loss.item()}", epoch, step, config))
            optimiser.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            norm = torch.nn.utils.clip_grad_norm_(_trainable(model), config.grad_clip)
            # an overflow in float16 is not divergence, unless it persists without upscaling
            if not torch.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() <= 1):
                raise TrainingError(_diverged(f"The gradient is {norm.item()}", epoch, step, config))
            scaler.step(optimiser)
            scaler.update()
            if average is not None:
                average.update(model)
            total += loss.item() * len(images)
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return total / len(indices)


def _load(
    images: _TrainingImages, batches: list[list[tuple[int, int]]], num_workers: int, pin_memory: bool
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield the batches in their order, loaded ahead: in ``num_workers`` processes, or in a thread if that is 0.

    Close the generator if you stop early: the thread then ends, too.
    """
    # created here, not in the thread, because it draws a number from the generator that dropout draws from
    loader = iter(DataLoader(images, batch_sampler=batches, num_workers=num_workers, pin_memory=pin_memory))
    if num_workers:
        yield from loader
        return
    with closing(ahead(loader)) as line:
        yield from line


def sampled(dataset: Dataset, config: Config, indices: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield batches of `STATISTICS_IMAGES` training images in all, as in the first epochs of training."""
    images = _TrainingImages(dataset, config)
    order = np.random.default_rng(config.seed).permutation(len(indices))[:STATISTICS_IMAGES]
    keys = [(epoch, indices[i]) for epoch in range(-(-STATISTICS_IMAGES // len(order))) for i in order]
    for start in range(0, STATISTICS_IMAGES, STATISTICS_BATCH):
        yield torch.stack([images[key][0] for key in keys[start : start + STATISTICS_BATCH]])


def _diverged(what: str, epoch: int, step: int, config: Config) -> str:
    return (
        f"{what} in epoch {epoch + 1}, step {step + 1}: training stopped. The last complete epoch is kept; lower lr "
        f"(now {config.lr:g}) or alpha (now {config.alpha:g}) in a new folder."
    )


def _loss(logits: Tensor, targets: Tensor, config: Config) -> Tensor:
    """Dice and focal loss of the foreground, plus cross-entropy of the distance map if there is one (scalar).

    ``logits``: (B, C, H, W). ``targets``: the same shape, with one more map if pixels are weighted.
    """
    n_maps = logits.shape[1]
    weights = targets[:, n_maps:] if targets.shape[1] > n_maps else None
    loss = dice_focal_loss(
        logits[:, :1], targets[:, :1], config.dice_weight, config.focal_alpha, config.focal_gamma, weights
    )
    if n_maps > 1:
        loss = loss + config.distance_weight * distance_loss(logits[:, 1:], targets[:, 1:n_maps], weights)
    return loss


def _trainable(model: NucleiModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    config: Config, dataset: Dataset, folder: str | Path, *, progress: bool = True, command: str = ""
) -> pd.DataFrame:
    """Train one run in ``folder`` and score its best checkpoint on the test images; return the scores.

    Files written: ``last.pt`` (to resume), ``best.safetensors`` (the adapter with the best validation score),
    ``history.csv`` (one row per epoch), and at the end ``scores.csv`` (one row per test image) and ``run.json``.
    A finished run is not repeated; an interrupted one resumes after its last complete epoch.

    Raises ``InputError`` for an invalid configuration or a folder that holds another run, ``Busy`` if another process
    works in the folder, and ``TrainingError`` for a loss that is not finite.
    """
    config.check()
    config, folder = replace(config, base=resolve_base(config.base)), Path(folder)
    if finished(config, folder):
        _same_sources(config, dataset, folder)
        return read_run(folder).scores
    began, code, device = time.monotonic(), commit(), pick_device(config.device)
    split = select_split(config, dataset)
    if not (split.train and split.val and split.test):
        raise InputError(f"Fold {config.fold} has an empty train, validation or test part: use more images.")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # for the initial weights of head and LoRA
        model = build_model(config)
    if config.start:
        start_from(model, config.start)
    model = place(model, device, config.precision)
    with only_one(folder):
        if finished(config, folder):  # another process may have finished it in the meantime
            return read_run(folder).scores
        seconds = _epochs(model, config, dataset, split, folder, began, progress)
        start = model.start_sha256
        model = place(load_model(folder / "best.safetensors", config.base), device, config.precision)
        model.start_sha256 = start
        tuning = _tune(model, config, dataset, folder) if config.tune_decoding else {}
        return evaluate_and_record(
            model,
            config,
            dataset,
            split,
            folder,
            adapter=folder / "best.safetensors",
            command=command or command_line(config, folder),
            started=began - seconds,
            commit=code,
            more=tuning,
            progress=progress,
        )


def _tune(model: NucleiModel, config: Config, dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Tune the decoding on the validation images and store it in the run's adapter; return the entry for run.json.

    All validation images are used, including those not used to select the epoch.
    """
    samples = [dataset[index] for index in select_split(replace(config, val_images=0), dataset).val]
    maps = [predict(model, sample.image) for sample in samples]
    chosen, about = tune(maps, [sample.labels for sample in samples], scale=model.config.nucleus_scale)
    model.decoding = chosen.to_dict()
    save_model(folder / "best.safetensors", model)
    parameters = {name: value for name, value in model.decoding.items() if name != "classifier"}
    return {"decoding": parameters | {name: round(value, 6) for name, value in about.items()}}


def start_from(model: NucleiModel, adapter: str | Path) -> None:
    """Load an adapter's weights and tuned decoding into a model.

    Raises ``InputError`` if base, tensor names or shapes differ.
    """
    path = adapter_path(adapter)
    tensors, _, base_sha256 = read_adapter(path)
    check_base(path, base_sha256, model.base_sha256, model.base_name)
    model.load_adapter_state(tensors, str(path))
    model.decoding = read_decoding(path)
    model.start_sha256 = sha256(path)


def _epochs(
    model: NucleiModel, config: Config, dataset: Dataset, split: Split, folder: Path, began: float, progress: bool
) -> float:
    """Train the remaining epochs; return the seconds spent before the run was resumed."""
    optimiser = torch.optim.AdamW(_trainable(model), lr=config.lr, weight_decay=config.weight_decay)
    identity = {"base": model.base_sha256, "split": split.file_list_hash(dataset), "start": model.start_sha256}
    identity["images and masks"] = content_hash(dataset)
    average = WeightAverage(model, config.ema) if config.ema else None
    scaler = torch.amp.GradScaler(model.mean.device.type, enabled=model.precision == "float16")
    if config.norm_statistics == "training" and not (folder / "last.pt").exists():
        estimate_statistics(model, sampled(dataset, config, split.train), head=bool(config.start))
    if config.num_workers and isinstance(dataset, InMemory):
        dataset.read(split.train)  # before the processes that load images are forked, in every epoch
    history, spent = _resume(folder / "last.pt", config, identity, model, optimiser, average, scaler)
    best = max((row[f"val_{config.monitor}"] for row in history), default=-math.inf)
    while not _ended(history, config):
        if _out_of_time(history, config, spent + time.monotonic() - began):
            break
        epoch, start = len(history), time.monotonic()
        loss = train_epoch(model, optimiser, dataset, split.train, config, epoch, progress, average, scaler)
        with average.applied(model) if average else nullcontext():
            scores = evaluate(
                model,
                dataset,
                split.val,
                scoring=config.scoring,
                threshold=None if model.decoding else config.threshold,
                leave_out_vague=config.data == "own",
                progress=progress,
            )
            row = {"epoch": epoch + 1, "lr": optimiser.param_groups[0]["lr"], "train_loss": loss}
            row |= {f"val_{name}": float(scores[name].mean()) for name in ("dice", "iou", "aji", "pq")}
            history.append(row | {"seconds": round(time.monotonic() - start, 2)})
            if row[f"val_{config.monitor}"] > best:
                best = row[f"val_{config.monitor}"]
                save_model(folder / "best.safetensors", model)
        seconds = spent + time.monotonic() - began
        _save_state(folder / "last.pt", config, identity, model, optimiser, history, seconds, average, scaler)
        _write_history(folder, history)
        if progress:
            tqdm.write(", ".join(f"{k} {v:.4g}" for k, v in history[-1].items()))
            if (fit := _epochs_that_fit(history, config)) < config.epochs and len(history) == 1:
                tqdm.write(f"About {fit} of {config.epochs} epochs fit into max_hours: plan that many with --epochs.")
            elif len(history) == 1 and config.data == "own":
                tqdm.write(_estimate(history[0]["seconds"], config))
    _write_history(folder, history)  # again, in case the run was killed between the two writes above
    return spent


def _estimate(seconds: float, config: Config) -> str:
    """A sentence on how long fine-tuning will take at most, judged by its first epoch, and how to shorten it."""
    minutes = seconds * (config.epochs - 1) / 60
    rest = f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{minutes * 60:.0f} seconds"
    return f"About {rest} more for {config.epochs} epochs at most; --epochs, --patience or --max-hours shorten it."


def _epochs_that_fit(history: list[dict[str, Any]], config: Config) -> int:
    """Number of epochs that end within ``max_hours``, at the speed of the first; without a limit, those planned."""
    return max(1, int(3600 * config.max_hours / history[0]["seconds"])) if config.max_hours else config.epochs


def _out_of_time(history: list[dict[str, Any]], config: Config, seconds: float) -> bool:
    """Whether another epoch, as long as the longest so far, would end after ``max_hours``.

    At least one epoch is run. The learning rate follows the planned epochs, not the clock, so that results do not
    depend on the machine's speed; a run stopped early ends at a higher learning rate than planned.
    """
    return bool(config.max_hours and history) and seconds + max(r["seconds"] for r in history) > 3600 * config.max_hours
