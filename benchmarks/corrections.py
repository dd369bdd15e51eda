"""NucEval's corrections of how nuclei are scored, on the five folds' own predictions: what each adds, unearned.

    python benchmarks/corrections.py --root data/nuinsseg --runs results/folds/offline-small

Needs the adapters of ``nucseg reproduce --studies folds``. Three of the four corrections (arXiv 2605.03144): nuclei
in vague areas left out, a border zone left out, images weighted by their nuclei. The fourth needs the annotators'
overlapping outlines, which the label maps do not hold. Written to results/corrections: scores.csv (a row an image
and way of scoring) and run.json.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from nucseg.data.datasets import NuInsSeg
from nucseg.data.splits import folds
from nucseg.files import write_atomic, write_json
from nucseg.inference.evaluate import segment_whole
from nucseg.inference.segmenter import load
from nucseg.metrics import score
from nucseg.records.provenance import stamp, with_note

OUT = Path(__file__).parents[1] / "results" / "corrections"
BORDER = 2  # px on either side of an outline, NucEval's middle choice


def main() -> None:
    """Score every image by the model that never saw it, in each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=0, help="images a fold, 0 for all: for a trial")
    parser.add_argument("--data-note", default="")
    arguments = parser.parse_args()
    dataset, rows = NuInsSeg(arguments.root), []
    for k, split in enumerate(folds(dataset)):
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
            if sample.vague is None:  # not every copy of the data has the masks: nothing is left out there
                del ways["vague areas left out"], ways["both"]
            for name, options in ways.items():
                result = asdict(score(sample.labels, labels, **options))
                keep = {key: result[key] for key in ("dice", "aji", "pq", "nuclei_true")}
                rows.append({"way": name, "fold": split.name, "tissue": sample.tissue, "stem": sample.stem} | keep)
    table = pd.DataFrame(rows)
    print(table.groupby("way", sort=False)[["dice", "aji", "pq"]].mean().round(4))
    with write_atomic(OUT / "scores.csv") as part:
        table.to_csv(part, index=False, float_format="%.6f")
    about = {
        "command": with_note(
            "python benchmarks/corrections.py --root NUINSSEG --runs results/folds/offline-small", arguments.data_note
        ),
        "border_px": BORDER,
        "data": {"name": "nuinsseg", "images": table["stem"].nunique(), "note": arguments.data_note},
        "base": {"name": model.base_name, "sha256": model.base_sha256},
        **stamp(model.mean.device),
    }
    write_json(OUT / "run.json", about)


if __name__ == "__main__":
    main()
