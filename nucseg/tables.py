"""From runs on disk to tables: what was measured, with its interval and where it comes from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nucseg.errors import InputError

SCORES = ("dice", "iou", "aji", "aji_plus", "pq", "sq", "rq")


@dataclass(frozen=True)
class Run:
    """One recorded run: what ``run.json`` says, the history (a row an epoch), the scores (a row an image)."""

    about: dict[str, Any]
    history: pd.DataFrame
    scores: pd.DataFrame

    @property
    def provenance(self) -> str:
        """One sentence: data, base, device, commit and date behind the run's numbers."""
        about, split = self.about, self.about["split"]
        note = f" ({about['data']['note']})" if about["data"]["note"] else ""
        return (
            f"Data: {about['data']['name']}{note}, {split['train']} training, {split['val']} validation and "
            f"{split['test']} test images of {split['name']}. Base: {about['base']['name']} "
            f"(SHA-256 {about['base']['sha256'][:12]}…). Device: {about['device']}. "
            f"Commit {about['commit'][:10]}, {about['date'][:10]}, {about['seconds'] / 60:.0f} minutes."
        )


def results_folder(start: str | Path = ".") -> Path:
    """The repository's ``results`` folder: that of ``start`` or of the nearest folder above it.

    Raises ``InputError`` where there is none, as in an installed package without the repository.
    """
    start = Path(start).resolve()
    for folder in (start, *start.parents):
        if (folder / "results").is_dir() and (folder / "nucseg").is_dir():
            return folder / "results"
    raise InputError("No 'results' folder here or above: clone the repository, which holds the recorded runs.")


def read_run(folder: str | Path) -> Run:
    """Read one finished run. Raises ``InputError`` for a folder without one, or with a damaged one."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return Run(about, pd.read_csv(folder / "history.csv"), pd.read_csv(folder / "scores.csv"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no finished run can be read here ({error}).") from error


def bootstrap_mean(values: np.ndarray, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over images: (low, high), NaN where there are no values.

    ``values``: (n,), one an image, taken as exchangeable; images of one tissue are not quite, so the interval
    is a little narrow (Efron & Tibshirani 1993, chapter 13).
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean of the per-image scores with its 95% bootstrap interval: index score, columns mean, low, high."""
    rows = {}
    for name in SCORES:
        low, high = bootstrap_mean(scores[name].to_numpy())
        rows[name] = {"mean": float(scores[name].mean()), "low": low, "high": high}
    return pd.DataFrame(rows).T
