"""The separate effects of NucEval's scoring corrections on the predictions of the five folds.

    python -m experiments.corrections --root data/nuinsseg --runs results/folds/offline-small

Needs the adapters of ``nucseg reproduce --studies folds``. Three of the four corrections (arXiv 2605.03144): nuclei
in vague areas left out, a border zone left out, images weighted by their nuclei. The fourth needs the annotators'
overlapping outlines, which the label maps do not hold. Writes results/corrections: scores.csv (one row per image and
way of scoring) and run.json.
"""

from dataclasses import asdict
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from experiments import common
from nucseg.data.datasets import NuInsSeg
from nucseg.data.splits import folds
from nucseg.inference.evaluate import segment_whole
from nucseg.inference.segmenter import load
from nucseg.metrics import score

BORDER = 2  # px on either side of an outline, NucEval's middle choice


def main() -> None:
    """Score every image in each way, with the model that was not trained on it."""
    options = common.parser(__doc__)
    options.add_argument("--runs", type=Path, required=True, help="results/folds/COLUMN, with the adapters")
    arguments = options.parse_args()
    dataset, rows = NuInsSeg(arguments.root), []
    for k, split in enumerate(folds(dataset), start=1):
        model = load(arguments.runs / f"fold_{k}" / "best.safetensors")
        for index in tqdm(split.test[: arguments.limit or None], desc=split.name):
            sample = dataset[index]
            labels = segment_whole(model, sample.image)
            ways = {
                "as the benchmark": {},
                "vague areas left out": {"vague": sample.vague},
                "border zone left out": {"border": BORDER},
                "both": {"vague": sample.vague, "border": BORDER},
            }
            if sample.vague is None:  # not every copy of the data has the masks
                del ways["vague areas left out"], ways["both"]
            for name, corrections in ways.items():
                result = asdict(score(sample.labels, labels, **corrections))
                keep = {key: result[key] for key in ("dice", "aji", "pq", "nuclei_true")}
                rows.append({"way": name, "fold": split.name, "tissue": sample.tissue, "stem": sample.stem} | keep)
    table = pd.DataFrame(rows)
    common.print_means(table, ["way"])
    common.record(
        "corrections",
        {"scores": table},
        model.mean.device,
        border_px=BORDER,
        data=common.data(table["stem"].nunique(), arguments.data_note),
        base=common.base_of(model),
    )


if __name__ == "__main__":
    main()
