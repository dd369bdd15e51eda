"""From runs on disk to tables: what was measured, with its interval and where it comes from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nucseg.errors import InputError

SCORES = ("dice", "iou", "aji", "aji_plus", "pq", "sq", "rq", "aji_matched_only")


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
        history = folder / "history.csv"  # absent where a run was only scored again
        about |= {k: v.replace(", 1 threads", ", 1 thread") for k, v in about.items() if k == "device"}  # in older runs
        rows = pd.read_csv(history) if history.exists() else pd.DataFrame()
        return Run(about, rows, _read_scores(folder / "scores.csv"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: no finished run can be read here ({error}).") from error


def _read_scores(path: Path) -> pd.DataFrame:
    """Names stay names: a stem 001 is no number, and a tissue "" or "NA" is not missing."""
    names = ["fold", "tissue", "stem"]
    empty = {str(name): [""] for name in pd.read_csv(path, nrows=0) if name not in names}
    return pd.read_csv(path, dtype=dict.fromkeys(names, str), keep_default_na=False, na_values=empty)


def bootstrap_mean(
    values: np.ndarray, groups: np.ndarray | None = None, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean: (low, high), NaN where there are no values.

    ``values``: (n,), one an image. Without ``groups`` images are drawn, as if each were independent. With
    ``groups`` (n,), such as tissues, whole groups are drawn (the cluster bootstrap): images of one tissue are
    alike, so this is the interval for the mean over another choice of tissues, each of them seen in training
    (Davison & Hinkley 1997, section 3.8).
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        return float("nan"), float("nan")
    _, code = np.unique(np.arange(len(values)) if groups is None else np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(code, weights=values), np.bincount(code)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Means of per-image scores with 95% bootstrap intervals.

    Index: score. Columns: ``mean`` (over images), ``low``, ``high`` (images drawn), ``fold_mean`` (the mean of
    the folds' means, as the benchmark reports), ``tissue_low``, ``tissue_high`` (whole tissues drawn).
    """
    rows = {}
    for name in SCORES:
        values = scores[name].to_numpy()
        low, high = bootstrap_mean(values)
        tissue_low, tissue_high = bootstrap_mean(values, scores["tissue"].to_numpy())
        rows[name] = {
            "mean": float(values.mean()),
            "low": low,
            "high": high,
            "fold_mean": float(scores.groupby("fold")[name].mean().mean()),
            "tissue_low": tissue_low,
            "tissue_high": tissue_high,
        }
    return pd.DataFrame(rows).T


def difference(ours: pd.DataFrame, theirs: pd.DataFrame, names: Sequence[str] = ("dice", "aji", "pq")) -> pd.DataFrame:
    """Paired differences ``ours - theirs`` of two per-image score tables over the images that both have.

    Index: score. Columns: ``difference`` (mean over images), ``low`` and ``high`` (95% bootstrap, images drawn),
    ``tissue_low`` and ``tissue_high`` (tissues drawn), ``images``. Pairing takes out what makes an image hard for
    both, so the interval is narrower than that of two means. Raises ``InputError`` without a common image.
    """
    keys = ["tissue", "stem"]
    both = ours.merge(theirs, on=keys, suffixes=("", "_theirs"), validate="one_to_one")
    if both.empty:
        raise InputError("The two tables of scores have no image in common, so they cannot be compared.")
    rows = {}
    for name in names:
        values = (both[name] - both[f"{name}_theirs"]).to_numpy()
        low, high = bootstrap_mean(values)
        tissue_low, tissue_high = bootstrap_mean(values, both["tissue"].to_numpy())
        rows[name] = {
            "difference": float(values.mean()),
            "low": low,
            "high": high,
            "tissue_low": tissue_low,
            "tissue_high": tissue_high,
            "images": len(values),
        }
    return pd.DataFrame(rows).T


def variance_explained(table: pd.DataFrame, factors: Sequence[str], value: str) -> pd.Series:
    """Share of the variance of ``value`` that each factor's main effect explains (eta squared), 0..1.

    ``table``: one row a combination, each combination of the factors' values once (a full factorial), so that the
    effects are orthogonal and their sums of squares add up. The last entry, ``rest``, is what interactions and
    chance have left. Raises ``InputError`` for a grid with holes or repeats, or no variance at all.
    """
    levels = [table[name].nunique() for name in factors]
    if len(table) != np.prod(levels) or table.duplicated(list(factors)).any():
        raise InputError(f"The table is no full grid over {', '.join(factors)}: average repeats, fill holes first.")
    total = ((table[value] - table[value].mean()) ** 2).sum()
    if not total > 0:
        raise InputError(f"Column {value!r} does not vary, so there is nothing to explain.")
    shares = {}
    for name in factors:
        effect = table.groupby(name)[value].transform("mean") - table[value].mean()
        shares[name] = float((effect**2).sum() / total)
    return pd.Series(shares | {"rest": 1 - sum(shares.values())})


def study_runs(name: str, results: str | Path | None = None) -> dict[str, dict[str, Run]]:
    """The finished runs of the study ``results/NAME``: {column: {run: Run}}, both in order of name.

    A column is a base with a budget, as ``nucseg reproduce`` names its folders: ``offline-small``,
    ``mobile_sam-full``. Empty where the study was never run.
    """
    folder = Path(results or results_folder()) / name
    columns = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    runs = {column.name: _finished_runs(column) for column in columns}
    return {column: found for column, found in runs.items() if found}


def _finished_runs(folder: Path) -> dict[str, Run]:
    return {run.name: read_run(run) for run in sorted(folder.iterdir()) if (run / "run.json").exists()}
