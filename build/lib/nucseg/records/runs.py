"""Recorded runs, read back from their folders into tables."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nucseg.errors import InputError


@dataclass(frozen=True)
class Run:
    """One recorded run: its ``run.json``, its history (one row per epoch) and its scores (one row per image)."""

    about: dict[str, Any]
    history: pd.DataFrame
    scores: pd.DataFrame

    @property
    def provenance(self) -> str:
        """The data, base, device, commit and date behind the run's numbers, in short sentences."""
        about, split = self.about, self.about["split"]
        note = f" ({about['data']['note']})" if about["data"]["note"] else ""
        return (
            f"Data: {about['data']['name']}{note}, {split['train']} training, {split['val']} validation and "
            f"{split['test']} test images of {split['name']}. Base: {about['base']['name']} "
            f"(SHA-256 {about['base']['sha256'][:12]}…). Device: {about['device']}. "
            f"Commit {about['commit'][:10]}, {about['date'][:10]}, {about['seconds'] / 60:.0f} minutes."
        )


def results_folder(start: str | Path = ".") -> Path:
    """Find the repository's ``results`` folder, in ``start`` or the nearest folder above it.

    Raises ``InputError`` if there is none, as in an installed package without the repository.
    """
    start = Path(start).resolve()
    for folder in (start, *start.parents):
        if (folder / "results").is_dir() and any((folder / name).is_dir() for name in ("nucseg", "book")):
            return folder / "results"
    raise InputError("No 'results' folder here or above: clone the repository, which holds the recorded runs.")


def read_run(folder: str | Path) -> Run:
    """Read one finished run. Raises ``InputError`` if the folder holds none, or a damaged one."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        history = folder / "history.csv"  # a rescored run has none
        rows = pd.read_csv(history) if history.exists() else pd.DataFrame()
        return Run(about, rows, _read_scores(folder / "scores.csv"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: cannot read a finished run here ({error}).") from error


def _read_scores(path: Path) -> pd.DataFrame:
    """Read names as text: a stem '001' is not a number, and a tissue '' or 'NA' is not a missing value."""
    names = ["fold", "tissue", "stem"]
    empty = {str(name): [""] for name in pd.read_csv(path, nrows=0) if name not in names}
    return pd.read_csv(path, dtype=dict.fromkeys(names, str), keep_default_na=False, na_values=empty)


def study_runs(name: str, results: str | Path | None = None) -> dict[str, dict[str, Run]]:
    """Read the finished runs of the study in ``results/NAME``: {column: {run: Run}}, both sorted by name.

    A column is a base and a budget, as in the folder names of ``nucseg reproduce``: ``offline-small``,
    ``mobile_sam-full``. Empty if the study was never run. ``results``: folder of all studies; default: the
    repository's. Raises ``InputError`` for a damaged run.
    """
    folder = Path(results or results_folder()) / name
    columns = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    runs = {column.name: _finished_runs(column) for column in columns}
    return {column: found for column, found in runs.items() if found}


def _finished_runs(folder: Path) -> dict[str, Run]:
    return {run.name: read_run(run) for run in sorted(folder.iterdir()) if (run / "run.json").exists()}
