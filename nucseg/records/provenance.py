"""Where a number comes from: data, base, device, versions, commit, and the command that repeats it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nucseg.data.datasets import Dataset

if TYPE_CHECKING:
    from nucseg.model.network import NucleiModel
    from nucseg.records.runs import Run
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

import nucseg
from nucseg.config import Config
from nucseg.data.datasets import content_hash
from nucseg.data.splits import Split
from nucseg.files import sha256
from nucseg.model.network import NucleiModel, parameter_ledger


def provenance(dataset: Dataset | None = None, model: "NucleiModel | None" = None, runs: "Sequence[Run]" = ()) -> str:
    """One line of Markdown: which data, which base and which device are behind a page.

    - ``runs``: recorded runs that the page reads, all with the same data.
    """

    parts: list[Any] = []
    kinds = {
        "nuinsseg": "NuInsSeg (Mahbod et al. 2024)",
        "synthetic": "synthetic tissue made by code, no real image",
        "folder": "your own images",
    }
    if dataset is not None:
        tissues = dataset.table["tissue"].nunique()
        name = getattr(dataset, "name", "folder")
        parts.append(f"{kinds.get(name, name)} ({len(dataset):,} images of {tissues} tissue{'s' * (tissues != 1)})")
    if model is not None:
        base = {
            "random": "MobileSAM with random weights, not pretrained",
            "mobile_sam": "MobileSAM, pretrained",
            "offline": "offline, trained by nucseg, not MobileSAM's weights",
        }
        parts.append(f"base: {base.get(model.base_name, model.base_name)} (SHA-256 {model.base_sha256[:8]}…)")
        parts.append(f"device: {device_name(model.mean.device)}")
    for about in [run.about for run in runs][:1]:
        note = f", {about['data']['note']}" if about["data"]["note"] else ""
        bases = sorted({run.about["base"]["name"] for run in runs})
        devices = sorted({run.about["device"] for run in runs})
        dates = sorted({run.about["date"][:10] for run in runs})
        commits = sorted({run.about["commit"][:7] for run in runs})
        parts.append(f"{len(runs)} recorded runs on {kinds.get(about['data']['name'], about['data']['name'])}{note}")
        parts.append(f"base: {', '.join(bases)}")
        parts.append(f"device: {', '.join(devices)}")
        parts.append(f"commit {', '.join(commits)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}")
    return "**Behind this page:** " + " · ".join(parts or ["no data and no model"])


def describe(
    config: Config, dataset: Dataset, split: Split, model: NucleiModel, adapter: Path, command: str
) -> dict[str, Any]:
    """What ``run.json`` says of a run: enough to know what was measured, and to measure it again.

    No path of the machine is kept: of a base that is a file, only the name and the hash.
    """
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
        "data": {"name": getattr(dataset, "name", config.data), "images": len(dataset), "note": config.data_note}
        | ({"sha256": digest} if (digest := content_hash(dataset)) else {}),
        "precision": model.precision,
        "peak_memory_mib": peak_memory_mib(model.mean.device),
        **stamp(model.mean.device),
    }


def stamp(device: torch.device) -> dict[str, Any]:
    """On what, with what and when something was measured: device, versions, commit and date (UTC)."""
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
    """The ``nucseg`` command that repeats a run; NuInsSeg's folder is expected in NUCSEG_DATA."""
    parts = Path(folder).parts  # from "results" on, or the last: nothing of the machine's own folders
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
    """A benchmark's command with the ``--data-note`` it was given, if any."""
    return command + (f" --data-note {shlex.quote(note)}" if note else "")


def device_name(device: torch.device) -> str:
    """A device in words: the card's name, or the CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    if device.type == "mps":
        return "Apple GPU (MPS)"
    return f"CPU, {threads} thread{'s' * (threads > 1)}, {platform.machine()}"


def peak_memory_mib(device: torch.device) -> int:
    """The most memory used so far, MiB: the card's where there is one, else this process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    if sys.platform == "win32":
        return 0  # not known there without another dependency
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def commit() -> str:
    """The commit of the checkout that nucseg runs from, with ``-dirty`` after it if it was changed; else ''."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return revision.stdout.strip() + ("-dirty" if status.stdout.strip() else "")
