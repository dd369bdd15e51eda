"""Stronger augmentation on images unlike the training images: another laboratory, haematoxylin halved and doubled.

    python -m experiments.augmentations --root data/nuinsseg --bbbc038 data/bbbc038 \\
        --runs results/recipe-long/broad-gpu/{reference,geometry,strong}-fold_1

The runs were trained on the same fold with different augmentation (``studies/recipe-long.toml``). All are scored on
that fold's test images, as they are and restained, and on BBBC038's 50 held-out histology images, with the decoding
that each was tuned with. Nothing is chosen here. Writes results/augmentations: scores.csv (one row per run, condition
and image) and run.json.
"""

from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from experiments import common
from experiments.generalisation import LABORATORY, laboratory
from nucseg.config import Config, apply, options
from nucseg.data.augment import restain
from nucseg.data.datasets import NuInsSeg
from nucseg.data.from_config import select_split
from nucseg.files import sha256
from nucseg.inference.segmenter import Segmenter, load
from nucseg.metrics import score
from nucseg.records.runs import read_run

HAEMATOXYLIN = {"as it is": 1.0, "haematoxylin x 0.5": 0.5, "haematoxylin x 2": 2.0}


def main() -> None:
    """Score every run under every condition, and write the record."""
    arguments_of = common.parser(__doc__)
    arguments_of.add_argument("--bbbc038", type=Path, required=True, help="folder with images and masks in it")
    arguments_of.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of runs of one fold")
    arguments = arguments_of.parse_args()
    dataset, rows = NuInsSeg(arguments.root), []
    segmenters = {run.name: Segmenter([load(run)]) for run in arguments.runs}
    stored = {k: v for k, v in read_run(arguments.runs[0]).about["config"].items() if k in options(Config)}
    config = replace(apply(Config(), stored, str(arguments.runs[0])), score_part="test", test_images=arguments.limit)
    test = select_split(config, dataset).test
    other, chosen = laboratory(arguments.bbbc038, arguments.limit)
    seen = [(LABORATORY, other[i], other[i].image) for i in tqdm(chosen, desc=LABORATORY, unit="image")]
    for index in tqdm(test, desc="test part, reading", unit="image"):
        sample = dataset[index]
        for condition, factor in HAEMATOXYLIN.items():
            image = sample.image if factor == 1 else restain(sample.image, (factor, 1, 1))
            seen.append((condition, sample, image))
    for condition, sample, image in tqdm(seen, unit="image"):
        for name, segmenter in segmenters.items():
            row = {"run": name, "condition": condition, "tissue": sample.tissue, "stem": sample.stem}
            rows.append(row | asdict(score(sample.labels, segmenter.segment(image))))
    table = pd.DataFrame(rows)
    common.print_means(table, ["condition", "run"])
    model = next(iter(segmenters.values())).models[0]
    common.record(
        "augmentations",
        {"scores": table[["run", "condition", "tissue", "stem", "dice", "aji", "pq"]]},
        model.mean.device,
        base=common.base_of(model),
        data=common.data(len(test), arguments.data_note) | {"laboratory": f"{len(chosen)} histology images of BBBC038"},
        adapters={run.name: sha256(run / "best.safetensors") for run in arguments.runs},
    )


if __name__ == "__main__":
    main()
