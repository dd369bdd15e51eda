"""One command in several processes: on this machine, or as jobs on a Slurm cluster through submitit.

Every process runs the same command. Each run, and each image, is locked by the process that works on it and skipped by
the others. Finished work is skipped and interrupted work resumes, so any process may be killed, including the one that
launched the others: run the same command again to continue.
"""

import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nucseg.config import read_toml
from nucseg.errors import InputError
from nucseg.files import write_json

PLACES = ("here", "local", "slurm")
POLL = 2.0  # seconds between two looks at the files
PATIENCE = 20  # a look at the files of a large archive takes long: rest at least this many times as long
ROUNDS = 3  # how often killed processes are started again
ROWS = 20  # lines of the live table
HOURS = 4  # time limit of a job whose options set none; a job that reaches it is queued again
REQUEUES = 100  # how often a job that reaches its time limit is queued again
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
FAILED = "failed"  # folder of the logs of images that failed, in the folder of the processes' logs


# ---------------------------------------------------------------- what is to be done


@dataclass(frozen=True)
class Item:
    """One run or image.

    ``files``: all of them exist once the item is finished. ``folder``: where its progress is stored while it is worked
    on. ``log``: where a process writes why the item failed.
    """

    name: str
    files: tuple[Path, ...]
    folder: Path
    log: Path

    def state(self, since: float = 0.0) -> str:
        """Return failed (since a time), finished, epoch N (of a run), row N (of an image's fields) or waiting."""
        if _modified(self.log) >= max(since, 1e-9):
            return "failed"
        if all(path.exists() for path in self.files):
            return "finished"
        try:
            return f"epoch {max(0, len((self.folder / 'history.csv').read_text().splitlines()) - 1)}"
        except OSError:
            pass
        try:
            return f"row {json.loads((self.folder / 'state.json').read_text(encoding='utf-8'))['rows']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "waiting"

    def reason(self) -> str:
        """Return the last line of the log."""
        try:
            return (self.log.read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
        except OSError:
            return ""


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def runs(folders: Sequence[Path], study: str = "") -> list[Item]:
    """Return the items of a study's run folders; ``study`` precedes their names."""
    names = [f"{study}/{folder.name}".lstrip("/") for folder in folders]
    return [Item(n, (f / "run.json",), f, f / "error.log") for n, f in zip(names, folders, strict=True)]


# ---------------------------------------------------------------- launching and watching


def launch(
    words: Sequence[str],
    items: Sequence[Item],
    logs: Path,
    place: str,
    jobs: int,
    slurm: Mapping[str, Any] | None = None,
    *,
    share: bool = False,
) -> int:
    """Run the command ``nucseg WORDS`` in up to ``jobs`` processes until every item is finished or failed.

    ``place``: local (the cores are divided among the processes) or slurm (one job array; extra ``slurm``). ``logs``:
    folder for the output of the processes. ``slurm``: submitit's options (`slurm_options`). ``share``: add the words
    --share K/N, so that each process starts with its own share of the items.

    Returns 0 if all items are finished, else 1, after naming those that failed and their logs on stderr. Starts nothing
    if no item is left. Raises ``InputError`` for a place that cannot be used.
    """
    if jobs < 1:
        raise InputError(f"Option --jobs is {jobs}: give the number of processes, 1 or more.")
    if place not in ("local", "slurm"):
        raise InputError(f"Option --on is {place!r}: choose one of {', '.join(PLACES)}.")
    if place == "slurm" and find_spec("submitit") is None:
        raise InputError("--on slurm needs the package submitit: run pip install 'nucseg[slurm]'.")
    logs.mkdir(parents=True, exist_ok=True)
    marker = logs / "started"  # its time is the file system's, because the clock of another node may differ
    watch = None
    if place == "slurm" and marker.exists() and _queued(_arrays(logs)):  # an earlier call's jobs run: watch them
        watch = _Watch(items, marker.stat().st_mtime)
    if watch is None or not watch.left():  # what failed before is tried again
        marker.touch()
        watch = _Watch(items, marker.stat().st_mtime)
    broken: list[str] = []
    if left := watch.left():
        jobs = min(jobs, len(left))
        each = [[*words, "--share", f"{k}/{jobs}"] if share else list(words) for k in range(1, jobs + 1)]
        if place == "local":
            broken = _local(each, logs, watch)
        else:
            broken = _slurm(each, logs, slurm or {}, watch)
    watch.show(last=True)
    return _report(watch, logs, broken)


def _report(watch: "_Watch", logs: Path, broken: Sequence[str]) -> int:
    """Name on stderr what failed, with the logs; return the exit code."""
    failed = [item for item in watch.items if watch.states[item.name] == "failed"]
    for item in failed:
        print(f"nucseg: {item.name} failed ({item.reason()}); see {item.log}", file=sys.stderr)
    if left := watch.left():
        some = ", ".join(item.name for item in left[:5]) + (", …" if len(left) > 5 else "")
        print(f"nucseg: {len(left)} not finished ({some}); see the logs in {logs}.", file=sys.stderr)
        for line in broken:
            print(f"nucseg: {line}", file=sys.stderr)
    return 1 if failed or left else 0


class _Watch:
    """The live table: redrawn in a terminal; elsewhere a line for each item that starts, finishes or fails."""

    def __init__(self, items: Sequence[Item], since: float):
        self.items, self.since, self.height = items, since, 0
        self.states: dict[str, str] = {}
        self.said: dict[str, str] = {}
        self.due = 0.0

    def look(self) -> None:
        """Read the states, unless the last look was a moment ago. A finished item is not looked at again."""
        began = time.monotonic()
        if began < self.due:
            return
        for item in self.items:
            if self.states.get(item.name) != "finished":
                self.states[item.name] = item.state(self.since)
        now = time.monotonic()
        self.due = now + max(POLL / 4, PATIENCE * (now - began))

    def left(self) -> list[Item]:
        """Return the items that are neither finished nor failed."""
        self.look()
        return [item for item in self.items if self.states[item.name] not in ("finished", "failed")]

    def show(self, note: str = "", last: bool = False) -> None:
        """Print what has changed. ``note``: a remark on the processes. ``last``: look once more, and print totals."""
        if last:
            self.due = 0.0
        self.look()
        kinds = Counter(state.split()[0] for state in self.states.values())
        total = f"{kinds['finished']} of {len(self.states)} finished"
        total += f", {kinds['failed']} failed" * bool(kinds["failed"]) + note
        width = max(map(len, self.states), default=0)
        if sys.stdout.isatty():
            lines = [*self._rows(width), total]
            print(f"\x1b[{self.height}F\x1b[J" * bool(self.height) + "\n".join(lines), flush=True)
            self.height = len(lines)
            return
        for name, state in self.states.items():
            kind = state.split()[0]
            if self.said.get(name, "waiting") != kind:
                print(f"{name:{width}s}  {state}", flush=True)
            self.said[name] = kind
        if last:
            print(total, flush=True)

    def _rows(self, width: int) -> list[str]:
        """The lines of the table: all items, or, if they are too many, those that are being worked on or failed."""
        rows = min(ROWS, shutil.get_terminal_size().lines - 3)
        shown = list(self.states.items())
        if len(shown) > rows:
            shown = [(name, state) for name, state in shown if state not in ("finished", "waiting")]
            shown = sorted(shown, key=lambda pair: pair[1] == "failed")[: max(1, rows)]
        return [f"{name:{width}s}  {state}" for name, state in shown]


# ---------------------------------------------------------------- this machine


def _local(each: Sequence[Sequence[str]], logs: Path, watch: _Watch) -> list[str]:
    """Run the commands as processes of this machine; return a sentence for each that ended with an error."""
    threads = str(max(1, (os.cpu_count() or 1) // len(each)))
    environment = os.environ | dict.fromkeys(THREADS, threads)
    started, broken = 0, []

    def start(words: Sequence[str]) -> "tuple[subprocess.Popen[bytes], Sequence[str], Path]":
        nonlocal started
        started += 1
        path = logs / f"local-{os.getpid()}-{started}.log"
        with open(path, "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "nucseg", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # so that it continues if this process is killed
            )
        return process, words, path

    workers = [start(words) for words in each]
    try:
        while workers:
            time.sleep(POLL / 4)
            watch.show()
            for worker in list(workers):
                process, words, log = worker
                if process.poll() is None:
                    continue
                workers.remove(worker)
                if process.returncode < 0 and watch.left() and started < len(each) * (1 + ROUNDS):
                    workers.append(start(words))
                elif process.returncode:
                    broken.append(f"a process ended with exit code {process.returncode}; see {log}")
    except KeyboardInterrupt:
        for process, _, _ in workers:
            process.send_signal(signal.SIGINT)
        for process, _, _ in workers:
            process.wait()
        raise
    return broken


# ---------------------------------------------------------------- Slurm


class Worker:
    """What a job runs. submitit queues it again if Slurm preempts it or its time is over; its work then resumes."""

    def __call__(self, words: list[str]) -> int:
        """Run the command and return its exit code."""
        return subprocess.call([sys.executable, "-m", "nucseg", *words])

    def checkpoint(self, words: list[str]) -> Any:
        """Queue the same command again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, words)


def _slurm(each: Sequence[Sequence[str]], logs: Path, options: Mapping[str, Any], watch: _Watch) -> list[str]:
    """Run the commands as a job array; return a sentence for each job of the last array that printed errors."""
    arrays, own = _arrays(logs), ""
    for _ in range(ROUNDS + 1):
        if not _queued(arrays):  # otherwise they were submitted before: only watch them
            own = _submit(each, logs, options)
            arrays.append(own)
            write_json(logs / "slurm.json", {"arrays": arrays})
            print(f"Slurm job {own}, logs in {logs}. This process only watches: it may be stopped.", flush=True)
        while (queued := _queued(arrays)) and watch.left():
            watch.show("; jobs: " + ", ".join(f"{n} {state.lower()}" for state, n in sorted(queued.items())))
            time.sleep(POLL)
        if not watch.left() or (own and _ended(logs, own) >= len(each)):
            break  # otherwise some were killed, and are started again
    return _errors(logs, arrays[-1])


def _ended(logs: Path, array: str) -> int:
    """Count the jobs of an array that ended by themselves, with whatever exit code."""
    codes = []
    for path in _files(logs, array, "*_result.pkl"):
        outcome, code = pickle.loads(path.read_bytes())  # written by submitit
        codes.append(code if outcome == "success" else -1)
    return sum(code >= 0 for code in codes)  # a process that was killed has a negative one


def _files(logs: Path, array: str, pattern: str) -> list[Path]:
    """List the files of an array's jobs; those of job 3 of array 7 are in 7_3, a single job's in 7."""
    return sorted([*logs.glob(f"{array}/{pattern}"), *logs.glob(f"{array}_*/{pattern}")])


def _arrays(logs: Path) -> list[str]:
    """Return the numbers of the job arrays submitted so far."""
    known = logs / "slurm.json"
    return json.loads(known.read_text())["arrays"] if known.exists() else []


def _submit(each: Sequence[Sequence[str]], logs: Path, options: Mapping[str, Any]) -> str:
    """Submit one job for each command, as an array; return its number."""
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=str(logs / "%j"), cluster="slurm", slurm_max_num_timeout=REQUEUES)
        executor.update_parameters(
            **{"name": "nucseg", "timeout_min": 60 * HOURS, "slurm_array_parallelism": len(each)} | dict(options)
        )
        submitted = executor.map_array(Worker(), [list(words) for words in each])
    except Exception as error:  # submitit raises several kinds: no sbatch, an unknown option, a refusal
        raise InputError(f"The jobs could not be submitted to Slurm: {error}") from error
    return str(submitted[0].job_id).split("_")[0]


def _queued(arrays: Sequence[str]) -> Counter[str]:
    """Count the jobs of these arrays that wait or run, by state. Asks squeue: not every cluster keeps accounts."""
    if not arrays:
        return Counter()
    words = ["squeue", "--noheader", "--array", "--format=%T", "--jobs", ",".join(arrays)]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        raise InputError("There is no Slurm here: the command squeue is missing.") from error
    except subprocess.TimeoutExpired:
        return Counter(unknown=1)  # the controller is busy: ask again
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return Counter(unknown=1)
    return Counter(answer.stdout.split())


def _errors(logs: Path, array: str, most: int = 5) -> list[str]:
    """Return the last lines that jobs of an array wrote to stderr, with the files."""
    found = []
    for path in _files(logs, array, "*.err"):
        if lines := path.read_text(encoding="utf-8", errors="replace").strip().splitlines():
            found.append(f"{lines[-1]}; see {path}")
    return found[:most]


# ---------------------------------------------------------------- options of the jobs


SUBMITIT = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")
RENAMED = {"gpus": "gpus_per_node", "cpus": "cpus_per_task", "mem": "slurm_mem", "memory": "slurm_mem"}


def slurm_options(words: Sequence[str] = (), table: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return submitit's options for ``table`` (a [slurm] table) and then each word: KEY=VALUE, or FILE.toml.

    Later ones win. ``partition``, ``gpus`` and ``cpus`` (per job), ``time`` (as Slurm writes it: minutes, H:MM:SS or
    D-H:MM:SS) and ``memory`` (16G) are understood; other keys are submitit's own or options of sbatch.

    Raises ``InputError`` for a word of another form, a file without [slurm], and a time that cannot be read.

    >>> slurm_options(["partition=gpu", "time=1-12:00:00", "gpus=1", "memory=16G"])
    {'slurm_partition': 'gpu', 'timeout_min': 2160, 'gpus_per_node': 1, 'slurm_mem': '16G'}
    """
    options = _converted(table or {})
    for word in words:
        key, equals, value = word.partition("=")
        if word.endswith(".toml") and not equals:
            text = read_toml(word)
            if not isinstance(text.get("slurm"), dict):
                raise InputError(f"{word}: has no table [slurm]: add one, for example with partition = 'gpu'.")
            options |= _converted(text["slurm"])
        elif key and value:
            options |= _converted({key: int(value) if value.isdigit() else value})
        else:
            raise InputError(f"Option --slurm takes KEY=VALUE, as in partition=gpu, or a TOML file, not {word!r}.")
    return options


def _converted(table: Mapping[str, Any]) -> dict[str, Any]:
    options = {}
    for key, value in table.items():
        if key == "time":
            options["timeout_min"] = minutes(value)
            continue
        key = RENAMED.get(key, key)
        known = key in SUBMITIT or key.startswith("slurm_")
        options[key if known else f"slurm_{key}"] = value
    return options


def minutes(value: object) -> int:
    """Return a time limit in minutes, rounded up, from Slurm's forms: minutes, [D-]H:MM:SS, MM:SS or D-H.

    >>> [minutes(value) for value in (90, "90", "1:30:00", "0:30", "2-0")]
    [90, 90, 90, 1, 2880]
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(value))
    if found is None:
        raise InputError(f"The time limit {value!r} cannot be read: write minutes, H:MM:SS or D-H:MM:SS.")
    days, *rest = found.groups()
    first, second, third = (int(part or 0) for part in rest)
    if days is not None or rest[2] is not None:
        hours, mins, seconds = first, second, third  # H:MM:SS, D-H, D-H:MM
    else:
        hours, mins, seconds = 0, first, second
    return max(1, math.ceil(((int(days or 0) * 24 + hours) * 60) + mins + seconds / 60))


# ---------------------------------------------------------------- words of the command


def without_launching(words: Sequence[str]) -> list[str]:
    """Return the words of a command without the options that say where it runs.

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
