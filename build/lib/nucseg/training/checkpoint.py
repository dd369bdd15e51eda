"""Saving and resuming a run, and recognising a finished one."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from nucseg.config import Config, options
from nucseg.data.datasets import Dataset, content_hash
from nucseg.data.from_config import select_split
from nucseg.errors import InputError
from nucseg.files import sha256, write_atomic
from nucseg.model.adapters import adapter_path
from nucseg.model.bases import resolve_base
from nucseg.model.network import NucleiModel
from nucseg.records.runs import read_run
from nucseg.training.average import WeightAverage


def _write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    with write_atomic(folder / "history.csv") as part:
        pd.DataFrame(history).to_csv(part, index=False)


def _save_state(
    path: Path,
    config: Config,
    identity: dict[str, str],
    model: NucleiModel,
    optimiser: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    seconds: float,
    average: WeightAverage | None,
    scaler: torch.amp.GradScaler,
) -> None:
    state = {
        "config": asdict(config),
        "identity": identity,
        "model": model.adapter_state(),
        "optimiser": optimiser.state_dict(),
        "average": average.state() if average else None,
        "scaler": scaler.state_dict(),  # empty unless training uses float16
        "history": history,
        "seconds": seconds,
    }
    with write_atomic(path) as part:
        torch.save(state, part)


def _resume(
    path: Path,
    config: Config,
    identity: dict[str, str],
    model: NucleiModel,
    optimiser: torch.optim.Optimizer,
    average: WeightAverage | None,
    scaler: torch.amp.GradScaler,
) -> tuple[list[dict[str, Any]], float]:
    """Restore the state after the last complete epoch; return (history so far, seconds spent so far)."""
    if not path.exists():
        return [], 0.0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged file
        raise InputError(
            f"{path}: the checkpoint to resume from is damaged; delete the folder to start again."
        ) from error
    _same_config(state["config"], config, path.parent)
    for what, mine in identity.items():
        if state.get("identity", identity).get(what, mine) != mine:
            raise InputError(f"{path.parent}: holds a run with another {what}; choose another folder.")
    model.load_adapter_state(state["model"], str(path))
    optimiser.load_state_dict(state["optimiser"])
    if average:
        average.load_state(state["average"])
    if scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    return state["history"], state["seconds"]


# options that may differ when a run resumes, because they do not affect the result
_FREE = {"device", "num_workers", "data_note", "max_hours"}


def _read_history(folder: Path) -> list[dict[str, Any]]:
    rows = pd.read_csv(folder / "history.csv").to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def _ended(history: list[dict[str, Any]], config: Config) -> bool:
    return len(history) >= config.epochs or _epochs_since_best(history, config.monitor) >= config.patience


def _epochs_since_best(history: list[dict[str, Any]], monitor: str) -> int:
    values = [row[f"val_{monitor}"] for row in history]
    return len(values) - 1 - int(np.argmax(values)) if values else 0


def finished(config: Config, folder: str | Path) -> bool:
    """Whether ``folder`` holds this run, finished. Raises ``InputError`` if it holds another or a damaged one."""
    folder = Path(folder)
    if not (folder / "run.json").exists():
        return False
    about = read_run(folder).about
    _same_config(about["config"], config, folder)
    if about["config"].get("max_hours", 0) != config.max_hours and not _ended(_read_history(folder), config):
        return False  # stopped by another time limit
    if Path(config.base).is_file():
        if sha256(config.base) != about["base"]["sha256"]:
            raise InputError(f"{folder}: holds a run with another base; choose another folder.")
    elif resolve_base(config.base) != about["base"]["name"]:
        raise InputError(f"{folder}: holds a run with base = {about['base']['name']!r}; choose another folder.")
    return True


def _same_sources(config: Config, dataset: Dataset, folder: Path) -> None:
    """Raise ``InputError`` unless a finished run used these images, masks and initial adapter."""
    about = read_run(folder).about
    start = sha256(adapter_path(config.start)) if config.start else ""
    pairs = {
        "list of images": (about["split"]["sha256"], select_split(config, dataset).file_list_hash(dataset)),
        "adapter to start from": (about.get("start_sha256", ""), start),
        "content of images or masks": (about["data"].get("sha256", ""), content_hash(dataset)),
    }
    for what, (then, now) in pairs.items():
        if then and now and then != now:
            raise InputError(f"{folder}: holds a finished run with another {what}; choose another folder.")


def _same_config(stored: dict[str, Any], config: Config, folder: Path) -> None:
    """Raise ``InputError`` unless the options agree; options newer than the run are taken at their defaults."""
    mine = asdict(config)
    for name, field in options(Config).items():
        then = stored.get(name, field.default)
        if name not in _FREE | {"base", "start"} and then != mine[name]:
            raise InputError(
                f"{folder}: holds a run with {name} = {then!r}, not {mine[name]!r}; choose another folder."
            )
