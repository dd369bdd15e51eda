"""Robustness by the head's normalisation: to other fields, other stains, another laboratory and plain images.

    python -m experiments.robustness --root data/nuinsseg --bbbc038 data/bbbc038 --runs results/recipe/offline-small/*

For each run, on its fold's validation images (no test image is read):

- fields: an image's maps, alone and as a quarter of a mosaic, compared inside the first attention window;
- stains: the amounts of haematoxylin and eosin halved and doubled;
- laboratory: BBBC038's held-out histology images, enlarged so that nuclei are as large as NuInsSeg's. The first edition
  of the base was trained on these images (heads that started fresh were not): compare the runs, not the values;
- plain: number of nuclei found in uniformly grey images.

Writes results/robustness: scores.csv (one row per run, condition and image), fields.csv, plain.csv and run.json.
"""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from experiments import common
from nucseg.config import Config, apply, options
from nucseg.data.augment import restain
from nucseg.data.bbbc038 import held_out_histology
from nucseg.data.datasets import ImageFolder, NuInsSeg
from nucseg.data.from_config import select_split
from nucseg.inference.evaluate import segment_whole
from nucseg.inference.segmenter import load
from nucseg.metrics import score
from nucseg.model import network
from nucseg.model.network import NucleiModel, predict
from nucseg.records.runs import read_run

STAINS = {f"{stain} x {factor:g}": (stain, factor) for stain in ("haematoxylin", "eosin") for factor in (0.5, 2.0)}
ENLARGE = 1.6  # as pretraining scores these images
WINDOW = 192  # px at the encoder's scale: the first attention window without the margin of the head's convolutions


def consistency(model: NucleiModel, images: list[np.ndarray]) -> dict[str, float]:
    """Greatest and mean difference between the first image's maps alone and as a quarter of a mosaic of four."""
    mosaic = np.concatenate([np.concatenate(images[:2], axis=1), np.concatenate(images[2:], axis=1)])
    window = np.s_[:, :WINDOW, :WINDOW]
    difference = np.abs(predict(model, images[0], 1.0)[window] - predict(model, mosaic, 1.0)[window])
    return {"greatest": float(difference.max()), "mean": float(difference.mean())}


def plain(model: NucleiModel) -> list[dict[str, int]]:
    """Nuclei that the network itself finds in uniformly grey images, without the rule for plain images."""
    rule, network.PLAIN = network.PLAIN, -1
    try:
        greys = (0, 32, 64, 96, 128, 160, 192, 224, 255)
        return [
            {"grey": g, "nuclei": int(segment_whole(model, np.full((512, 512, 3), g, np.uint8)).max())} for g in greys
        ]
    finally:
        network.PLAIN = rule


def main() -> None:
    """Measure each run and write the tables."""
    given = common.parser(__doc__)
    given.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of runs, with adapters")
    given.add_argument("--bbbc038", type=Path, required=True, help="folder of BBBC038")
    arguments = given.parse_args()
    dataset = NuInsSeg(arguments.root)
    others = ImageFolder(arguments.bbbc038 / "images" / "histology", arguments.bbbc038 / "masks" / "histology")
    held = [i for i, stem in enumerate(others.table["stem"]) if stem[:12] in held_out_histology()]
    rows, fields, greys = [], [], []
    for run in arguments.runs:
        stored = {k: v for k, v in read_run(run).about["config"].items() if k in options(Config)}
        config = replace(apply(Config(), stored, str(run)), score_part="val", test_images=arguments.limit)
        images, model = select_split(config, dataset).test, load(run)
        name = {"run": run.name, "head_norm": config.head_norm}
        for k in range(0, len(images) - 3, 4):
            fields.append(name | consistency(model, [dataset[i].image for i in images[k : k + 4]]))
        greys += [name | row for row in plain(model)]
        for i in tqdm(images, desc=run.name):
            sample = dataset[i]
            for condition, (stain, factor) in ({"as it is": ("", 1.0)} | STAINS).items():
                image = restain(sample.image, (factor, 1, 1) if stain == "haematoxylin" else (1, factor, 1))
                labels = segment_whole(model, image if stain else sample.image)
                rows.append(name | {"condition": condition, "tissue": sample.tissue, "stem": sample.stem})
                rows[-1] |= asdict(score(sample.labels, labels))
        for i in tqdm(held[: arguments.limit or None], desc="BBBC038"):
            sample = others[i]
            size = [round(ENLARGE * side) for side in sample.labels.shape[::-1]]
            image = np.asarray(Image.fromarray(sample.image).resize(size, Image.Resampling.BILINEAR))
            truth = np.asarray(Image.fromarray(sample.labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
            rows.append(name | {"condition": "BBBC038", "tissue": "", "stem": sample.stem})
            rows[-1] |= asdict(score(truth, segment_whole(model, image)))
    tables = {"scores": pd.DataFrame(rows), "fields": pd.DataFrame(fields), "plain": pd.DataFrame(greys)}
    common.print_means(tables["scores"], ["run", "condition"])
    print(tables["fields"].groupby("run")[["greatest", "mean"]].agg(["mean", "max"]))
    print(tables["plain"].groupby("run")["nuclei"].agg(["sum", "max"]))
    common.record(
        "robustness",
        tables,
        model.mean.device,
        data=common.data(len(images), arguments.data_note),
        others=common.data(len(held), "", "BBBC038v1, held-out histology"),
        base=common.base_of(model),
    )


if __name__ == "__main__":
    main()
