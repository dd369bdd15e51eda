"""Atomic writes, locks, hashes and JSON files."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nucseg.errors import Busy, InputError

ASSETS = Path(__file__).parent / "assets"  # data that ships with the package


@contextmanager
def write_atomic(path: str | Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` if the block succeeds, else delete it.

    A reader, or a run resumed after being killed, sees either the old file or the complete new one. The folder of
    ``path`` is created if needed. The temporary name keeps the suffix of ``path``, because some writers choose the
    format by it. ``replace=False``: ``path`` must not exist; if another program has created it meanwhile, that file
    is kept and ``InputError`` is raised.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)  # mkstemp creates files that only their owner can read
        if replace:
            part.replace(path)
        else:
            move_new(part, path)
    finally:
        part.unlink(missing_ok=True)


def move_new(part: Path, path: Path) -> None:
    """Rename a file to a name that must be free. Creating a link checks and takes the name in one step."""
    taken = InputError(f"'{path}' was written by another program meanwhile and is kept: rename or move it.")
    try:
        os.link(part, path)
    except FileExistsError:
        raise taken from None
    except OSError:  # the file system has no hard links
        if path.exists():
            raise taken from None
        part.rename(path)


@contextmanager
def only_one(folder: str | Path) -> Iterator[None]:
    """Lock ``folder``, so that only one process works in it. The folder is created if needed.

    Raises ``Busy`` if another process holds the lock. The system releases the lock when that process ends or crashes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise Busy(f"{folder}: another process is working on this run: wait for it or stop it.") from None


def write_json(path: str | Path, value: Any, replace: bool = True) -> None:
    """Write ``value`` as indented JSON, atomically; ``replace`` as for `write_atomic`."""
    with write_atomic(path, replace) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
