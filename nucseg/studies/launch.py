"""Several processes for one command: on this machine, or on a Slurm cluster through submitit.

Every process runs the whole command. Each run, and each image, is locked by the process that works on it, and skipped
by the others; what is finished is never repeated, and what was interrupted resumes. So a process may be killed, and
the one that launched them too: run the same command again, and it goes on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nucseg.errors import InputError
from nucseg.files import write_json

PLACES = ("here", "local", "slurm")
POLL = 2.0  # seconds between two looks at the runs
ROUNDS = 3  # how often what a killed process left is started again
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Item:
    """One run or image: it is finished once the file ``done`` exists; its errors are in ``folder/error.log``."""

    name: str
    done: Path
    folder: Path

    def state(self, since: float = 0.0) -> str:
        """finished, failed (since a time), epoch N, or waiting."""
        if self.done.exists():
            return "finished"
        log, history = self.folder / "error.log", self.folder / "history.csv"
        if log.exists() and log.stat().st_mtime >= since:
            return "failed"
        if history.exists():
            return f"epoch {max(0, len(history.read_text().splitlines()) - 1)}"
        return "waiting"


def runs(folders: Sequence[Path]) -> list[Item]:
    """The items of a study's run folders."""
    return [Item(folder.name, folder / "run.json", folder) for folder in folders]


def launch(
    words: Sequence[str],
    items: Sequence[Item],
    logs: Path,
    place: str,
    jobs: int,
    slurm: Mapping[str, Any] | None = None,
) -> int:
    """Run the command ``nucseg WORDS`` in ``jobs`` processes until all items are finished or failed.

    ``place``: local, with the cores divided among the processes; or slurm, as one job array (extra ``slurm``).
    ``logs``: folder for the output of the processes. ``slurm``: options of submitit, as in partition or gpus_per_node.
    Returns 0 if all items are finished, else 1. Raises ``InputError`` for a place that cannot be used.
    """
    if jobs < 1:
        raise InputError(f"Option --jobs is {jobs}: give the number of processes, 1 or more.")
    logs.mkdir(parents=True, exist_ok=True)
    # a time as the file system counts it: the clock of another node may differ
    marker = logs / "started"
    marker.touch()
    since = marker.stat().st_mtime
    watch = _Watch(items, since)
    if place == "local":
        _local(words, logs, jobs, watch)
    elif place == "slurm":
        _slurm(words, logs, jobs, slurm or {}, watch)
    else:
        raise InputError(f"Option --on is {place!r}: choose one of {', '.join(PLACES)}.")
    watch.show(last=True)
    for item in items:
        if item.state(since) == "failed":
            log = item.folder / "error.log"
            reason = (log.read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
            print(f"nucseg: {item.name} failed ({reason}); see {log}", file=sys.stderr)
    if watch.left() and not any(item.state(since) == "failed" for item in items):
        print(f"nucseg: {len(watch.left())} not finished; see the logs in {logs}.", file=sys.stderr)
    return 0 if all(item.done.exists() for item in items) else 1


class _Watch:
    """The table of the items, printed when it changes: redrawn in a terminal, line by line elsewhere."""

    def __init__(self, items: Sequence[Item], since: float):
        self.items, self.since, self.shown, self.height = items, since, {}, 0  # type: ignore[var-annotated]

    def left(self) -> list[Item]:
        """The items that are neither finished nor failed."""
        return [item for item in self.items if item.state(self.since) not in ("finished", "failed")]

    def show(self, last: bool = False) -> None:
        states = {item.name: item.state(self.since) for item in self.items}
        if states == self.shown and not last:
            return
        finished = sum(state == "finished" for state in states.values())
        width = max(map(len, states), default=0)
        if sys.stdout.isatty():
            lines = [f"{name:{width}s}  {state}" for name, state in states.items()]
            lines.append(f"{finished} of {len(states)} finished")
            print(f"\x1b[{self.height}F\x1b[J" * bool(self.height) + "\n".join(lines), flush=True)
            self.height = len(lines)
        else:
            for name, state in states.items():
                if self.shown.get(name) != state:
                    print(f"{name:{width}s}  {state}", flush=True)
            if last:
                print(f"{finished} of {len(states)} finished", flush=True)
        self.shown = states


# ---------------------------------------------------------------- this machine


def _local(words: Sequence[str], logs: Path, jobs: int, watch: _Watch) -> None:
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = os.environ | dict.fromkeys(THREADS, threads)
    started = 0

    def start() -> "subprocess.Popen[bytes]":
        nonlocal started
        started += 1
        with open(logs / f"local-{os.getpid()}-{started}.log", "wb") as log:
            # in a session of its own, so that it goes on if this process is killed
            return subprocess.Popen(
                [sys.executable, "-m", "nucseg", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    workers = [start() for _ in range(jobs)]
    try:
        while workers:
            time.sleep(POLL / 4)
            watch.show()
            for worker in list(workers):
                if worker.poll() is None:
                    continue
                workers.remove(worker)
                if worker.returncode < 0 and watch.left() and started < jobs * (1 + ROUNDS):
                    workers.append(start())
    except KeyboardInterrupt:
        for worker in workers:
            worker.send_signal(signal.SIGINT)
        for worker in workers:
            worker.wait()
        raise


# ---------------------------------------------------------------- Slurm


class Worker:
    """What a job runs. If Slurm preempts it or its time is over, submitit queues it again, and it resumes."""

    def __call__(self, words: list[str]) -> int:
        """Run the command and return its exit code."""
        return subprocess.call([sys.executable, "-m", "nucseg", *words])

    def checkpoint(self, words: list[str]) -> Any:
        """Queue the same command again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, words)


def _slurm(words: Sequence[str], logs: Path, jobs: int, options: Mapping[str, Any], watch: _Watch) -> None:
    if find_spec("submitit") is None:
        raise InputError("--on slurm needs the package submitit: run pip install 'nucseg[slurm]'.")
    known = logs / "slurm.json"
    arrays = json.loads(known.read_text())["arrays"] if known.exists() else []
    for _ in range(ROUNDS + 1):
        if not _alive(arrays):  # else they were submitted before, and are only watched
            if not watch.left():
                return
            arrays = [*arrays, _submit(words, logs, jobs, options)]
            write_json(known, {"arrays": arrays})
            print(f"Slurm job {arrays[-1]}, logs in {logs}. This process only watches: it may be stopped.", flush=True)
        while _alive(arrays) and watch.left():
            watch.show()
            time.sleep(POLL)
        if not watch.left():
            return


def _submit(words: Sequence[str], logs: Path, jobs: int, options: Mapping[str, Any]) -> str:
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=str(logs / "%j"), cluster="slurm")
        executor.update_parameters(name="nucseg", slurm_array_parallelism=jobs, **options)
        submitted = executor.map_array(Worker(), [list(words)] * jobs)
    except Exception as error:  # submitit raises several kinds: no sbatch, an unknown option, a refusal
        raise InputError(f"The jobs could not be submitted to Slurm: {error}") from error
    return str(submitted[0].job_id).split("_")[0]


def _alive(arrays: Sequence[str]) -> bool:
    """Whether any of these job arrays waits or runs. Asks squeue, because not every cluster keeps accounts."""
    if not arrays:
        return False
    words = ["squeue", "--noheader", "--format=%i", "--jobs", ",".join(arrays)]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        raise InputError("There is no Slurm here: the command squeue is missing.") from error
    except subprocess.TimeoutExpired:
        return True  # the controller is busy: ask again
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return True
    return bool(answer.stdout.strip())


def slurm_options(words: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words as submitit's options: partition becomes slurm_partition, and so on.

    >>> slurm_options(["partition=gpu", "timeout_min=60", "gpus_per_node=1"])
    {'slurm_partition': 'gpu', 'timeout_min': 60, 'gpus_per_node': 1}
    """
    options: dict[str, Any] = {}
    shared = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise InputError(f"Option --slurm takes KEY=VALUE, as in partition=gpu, not {word!r}.")
        key = key if key in shared or key.startswith("slurm_") else f"slurm_{key}"
        options[key] = int(value) if value.isdigit() else value
    return options


def without_launching(words: Sequence[str]) -> list[str]:
    """The words of a command without the options that say where it runs.

    >>> without_launching(["search", "s.toml", "--on", "local", "--jobs=2", "--out", "o"])
    ['search', 's.toml', '--out', 'o']
    """
    kept, rest = [], iter(words)
    for word in rest:
        if word in ("--on", "--jobs", "--slurm"):
            next(rest, None)
        elif not word.startswith(("--on=", "--jobs=", "--slurm=")):
            kept.append(word)
    return kept
