"""Build the book: ``python book/build.py``. Warnings and broken internal links are errors.

The exit code is jupyter-book's, or 1 if only a link is broken.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

BOOK = Path(__file__).resolve().parent
sys.path.insert(0, str(BOOK))
from links import problems

ROOT = BOOK.parent
BUILD = BOOK / "_build"
# All notebooks run again when any of these changes. jupyter-book's own cache only notices changes of the
# notebook itself.
INPUTS = ("nucseg/**/*", "results/**/*", "book/reference/**/*")


def fingerprint(root: Path = ROOT, data: str | None = None) -> str:
    """SHA-256 of ``NUCSEG_DATA`` and of the names and bytes of all files that notebook outputs depend on."""
    data = os.environ.get("NUCSEG_DATA", "") if data is None else data
    digest = hashlib.sha256(f"NUCSEG_DATA={data}\0{sys.version}\0".encode())
    files = {
        path for pattern in INPUTS for path in root.glob(pattern) if path.is_file()
    }
    for path in sorted(files):
        if "__pycache__" not in path.parts:
            digest.update(
                f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode()
            )
            digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> int:
    start = time.monotonic()
    stamp, now = BUILD / "fingerprint", fingerprint()
    if not stamp.exists() or stamp.read_text() != now:
        shutil.rmtree(BUILD / ".jupyter_cache", ignore_errors=True)
        read_all_again()
        BUILD.mkdir(parents=True, exist_ok=True)
        stamp.write_text(now)
    tools = str(Path(sys.executable).parent)
    program = shutil.which("jupyter-book", path=tools) or "jupyter-book"
    command = [program, "build", "-W", "--keep-going", str(BOOK)]
    path = tools + os.pathsep + os.environ.get("PATH", "")
    # makes waiting threads sleep: torch is then several times faster if other programs run too
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"PATH": path}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    broken = [] if code else problems(BUILD / "html")
    seconds = time.monotonic() - start
    if code:
        read_all_again()  # otherwise the next build would not report the same warnings
        print(
            f"The book did not build ({seconds:.0f} s): see above.", file=sys.stderr
        )
    elif broken:
        print(*broken, f"{len(broken)} broken links.", sep="\n", file=sys.stderr)
        code = 1
    else:
        page = BUILD / "html" / "index.html"
        print(f"Built in {seconds:.0f} s: {page.as_uri()}")
    return code


def read_all_again() -> None:
    """Make Sphinx forget the pages it has parsed."""
    shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
