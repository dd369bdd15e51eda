"""From runs on disk to tables: what was measured, with its interval and where it comes from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nucseg.errors import InputError


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
        rows = pd.read_csv(history) if history.exists() else pd.DataFrame()
        return Run(about, rows, _read_scores(folder / "scores.csv"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: no finished run can be read here ({error}).") from error


def _read_scores(path: Path) -> pd.DataFrame:
    """Names stay names: a stem 001 is no number, and a tissue "" or "NA" is not missing."""
    names = ["fold", "tissue", "stem"]
    empty = {str(name): [""] for name in pd.read_csv(path, nrows=0) if name not in names}
    return pd.read_csv(path, dtype=dict.fromkeys(names, str), keep_default_na=False, na_values=empty)


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
