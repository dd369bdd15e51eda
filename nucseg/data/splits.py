"""Splits of a dataset into training, validation and test parts: the benchmark's folds and others."""

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from nucseg.data.datasets import Dataset, Name, _names, _order, _pinned
from nucseg.data.preview import check_no_preview
from nucseg.errors import InputError


@dataclass(frozen=True)
class Split:
    """The parts of a dataset: training, validation (which selects the checkpoint) and test.

    ``train``, ``val``, ``test``: ascending positions in the split's dataset.
    """

    name: str
    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]

    def names(self, dataset: Dataset | pd.DataFrame) -> dict[str, list[str]]:
        """The sorted ``tissue/stem`` of each part (keys train, val, test), given the dataset or its table."""
        table = dataset if isinstance(dataset, pd.DataFrame) else dataset.table
        paths = (table["tissue"] + "/" + table["stem"]).to_numpy()
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {part: sorted(paths[i] for i in indices) for part, indices in parts.items()}

    def file_list_hash(self, dataset: Dataset | pd.DataFrame) -> str:
        """SHA-256 (64 hexadecimal digits) of `names`: equal for equal lists, wherever the files are."""
        lines = [f"{part}\t{name}\n" for part, names in self.names(dataset).items() for name in names]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _kfold(count: int, n: int, seed: int) -> np.ndarray:
    """The fold of each position, (count,), as in scikit-learn's ``KFold(n, shuffle=True, random_state=seed)``."""
    order = np.arange(count)
    np.random.RandomState(seed).shuffle(order)  # scikit-learn shuffles with the legacy generator
    fold = np.empty(count, int)
    for k, part in enumerate(np.array_split(order, n)):
        fold[part] = k
    return fold


def _fold_of(names: Sequence[Name], n: int, seed: int) -> np.ndarray:
    """The test fold of each name, for names in `_order`: pinned for NuInsSeg's images, separate for all others."""
    pinned = _pinned()
    fold_of_pinned = _kfold(len(pinned), n, seed)
    known = [fold_of_pinned[pinned[name]] for name in names if name in pinned]
    return np.concatenate([np.array(known, int), _kfold(len(names) - len(known), n, seed)])


def _hold_out(tissues: Sequence[str], fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Choose about ``fraction`` of each tissue at random (in all at least one image, never all); returns a bool mask.

    Images are ranked at random within their tissue and chosen in the order of (rank + 1/2) / images of that tissue, the
    Sainte-Laguë method of allocating seats. So the total is exact, and each tissue's share is within about one image of
    proportional.
    """
    count = len(tissues)
    total = min(max(round(fraction * count), int(fraction > 0)), max(count - 1, 0))
    order = rng.permutation(count)
    shuffled = pd.Series([tissues[i] for i in order], dtype=str)
    groups = shuffled.groupby(shuffled)
    turn = ((groups.cumcount() + 0.5) / groups.transform("size")).to_numpy()
    held = np.zeros(count, bool)
    held[order[np.argsort(turn, kind="stable")[:total]]] = True
    return held


def _indices(order: Sequence[int], positions: Iterable[int] | np.ndarray) -> tuple[int, ...]:
    return tuple(sorted(order[int(i)] for i in positions))


def _split(
    name: str, names: Sequence[Name], order: Sequence[int], test: np.ndarray, val: float, seed: list[int]
) -> Split:
    """Make a `Split` from a bool mask of test positions over ``order``; divide the rest into train and val."""
    rest = np.flatnonzero(~test)
    held = _hold_out([names[order[int(i)]][0] for i in rest], val, np.random.default_rng(seed))
    parts = rest[~held], rest[held], np.flatnonzero(test)
    return Split(name, *(_indices(order, part) for part in parts))


def _check_options(val_fraction: float, seed: int) -> None:
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction}: give a fraction from 0 up to, but not including, 1.")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}: give a whole number from 0 to 4294967295.")


def folds(dataset: Dataset, n: int = 5, seed: int = 19, val_fraction: float = 0.15) -> list[Split]:
    """Cross-validation as in the NuInsSeg benchmark: ``KFold(5, shuffle=True, random_state=19)`` over its file list.

    An image on NuInsSeg's list (`nuinsseg_list`, by tissue and stem) keeps the test fold that it has in the complete
    list, even in a partial copy. All other images are divided separately, in the order of their names. Each image is
    tested exactly once. The benchmark's public code selects its checkpoint on the test fold; here, ``val_fraction`` of
    each training part is held out for that, stratified by tissue as far as the counts allow (0: no val part). Names:
    "fold 1" to "fold n".

    The folds are not stratified by tissue, and patches of one slide very probably occur in both training and test.

    Raises `InputError` for n below 2, too few images, a partial copy with an empty fold, or the preview.
    """
    _check_options(val_fraction, seed)
    check_no_preview(dataset)
    names = _names(dataset)
    if not 2 <= n <= len(names):
        raise InputError(f"n = {n} folds of {len(names)} images: use at least 2 folds, and at most one per image.")
    order = _order(names)
    fold = _fold_of([names[i] for i in order], n, seed)
    for k in range(n):
        if not (fold == k).any():
            raise InputError(
                f"Fold {k + 1} of {n} has none of the {len(names)} images: add images, or use fewer folds."
            )
    return [_split(f"fold {k + 1}", names, order, fold == k, val_fraction, [seed, k]) for k in range(n)]


def leave_one_tissue_out(dataset: Dataset, val_fraction: float = 0.15, seed: int = 19) -> list[Split]:
    """One split per tissue, named after it: that tissue is the test part, all others are train and val.

    NuInsSeg's images of a tissue very probably come from one slide, so this is close to leave-one-slide-out. The val
    part is ``val_fraction`` of the other tissues' images, stratified by tissue. Splits are sorted by name.

    Raises `InputError` if there are fewer than two tissues, or for the preview.
    """
    _check_options(val_fraction, seed)
    check_no_preview(dataset)
    names = _names(dataset)
    tissues = sorted({tissue for tissue, _ in names})
    if len(tissues) < 2:
        raise InputError("The dataset has one tissue only: put each tissue's images into its own subfolder.")
    order = _order(names)
    of = np.array([names[i][0] for i in order])
    return [_split(t, names, order, of == t, val_fraction, [seed, k]) for k, t in enumerate(tissues)]


def own_images(dataset: Dataset, val_fraction: float = 0.2, seed: int = 19) -> list[Split]:
    """One split of your own images: ``val_fraction`` of them, at least two, select the checkpoint; the rest train.

    With three images, only one selects it. There is no separate test part: ``test`` equals ``val``, so its scores are
    optimistic. To measure the adapter, keep images back and score them with ``nucseg evaluate``.
    Raises `InputError` for fewer than 3 images.
    """
    _check_options(val_fraction, seed)
    names = _names(dataset)
    if len(names) < 3:
        raise InputError(f"There are {len(names)} images with masks: at least 3 are needed, 10 or more are better.")
    order = _order(names)
    fraction = max(val_fraction, min(2, len(names) - 2) / len(names))
    held = _hold_out([names[i][0] for i in order], fraction, np.random.default_rng(seed))
    val = _indices(order, np.flatnonzero(held))
    return [Split("own images", _indices(order, np.flatnonzero(~held)), val, val)]


def all_images(dataset: Dataset) -> list[Split]:
    """One split for an adapter that is to be used, not scored: 6% of the images are validation, the rest train.

    The validation images (40 of NuInsSeg's 665) select the epoch and tune the decoding. ``test`` equals ``val``, as in
    `own_images`. Raises `InputError` for fewer than 3 images, or for the preview.
    """
    check_no_preview(dataset)
    return [replace(own_images(dataset, 0.06)[0], name="all images")]


def report_folds(dataset: Dataset, n: int = 5) -> list[Split]:
    """The report's own protocol, to measure the effect of its overlap; not for results.

    Train and val are the two sides of ``KFold(n, shuffle=True, random_state=42)`` over the first 70% of the
    sorted list; the test part is the last 20% of a separate shuffle of the whole list, the same for all folds. Most
    test images are therefore also training images: of NuInsSeg's 133, 68 to 75 are in train and more in val. Only in
    this protocol do the parts of a `Split` overlap. Names: "report fold 1" to "report fold n".

    Raises `InputError` if n is below 2 or above 70% of the images, there are fewer than 5 images, or for the preview.
    """
    check_no_preview(dataset)
    order = _order(_names(dataset))
    count = len(order)
    used = int(0.7 * count)
    if not 2 <= n <= used or int(0.2 * count) < 1:
        raise InputError(f"n = {n} report folds of {count} images: use 2 or more, at most 70% of the images.")
    shuffled = list(range(count))
    random.Random(42).shuffle(shuffled)
    test = _indices(order, shuffled[-int(0.2 * count) :])
    fold = _kfold(used, n, 42)
    train = [_indices(order, np.flatnonzero(fold != k)) for k in range(n)]
    val = [_indices(order, np.flatnonzero(fold == k)) for k in range(n)]
    return [Split(f"report fold {k + 1}", train[k], val[k], test) for k in range(n)]


def given_parts(dataset: Dataset) -> list[Split]:
    """The split given by the dataset itself, in the column ``part`` of its table: train, val or test.

    Raises `InputError` for a dataset without that column.
    """
    if "part" not in dataset.table:
        raise InputError("The protocol 'parts' needs a dataset that names its parts: choose another protocol.")
    part = dataset.table["part"].to_numpy()
    train, val, test = (tuple(int(i) for i in np.flatnonzero(part == name)) for name in ("train", "val", "test"))
    return [Split("given parts", train, val, test)]


PROTOCOLS: dict[str, Callable[[Dataset], list[Split]]] = {
    "benchmark": folds,
    "report": report_folds,
    "leave-one-tissue-out": leave_one_tissue_out,
    "own": own_images,
    "all": all_images,
    "parts": given_parts,
}
