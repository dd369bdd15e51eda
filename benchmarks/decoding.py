"""How deep a valley must be to cut a nucleus, and what is lost where: each fold's model on its own validation images.

    python benchmarks/decoding.py --root data/nuinsseg --runs results/folds/offline-small

Needs the adapters of ``nucseg reproduce --studies folds``. No image is read that its fold's model is tested on; but
what is chosen for all folds is chosen on images that are test images of other folds. Written to results/decoding:
scores.csv (a row a fold and way to decode, means over its validation images) and run.json.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from nucseg.config import Config, apply, options
from nucseg.data.datasets import NuInsSeg
from nucseg.data.from_config import select_split
from nucseg.files import write_atomic, write_json
from nucseg.inference.segmenter import load
from nucseg.instances import decode, encode
from nucseg.metrics import score
from nucseg.model.network import predict
from nucseg.records.provenance import stamp, with_note
from nucseg.records.runs import read_run

OUT = Path(__file__).parents[1] / "results" / "decoding"
RIDGES = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1.0)
SMOOTHS = (0.0, 1.0, 2.0, 3.0)  # px
SCORES = ("dice", "aji", "pq", "nuclei_predicted", "nuclei_true")


def ways(maps: np.ndarray, truth: np.ndarray) -> dict[tuple, np.ndarray]:
    """(foreground, depth, smooth, ridge) -> (H, W) label map; last with one map replaced by the true one."""
    foreground, depth = encode(truth)
    found = {
        ("predicted", "predicted", smooth, ridge): decode(maps, ridge=ridge, smooth=smooth)
        for smooth in SMOOTHS
        for ridge in RIDGES
    }
    found["predicted", "true", np.nan, np.nan] = decode(np.stack([maps[0], depth]))
    found["true", "predicted", np.nan, np.nan] = decode(np.stack([foreground, maps[1]]))
    return found


def main() -> None:
    """Score every way to decode on the validation images of each fold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=0, help="images of a fold, 0 for all: for a trial")
    parser.add_argument("--data-note", default="")
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
    print(table.drop(columns="fold").groupby(by[1:], dropna=False).mean().round(4))
    with write_atomic(OUT / "scores.csv") as part:
        table.to_csv(part, index=False, float_format="%.6f")
    about = {
        "command": with_note(
            "python benchmarks/decoding.py --root NUINSSEG --runs results/folds/offline-small", arguments.data_note
        ),
        "data": {"name": "nuinsseg", "images": images, "note": arguments.data_note},
        "base": {"name": model.base_name, "sha256": model.base_sha256},
        **stamp(model.mean.device),
    }
    write_json(OUT / "run.json", about)


if __name__ == "__main__":
    main()
