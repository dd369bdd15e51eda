"""What fine-tuning on 5, 10 and 20 images of one's own brings: BBBC038's histology images, scored on the rest.

    python benchmarks/own_images.py --bbbc038 data/bbbc038 --start results/ablation/random-small/…/best.safetensors

The base 'offline' was trained on these very images, so an honest answer needs an adapter whose base never saw them:
one trained on NuInsSeg from the base 'random' (variant 'random' of the study ablation). Which images one happens to
outline matters, so it is done for several draws of them. Written to results/own-images: scores.csv (a row a draw,
number of images and test image) and run.json. Stopped, it goes on with the draw it was at.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from nucseg.data.datasets import ImageFolder, InMemory
from nucseg.files import sha256, write_atomic, write_json
from nucseg.inference.evaluate import evaluate
from nucseg.model.network import load_model, pick_device, place
from nucseg.records.provenance import stamp, with_note
from nucseg.training.finetune import finetune, finetune_config, median_diameter

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "own-images"
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bbbc038", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=ROOT / "data" / "own-images", help="where the runs are kept")
    parser.add_argument("--data-note", default="")
    parser.add_argument("--limit", type=int, default=0, help="test images, 0 for all: for a trial")
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
            if size == 10:  # what the scale alone brings: the adapter as it was, told how large the nuclei are
                scaled = load_model(arguments.start)
                object.__setattr__(scaled.config, "field_px", config.field_px)
                score(scaled, "scale only", draw, rest)
            score(load_model(path), str(size), draw, rest)
    with write_atomic(OUT / "scores.csv") as part:
        pd.concat(tables).to_csv(part, index=False, float_format="%.6f")
    about = {
        "command": with_note(
            "python benchmarks/own_images.py --bbbc038 BBBC038 --start "
            "results/ablation/offline-small/random/best.safetensors",
            arguments.data_note,
        ),
        "data": {"name": "BBBC038v1, histology", "images": len(dataset), "note": arguments.data_note},
        "test_images": len(rest),
        "start": {"name": "NuInsSeg, fold 1, base random", "base": model.base_name, "sha256": sha256(arguments.start)},
        "seconds": seconds,
        "configs": configs,
        "draws": DRAWS,
        **stamp(device),
    }
    write_json(OUT / "run.json", about)


if __name__ == "__main__":
    main()
