"""The gain from fine-tuning on 5, 10 and 20 of BBBC038's histology images, scored on the rest.

    python -m experiments.own_images --bbbc038 data/bbbc038 \\
        --start results/ablation/offline-small/random/best.safetensors

The base 'offline' was trained on these images, so the adapter must come from another base: here it was trained on
NuInsSeg from the base 'random' (variant 'random' of the study ablation). The choice of annotated images matters, so
it is drawn several times. Writes results/own-images: scores.csv (one row per draw, number of images and test image) and
run.json. Run the same command again to resume.
"""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from experiments import common
from nucseg.data.datasets import ImageFolder, InMemory
from nucseg.files import sha256
from nucseg.inference.evaluate import evaluate
from nucseg.model.network import load_model, pick_device, place
from nucseg.training.finetune import finetune, finetune_config, median_diameter

SIZES = (5, 10, 20)
DRAWS = 5


class Part:
    """Some images of a dataset."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices = dataset, list(indices)
        self.table = dataset.table.iloc[self.indices].reset_index(drop=True)
        self.name = dataset.name

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.dataset[self.indices[index]]


def main() -> None:
    """Score the adapter before and after, and write the tables."""
    parser = common.parser(__doc__, root=False)
    parser.add_argument("--bbbc038", type=Path, required=True, help="folder created by nucseg fetch bbbc038")
    parser.add_argument("--start", type=Path, required=True, help="adapter to fine-tune")
    parser.add_argument("--work", type=Path, default=Path("data") / "own-images", help="folder for the runs")
    arguments = parser.parse_args()
    images = arguments.bbbc038 / "images" / "histology"
    dataset = InMemory(ImageFolder(images, arguments.bbbc038 / "masks" / "histology"))
    device = pick_device()
    model = place(load_model(arguments.start), device)
    tables, seconds, configs = [], {str(size): [] for size in SIZES}, []

    def score(model, name, draw, rest):
        scores = evaluate(place(model, device), dataset, rest, fold=name)
        tables.append(scores.rename(columns={"fold": "images"}).drop(columns="tissue").assign(draw=draw))
        print(draw, name, scores[["dice", "aji", "pq"]].mean().round(3).to_dict(), flush=True)

    for draw in tqdm(range(DRAWS), desc="draws"):
        order = np.random.default_rng(draw).permutation(len(dataset))
        pool, rest = order[: max(SIZES)], sorted(order[max(SIZES) :])[: arguments.limit or None]
        score(model, "0", draw, rest)
        for size in SIZES:
            mine = Part(dataset, pool[:size])
            folder = arguments.work / f"draw-{draw}" / f"{size}"
            began = time.monotonic()
            path = finetune(mine, folder, arguments.start, progress=False)
            seconds[str(size)].append(round(time.monotonic() - began, 1))
            config = finetune_config(mine, arguments.start)
            ran = len(pd.read_csv(folder / "history.csv"))
            known = {name: getattr(config, name) for name in ("epochs", "crop", "field_px", "lr", "patience")}
            known |= {"draw": draw, "images": size, "epochs_run": ran}
            configs.append(known | {"median_diameter_px": round(median_diameter(mine), 2)})
            if size == 10:  # the effect of scale alone: the same adapter at the scale of these nuclei
                scaled = load_model(arguments.start)
                scaled.config = replace(scaled.config, field_px=config.field_px)
                score(scaled, "scale only", draw, rest)
            score(load_model(path), str(size), draw, rest)
    start = {"name": "NuInsSeg, fold 1, base random", "base": model.base_name, "sha256": sha256(arguments.start)}
    common.record(
        "own-images",
        {"scores": pd.concat(tables)},
        device,
        data=common.data(len(dataset), arguments.data_note, "BBBC038v1, histology"),
        test_images=len(rest),
        start=start,
        seconds=seconds,
        configs=configs,
        draws=DRAWS,
    )


if __name__ == "__main__":
    main()
