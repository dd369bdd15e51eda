"""The preview of NuInsSeg: 45 of its 665 images, for pages that show real tissue; not for folds or scores."""

import operator
import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import pandas as pd

from nucseg.data.datasets import Dataset, Name, NuInsSeg, Sample, nuinsseg_list
from nucseg.data.synth import TISSUES, Synthetic
from nucseg.errors import InputError

DATA_VARIABLE = "NUCSEG_DATA"
NUINSSEG = "NuInsSeg (Mahbod et al. 2024), CC BY 4.0"
SYNTHETIC = "synthetic tissue"


def preview_list() -> pd.DataFrame:
    """List the preview's 45 images in the benchmark's order: columns ``tissue``, ``stem``, ``fold`` (1..5).

    ``fold`` is the benchmark's fold that tests the image. The list was chosen by rule, without looking at the images:
    from the test part of fold 1, which the adapter ``nuinsseg-1`` was not trained on, the first image of each tissue
    and every eighth of all; then the first image of each of the three tissues that the part lacks.
    """
    text = resources.files("nucseg") / "assets" / "nuinsseg_preview.csv"
    with text.open(encoding="utf-8") as handle:
        return pd.read_csv(handle, dtype={"tissue": str, "stem": str, "fold": int})


@cache
def _folds() -> dict[Name, int]:
    """The fold of each of the preview's images."""
    table = preview_list()
    return dict(zip(zip(table["tissue"], table["stem"], strict=True), table["fold"], strict=True))


def _names(dataset: Dataset | pd.DataFrame) -> list[Name]:
    table = dataset if isinstance(dataset, pd.DataFrame) else dataset.table
    return list(zip(table["tissue"], table["stem"], strict=True))


def is_preview(dataset: Dataset | pd.DataFrame) -> bool:
    """Whether a dataset, or its table, has images of NuInsSeg's preview and no others.

    It is recognised by its names, because a marker file would not survive copying the images. A partial copy with any
    other image of NuInsSeg is no preview.
    """
    names = _names(dataset)
    return bool(names) and _folds().keys() >= set(names)


def check_no_preview(dataset: Dataset | pd.DataFrame) -> None:
    """Raise `InputError` for the preview: too few images, chosen for display, to train on or to score."""
    if is_preview(dataset):
        raise InputError(
            f"These {len(_names(dataset))} images are NuInsSeg's preview, which has no folds: get all "
            f"{len(nuinsseg_list())} images with nucseg fetch nuinsseg --out NEW_FOLDER."
        )


def _folder(root: str | Path | None) -> str | Path | None:
    return root or os.environ.get(DATA_VARIABLE) or None


def whole_dataset(root: str | Path | None = None) -> NuInsSeg | None:
    """NuInsSeg with all its images, or None where there are fewer: for what needs folds or training images.

    ``root``: its folder (default: the environment variable NUCSEG_DATA, if set). Raises `InputError` for a folder
    without NuInsSeg.
    """
    folder = _folder(root)
    if folder is None:
        return None
    dataset = NuInsSeg(folder)
    return dataset if set(_names(nuinsseg_list())) <= set(_names(dataset)) else None


class Pictures:
    """Images to show: a dataset that says where its images come from. See `pictures`.

    ``table``: one row per image, with the columns tissue and stem. ``name``: that of the dataset behind it.
    ``real``: whether the images are photographs of tissue. ``attribution``: the words for a caption.
    ``unseen``: positions of the images that the adapter ``nuinsseg-1`` was not trained on.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int], real: bool) -> None:
        self._dataset, self._indices = dataset, list(indices)
        self.real = real
        self.name = getattr(dataset, "name", "")
        self.attribution = NUINSSEG if real else SYNTHETIC
        self.table = dataset.table.iloc[self._indices].reset_index(drop=True)
        self.tissues = sorted(self.table["tissue"].unique())
        folds = _folds()
        self.unseen = [i for i, name in enumerate(_names(self.table)) if not real or folds[name] == 1]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int, /) -> Sample:
        return self._dataset[self._indices[operator.index(index)]]

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def of(self, tissue: str) -> Sample:
        """The first image of a tissue. Raises `InputError` if there is none."""
        for i, name in enumerate(self.table["tissue"]):
            if name == tissue:
                return self[i]
        raise InputError(f"There is no image of '{tissue}': choose one of {', '.join(self.tissues)}.")


def pictures(
    n_per_tissue: int = 1,
    *,
    size: int = 512,
    seed: int = 0,
    tissues: Sequence[str] = TISSUES,
    root: str | Path | None = None,
) -> Pictures:
    """Open real tissue to show if there is any on this computer, and synthetic tissue otherwise.

    Real tissue is the preview's images from NuInsSeg in ``root`` (default: the environment variable NUCSEG_DATA), be it
    the preview or the whole, so that both give the same pictures; in a partial copy those of them that it has.
    ``n_per_tissue``, ``size`` (px), ``seed`` and ``tissues`` are for the synthetic tissue alone: see `Synthetic`.

    Raises `InputError` if the folder does not exist, or holds none of the preview's images.
    """
    folder = _folder(root)
    if folder is None:
        dataset = Synthetic(n_per_tissue, size, seed, tissues)
        return Pictures(dataset, range(len(dataset)), real=False)
    data, listed = NuInsSeg(folder), _folds()
    indices = [i for i, name in enumerate(_names(data)) if name in listed]
    if not indices:
        raise InputError(
            f"'{folder}' has none of the {len(listed)} images of NuInsSeg to show: get them with nucseg fetch nuinsseg "
            f"--preview, or unset {DATA_VARIABLE}."
        )
    return Pictures(data, indices, real=True)


def attribution(root: str | Path | None = None) -> str:
    """The words for a caption under pictures of `pictures`, without opening any image."""
    return SYNTHETIC if _folder(root) is None else NUINSSEG
