"""A base that needs no download: MobileSAM's encoder trained from random weights, never on NuInsSeg.

The images are synthetic tissue and the histology and brightfield images of BBBC038 (CC0). The encoder is
trained whole, with the instance head. Both together are the base ``offline``: the head is small, and a run that starts
from it needs fewer images (``head_start``).
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.torch import save_file
from torch import nn

from nucseg.data import Dataset, ImageFolder, InMemory, Sample
from nucseg.errors import InputError
from nucseg.files import write_atomic
from nucseg.model import load_model
from nucseg.presets import Config, preset
from nucseg.provenance import command_line
from nucseg.synth import TISSUES, Synthetic
from nucseg.train import train
from nucseg.weights import INSTANCE_HEAD

# The book trains on these live: a base that had seen them would make that page say nothing
HELD_OUT = (
    "human kidney",
    "human liver",
    "human pancreas",
    "human placenta",
    "human salivory gland",
    "mouse kidney",
)
KINDS = ("histology", "brightfield")  # of BBBC038; fluorescence has no stain to learn from


class Tiles:
    """The images of some tissues of a dataset; those larger than ``largest`` px are cut into squares of ``side`` px.

    What is left over at the right and at the bottom is not used. ``table`` names a tile by its top left corner.
    """

    def __init__(self, dataset: Dataset, tissues: tuple[str, ...], largest: int = 320, side: int = 256):
        self._dataset = dataset
        self.name = getattr(dataset, "name", "")
        self._places: list[tuple[int, tuple[slice, slice]]] = []
        rows = []
        for i, (tissue, stem) in enumerate(zip(dataset.table["tissue"], dataset.table["stem"], strict=True)):
            if tissue not in tissues:
                continue
            height, width = dataset[i].labels.shape
            if max(height, width) <= largest:
                corners, size = [(0, 0)], (height, width)
            else:
                grid = itertools.product(range(0, height - side + 1, side), range(0, width - side + 1, side))
                corners, size = list(grid), (side, side)
            for top, left in corners:
                self._places.append((i, np.s_[top : top + size[0], left : left + size[1]]))
                rows.append((tissue, stem if len(corners) == 1 else f"{stem}_{top}_{left}"))
        self.table = pd.DataFrame(rows, columns=["tissue", "stem"], dtype=str)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int, /) -> Sample:
        i, window = self._places[index]
        sample, row = self._dataset[i], self.table.iloc[index]
        return Sample(sample.image[window], sample.labels[window], row["tissue"], row["stem"])


class Joined:
    """Several datasets one after the other."""

    def __init__(self, *datasets: Dataset):
        self.name = " and ".join(getattr(dataset, "name", "") for dataset in datasets)
        self.table = pd.concat([d.table[["tissue", "stem"]] for d in datasets], ignore_index=True)
        self._places = [(d, i) for d in datasets for i in range(len(d))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int, /) -> Sample:
        dataset, i = self._places[index]
        return dataset[i]


def pretraining_data(bbbc038: str | Path, per_tissue: int = 12, seed: int = 100) -> Joined:
    """Synthetic images of all tissues but ``HELD_OUT``, and BBBC038's images of ``KINDS``.

    ``bbbc038``: a folder with ``images/<kind>/<id>.png`` and ``masks/<kind>/<id>.png``. Its nuclei are small
    (median 273 px of area in histology); at 320 or 256 px scaled to the encoder's 512 they are as large as
    NuInsSeg's.
    """
    tissues = tuple(tissue for tissue in TISSUES if tissue not in HELD_OUT)
    root = Path(bbbc038)
    real = Tiles(InMemory(ImageFolder(root / "images", root / "masks")), KINDS)
    real.name = "BBBC038"
    return Joined(Synthetic(per_tissue, 512, seed, tissues), real)


def pretrain(bbbc038: str | Path, folder: str | Path, config: Config | None = None, *, progress: bool = True) -> Path:
    """Train the base and write its encoder, float16, as ``offline.safetensors`` in ``folder``; returns its path.

    ``config``: the preset ``pretrain`` where none is given. Resumes as any run does.
    """
    config = config or preset("pretrain")
    if config.where != "full" or config.head != "instance":
        raise InputError("Pretraining trains the whole encoder with the head 'instance': leave both options.")
    command = command_line(config, Path(folder)).replace("nucseg train", "nucseg pretrain --bbbc038 BBBC038", 1)
    scores = train(config, pretraining_data(bbbc038), folder, progress=progress, command=command)
    return export(folder, {"pq": float(scores["pq"].mean()), "dice": float(scores["dice"].mean())})


def export(run: str | Path, scores: dict[str, float]) -> Path:
    """Write a pretraining run's encoder and head as a base: float16 safetensors, what it is in the header."""
    run = Path(run)
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    model = load_model(run / "best.safetensors")
    parts: dict[str, nn.Module] = {"image_encoder.": model.encoder, INSTANCE_HEAD: model.head}
    tensors = {prefix + n: t for prefix, module in parts.items() for n, t in module.state_dict().items()}
    state = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    card = {
        "what": "MobileSAM's image encoder and nucseg's instance head, trained from random weights. "
        "These are not MobileSAM's weights.",
        "data": "synthetic tissue (CC0, made by nucseg) and BBBC038v1 (CC0)",
        "date": about["date"],
        "commit": about["commit"],
        "device": about["device"],
        "epochs": str(about["config"]["epochs"]),
        "seed": str(about["config"]["seed"]),
        "scores": json.dumps(scores),
    }
    path = run / "offline.safetensors"
    with write_atomic(path) as part:
        save_file({n: t.contiguous() for n, t in state.items()}, part, metadata=card)
    return path
