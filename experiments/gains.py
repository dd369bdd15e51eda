"""What tuned decoding, the object confidence and mirrored views add on the test images of each fold.

    python -m experiments.gains --root data/nuinsseg --runs results/best/broad-small/fold_{1,2,3,4,5} [--name gains]

Decoding and confidence were tuned on each fold's own validation images after training, and are stored in its adapter.
For mirrored views they are tuned again, on the same validation images seen in mirrored views. Nothing is chosen on test
images. Writes results/NAME: scores.csv (one row per way and image), reliability.csv (predicted confidence against
the share of true nuclei, on test images), a part per run as soon as it is measured, and run.json. Measured runs are not
repeated.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from experiments import common
from experiments.confidence import reliability, ways
from nucseg.config import Config, apply, options
from nucseg.data.datasets import NuInsSeg
from nucseg.data.from_config import select_split
from nucseg.files import sha256, write_atomic
from nucseg.inference.confidence import features, true_objects
from nucseg.inference.decoding import Decoding, decoding_of, tune
from nucseg.inference.segmenter import Segmenter, load
from nucseg.metrics import score
from nucseg.model.network import predict
from nucseg.records.runs import read_run

MIRRORED, TUNED_AGAIN = "mirrored views", "mirrored views, tuned with confidence"


def measure(run: Path, dataset: NuInsSeg, limit: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the scores per way and test image, and the confidence and truth of each object."""
    stored = {k: v for k, v in read_run(run).about["config"].items() if k in options(Config)}
    config = replace(apply(Config(), stored, str(run)), val_images=limit, test_images=limit)
    split, model = select_split(config, dataset), load(run)
    views = Segmenter([model], tta=True)
    validation = [dataset[i] for i in tqdm(split.val, desc=f"{run.name}, reading")]
    seen = [views.maps([s.image], model)[0] for s in tqdm(validation, desc=f"{run.name}, validation")]
    again, _ = tune(seen, [s.labels for s in validation])
    own = decoding_of(model)
    rows, objects = [], []
    for i in tqdm(split.test, desc=f"{run.name}, test"):
        sample = dataset[i]
        maps, mirrored = predict(model, sample.image), views.maps([sample.image], model)[0]
        found = ways(maps, own) | {MIRRORED: Decoding().decode(mirrored)[0], TUNED_AGAIN: again.decode(mirrored)[0]}
        name = {"run": run.name, "fold": split.name, "tissue": sample.tissue, "stem": sample.stem}
        rows += [{"way": way} | name | asdict(score(sample.labels, labels)) for way, labels in found.items()]
        if own.classifier:
            labels = own.cut(maps)
            confidence, true = own.classifier.predict(features(labels, maps)), true_objects(sample.labels, labels)
            objects.append(pd.DataFrame({"run": run.name, "probability": confidence, "true": true}))
    columns = pd.DataFrame({"run": run.name, "probability": [], "true": []})
    return pd.DataFrame(rows), pd.concat(objects) if objects else columns


def measured(run: Path, dataset: NuInsSeg, limit: int, out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """As `measure`, but from the parts in the folder ``out`` if they are of the same adapter."""
    adapter = sha256(run / "best.safetensors")
    kinds = [out / f"{run.name}-{kind}.csv" for kind in ("scores", "reliability")]
    if not limit and all(path.exists() for path in kinds):
        tables = [pd.read_csv(path) for path in kinds]
        if set(tables[0]["adapter"]) == {adapter}:
            return tables[0], tables[1]
    scores, objects = measure(run, dataset, limit)
    scores, bins = scores.assign(adapter=adapter), reliability(objects)
    for path, table in zip(kinds, (scores, bins), strict=True):
        if not limit:
            with write_atomic(path) as part:
                table.to_csv(part, index=False, float_format="%.6f")
    return scores, bins


def main() -> None:
    """Measure each run and write the tables."""
    arguments_of = common.parser(__doc__)
    arguments_of.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of runs, with adapters")
    arguments_of.add_argument("--name", default="gains", help="folder in results (default: gains)")
    arguments = arguments_of.parse_args()
    dataset, out = NuInsSeg(arguments.root), common.RESULTS / arguments.name
    parts = [measured(run, dataset, arguments.limit, out) for run in arguments.runs]
    scores, bins = (pd.concat(tables) for tables in zip(*parts, strict=True))
    common.print_means(scores, ["way"])
    model = load(arguments.runs[0])
    about: dict[str, Any] = {"data": common.data(int(len(scores) / scores["way"].nunique()), arguments.data_note)}
    about["adapters"] = scores.groupby("run")["adapter"].first().to_dict()
    tables = {"scores": scores.drop(columns="adapter"), "reliability": bins}
    common.record(arguments.name, tables, model.mean.device, base=common.base_of(model), **about)


if __name__ == "__main__":
    main()
