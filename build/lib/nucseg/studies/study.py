"""Studies, sets of related runs, such as cross-validation or a grid over any options.

A run depends only on its configuration and folder (`run_one`). Running a study again skips finished runs, resumes
interrupted ones and retries failed ones.
"""

import itertools
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from nucseg.config import Config, ModelConfig, apply, options, preset, read_toml
from nucseg.data.datasets import Dataset
from nucseg.data.from_config import open_dataset, select_split
from nucseg.data.splits import PROTOCOLS
from nucseg.errors import Busy, InputError
from nucseg.inference.evaluate import evaluate_and_record
from nucseg.model.network import load_model, pick_device, place
from nucseg.records.provenance import command_line
from nucseg.records.runs import read_run
from nucseg.records.statistics import summarise
from nucseg.training.checkpoint import finished
from nucseg.training.loop import train

Task = tuple[Config, Path]


@dataclass(frozen=True)
class Study:
    """A configuration, named variants of it (``runs``), and a grid for each variant.

    ``runs``: changed options by the name of the variant. ``grid``: list of values by option.
    ``again``: changed options by name, for scoring every run a second time (see `rescore`).
    """

    config: Config
    runs: dict[str, dict[str, Any]]
    grid: dict[str, list[Any]]
    again: dict[str, dict[str, Any]]

    def tasks(self, folder: str | Path) -> list[Task]:
        """List every run with its folder, variant by variant; the last option of the grid varies fastest."""
        tasks = []
        for variant, own in (self.runs or {"": {}}).items():
            start = apply(self.config, own, f"study, run {variant}")
            for values in itertools.product(*self.grid.values()):
                changes = dict(zip(self.grid, values, strict=True))
                name = "-".join(filter(None, [variant, *(f"{field}_{value}" for field, value in changes.items())]))
                tasks.append((apply(start, changes, f"study, run {name}"), Path(folder) / name))
        return tasks


def read_study(path: str | Path, budget: str = "", changes: dict[str, Any] | None = None) -> Study:
    """Read a study's TOML file.

    Precedence, lowest first: ``preset`` (a name), the table ``[fixed]`` of options, the table ``[budget.NAME]`` of
    the chosen ``budget``, ``changes`` (from the command line), the tables ``[runs.NAME]`` of variants, and the table
    ``[grid]`` of lists. All are optional, but a study needs ``[runs]`` or ``[grid]``. Tables ``[again.NAME]`` score
    every run a second time. A table ``[slurm]`` has options of Slurm's jobs (`launch.slurm_options`).

    Raises ``InputError`` for unknown entries or options, an unknown budget, a study without runs, and a grid value
    that is not a list or is listed twice.
    """
    text = read_toml(path)
    unknown = text.keys() - {"preset", "fixed", "budget", "runs", "grid", "again", "slurm"}
    if unknown:
        raise InputError(
            f"{path}: unknown entry {min(unknown)!r}; a study has preset, [fixed], [budget], [runs], [grid], [again], "
            "[slurm]."
        )
    config = preset(text["preset"]) if "preset" in text else Config()
    config = apply(config, _table(text, "fixed", path), f"{path} [fixed]")
    budgets = _table(text, "budget", path)
    if budget and budget not in budgets:
        raise InputError(f"{path}: has no table [budget.{budget}]: choose from {', '.join(budgets) or 'none'}.")
    config = apply(config, _table(budgets, budget, path), f"{path} [budget.{budget}]")
    config = apply(config, changes or {}, "command line")
    runs, grid, again = (_table(text, name, path) for name in ("runs", "grid", "again"))
    if not (runs or grid):
        raise InputError(f"{path}: has neither [runs.NAME] nor [grid]: add one of them.")
    for table, name in ((runs, "runs"), (again, "again")):
        for one in table:
            apply(config, _table(table, one, path), f"{path} [{name}.{one}]").check()
    for name, values in grid.items():
        if not isinstance(values, list) or not values or len(set(map(str, values))) < len(values):
            raise InputError(f"{path}: [grid] {name} must be a list of different values, as in {name} = [1, 2].")
        for value in values:
            apply(config, {name: value}, f"{path} [grid]").check()
    return Study(config, runs, grid, again)


def _table(text: dict[str, Any], name: str, path: str | Path) -> dict[str, Any]:
    table = text.get(name, {})
    if not isinstance(table, dict):
        raise InputError(f"{path}: {name} must be a table: write [{name}] on a line of its own.")
    return table


def fold_tasks(config: Config, dataset: Dataset, folder: str | Path, only: Iterable[int] = ()) -> list[Task]:
    """One task per fold of the config's protocol, in folders ``fold_1``, ``fold_2``, …

    ``only``: the folds to run, counted from 1; empty: all. Raises ``InputError`` for a fold that does not exist.
    """
    count = len(PROTOCOLS[config.protocol](dataset))
    chosen = list(dict.fromkeys(only)) or list(range(1, count + 1))
    wrong = [k for k in chosen if not 1 <= k <= count]
    if wrong:
        raise InputError(f"Fold {wrong[0]} does not exist: the protocol {config.protocol!r} has folds 1 to {count}.")
    return [(replace(config, fold=k), Path(folder) / f"fold_{k}") for k in chosen]


def run_one(
    config: Config, folder: str | Path, root: str | Path | None = None, again: dict[str, dict[str, Any]] | None = None
) -> None:
    """Train one run in its folder, then score it again under each entry of ``again``.

    ``root``: the dataset's folder. A worker on another machine needs only these arguments.
    """
    dataset = _dataset(config, root)
    train(config, dataset, folder, progress=False)
    for name, other in (again or {}).items():
        rescore(folder, apply(config, other, f"again, {name}"), dataset, name)


_opened: dict[tuple[Any, ...], Dataset] = {}


def _dataset(config: Config, root: str | Path | None) -> Dataset:
    # datasets cache their images, so runs of one process on the same images share a dataset
    key = (
        config.data,
        config.synthetic_per_tissue,
        config.seed if config.data == "synthetic" else 0,
        config.num_workers,
    )
    if (root, key) not in _opened:
        _opened.clear()
        _opened[root, key] = open_dataset(config, root)
    return _opened[root, key]


def rescore(run: str | Path, config: Config, dataset: Dataset, name: str, *, progress: bool = False) -> pd.DataFrame:
    """Score a finished run's adapter under another ``config``: another protocol, scoring, threshold or fold.

    Writes ``run.json`` and ``scores.csv`` to ``run / name``; the column ``part`` of the scores is the image's part in
    the run's own split (train, val, test or none). Existing scores are read, not recomputed.
    Raises ``InputError`` if the run's adapter is missing (the repository does not keep adapters), or if ``config``
    describes a model other than the run's.
    """
    run, folder = Path(run), Path(run) / name
    if finished(config, folder):
        return read_run(folder).scores
    began, about = time.monotonic(), read_run(run).about
    own = apply(config, {k: v for k, v in about["config"].items() if k in options(Config) and k != "base"}, str(run))
    mine, split = select_split(own, dataset), select_split(config, dataset)
    for field in fields(ModelConfig):
        if field.name != "base" and getattr(config, field.name) != getattr(own, field.name):
            was = getattr(own, field.name)
            raise InputError(f"{run}: the adapter was trained with {field.name} = {was!r}: leave that option out.")
    model = place(load_model(run / "best.safetensors", config.base), pick_device(config.device), config.precision)
    return evaluate_and_record(
        model,
        config,
        dataset,
        split,
        folder,
        adapter=run / "best.safetensors",
        command=command_line(config, folder, "rescore"),
        started=began,
        seen_as={i: part for part in ("train", "val", "test") for i in getattr(mine, part)},
        progress=progress,
    )


def run_all(
    tasks: list[Task], run: Callable[[Config, Path], Any], *, progress: bool = True
) -> tuple[pd.DataFrame, dict[Path, str]]:
    """Run the unfinished tasks one after the other; return the table of finished runs, and the failures.

    ``run``: called with a task's configuration and folder. ``failures`` maps a run's folder to the last line of its
    error; the traceback is in ``error.log`` in that folder. Any exception fails only its own run; Ctrl-C stops the
    study.
    """
    failures: dict[Path, str] = {}
    open_tasks = []
    for config, folder in tasks:
        try:
            if not finished(config, folder):
                open_tasks.append((config, folder))
        except InputError as error:  # the folder holds a different run, which is neither counted nor overwritten
            failures[folder] = str(error)
    bar = tqdm(open_tasks, desc="runs", unit="run", disable=not progress)
    for config, folder in bar:
        bar.set_postfix_str(folder.name)
        log = folder / "error.log"
        try:
            run(config, folder)
            log.unlink(missing_ok=True)
        except Busy:  # another process of the same study works on this run
            continue
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
    """One row per finished run: its name, configuration, best validation scores, and mean test scores."""
    rows = []
    for folder in folders:
        if (folder / "run.json").exists():
            run = read_run(folder)
            means = summarise(run.scores)["mean"]
            best = {f"val_{k}": run.history[f"val_{k}"].max() for k in ("dice", "aji", "pq")}
            rows.append({"run": folder.name} | run.about["config"] | best | means.to_dict())
    return pd.DataFrame(rows)


def pooled_scores(folders: Iterable[Path]) -> pd.DataFrame:
    """Per-image scores of several finished runs, concatenated."""
    return pd.concat([read_run(folder).scores for folder in folders], ignore_index=True)
