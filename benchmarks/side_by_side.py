"""Ratios measured side by side: what is compared runs in turns, on one thread, and CPU seconds are compared.

So that a machine that does other work at the same time slows down both alike. An earlier commit runs in a process of
its own, from an export of its files.
"""

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


def in_turns(tasks: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """The seconds that each task gives, run in turns; the first turn warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(turns + 1):
        for name, task in tasks.items():
            spent = task()
            if turn:
                seconds[name].append(spent)
    return seconds


def cpu_seconds(task: Callable[[], Any]) -> float:
    """CPU seconds of a call, in all threads."""
    start = time.process_time()
    task()
    return time.process_time() - start


def ratio(slow: list[float], fast: list[float]) -> dict[str, Any]:
    """How many times as fast: the median over the turns, and its quartiles."""
    pairs = np.array(slow) / np.array(fast)
    low, middle, high = np.quantile(pairs, (0.25, 0.5, 0.75))
    return {"ratio": round(float(middle), 3), "quartiles": [round(float(low), 3), round(float(high), 3)]}


@contextmanager
def exported(commit: str) -> Iterator[Path]:
    """The package as it was at a commit, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "nucseg.tar"
        subprocess.run(["git", "archive", "-o", str(archive), commit, "nucseg"], cwd=ROOT, check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder)


class Process:
    """A script that answers each line with one, under the package in ``path``: a task of another commit."""

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
        """Run once; the answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
