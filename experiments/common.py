"""Shared parts of the measuring scripts: their arguments, and their record in ``results/NAME``.

Run a script from the root of the repository: ``python -m experiments.stain --root data/nuinsseg``.

``run.json`` holds the command (from ``sys.argv``), the data with the user's note, the device, versions, commit and
date. Tables are CSV files beside it.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from nucseg.files import write_atomic, write_json
from nucseg.model.network import NucleiModel
from nucseg.records.provenance import stamp

RESULTS = Path(__file__).parents[1] / "results"
# options that hold local paths, with the names recorded instead
FOLDERS = {"root": "NUINSSEG", "bbbc038": "BBBC038", "python": "PYTHON", "work": "WORK"}


def parser(description: str | None, *, root: bool = True) -> argparse.ArgumentParser:
    """A parser with the options of every measuring script.

    - ``description``: the script's docstring; its first line is shown.
    - ``root``: add ``--root``, the folder of NuInsSeg.
    """
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    if root:
        made.add_argument("--root", type=Path, required=True, help="folder of NuInsSeg")
    made.add_argument("--limit", type=int, default=0, help="number of images, for a trial (0: all)")
    made.add_argument("--data-note", default="", help="remark on this copy of the data, recorded with the results")
    return made


def command() -> str:
    """Return the command that was run, with names in place of local folders.

    >>> sys.argv = ["/home/me/nucseg/experiments/stain.py", "--root", "/data/nuinsseg", "--limit", "2"]
    >>> command()
    'python -m experiments.stain --root NUINSSEG --limit 2'
    """
    script = Path(sys.argv[0]).resolve()
    words, given = ["python", "-m", f"{script.parent.name}.{script.stem}"], list(sys.argv[1:])
    while given:
        word = given.pop(0)
        option, equals, value = word.partition("=")
        if option.lstrip("-") in FOLDERS:
            if not equals and given:
                given.pop(0)
            words += [option, FOLDERS[option.lstrip("-")]]
        elif equals:
            words += [option, _portable(value)]
        else:
            words.append(_portable(word))
    return shlex.join(words)


def _portable(word: str) -> str:
    """Shorten a path of the results so that it starts with ``results``; other words are unchanged."""
    parts = Path(word).parts
    return "/".join(parts[parts.index("results") :]) if "results" in parts else word


def record(name: str, tables: dict[str, pd.DataFrame], device: torch.device | str = "cpu", **about: Any) -> Path:
    """Write ``results/NAME``: each table as ``KEY.csv``, then ``run.json`` with ``about`` and the stamp.

    Returns the folder. ``about`` may hold anything that JSON can: data, base, settings, summaries.
    """
    folder = RESULTS / name
    for key, table in tables.items():
        with write_atomic(folder / f"{key}.csv") as part:
            table.to_csv(part, index=False, float_format="%.6f")
    write_json(folder / "run.json", {"command": command(), **about, **stamp(torch.device(device))})
    return folder


def data(images: int, note: str, name: str = "nuinsseg") -> dict[str, Any]:
    """Return the data's entry in ``run.json``: its name, the number of images measured, the note on this copy."""
    return {"name": name, "images": images, "note": note}


def base_of(model: NucleiModel) -> dict[str, str]:
    """Return the base's entry in ``run.json``: its name and SHA-256."""
    return {"name": model.base_name, "sha256": model.base_sha256}


def print_means(table: pd.DataFrame, by: Sequence[str], scores: Sequence[str] = ("dice", "aji", "pq")) -> None:
    """Print the mean scores of each group of rows."""
    print(table.groupby(list(by), sort=False, dropna=False)[list(scores)].mean().round(4))
