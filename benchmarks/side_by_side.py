"""Shared parts of the benchmarks: their options, and ratios measured side by side.

The programs under comparison run in turns on one thread, and their CPU seconds are compared. Other work on the machine
then slows all of them alike. An earlier commit runs in a separate process, from an export of its files.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the option of every benchmark, --quick. ``description``: the docstring; its first line is shown."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="trial run at the smallest sizes; nothing is recorded")
    return made


def in_turns(tasks: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Run tasks in turns; return the seconds that each reports. The first turn warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(turns + 1):
        for name, task in tasks.items():
            spent = task()
            if turn:
                seconds[name].append(spent)
    return seconds


def cpu_seconds(task: Callable[[], Any]) -> float:
    """Return the CPU seconds of a call, summed over all threads."""
    start = time.process_time()
    task()
    return time.process_time() - start


def ratio(slow: list[float], fast: list[float]) -> dict[str, Any]:
    """Return the ratio of the seconds: its median over the turns, and its quartiles."""
    pairs = np.array(slow) / np.array(fast)
    low, middle, high = np.quantile(pairs, (0.25, 0.5, 0.75))
    return {"ratio": round(float(middle), 3), "quartiles": [round(float(low), 3), round(float(high), 3)]}


@contextmanager
def exported(commit: str) -> Iterator[Path]:
    """Export the package of a commit to a temporary folder, and yield the folder."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "nucseg.tar"
        subprocess.run(["git", "archive", "-o", str(archive), commit, "nucseg"], cwd=ROOT, check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder)


class Process:
    """A script that answers each input line with one line, run with the package in ``path`` (of another commit)."""

    def __init__(self, path: Path, script: str, *words: str):
        self.process = subprocess.Popen(
            [sys.executable, script, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
        )
        self.ask()  # ready

    def ask(self) -> str:
        """Send one line and return the answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        """Close the process's input and wait for its end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
