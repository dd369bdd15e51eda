"""Decoding parameters and the errors of each target map, for each fold's model on its validation images.

    python -m experiments.decoding --root data/nuinsseg --runs results/folds/offline-small

Needs the adapters of ``nucseg reproduce --studies folds``. No model is scored on its own fold's test images, but a
setting chosen over all folds is chosen on images that are test images of other folds. Writes results/decoding:
scores.csv (one row per fold and way to decode, means over its validation images) and run.json.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from experiments import common
from nucseg.config import Config, apply, options
from nucseg.data.datasets import NuInsSeg
from nucseg.data.from_config import select_split
from nucseg.inference.segmenter import load
from nucseg.instances import decode, encode
from nucseg.metrics import score
from nucseg.model.network import predict
from nucseg.records.runs import read_run

RIDGES = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1.0)
SMOOTHS = (0.0, 1.0, 2.0, 3.0)  # px
SCORES = ("dice", "aji", "pq", "nuclei_predicted", "nuclei_true")


def ways(maps: np.ndarray, truth: np.ndarray) -> dict[tuple, np.ndarray]:
    """(foreground, distance, smooth, ridge) -> (H, W) label map; the last two with one map replaced by the true one."""
    foreground, distance = encode(truth)
    found = {
        ("predicted", "predicted", smooth, ridge): decode(maps, ridge=ridge, smooth=smooth)
        for smooth in SMOOTHS
        for ridge in RIDGES
    }
    found["predicted", "true", np.nan, np.nan] = decode(np.stack([maps[0], distance]))
    found["true", "predicted", np.nan, np.nan] = decode(np.stack([foreground, maps[1]]))
    return found


def main() -> None:
    """Score every way to decode on the validation images of each fold."""
    parser = common.parser(__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="results/folds/COLUMN, with the adapters")
    arguments = parser.parse_args()
    dataset, rows, images = NuInsSeg(arguments.root), [], 0
    for folder in sorted(path.parent for path in arguments.runs.glob("*/best.safetensors")):
        recorded = read_run(folder).about["config"]
        config = apply(Config(), {key: recorded[key] for key in options(Config) if key != "base"}, str(folder))
        model = load(folder / "best.safetensors")
        split = select_split(config, dataset)
        for index in tqdm(split.val[: arguments.limit or None], desc=split.name, unit="image"):
            truth = dataset[index].labels
            images += 1
            for way, labels in ways(predict(model, dataset[index].image), truth).items():
                names = dict(zip(("foreground", "distance", "smooth_px", "ridge"), way, strict=True))
                rows.append({"fold": split.name} | names | asdict(score(truth, labels)))
    by = ["fold", "foreground", "distance", "smooth_px", "ridge"]
    table = pd.DataFrame(rows).groupby(by, dropna=False)[list(SCORES)].mean().reset_index()
    common.print_means(table, by[1:])
    common.record(
        "decoding",
        {"scores": table},
        model.mean.device,
        data=common.data(images, arguments.data_note),
        base=common.base_of(model),
    )


if __name__ == "__main__":
    main()
