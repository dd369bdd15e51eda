"""What mirrored views and ensembles bring and cost, on the first fold's test images of NuInsSeg.

    python benchmarks/options.py --root data/nuinsseg --runs results/ablation/offline-small

Needs the adapters of ``nucseg reproduce --studies ablation``: the ensemble is of its ranks 4, 8 and 16, all trained
on the same fold. Nothing is chosen here. Written to results/options: scores.csv (a row a way and image), run.json.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from nucseg.data.datasets import NuInsSeg
from nucseg.data.splits import folds
from nucseg.files import write_atomic, write_json
from nucseg.inference.segmenter import Segmenter, load
from nucseg.instances import labels_from
from nucseg.metrics import score
from nucseg.records.provenance import stamp, with_note

OUT = Path(__file__).parents[1] / "results" / "options"
MEMBERS = ("lora-8", "lora-4", "lora-16")


def main() -> None:
    """Score each way of segmenting, one image after the other, and time it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=0, help="images, 0 for all: for a trial")
    parser.add_argument("--data-note", default="")
    arguments = parser.parse_args()
    models = [load(arguments.runs / name / "best.safetensors") for name in MEMBERS]
    ways = {
        "one adapter": Segmenter(models[:1]),
        "mirrored views": Segmenter(models[:1], tta=True),
        "ensemble of three": Segmenter(models),
    }
    dataset = NuInsSeg(arguments.root)
    test = folds(dataset)[0].test[: arguments.limit or None]
    rows, seconds = [], dict.fromkeys(ways, 0.0)
    for index in tqdm(test, desc="images"):
        sample = dataset[index]
        for name, segmenter in ways.items():
            began = time.perf_counter()
            maps = sum(segmenter.maps(sample.image, model) for model in segmenter.models) / len(segmenter.models)
            labels = labels_from(maps)
            seconds[name] += time.perf_counter() - began
            rows.append(
                {"way": name, "tissue": sample.tissue, "stem": sample.stem} | asdict(score(sample.labels, labels))
            )
    table = pd.DataFrame(rows)
    print(table.groupby("way", sort=False)[["dice", "aji", "pq"]].mean().round(4))
    with write_atomic(OUT / "scores.csv") as part:
        table.to_csv(part, index=False, float_format="%.6f")
    about = {
        "command": with_note(
            "python benchmarks/options.py --root NUINSSEG --runs results/ablation/offline-small", arguments.data_note
        ),
        "members": list(MEMBERS),
        "seconds_an_image": {name: round(value / len(test), 3) for name, value in seconds.items()},
        "data": {"name": "nuinsseg", "images": len(test), "note": arguments.data_note},
        "base": {"name": models[0].base_name, "sha256": models[0].base_sha256},
        **stamp(models[0].mean.device),
    }
    write_json(OUT / "run.json", about)


if __name__ == "__main__":
    main()
