"""The gain from tuned decoding and the object confidence, and the calibration of the confidence.

    python -m experiments.confidence --root data/nuinsseg --runs results/recipe/offline-small/reference-fold_{1,2}

Each run's validation images are divided into two halves. Decoding and confidence are tuned on one half and scored on
the other, and vice versa, so that no image is scored with parameters tuned on it. No test image is read.
Writes results/confidence: scores.csv (one row per way of decoding and image), reliability.csv (predicted probability
against the share of true nuclei, ten bins per run) and run.json.
"""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from experiments import common
from nucseg.config import Config, apply, options
from nucseg.data.datasets import NuInsSeg, Sample
from nucseg.data.from_config import select_split
from nucseg.inference.confidence import features, true_objects
from nucseg.inference.decoding import Decoding, tune
from nucseg.inference.segmenter import load
from nucseg.metrics import score
from nucseg.model.network import predict
from nucseg.records.runs import read_run
from nucseg.records.statistics import difference

WAYS = ("default", "tuned", "tuned with confidence")


def ways(maps: np.ndarray, tuned: Decoding) -> dict[str, np.ndarray]:
    """Label maps of one image by way of decoding."""
    plain = replace(tuned, min_confidence=0.0, classifier=None)
    found = (how.decode(maps)[0] for how in (Decoding(), plain, tuned))
    return dict(zip(WAYS, found, strict=True))


def measure(run: Path, dataset: NuInsSeg, limit: int) -> tuple[pd.DataFrame, pd.DataFrame, list[dict[str, float]]]:
    """Return the scores per way and image, the probability and truth of each object, and the results of tuning."""
    stored = {k: v for k, v in read_run(run).about["config"].items() if k in options(Config)}
    config = replace(apply(Config(), stored, str(run)), score_part="val", test_images=limit)
    split, model = select_split(config, dataset), load(run)
    samples: list[Sample] = [dataset[i] for i in split.test]
    maps = [predict(model, sample.image) for sample in tqdm(samples, desc=run.name)]
    half = np.random.default_rng(0).permutation(len(samples)) % 2
    rows, objects, chosen = [], [], []
    for k in (0, 1):
        own, other = np.flatnonzero(half != k), np.flatnonzero(half == k)
        tuned, about = tune([maps[i] for i in own], [samples[i].labels for i in own])
        chosen.append(about | {n: v for n, v in asdict(tuned).items() if n != "classifier"})
        for i in other:
            name = {"run": run.name, "fold": split.name, "tissue": samples[i].tissue, "stem": samples[i].stem}
            for way, labels in ways(maps[i], tuned).items():
                rows.append({"way": way} | name | asdict(score(samples[i].labels, labels)))
            if tuned.classifier:
                labels = tuned.cut(maps[i])
                probability = tuned.classifier.predict(features(labels, maps[i]))
                objects.append(
                    pd.DataFrame({"probability": probability, "true": true_objects(samples[i].labels, labels)})
                )
    return pd.DataFrame(rows), pd.concat(objects).assign(run=run.name), chosen


def reliability(objects: pd.DataFrame, bins: int = 10) -> pd.DataFrame:
    """Mean probability and share of true nuclei in bins of the probability: run, low, high, objects, both means."""
    low = np.minimum((objects["probability"] * bins).astype(int), bins - 1) / bins
    groups = objects.assign(low=low, high=low + 1 / bins).groupby(["run", "low", "high"])
    return groups.agg(
        objects=("true", "size"), probability=("probability", "mean"), true=("true", "mean")
    ).reset_index()


def main() -> None:
    """Measure each run and write the tables."""
    arguments_of = common.parser(__doc__)
    arguments_of.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of runs, with adapters")
    arguments = arguments_of.parse_args()
    dataset = NuInsSeg(arguments.root)
    scores, objects, chosen = [], [], {}
    for run in arguments.runs:
        table, found, tuned = measure(run, dataset, arguments.limit)
        scores.append(table)
        objects.append(found)
        chosen[run.name] = tuned
    table = pd.concat(scores)
    common.print_means(table, ["run", "way"])
    for run, part in table.groupby("run"):
        by_way = dict(list(part.groupby("way")))
        for way in WAYS[1:]:
            print(run, way, difference(by_way[way], by_way["default"]).round(4).to_string(), sep="\n")
    bins = reliability(pd.concat(objects))
    print(bins.round(3).to_string(index=False))
    model = load(arguments.runs[0])
    common.record(
        "confidence",
        {"scores": table, "reliability": bins},
        model.mean.device,
        tuned=chosen,
        data=common.data(int(table["stem"].nunique()), arguments.data_note),
        base=common.base_of(model),
    )


if __name__ == "__main__":
    main()
