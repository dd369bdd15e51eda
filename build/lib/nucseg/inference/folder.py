"""The output folder of ``nucseg predict``: the images to segment, and which files in the folder are nucseg's.

Only files that nucseg wrote are replaced. They are recorded, with their hashes, in the image's ``.json``; a file that
is not recorded, or has changed, belongs to the user. All of this is checked before any work, without loading PyTorch.
"""

import csv
import glob
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nucseg import __version__
from nucseg.errors import InputError, Notice
from nucseg.files import sha256, write_atomic
from nucseg.images.raster import SUFFIXES
from nucseg.images.slides import dicom_series

OUTPUTS = ("labels", "csv", "geojson", "overlay", "rois")
ENDINGS = {
    "labels": ".labels.tif",
    "csv": ".nuclei.csv",
    "geojson": ".geojson",
    "overlay": ".overlay.png",
    "rois": ".rois.zip",
}
SUMMARY = ("image", "height_px", "width_px", "um_per_px", "nuclei", "area_px_mean", "nuclei_per_mm2", "seconds")
LONGEST_NAME = 255  # bytes in a file name, the limit of nearly every file system
JUNK = ("thumbs.db", "desktop.ini")
# all that nucseg puts into an image's work folder
WORK_FILES = ("state.json", "maps", "labels", ".lock", *(f"new{ending}" for ending in ENDINGS.values()))


# ---------------------------------------------------------------- images


@dataclass(frozen=True)
class Job:
    """An image and the ``folder`` of its results, relative to ``out``: the image's place within the folder given."""

    path: Path
    folder: Path = Path()

    def target(self, out: Path, ending: str) -> Path:
        """The path of the result with this ending."""
        return out / self.folder / f"{self.path.stem}{ending}"

    def record(self, out: Path) -> Path:
        """The path of the .json that records the settings and the files written."""
        return self.target(out, ".json")

    def work(self, out: Path) -> Path:
        """The path of the folder for intermediate files, needed while the image is segmented."""
        return out / self.folder / f".{self.path.stem}.part"

    @property
    def name(self) -> str:
        """The image's name in the summary."""
        return os.fsencode((self.folder / self.path.name).as_posix()).decode("utf-8", "replace")


def find_images(paths: Sequence[str | Path], recursive: bool = False) -> list[Job]:
    """Find the image files among ``paths`` and in folders among them, with their subfolders if ``recursive``.

    Each image is listed once, in the order given. Other files in a folder are named in a warning. Names with * or ?
    are expanded if the shell did not do so (Windows). Raises ``InputError`` for a path that does not exist, a folder
    without images, a name too long for its results, or two images whose results would have the same names.
    """
    jobs: dict[Path, Job] = {}
    for path in _expanded(paths):
        if path.is_dir():
            found = _in_folder(path, recursive)
        elif path.is_file():
            found = [Job(path)]
        else:
            raise InputError(f"There is no file or folder '{path}': check the path.")
        for job in found:
            _check_name(job.path)
            key = job.folder / job.path.stem
            if key in jobs and jobs[key].path.resolve() != job.path.resolve():
                raise InputError(
                    f"'{jobs[key].path}' and '{job.path}' have the same name: segment them into two folders."
                )
            jobs.setdefault(key, job)
    return list(jobs.values())


def _expanded(paths: Sequence[str | Path]) -> Iterable[Path]:
    for given in paths:
        path = Path(given)
        if glob.has_magic(str(given)) and not path.exists():
            matches = sorted(glob.glob(str(given), recursive=True))
            if not matches:
                raise InputError(f"No file matches '{given}': check the path.")
            yield from map(Path, matches)
        else:
            yield path


def _in_folder(folder: Path, recursive: bool) -> list[Job]:
    jobs, skipped, unentered = [], [], []
    for place, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__MACOSX")
        files = [Path(place) / name for name in sorted(names)]
        results = {path for path in files if is_result(path)}
        for path in files:
            if path.name.startswith(".") or path.name.casefold() in JUNK or path in results:
                continue
            if path.suffix.lower() in SUFFIXES:
                jobs.append(Job(path, path.parent.relative_to(folder)))
            else:
                skipped.append(path)
        if not recursive:
            parts = {path.stem for path in files if path.suffix.lower() in (".mrxs", ".vms")}  # data of those slides
            unentered = [name for name in subfolders if name not in parts]
            break
    jobs = _one_per_slide(jobs)
    if not jobs:
        deeper = " (--recursive looks into its subfolders)" if unentered else ""
        raise InputError(f"The folder '{folder}' has no images{deeper}; readable formats: {', '.join(SUFFIXES)}.")
    if skipped:
        warnings.warn(f"'{folder}': {_some(skipped)} not images and skipped: {_names(skipped)}.", Notice, stacklevel=3)
    if unentered:
        warnings.warn(
            f"'{folder}': {len(unentered)} subfolder{'s' * (len(unentered) > 1)} not entered "
            f"({_names(map(Path, unentered))}); pass --recursive to segment their images too.",
            Notice,
            stacklevel=3,
        )
    return jobs


def _one_per_slide(jobs: list[Job]) -> list[Job]:
    """The jobs, of the DICOM files of one slide only the first: each of them opens the whole slide."""
    seen: set[tuple[Path, str]] = set()
    kept = []
    for job in jobs:
        slide = (job.folder, dicom_series(job.path)) if job.path.suffix.lower() == ".dcm" else (job.folder, "")
        if not slide[1] or slide not in seen:
            kept.append(job)
        seen.add(slide)
    return kept


def _some(paths: Sequence[Path]) -> str:
    return "1 file is" if len(paths) == 1 else f"{len(paths)} files are"


def _names(paths: Iterable[Path], most: int = 8) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_name(path: Path) -> None:
    """Raise ``InputError`` if the results' names would be longer than a file system allows."""
    longest = max(len(os.fsencode(f".{path.stem}{ending}")) for ending in ENDINGS.values()) + 9  # the temporary name
    if longest > LONGEST_NAME:
        raise InputError(
            f"The name '{path.name}' is too long by {longest - LONGEST_NAME} bytes for its results: rename the image."
        )


# ---------------------------------------------------------------- records


def read_record(path: Path) -> dict[str, Any]:
    """Read an image's .json. Raises ``InputError`` if nucseg predict did not write it, or it is damaged."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(about, dict) and {"image", "image_sha256", "adapters", "nuclei"} <= about.keys():
            return about
    except (OSError, ValueError, RecursionError):
        pass
    raise InputError(
        f"'{path}' was not written by nucseg predict, or is damaged: rename or move it, or choose another --out."
    )


def sealed(about: dict[str, Any]) -> dict[str, Any]:
    """Return the record with a hash of its own content, which reveals later changes."""
    about = {name: value for name, value in about.items() if name != "record_sha256"}
    return about | {"record_sha256": _digest(about)}


def unchanged(about: dict[str, Any]) -> bool:
    """Whether a record still matches its seal; older versions wrote none, so their records count as unchanged."""
    content = {name: value for name, value in about.items() if name != "record_sha256"}
    return about.get("record_sha256", _digest(content)) == _digest(content)


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def recorded(about: dict[str, Any]) -> dict[str, str]:
    """The outputs that a record lists, with their SHA-256 ("" if an older version did not record it)."""
    files = about.get("files")
    if isinstance(files, dict):
        return {name: str(value) for name, value in files.items() if name in OUTPUTS}
    return {name: "" for name in about.get("outputs", ()) if name in OUTPUTS}


def is_result(path: Path) -> bool:
    """Whether a file is a result, record or summary of `nucseg predict`, and so not an image to segment."""
    if path.name == "summary.csv":
        return is_summary(path)
    if path.suffix == ".json":
        return summary_row(path) is not None
    ending = next((end for end in ENDINGS.values() if path.name.endswith(end)), None)
    if ending is None:
        return False
    record = path.with_name(path.name.removesuffix(ending) + ".json")
    return record.is_file() and summary_row(record) is not None


# ---------------------------------------------------------------- ownership


@dataclass(frozen=True)
class Plan:
    """The work left for one image.

    ``about``: its record, or None. ``missing``: the outputs to write. ``kept``: the outputs that exist.
    """

    job: Job
    about: dict[str, Any] | None
    missing: tuple[str, ...]
    kept: tuple[str, ...]


def plan(job: Job, out: Path, outputs: Sequence[str]) -> Plan:
    """Return the plan of an image: which of its outputs exist as nucseg's, and which are missing.

    Raises ``InputError`` if a file that nucseg did not write has an output's name, or if the record would have to be
    rewritten but has been changed.
    """
    record, about = job.record(out), None
    if _exists(record):
        about = read_record(record)
    listed, so_far = recorded(about or {}), written_so_far(job.work(out))
    kept, missing = [], []
    for name in outputs:
        path = job.target(out, ENDINGS[name])
        if not _exists(path):
            missing.append(name)
        elif name in listed or (name in so_far and path.is_file() and sha256(path) == so_far[name]):
            kept.append(name)  # unchanged, or since corrected by hand: kept in both cases
        else:
            raise InputError(f"'{path}' was not written by nucseg predict: rename or move it, or choose another --out.")
    if about is not None and missing and not unchanged(about):
        raise InputError(f"'{record}' has been changed since it was written: rename it, or choose another --out.")
    work = job.work(out)
    if _exists(work) and not _is_work(work):
        raise InputError(
            f"'{work}' was not made by nucseg predict, or is damaged: rename or move it, or choose another --out."
        )
    return Plan(job, about, tuple(missing), tuple(kept))


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def written_so_far(work: Path) -> dict[str, str]:
    """The outputs that an interrupted run had written before its record, with their SHA-256."""
    try:
        written = json.loads((work / "state.json").read_text(encoding="utf-8"))["written"]
        return {name: str(value) for name, value in written.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_work(work: Path) -> bool:
    if not work.is_dir():
        return False
    names = {path.name for path in work.iterdir() if not path.name.startswith(".state.")}  # temporary files
    if names <= {".lock"}:
        return True
    try:
        state = json.loads((work / "state.json").read_text(encoding="utf-8"))
        return names <= set(WORK_FILES) and {"settings", "rows", "seconds"} <= state.keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def remove_work(work: Path) -> None:
    """Remove nucseg's files from an image's work folder, and the folder if it is then empty."""
    for name in WORK_FILES:
        (work / name).unlink(missing_ok=True)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def check_folder(jobs: Sequence[Job], out: Path, outputs: Sequence[str]) -> list[Plan]:
    """Return the plan of every image.

    Raises ``InputError`` for the first file that blocks an output, with the number of others. Nothing is written, so
    that this can run before anything is loaded.
    """
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs:
        raise InputError(f"Output {(unknown or [''])[0]!r} is not known: choose from {', '.join(OUTPUTS)}.")
    if out.exists() and not out.is_dir():
        raise InputError(f"'{out}' is a file: give --out a folder.")
    plans, faults = [], []
    for job in jobs:
        try:
            plans.append(plan(job, out, outputs))
        except InputError as error:
            faults.append(str(error))
    if _exists(out / "summary.csv") and not is_summary(out / "summary.csv"):
        faults.append(
            f"'{out / 'summary.csv'}' was not written by nucseg predict, or has been changed: rename or move it, or "
            "choose another --out."
        )
    if faults:
        more = f" ({len(faults) - 1} more files are in the way.)" if len(faults) > 1 else ""
        raise InputError(faults[0] + more)
    return plans


def share_of(plans: Sequence[Plan], out: Path, share: tuple[int, int], logs: Path) -> Iterator[Plan]:
    """Yield the plans for one of several processes: its own share, then what the others have not finished or tried.

    ``share``: (k, n), the k-th of n processes, from 1. ``logs``: folder of the logs of images that failed.
    """
    k, n = share
    yield from plans[k - 1 :: n]
    for number, one in reversed(list(enumerate(plans))):  # from the end, where the others arrive last
        failed = logs / f"{one.job.name}.log"
        if number % n != k - 1 and not (_exists(one.job.record(out)) or failed.exists()):
            yield one


def is_finished(one: Plan, adapters_sha256: Sequence[str], options: dict[str, Any], *, read_image: bool = True) -> bool:
    """Whether all outputs of an image exist, made from the current image with these adapters and options.

    ``read_image``: compare the image's hash, which reads the whole file.
    """
    about = one.about
    return (
        about is not None
        and not one.missing
        and about.get("adapters_sha256") == list(adapters_sha256)
        and about.get("options") == options
        and about.get("nucseg") == __version__
        and (not read_image or about.get("image_sha256") == sha256(one.job.path))
    )


# ---------------------------------------------------------------- the summary


def summary_row(record: Path) -> dict[str, Any] | None:
    """The summary's row for an image, from its record; None for any other file."""
    try:
        about = read_record(record)
        return {key: about[key] for key in SUMMARY}
    except (InputError, KeyError):
        return None


def summary_rows(out: Path) -> list[dict[str, Any]]:
    """One row per image with results in ``out``, sorted by name."""
    rows = []
    for record in sorted(out.rglob("*.json")):
        folder = record.parent.relative_to(out)
        row = None if any(part.startswith(".") for part in (*folder.parts, record.name)) else summary_row(record)
        if row is not None and Path(str(row["image"])).parent == folder:  # otherwise it belongs to a nested --out
            rows.append(row)
    return rows


def summary_text(rows: Iterable[dict[str, Any]]) -> str:
    """The summary as CSV, one line per image."""
    return "".join(map(_line, [dict(zip(SUMMARY, SUMMARY, strict=True)), *rows]))


def _line(row: dict[str, Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(["" if row[key] is None else row[key] for key in SUMMARY])
    return buffer.getvalue()


def write_summary(out: Path) -> list[dict[str, Any]]:
    """Rewrite ``summary.csv``, unless it is the user's; return its rows (`summary_rows`)."""
    rows, path = summary_rows(out), out / "summary.csv"
    if _exists(path) and not is_summary(path):  # created since `check_folder`
        warnings.warn(f"'{path}' was not written by nucseg predict and is kept.", Notice, stacklevel=2)
    elif not (path.exists() and path.read_text(encoding="utf-8") == summary_text(rows)):
        with write_atomic(path) as part:
            part.write_text(summary_text(rows), encoding="utf-8", newline="")
    return rows


def is_summary(path: Path) -> bool:
    """Whether a summary.csv is nucseg's and unchanged: its lines match the records, in order.

    Lines of images whose records have been deleted are allowed.
    """
    try:
        with open(path, encoding="utf-8", newline="") as handle:
            head, *lines = handle.read().splitlines(keepends=True) or [""]
    except (OSError, UnicodeDecodeError):
        return False
    if head != summary_text([]):
        return False
    rows = summary_rows(path.parent)
    images, ours = {str(row["image"]) for row in rows}, map(_line, rows)
    return all(
        line in ours or _orphan(line, images) for line in lines
    )  # `in` consumes the iterator `ours`, so the order counts


def _orphan(line: str, images: set[str]) -> bool:
    """Whether a line has the form of nucseg's, for an image without a record."""
    [cells] = csv.reader([line])
    try:
        return len(cells) == len(SUMMARY) and cells[0] not in images and bool([float(c) for c in cells[1:] if c])
    except ValueError:
        return False
