"""Provenance of a result: data, base, device, versions, commit, and the command that reproduces it."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nucseg
from nucseg.config import Config
from nucseg.data.datasets import Dataset, content_hash
from nucseg.data.splits import Split
from nucseg.files import sha256
from nucseg.model.network import NucleiModel, parameter_ledger
from nucseg.records.runs import Run

DATA_NAMES = {
    "nuinsseg": "NuInsSeg (Mahbod et al. 2024)",
    "synthetic": "synthetic tissue made by code, no real image",
    "folder": "your own images",
}
BASE_NAMES = {
    "random": "MobileSAM with random weights, not pretrained",
    "mobile_sam": "MobileSAM, pretrained",
    "offline": "offline, trained by nucseg, not MobileSAM's weights",
    "broad": "broad, trained by nucseg, not MobileSAM's weights",
}


def provenance_note(dataset: Dataset | None = None, model: NucleiModel | None = None, runs: Sequence[Run] = ()) -> str:
    """Markdown of a folded note that names the data, base and device behind a page.

    It begins folded on the page and in Jupyter alike: a ``details`` element around a list.
    ``dataset`` and ``model``: those used by the page itself. ``runs``: the recorded runs that it reads, all on the same
    data.
    """
    parts: list[str] = []
    if dataset is not None:
        name = getattr(dataset, "name", "folder")
        images, tissues = f"{len(dataset):,} images", plural(dataset.table["tissue"].nunique(), "tissue")
        parts.append(f"data: {DATA_NAMES.get(name, name)} ({images} of {tissues})")
    if model is not None:
        base = BASE_NAMES.get(model.base_name, model.base_name)
        parts.append(f"base: {base} (SHA-256 {model.base_sha256[:8]}…)")
        parts.append(f"device: {device_name(model.mean.device)}")
    if runs:
        parts += _note_on_runs(runs)
    points = "\n".join(f"- {part}" for part in parts or ["no data and no model"])
    # Markdown within HTML needs the blank lines
    return f'<details class="provenance"><summary>Behind this page</summary>\n\n{points}\n\n</details>'


def _note_on_runs(runs: Sequence[Run]) -> list[str]:
    data = runs[0].about["data"]
    note = f", {data['note']}" if data["note"] else ""
    bases = sorted({run.about["base"]["name"] for run in runs})
    devices = sorted({run.about["device"] for run in runs})
    dates = sorted({run.about["date"][:10] for run in runs})
    commits = sorted({run.about["commit"][:7] for run in runs})
    period = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return [
        f"{plural(len(runs), 'recorded run')} on {DATA_NAMES.get(data['name'], data['name'])}{note}",
        f"base of the runs: {', '.join(bases)}",
        f"device of the runs: {', '.join(devices)}",
        f"commit of the runs: {', '.join(commits)}, {period}",
    ]


def plural(count: int, noun: str) -> str:
    """A count with its noun: '1 tissue', '2 tissues', '1,000 tissues'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def describe(
    config: Config, dataset: Dataset, split: Split, model: NucleiModel, adapter: Path, command: str
) -> dict[str, Any]:
    """Return the contents of a run's ``run.json``: what was measured, and how to measure it again.

    ``adapter``: the file that was measured. ``command``: the command that reproduces it.
    The record holds no local paths: a base or an adapter given as a file is recorded by its name and hash.
    """
    data = {"name": getattr(dataset, "name", config.data), "images": len(dataset), "note": config.data_note}
    digest = content_hash(dataset)
    if digest:
        data["sha256"] = digest
    stored = asdict(config) | {"base": model.base_name, "start": Path(config.start).stem}
    return {
        "config": stored,
        "command": command,
        "split": {
            "name": split.name,
            "train": len(split.train),
            "val": len(split.val),
            "test": len(split.test),
            "sha256": split.file_list_hash(dataset),
        },
        "base": {"name": model.base_name, "sha256": model.base_sha256},
        "start_sha256": model.start_sha256,
        "parameters": parameter_ledger(model),
        "adapter_sha256": sha256(adapter),
        "data": data,
        "precision": model.precision,
        "peak_memory_mib": peak_memory_mib(model.mean.device),
        **stamp(model.mean.device),
    }


def stamp(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and date (UTC) of a measurement."""
    return {
        "device": device_name(device),
        "versions": {
            "nucseg": nucseg.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line(config: Config, folder: Path, command: str = "train") -> str:
    """The ``nucseg`` command that reproduces a run, with the dataset's folder in the variable NUCSEG_DATA."""
    parts = Path(folder).parts  # kept from "results" on, or the last part only, because records hold no local paths
    parts = parts[parts.index("results") :] if "results" in parts else parts[-1:]
    words = ["nucseg", command, "--out", "/".join(parts)]
    for name, default in asdict(Config()).items():
        value = getattr(config, name)
        if value != default:
            flag = name.replace("_", "-")
            words += [f"--{flag if value is not False else 'no-' + flag}"]
            words += [] if isinstance(value, bool) else [Path(value).name if name in ("base", "start") else str(value)]
    return shlex.join(words)


def with_note(command: str, note: str) -> str:
    """Append the ``--data-note`` to a command, if there is one."""
    return command + (f" --data-note {shlex.quote(note)}" if note else "")


def device_name(device: torch.device) -> str:
    """Name of a device: the GPU's model, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU (MPS)"
    return f"CPU, {plural(torch.get_num_threads(), 'thread')}, {platform.machine()}"


def peak_memory_mib(device: torch.device) -> int:
    """Peak memory so far in MiB: of the GPU if there is one, else of this process (0 on Windows)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    if sys.platform == "win32":
        return 0  # unknown there without another dependency
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def commit() -> str:
    """Commit of the checkout in use, with ``-dirty`` if the package was changed; '' without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return revision.stdout.strip() + ("-dirty" if status.stdout.strip() else "")
