"""Opening the dataset and selecting the split of a run's configuration."""

from pathlib import Path

import numpy as np

from nucseg.config import Config
from nucseg.data.datasets import Dataset, InMemory, NuInsSeg
from nucseg.data.splits import PROTOCOLS, Split
from nucseg.data.synth import Synthetic
from nucseg.errors import InputError


def open_dataset(config: Config, root: str | Path | None = None) -> Dataset:
    """Open the dataset that ``config`` names. ``root``: folder of NuInsSeg. Raises ``InputError`` if it is missing."""
    if config.data == "synthetic":
        return Synthetic(n_per_tissue=config.synthetic_per_tissue, seed=config.seed)
    if config.data == "own":
        raise InputError("Data 'own' is for nucseg finetune FOLDER, which opens the folder itself.")
    if root is None:
        raise InputError("Data 'nuinsseg' needs its folder: give --root, or set NUCSEG_DATA to it.")
    return InMemory(NuInsSeg(root))


def select_split(config: Config, dataset: Dataset) -> Split:
    """Select the split that ``config`` names, with its parts reduced to the configured numbers by a seeded draw.

    If ``score_part`` is "val", the whole validation part replaces the test part, and no test image is read.
    """
    splits = PROTOCOLS[config.protocol](dataset)
    if not 1 <= config.fold <= len(splits):
        raise InputError(
            f"Fold {config.fold} does not exist: the protocol {config.protocol!r} has folds 1 to {len(splits)}."
        )
    split = splits[config.fold - 1]
    rng = np.random.default_rng([config.seed, config.fold - 1])

    def some(indices: tuple[int, ...], count: int) -> tuple[int, ...]:
        order = rng.permutation(len(indices))[: count or len(indices)]
        return tuple(indices[i] for i in sorted(order))

    train, val = some(split.train, config.train_images), some(split.val, config.val_images)
    scored = split.val if config.score_part == "val" else split.test
    return Split(split.name, train, val, some(scored, config.test_images))
