"""Files that are whole or absent: atomic writes, hashes, JSON."""

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
    """Yield a temporary path beside ``path``; rename it onto ``path`` if the block succeeds, else delete it.

    A reader (or a run that resumes after a kill) sees the old file or the whole new one, never a part.
    The folder of ``path`` is made if it is missing. The temporary name keeps ``path``'s suffix, because
    some writers choose the format by it. ``replace``: False where ``path`` must not exist yet; a file that has come
    to be there meanwhile is kept, and ``InputError`` raised.
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
        part.chmod(0o666 & ~umask)  # mkstemp makes 0600; a result should be as readable as any other file
        if replace:
            part.replace(path)
        else:
            _move_new(part, path)
    finally:
        part.unlink(missing_ok=True)


def _move_new(part: Path, path: Path) -> None:
    """Rename a file to a name that must be free. A link fails where the name is taken, at once and for certain."""
    taken = InputError(f"'{path}' was written by another program meanwhile, and is kept: rename or move it.")
    try:
        os.link(part, path)
    except FileExistsError:
        raise taken from None
    except OSError:  # a disk without hard links
        if path.exists():
            raise taken from None
        part.rename(path)


@contextmanager
def only_one(folder: str | Path) -> Iterator[None]:
    """Let one process at a time work in ``folder``, which is made if it is missing.

    Raises ``Busy`` where another process does. The system lets the lock go when its holder ends, however it ends.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise Busy(f"{folder}: another process is working on this run; wait for it, or stop it first.") from None


def write_json(path: str | Path, value: Any, replace: bool = True) -> None:
    """Write ``value`` as indented JSON, atomically; ``replace`` as for `write_atomic`."""
    with write_atomic(path, replace) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
