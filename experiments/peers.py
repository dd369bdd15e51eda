"""A U-Net, StarDist and Cellpose 3, trained from scratch on fold 1 for the same time, and scored by the same code.

    python -m experiments.peers --peer unet --root data/nuinsseg --minutes 60 --python .venv-unet/bin/python
    python -m experiments.peers --peer stardist --root data/nuinsseg --minutes 60 --python .venv-stardist/bin/python
    python -m experiments.peers --peer cellpose --root data/nuinsseg --minutes 60 --python .venv-cellpose/bin/python

The peers need packages that exclude each other (StarDist needs TensorFlow, Cellpose 3 an older NumPy), so that each is
trained by the interpreter of an environment of its own:

    python -m venv .venv-unet && .venv-unet/bin/pip install -e '.[peers]'
    python -m venv .venv-stardist && .venv-stardist/bin/pip install stardist==0.9.2 tensorflow-cpu==2.21.0
    python -m venv .venv-cellpose && .venv-cellpose/bin/pip install cellpose==3.1.1.3

This script itself runs in nucseg's usual environment. It exports the fold's images, starts
`experiments/peers_train.py` in the other one, and scores the label maps that come back. Each peer is trained as its
authors do, for the same ``--minutes`` by the wall clock on the same number of ``--threads``, and nothing is downloaded;
`experiments/peers_train.py` describes each. Checkpoint and thresholds are chosen on the fold's validation images; the
peers never see the test part's label maps. Objects below 50 px are dropped, as in the benchmark. The CPU seconds are
recorded as well: on a shared machine they say more.

Adds the peer's rows to results/peers: scores.csv (one row per peer and test image, in the columns of a run's
scores.csv, so that they can be paired with it) and run.json. Run the same command again to resume. With ``--limit 8``,
a trial: 8 training, 4 validation and 4 test images, each cut to its middle 256 px; nothing is written to results.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock

from experiments import common
from experiments.peers_train import PEERS, Budget
from nucseg.data.datasets import Dataset, NuInsSeg, Sample, content_hash
from nucseg.data.splits import Split, folds
from nucseg.errors import InputError
from nucseg.files import write_atomic, write_json
from nucseg.instances import MIN_AREA, renumber
from nucseg.metrics import score
from nucseg.records.provenance import commit

TRIAL_PX = 256


def some(indices: Sequence[int], count: int) -> list[int]:
    """``count`` of the indices, evenly spread (all if 0)."""
    return [indices[i] for i in np.linspace(0, len(indices) - 1, count).astype(int)] if count else list(indices)


def middle(sample: Sample, side: int) -> Sample:
    """Cut the middle ``side`` px of a sample (0: all of it)."""
    height, width = sample.labels.shape
    if not side:
        return sample
    top, left = (height - side) // 2, (width - side) // 2
    window = np.s_[top : top + side, left : left + side]
    return Sample(sample.image[window], sample.labels[window], sample.tissue, sample.stem)


def export(dataset: Dataset, parts: dict[str, list[int]], folder: Path, side: int, identity: dict[str, Any]) -> None:
    """Write each part as ``folder/NAME.npz`` for `peers_train`; the test part without its label maps.

    ``parts``: positions in the dataset by the name of the part. ``side``: px of the middle to keep (0: all).
    ``identity``: what distinguishes this export from others; an equal one is not repeated.
    """
    known = folder / "parts.json"
    if known.exists() and json.loads(known.read_text()) == identity:
        return
    for name, indices in parts.items():
        samples = [middle(dataset[i], side) for i in indices]
        arrays = {"images": np.stack([sample.image for sample in samples])}
        if name != "test":
            arrays["labels"] = np.stack([sample.labels for sample in samples]).astype(np.uint16)
        with write_atomic(folder / f"{name}.npz") as part:
            np.savez(part, **arrays)
    write_json(known, identity)


def train(peer: str, python: str, parts: Path, out: Path, budget: Budget) -> dict[str, Any]:
    """Train a peer in its own environment, unless that is done; returns what it says about the training.

    Raises `InputError` if it fails.
    """
    about = out / "about.json"
    if not about.exists():
        names = ("OMP", "MKL", "OPENBLAS", "NUMBA", "NUMEXPR")
        limits = {f"{name}_NUM_THREADS": str(budget.threads) for name in names}
        command = [python, "-m", "experiments.peers_train", peer, str(parts.resolve()), str(out.resolve())]
        command += ["--minutes", str(budget.minutes), "--clock", budget.clock, "--threads", str(budget.threads)]
        ended = subprocess.run(command, env=os.environ | limits, cwd=Path(__file__).parents[1])
        if ended.returncode or not about.exists():
            raise InputError(f"The training of {peer} ended early: read its messages above, then run it again.")
    return json.loads(about.read_text())


def scores(peer: str, dataset: Dataset, indices: Sequence[int], labels: np.ndarray, side: int = 0) -> pd.DataFrame:
    """Score the peer's label maps, (n, H, W), of the images ``indices``: columns peer, tissue, stem and the scores."""
    rows = []
    for index, predicted in zip(indices, labels, strict=True):
        sample = middle(dataset[index], side)
        found = asdict(score(sample.labels, renumber(predicted, MIN_AREA)))
        rows.append({"peer": peer, "tissue": sample.tissue, "stem": sample.stem, **found})
    return pd.DataFrame(rows)


def merge(peer: str, table: pd.DataFrame, about: dict[str, Any], **shared: Any) -> Path:
    """Put a peer's rows and record into results/peers, in place of older ones; the other peers' stay."""
    folder = common.RESULTS / "peers"
    peers = {peer: about}
    if (folder / "run.json").exists():
        peers = json.loads((folder / "run.json").read_text())["peers"] | peers
        others = pd.read_csv(folder / "scores.csv")
        table = pd.concat([others[others["peer"] != peer], table])
    order = {name: i for i, name in enumerate(PEERS)}
    table = table.sort_values("peer", key=lambda column: column.map(order), kind="stable")
    return common.record(
        "peers", {"scores": table}, **shared, peers={name: peers[name] for name in PEERS if name in peers}
    )


def main() -> None:
    """Export the parts, train, score, and add the result."""
    parser = common.parser(__doc__)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--python", default="python", help="interpreter of the peer's environment")
    parser.add_argument("--minutes", type=float, required=True, help="budget of training")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what the minutes are")
    parser.add_argument("--threads", type=int, default=1, help="number of threads")
    parser.add_argument("--work", type=Path, default=Path("data") / "peers", help="folder for exports and checkpoints")
    arguments = parser.parse_args()
    code, count = commit(), arguments.limit
    dataset = NuInsSeg(arguments.root)
    split: Split = folds(dataset)[0]
    side = TRIAL_PX if count else 0
    parts = {"train": some(split.train, count)}
    parts |= {"val": some(split.val, count // 2), "test": some(split.test, count // 2)}
    work = arguments.work / (f"trial-{count}" if count else "full")
    identity = {"split": split.file_list_hash(dataset), "data": content_hash(dataset)}
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / ".lock"):  # peers may be started side by side
        export(dataset, parts, work, side, identity)
    budget = Budget(arguments.minutes, arguments.clock, arguments.threads)
    out = work / f"{arguments.peer}-{budget.minutes:g}-{budget.clock}-{budget.threads}"
    about = train(arguments.peer, arguments.python, work, out, budget)
    with np.load(out / "labels.npz") as saved:
        table = scores(arguments.peer, dataset, parts["test"], saved["labels"], side)
    print(table[["dice", "aji", "pq"]].mean().round(4).to_dict(), flush=True)
    if count:
        return
    sizes = {name: len(indices) for name, indices in parts.items()}
    about = {"command": common.command(), **about, "commit": code}
    with FileLock(work / ".lock"):
        merge(
            arguments.peer,
            table,
            about,
            data=common.data(len(dataset), arguments.data_note),
            split={"name": split.name, **sizes, "sha256": identity["split"]},
        )


if __name__ == "__main__":
    main()
