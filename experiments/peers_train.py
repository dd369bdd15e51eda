"""Train one peer of nucseg, choose its thresholds on validation images, and write its label maps of the test images.

`experiments/peers.py` starts this module with the interpreter of the peer's own environment, which need not contain
nucseg (only the U-Net uses it). The peer gets the images and label maps of the training and validation parts, but only
the images of the test part, so nothing can be chosen on test images:

    python -m experiments.peers_train PEER PARTS OUT --minutes 60 --threads 1

PARTS holds train.npz, val.npz (``images``, (n, H, W, 3) uint8 RGB; ``labels``, (n, H, W), 0 = background) and test.npz
(``images``). OUT gets labels.npz (``labels``, (n, H, W) int32) and about.json.

The clock runs during training, with everything that a peer computes for it (targets, normalisation, augmentation, its
validation passes), but not while packages are imported, thresholds are chosen and test images are segmented; those
seconds are recorded separately. With ``--clock cpu`` the budget counts CPU time, divided by the number of threads: what
the wall clock shows on an idle machine, and fair on a busy one. An interrupted training resumes from its last
checkpoint, and its clock with it.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

# ruff: noqa: NPY002 (StarDist and Cellpose draw from NumPy's global generator)
SEED = 0
Segment = Callable[[np.ndarray], np.ndarray]  # (H, W, 3) uint8 RGB -> (H, W) label map


class Part(NamedTuple):
    """The images, (n, H, W, 3) uint8 RGB, and label maps, (n, H, W) int32, of one part of a split."""

    images: np.ndarray
    labels: np.ndarray


class Budget(NamedTuple):
    """What a training may use: minutes by the wall clock, or of CPU time per thread, and threads."""

    minutes: float
    clock: str
    threads: int


class TimeUp(Exception):
    """The budget is used up."""


class Clock:
    """Seconds of training so far, over all attempts, by the wall and by the CPU.

    ``path``: the file that keeps the seconds of earlier attempts.
    """

    def __init__(self, path: Path, budget: Budget) -> None:
        self.path, self.budget = path, budget
        before = json.loads(path.read_text()) if path.exists() else {"wall": 0.0, "cpu": 0.0}
        self._wall, self._cpu = time.monotonic() - before["wall"], time.process_time() - before["cpu"]

    @property
    def wall(self) -> float:
        """Seconds by the wall."""
        return time.monotonic() - self._wall

    @property
    def cpu(self) -> float:
        """Seconds of CPU time of this process, over all its threads."""
        return time.process_time() - self._cpu

    @property
    def progress(self) -> float:
        """Share of the budget that is used up, 0..1."""
        used = self.wall if self.budget.clock == "wall" else self.cpu / self.budget.threads
        return min(1.0, used / (60 * self.budget.minutes))

    @property
    def over(self) -> bool:
        """Whether the budget is used up."""
        return self.progress >= 1

    def save(self) -> None:
        """Keep the seconds so far, for a later attempt. To be called with each checkpoint."""
        _write(self.path, {"wall": self.wall, "cpu": self.cpu})


def _write(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)


def _trained(folder: Path, clock: Clock, **about: Any) -> None:
    """Mark the end of the training: it is not repeated if a later stage is interrupted."""
    clock.save()
    _write(folder / "trained.json", {"seconds": round(clock.wall, 1), "cpu_seconds": round(clock.cpu, 1), **about})


# --- U-Net ---------------------------------------------------------------------------------------------------------


class _Samples:
    """The images of a part as a dataset of nucseg."""

    name = "nuinsseg"

    def __init__(self, part: Part) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part.images)

    def __getitem__(self, index: int, /) -> Any:
        from nucseg.data.datasets import Sample

        return Sample(self.part.images[index], self.part.labels[index], "", "")


def unet(train: Part, val: Part, folder: Path, budget: Budget) -> tuple[Segment, dict[str, Any]]:
    """A U-Net (Ronneberger et al. 2015) with a ResNet-34 as encoder, all of it from random weights.

    Everything but the network is the preset ``best`` of nucseg: target maps, losses, windows, augmentation, batch,
    AdamW at 1e-3 and a cosine to zero, here over the budget instead of over the epochs; the decoding and the object
    confidence are tuned on the validation images. The weights kept are those with the best mean PQ on every second
    validation image, in one of ten checks.
    """
    import torch
    from segmentation_models_pytorch import Unet

    from nucseg.config import apply, preset
    from nucseg.inference.decoding import Decoding, tune
    from nucseg.metrics import score
    from nucseg.training import loop

    torch.set_num_threads(budget.threads)
    torch.manual_seed(SEED)
    side = train.images.shape[1]
    config = apply(preset("best"), {"crop": min(256, side), "field_px": 512, "seed": SEED}, "the U-Net")
    network = Unet("resnet34", encoder_weights=None, classes=2)
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    windows = loop._TrainingImages(_Samples(train), config)  # type: ignore[arg-type]

    def maps(image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (2, H, W) maps, 0..1."""
        network.eval()
        with torch.inference_mode():
            return torch.sigmoid(network(_normalised(torch.from_numpy(image).permute(2, 0, 1)[None])))[0].numpy()

    def check(checks: list[float]) -> None:
        """Append the mean PQ on validation images, and keep the weights if it is the best so far."""
        found = [Decoding().cut(maps(image)) for image in val.images[::2]]
        checks.append(float(np.mean([score(t, f).pq for t, f in zip(val.labels[::2], found, strict=True)])))
        if checks[-1] >= max(checks):
            torch.save(network.state_dict(), kept)
        print(f"{clock.wall:.0f} s, {clock.progress:.0%}, PQ {checks[-1]:.4f}", flush=True)

    last, kept = folder / "last.pt", folder / "best.pt"
    if not (folder / "trained.json").exists():
        state: dict[str, Any] = {"epoch": 0, "step": 0, "checks": []}
        if last.exists():
            saved = torch.load(last, weights_only=False)
            network.load_state_dict(saved["network"])
            optimiser.load_state_dict(saved["optimiser"])
            state = saved["state"]
        clock = Clock(folder / "clock.json", budget)
        while not clock.over:
            for keys in loop.batch_keys(config, tuple(range(len(train.images))), state["epoch"]):
                if clock.over:
                    break
                network.train()
                drawn = [windows[key] for key in keys]
                images, targets = (torch.stack(arrays) for arrays in zip(*drawn, strict=True))
                for group in optimiser.param_groups:
                    group["lr"] = loop.learning_rate(config, clock.progress)
                loss = loop._loss(network(_normalised(images)), targets, config)
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip)
                optimiser.step()
                state["step"] += 1
                if len(state["checks"]) < min(9, int(10 * clock.progress)):
                    check(state["checks"])
            state["epoch"] += 1
            part = last.with_suffix(".part")
            torch.save({"network": network.state_dict(), "optimiser": optimiser.state_dict(), "state": state}, part)
            part.replace(last)
            clock.save()
        check(state["checks"])
        checks = [round(value, 4) for value in state["checks"]]
        _trained(folder, clock, epochs=state["epoch"], steps=state["step"], validation_pq=checks)
    network.load_state_dict(torch.load(kept, weights_only=True))
    decoding, quality = tune([maps(image) for image in val.images], list(val.labels))
    parameters = {name: value for name, value in decoding.to_dict().items() if name != "classifier"}
    about = {
        "network": "U-Net, encoder ResNet-34, random weights",
        "weights": sum(parameter.numel() for parameter in network.parameters()),
        "settings": {name: getattr(config, name) for name in ("crop", "augmentation", "batch_size", "lr")},
        "decoding": parameters | {name: round(value, 6) for name, value in quality.items()},
        "selection": "best mean PQ on every second validation image",
    }
    return lambda image: decoding.decode(maps(image))[0], about


def _normalised(images: Any) -> Any:
    """(B, 3, H, W) uint8 tensor -> float32 tensor of about zero mean and unit variance."""
    return (images.float() / 255 - 0.5) / 0.25


# --- StarDist ------------------------------------------------------------------------------------------------------


def _stardist_augmenter(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Random flips and quarter turns, brightness, contrast and noise, as in StarDist's example of 2D training."""
    order = np.random.permutation(2)
    image, labels = image.transpose(*order, 2), labels.transpose(order)
    for axis in (0, 1):
        if np.random.rand() > 0.5:
            image, labels = np.flip(image, axis), np.flip(labels, axis)
    image = image * np.random.uniform(0.6, 2) + np.random.uniform(-0.2, 0.2)
    return image + 0.02 * np.random.uniform(0, 1) * np.random.normal(0, 1, image.shape), labels


def stardist(train: Part, val: Part, folder: Path, budget: Budget) -> tuple[Segment, dict[str, Any]]:
    """StarDist (Schmidt et al. 2018; Weigert and Schmidt 2022), as in its authors' example of 2D training.

    ``Config2D`` with 32 rays on a grid of 2 px, and its defaults: patches of 256 px in batches of 4, Adam at 3e-4,
    halved after 40 epochs of 100 steps without a lower validation loss (so hardly ever within an hour on a CPU). The
    weights kept are those with the lowest validation loss; ``optimize_thresholds`` chooses the two thresholds.
    """
    import tensorflow as tf
    from csbdeep.utils import normalize
    from stardist import fill_label_holes
    from stardist.models import Config2D, StarDist2D

    tf.config.threading.set_intra_op_parallelism_threads(budget.threads)
    tf.config.threading.set_inter_op_parallelism_threads(budget.threads)
    tf.random.set_seed(SEED)
    np.random.seed(SEED)

    def prepared(image: np.ndarray) -> np.ndarray:
        return normalize(image, 1, 99.8, axis=(0, 1))  # each channel by itself, as in the example

    clock = Clock(folder / "clock.json", budget)  # normalisation and filling of holes count too
    done = folder / "trained.json"
    patch = min(256, train.images.shape[1])
    config = Config2D(
        n_rays=32, grid=(2, 2), n_channel_in=3, train_patch_size=(patch, patch), train_tensorboard=False, use_gpu=False
    )
    model = StarDist2D(config, name="model", basedir=str(folder))
    val_images, val_labels = [prepared(image) for image in val.images], [fill_label_holes(y) for y in val.labels]
    if not done.exists():
        train_images = [prepared(image) for image in train.images]
        train_labels = [fill_label_holes(y) for y in train.labels]
        model.prepare_for_training()
        state = _StarDistState(model, folder / "state.npz")
        state.restore()
        model.callbacks.append(_deadline(clock, state))
        model.train(
            train_images,
            train_labels,
            validation_data=(val_images, val_labels),
            augmenter=_stardist_augmenter,
            seed=SEED + state.steps,
            epochs=config.train_epochs,
        )
        _trained(folder, clock, epochs=len(state.losses), steps=state.steps, validation_loss=state.losses)
    model.load_weights("weights_best.h5")
    model.optimize_thresholds(val_images, val_labels)
    about = {
        "network": "StarDist2D, U-Net of depth 3, 32 rays, grid 2 px, random weights",
        "weights": int(model.keras_model.count_params()),
        "settings": {
            "patch": config.train_patch_size,
            "batch_size": config.train_batch_size,
            "lr": config.train_learning_rate,
            "steps_per_epoch": config.train_steps_per_epoch,
            "augmentation": "flips, quarter turns, brightness, contrast, noise",
        },
        "decoding": {name: float(value) for name, value in model.thresholds._asdict().items()},
        "selection": "lowest validation loss",
    }
    return lambda image: model.predict_instances(prepared(image))[0], about


class _StarDistState:
    """The state of StarDist's training that its own checkpoints lack: the optimiser's, and the losses so far."""

    def __init__(self, model: Any, path: Path) -> None:
        self.model, self.path = model, path
        self.losses: list[float] = []
        self.steps = 0

    def _variables(self) -> list[Any]:
        variables = self.model.keras_model.optimizer.variables
        return list(variables() if callable(variables) else variables)

    def save(self) -> None:
        """Write weights and optimiser after an epoch."""
        arrays = {f"weight_{i}": value for i, value in enumerate(self.model.keras_model.get_weights())}
        arrays |= {f"optimiser_{i}": np.asarray(value) for i, value in enumerate(self._variables())}
        part = self.path.with_name("state.part.npz")
        np.savez(part, losses=self.losses, steps=self.steps, **arrays)
        part.replace(self.path)

    def restore(self) -> None:
        """Continue from the last epoch, if there is one."""
        if not self.path.exists():
            return
        with np.load(self.path) as saved:
            self.losses, self.steps = saved["losses"].tolist(), int(saved["steps"])
            network = self.model.keras_model
            network.set_weights([saved[f"weight_{i}"] for i in range(len(network.get_weights()))])
            network.optimizer.build(network.trainable_variables)
            for i, variable in enumerate(self._variables()):
                variable.assign(saved[f"optimiser_{i}"])
        for callback in self.model.callbacks:  # the checkpoint of the best weights
            if hasattr(callback, "save_best_only") and callback.save_best_only:
                callback.best = min(self.losses)


def _deadline(clock: Clock, state: _StarDistState) -> Any:
    """A Keras callback that stops the training when the budget is used up, and saves its state after each epoch."""
    from csbdeep.utils.tf import keras_import

    class Deadline(keras_import("callbacks", "Callback")):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            state.steps += 1
            if clock.over:
                self.model.stop_training = True

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            state.losses.append(round(float(logs["val_loss"]), 4))
            state.save()
            clock.save()

    return Deadline()


# --- Cellpose ------------------------------------------------------------------------------------------------------


def cellpose_rate(progress: float, highest: float = 0.005) -> float:
    """The learning rate of Cellpose 3 at ``progress``, 0..1, of a training.

    Its shape is that of Cellpose's default of 500 epochs: a linear rise over 10, and ten halvings over the last 100.

    >>> [round(cellpose_rate(p), 6) for p in (0.0, 0.01, 0.02, 0.79, 0.81, 0.83, 1.0)]
    [0.0, 0.0025, 0.005, 0.005, 0.0025, 0.00125, 5e-06]
    """
    halvings = min(10, int((progress - 0.8) / 0.02 + 1e-9) + 1) if progress >= 0.8 else 0
    return highest * min(1.0, progress / 0.02) / 2**halvings


def cellpose(train: Part, val: Part, folder: Path, budget: Budget) -> tuple[Segment, dict[str, Any]]:
    """Cellpose 3 (Stringer and Pachitariu 2025) by its own ``train_seg``, from random weights, on RGB images.

    Defaults of ``train_seg``: AdamW at 0.005, as for the authors' model cyto3, batches of 8 patches of 224 px, rotated,
    flipped and scaled by 0.75 to 1.25 after nuclei were brought to a diameter of 30 px. Only the clock is ours:
    ``train_seg`` wants the number of epochs beforehand, so its optimiser is replaced by one that follows
    `cellpose_rate` over the budget and ends the training with it. As in Cellpose, the last weights are kept. At test
    images are scaled by the mean diameter of the training nuclei; its size model supports two channels only. Training
    images with fewer than five nuclei are left out, as by default. Two thresholds are chosen on validation images by
    Cellpose's average precision at IoU 0.5; the published defaults are among the candidates.
    """
    os.environ["CELLPOSE_LOCAL_MODELS_PATH"] = str(folder / "cellpose")  # else a folder in the user's home
    import torch
    from cellpose import metrics, models
    from cellpose import train as training

    torch.set_num_threads(budget.threads)
    torch.manual_seed(SEED)
    weights, last = folder / "weights", folder / "last.pt"
    if not (folder / "trained.json").exists():
        clock = Clock(folder / "clock.json", budget)
        model = models.CellposeModel(gpu=False, pretrained_model=False, nchan=3, mkldnn=False)
        count = {"steps": 0, "origin": 0.0}  # origin: progress at the first step, after the flows were computed

        def rate() -> float:
            return cellpose_rate((clock.progress - count["origin"]) / max(1e-6, 1 - count["origin"]))

        class Timed(torch.optim.AdamW):
            """AdamW whose rate follows the clock, that saves its state every few minutes and ends the training."""

            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                self.saved, count["origin"] = clock.wall, clock.progress
                if last.exists():
                    saved = torch.load(last, weights_only=False)
                    model.net.load_state_dict(saved["network"])
                    self.load_state_dict(saved["optimiser"])
                    count.update({name: saved[name] for name in count})

            def step(self, closure: Any = None) -> None:
                for group in self.param_groups:
                    group["lr"] = rate()
                super().step(closure)
                count["steps"] += 1
                if clock.wall > self.saved + 180:
                    self.saved = clock.wall
                    part = last.with_suffix(".part")
                    state = {"network": model.net.state_dict(), "optimiser": self.state_dict(), **count}
                    torch.save(state, part)
                    part.replace(last)
                    clock.save()
                if count["steps"] % 50 == 0:
                    print(f"{clock.wall:.0f} s, {count['steps']} steps, rate {rate():.2g}", flush=True)
                if clock.over:
                    raise TimeUp

        try:
            with mock.patch.object(torch.optim, "AdamW", Timed):
                training.train_seg(
                    model.net,
                    train_data=list(train.images.transpose(0, 3, 1, 2).astype(np.float32)),
                    train_labels=list(train.labels),
                    rgb=True,  # with channels or channel_axis, train_seg would keep two channels only
                    n_epochs=100_000,
                    save_every=100_000,
                    save_path=str(folder),
                )
        except TimeUp:
            model.net.save_model(str(weights))
        steps = int(count["steps"])
        _trained(folder, clock, epochs=round(8 * steps / len(train.images), 2), steps=steps)
    model = models.CellposeModel(gpu=False, pretrained_model=str(weights), nchan=3, mkldnn=False)
    flows = [model.eval(image, channel_axis=-1, compute_masks=False)[1] for image in val.images]

    def masks(dynamics: Any, cell: float, flow: float) -> np.ndarray:
        """The label map of an image from its flows and cell probability, as in ``CellposeModel.eval``."""
        _, field, probability = dynamics
        steps = 200 * model.diam_labels / model.diam_mean
        return model._compute_masks(
            (1, *probability.shape, 3), field[:, None], probability[None], flow, cell, niter=steps
        )

    def precision(cell: float, flow: float) -> float:
        found = [masks(dynamics, cell, flow) for dynamics in flows]
        return float(metrics.average_precision(list(val.labels), found, threshold=[0.5])[0].mean())

    cell, flow = 0.0, 0.4
    best = first = precision(cell, flow)
    for candidate in (-2.0, -1.0, 1.0, 2.0):
        if (value := precision(candidate, flow)) > best:
            cell, best = candidate, value
    for candidate in (0.2, 0.8):
        if (value := precision(cell, candidate)) > best:
            flow, best = candidate, value
    about = {
        "network": "Cellpose 3, residual U-Net, three channels, random weights",
        "weights": sum(parameter.numel() for parameter in model.net.parameters() if parameter.requires_grad),
        "settings": {"patch": 224, "batch_size": 8, "lr": 0.005, "diameter_px": round(float(model.diam_labels), 2)},
        "decoding": {
            "cellprob_threshold": cell,
            "flow_threshold": flow,
            "average_precision": round(best, 6),
            "average_precision_default": round(first, 6),
        },
        "selection": "last weights",
    }
    final = {"cellprob_threshold": cell, "flow_threshold": flow}
    return lambda image: model.eval(image, channel_axis=-1, **final)[0], about


PEERS: dict[str, Callable[[Part, Part, Path, Budget], tuple[Segment, dict[str, Any]]]] = {
    "unet": unet,
    "stardist": stardist,
    "cellpose": cellpose,
}
PACKAGES = {
    "unet": ("segmentation-models-pytorch", "torch", "numpy"),
    "stardist": ("stardist", "csbdeep", "tensorflow", "tensorflow-cpu", "keras", "tf-keras", "numpy"),
    "cellpose": ("cellpose", "torch", "numpy"),
}


def versions(peer: str) -> dict[str, str]:
    """The versions of Python and of a peer's packages, as installed here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES[peer]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read(path: Path) -> Part:
    """Read the training or validation part."""
    with np.load(path) as saved:
        return Part(saved["images"], saved["labels"].astype(np.int32))


def main() -> None:
    """Train, choose thresholds, segment the test images."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("parts", type=Path, help="folder with train.npz, val.npz and test.npz")
    parser.add_argument("out", type=Path, help="folder for checkpoints and results")
    parser.add_argument("--minutes", type=float, required=True, help="budget of training")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what the minutes are")
    parser.add_argument("--threads", type=int, default=1, help="number of threads")
    arguments = parser.parse_args()
    folder, budget = arguments.out, Budget(arguments.minutes, arguments.clock, arguments.threads)
    folder.mkdir(parents=True, exist_ok=True)
    train, val = read(arguments.parts / "train.npz"), read(arguments.parts / "val.npz")
    began = time.monotonic()
    segment, about = PEERS[arguments.peer](train, val, folder, budget)
    training = json.loads((folder / "trained.json").read_text())
    del train
    predicting = time.monotonic()
    with np.load(arguments.parts / "test.npz") as saved:
        labels = np.stack([segment(image) for image in saved["images"]]).astype(np.int32)
    np.savez_compressed(folder / "labels.npz", labels=labels)
    about |= training | {
        "budget": budget._asdict(),
        "seed": SEED,
        "seconds_all": round(time.monotonic() - began, 1),
        "seconds_test": round(time.monotonic() - predicting, 1),
        "versions": versions(arguments.peer),
    }
    _write(folder / "about.json", about)


if __name__ == "__main__":
    main()
