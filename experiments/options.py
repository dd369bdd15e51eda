"""Gain and cost of test-time augmentation and ensembles, on the test images of NuInsSeg's first fold.

    python -m experiments.options --root data/nuinsseg --runs results/ablation/offline-small

Needs the adapters of ``nucseg reproduce --studies ablation``: the ensemble combines those of rank 4, 8 and 16, all
trained on the same fold. No setting is chosen here. Writes results/options: scores.csv (one row per way of segmenting
and image) and run.json.
"""

import time
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from experiments import common
from nucseg.data.datasets import NuInsSeg
from nucseg.data.splits import folds
from nucseg.inference.segmenter import Segmenter, load
from nucseg.instances import labels_from
from nucseg.metrics import score

MEMBERS = ("lora-8", "lora-4", "lora-16")


def main() -> None:
    """Score and time each way of segmenting, image by image."""
    options = common.parser(__doc__)
    options.add_argument("--runs", type=Path, required=True, help="results/ablation/COLUMN, with the adapters")
    arguments = options.parse_args()
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
            maps = sum(segmenter.maps([sample.image], model)[0] for model in segmenter.models) / len(segmenter.models)
            labels = labels_from(maps)
            seconds[name] += time.perf_counter() - began
            rows.append(
                {"way": name, "tissue": sample.tissue, "stem": sample.stem} | asdict(score(sample.labels, labels))
            )
    table = pd.DataFrame(rows)
    common.print_means(table, ["way"])
    common.record(
        "options",
        {"scores": table},
        models[0].mean.device,
        members=list(MEMBERS),
        seconds_per_image={name: round(value / len(test), 3) for name, value in seconds.items()},
        data=common.data(len(test), arguments.data_note),
        base=common.base_of(models[0]),
    )


if __name__ == "__main__":
    main()
