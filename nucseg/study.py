"""Studies: runs that belong together. Cross-validation over folds, and grids over any fields of a config.

One run is a plain function of its configuration and its folder (`run_one`). Finished runs are never repeated,
broken ones go on, failed ones are listed with their logs and tried again the next time.
"""

import itertools
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from nucseg.config import apply, read_toml
from nucseg.data import Dataset
from nucseg.errors import InputError
from nucseg.presets import PROTOCOLS, Config, preset
from nucseg.tables import read_run, summarise
from nucseg.train import finished, open_dataset, train

Task = tuple[Config, Path]


@dataclass(frozen=True)
class Study:
    """A grid: a configuration to start from, and for each varied field the values it takes."""

    config: Config
    grid: dict[str, list[Any]]

    def tasks(self, folder: str | Path) -> list[Task]:
        """Every combination with the folder of its run, in the order of the grid, the last field fastest."""
        tasks = []
        for values in itertools.product(*self.grid.values()):
            changes = dict(zip(self.grid, values, strict=True))
            name = "-".join(f"{field}_{value}" for field, value in changes.items())
            tasks.append((apply(self.config, changes, f"study, run {name}"), Path(folder) / name))
        return tasks


def read_study(path: str | Path) -> Study:
    """Read a study's TOML file: ``preset`` (a name, optional), a table ``[fixed]`` and a table ``[grid]`` of lists.

    Raises ``InputError`` for unknown options, an empty grid, a value that is no list, or one listed twice.
    """
    text = read_toml(path)
    unknown = text.keys() - {"preset", "fixed", "grid"}
    if unknown:
        raise InputError(f"{path}: unknown entry {min(unknown)!r}; a study has preset, [fixed] and [grid].")
    config = preset(text["preset"]) if "preset" in text else Config()
    config = apply(config, _table(text, "fixed", path), f"{path} [fixed]")
    grid = _table(text, "grid", path)
    if not grid:
        raise InputError(f"{path}: the table [grid] is missing or empty: list values for at least one option.")
    for name, values in grid.items():
        if not isinstance(values, list) or not values or len(set(map(str, values))) < len(values):
            raise InputError(f"{path}: [grid] {name} must be a list of different values, as in {name} = [1, 2].")
        for value in values:
            apply(config, {name: value}, f"{path} [grid]").check()
    return Study(config, grid)


def _table(text: dict[str, Any], name: str, path: str | Path) -> dict[str, Any]:
    table = text.get(name, {})
    if not isinstance(table, dict):
        raise InputError(f"{path}: {name} must be a table, written [{name}] on a line of its own.")
    return table


def fold_tasks(config: Config, dataset: Dataset, folder: str | Path, only: Iterable[int] = ()) -> list[Task]:
    """One task a fold of the config's protocol (or those of ``only``), in folders ``fold0``, ``fold1``, …"""
    count = len(PROTOCOLS[config.protocol](dataset))
    chosen = list(only) or list(range(count))
    wrong = [k for k in chosen if not 0 <= k < count]
    if wrong:
        raise InputError(f"Fold {wrong[0]} does not exist: the protocol {config.protocol!r} has {count}.")
    return [(replace(config, fold=k), Path(folder) / f"fold{k}") for k in chosen]


def run_one(config: Config, folder: str | Path, root: str | Path | None = None, command: str = "") -> None:
    """Train one run in its folder: all that a worker anywhere needs to be told."""
    train(config, open_dataset(config, root), folder, progress=False, command=command)


def run_all(
    tasks: list[Task], run: Callable[[Config, Path], Any], *, progress: bool = True
) -> tuple[pd.DataFrame, dict[Path, str]]:
    """Run the tasks that are not finished, one after the other; returns the table of finished runs and failures.

    ``failures`` maps a run's folder to the last line of its error; the whole of it is in ``error.log`` there.
    ``InputError`` and everything else a run raises is a failure of that run; Ctrl-C stops the study.
    """
    failures: dict[Path, str] = {}
    open_tasks = []
    for config, folder in tasks:
        try:
            if not finished(config, folder):
                open_tasks.append((config, folder))
        except InputError as error:  # the folder holds another run, which is neither counted nor overwritten
            failures[folder] = str(error)
    bar = tqdm(open_tasks, desc="runs", unit="run", disable=not progress)
    for config, folder in bar:
        bar.set_postfix_str(folder.name)
        log = folder / "error.log"
        try:
            run(config, folder)
            log.unlink(missing_ok=True)
        except Exception as error:
            folder.mkdir(parents=True, exist_ok=True)
            log.write_text(traceback.format_exc(), encoding="utf-8")
            failures[folder] = f"{type(error).__name__}: {error}"
            continue
        if progress:
            means = read_run(folder).scores.mean(numeric_only=True)
            tqdm.write(f"{folder.name}: " + ", ".join(f"{k} {means[k]:.4f}" for k in ("dice", "aji", "pq")))
    return table_of_runs([folder for _, folder in tasks if folder not in failures]), failures


def table_of_runs(folders: Iterable[Path]) -> pd.DataFrame:
    """A row a finished run: its name, its whole configuration, and the means of its scores."""
    rows = []
    for folder in folders:
        if (folder / "run.json").exists():
            run = read_run(folder)
            means = summarise(run.scores)["mean"]
            best = {f"val_{k}": run.history[f"val_{k}"].max() for k in ("dice", "aji", "pq")}
            rows.append({"run": folder.name} | run.about["config"] | best | means.to_dict())
    return pd.DataFrame(rows)


def pooled_scores(folders: Iterable[Path]) -> pd.DataFrame:
    """The per-image scores of several finished runs one under the other."""
    return pd.concat([read_run(folder).scores for folder in folders], ignore_index=True)
