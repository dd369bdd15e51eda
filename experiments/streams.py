"""Comparison of two streams of pretraining images: a short training from random weights on each, then its scores.

    OMP_NUM_THREADS=1 python -m experiments.streams --root data/nuinsseg --bbbc038 data/bbbc038

Streams: ``first``, the images of the first edition of the base (synthetic tissue with NuInsSeg's statistics, and the
histology and brightfield images of BBBC038), and ``second``, those of `nucseg.data.mixture`. Both runs share initial
weights, number of steps, crops and learning rate. They are scored without fine-tuning on validation images of fold 1,
never on test images. Takes about ten minutes on one core. Writes results/streams: scores.csv (one row per stream and
image) and run.json.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from experiments import common
from nucseg.config import preset
from nucseg.data.datasets import Dataset, ImageFolder, InMemory, Joined, NuInsSeg, Sample, Tiles
from nucseg.data.mixture import PretrainingImages
from nucseg.data.splits import folds
from nucseg.data.synth import TISSUES, Synthetic
from nucseg.inference.evaluate import evaluate
from nucseg.model.network import build_model, pick_device, place
from nucseg.training.loop import train_epoch
from nucseg.training.pretrain import HELD_OUT

EPOCHS, WINDOWS, CROP = 3, 640, 128  # small crops: four times as many steps in the same time


class Repeated:
    """A dataset repeated several times, so that an epoch can have more crops than the dataset has images."""

    def __init__(self, dataset: Dataset, times: int) -> None:
        self.dataset, self.times = dataset, times
        self.table = pd.concat([dataset.table] * times, ignore_index=True)

    def __len__(self) -> int:
        return len(self.dataset) * self.times

    def __getitem__(self, index: int, /) -> Sample:
        return self.dataset[index % len(self.dataset)]


def first_stream(bbbc038: Path) -> Dataset:
    """Return the images of the first edition, with half as many synthetic ones (6 per tissue)."""
    tissues = tuple(tissue for tissue in TISSUES if tissue not in HELD_OUT)
    real = InMemory(ImageFolder(bbbc038 / "images", bbbc038 / "masks"))
    return Repeated(InMemory(Joined(Synthetic(6, 512, 100, tissues), Tiles(real, ("histology", "brightfield")))), 2)


def train_and_score(stream: str, bbbc038: Path, dataset: Dataset, images: Sequence[int], epochs: int) -> pd.DataFrame:
    """Train on one stream; return the scores on ``images`` of ``dataset``, with a column ``stream``."""
    config = dataclasses.replace(
        preset("pretrain"), epochs=epochs, warmup=0.1, crop=CROP, num_workers=0, seed=1, device="cpu"
    )
    torch.manual_seed(config.seed)
    model = place(build_model(config), pick_device("cpu"))
    if stream == "first":
        config = dataclasses.replace(config, field_px=0)  # its images are scaled by their longer side
        data = first_stream(bbbc038)
        rows = np.arange(len(data))
    else:
        data = PretrainingImages(bbbc038, config.seed, WINDOWS)
        rows = np.flatnonzero(data.table["part"] == "train")
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay)
    for epoch in range(epochs):
        chosen = np.random.default_rng([config.seed, epoch]).choice(rows, WINDOWS, replace=False)
        loss = train_epoch(model, optimiser, data, tuple(map(int, chosen)), config, epoch)
        print(f"{stream}, epoch {epoch + 1}: loss {loss:.3f}", flush=True)
    return evaluate(model, dataset, images).assign(stream=stream)


def main() -> None:
    """Train and score on both streams, and write the record."""
    parser = common.parser(__doc__)
    parser.add_argument("--bbbc038", type=Path, required=True, help="folder of BBBC038")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"epochs of {WINDOWS} windows (default: {EPOCHS})")
    arguments = parser.parse_args()
    dataset = NuInsSeg(arguments.root)
    images = folds(dataset)[0].val[::2][: arguments.limit or None]
    tables = [
        train_and_score(stream, arguments.bbbc038, dataset, images, arguments.epochs) for stream in ("first", "second")
    ]
    scores = pd.concat(tables, ignore_index=True)
    common.print_means(scores, ["stream"])
    settings = {"epochs": arguments.epochs, "windows": WINDOWS, "crop": CROP, "seed": 1}
    common.record("streams", {"scores": scores}, data=common.data(len(images), arguments.data_note), settings=settings)


if __name__ == "__main__":
    main()
