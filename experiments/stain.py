"""Robustness to stain: NuInsSeg's first test fold with the amount of one stain changed.

    python -m experiments.stain --root data/nuinsseg --report results/protocol/offline-small/fold_1/best.safetensors

In every image, the optical density of haematoxylin or eosin is multiplied (`nucseg.data.augment.restain`), and the
image is segmented again by the adapter nuinsseg-1, whose training varied the stain, and, if an adapter is given, by the
preset report, whose training did not. Both were trained on the first fold. Writes results/stain: scores.csv (one row
per model, change and test image) and run.json.
"""

from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from experiments import common
from nucseg.data.augment import restain
from nucseg.data.datasets import NuInsSeg
from nucseg.data.splits import folds
from nucseg.files import sha256
from nucseg.inference.evaluate import segment_whole
from nucseg.inference.segmenter import load
from nucseg.metrics import score
from nucseg.model.adapters import DEFAULT_ADAPTER, adapter_path

FACTORS = (0.5, 0.7, 0.85, 1.0, 1.15, 1.4, 2.0)  # roughly evenly spaced on a log scale


def changes() -> list[tuple[str, float]]:
    """(stain, factor); the unchanged image once."""
    return [("none", 1.0)] + [
        (stain, factor) for stain in ("haematoxylin", "eosin") for factor in FACTORS if factor != 1
    ]


def main() -> None:
    """Score every change and write the tables."""
    options = common.parser(__doc__)
    options.add_argument("--report", type=Path, help="adapter of the preset report, trained on the first fold")
    arguments = options.parse_args()
    dataset, rows = NuInsSeg(arguments.root), []
    paths = {"instance": adapter_path(DEFAULT_ADAPTER)} | ({"report": arguments.report} if arguments.report else {})
    models = {name: load(path) for name, path in paths.items()}
    for index in tqdm(folds(dataset)[0].test[: arguments.limit or None], unit="image"):
        sample = dataset[index]
        for stain, factor in changes():
            image = restain(sample.image, (factor, 1, 1) if stain == "haematoxylin" else (1, factor, 1))
            for name, model in models.items():
                found = score(sample.labels, segment_whole(model, image if stain != "none" else sample.image))
                rows.append((name, stain, factor, sample.tissue, sample.stem, found.dice, found.aji, found.pq))
    table = pd.DataFrame(rows, columns=["model", "stain", "factor", "tissue", "stem", "dice", "aji", "pq"])
    common.print_means(table, ["model", "stain", "factor"])
    common.record(
        "stain",
        {"scores": table},
        models["instance"].mean.device,
        data=common.data(table["stem"].nunique(), arguments.data_note),
        models={name: {"base": models[name].base_name, "sha256": sha256(path)} for name, path in paths.items()},
    )


if __name__ == "__main__":
    main()
