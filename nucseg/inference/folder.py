"""The folder that ``nucseg predict`` writes to: which images it is given, and whose each file in the folder is.

Nothing that nucseg did not write is ever replaced. What it wrote is recorded with hashes in an image's ``.json``; a
file that is not recorded, or not what was recorded, is the user's. All of this is found out before any work, and
without loading PyTorch.
"""

import csv
import glob
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Sequence
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
LONGEST_NAME = 255  # bytes of a file's name, on nearly every system
JUNK = ("thumbs.db", "desktop.ini")
# all that nucseg puts into an image's work folder
WORK_FILES = ("state.json", "maps", "labels", ".lock", *(f"new{ending}" for ending in ENDINGS.values()))


# ---------------------------------------------------------------- images


@dataclass(frozen=True)
class Job:
    """One image and where its results go: ``out/folder``, ``folder`` being the image's place in the folder given."""

    path: Path
    folder: Path = Path()

    def target(self, out: Path, ending: str) -> Path:
        """The file of a result, given its ending."""
        return out / self.folder / f"{self.path.stem}{ending}"

    def record(self, out: Path) -> Path:
        """The .json that says how the results were made, and what was written."""
        return self.target(out, ".json")

    def work(self, out: Path) -> Path:
        """The folder of what is needed while the image is segmented."""
        return out / self.folder / f".{self.path.stem}.part"

    @property
    def name(self) -> str:
        """The image in the summary."""
        return (self.folder / self.path.name).as_posix()


def find_images(paths: Sequence[str | Path], recursive: bool = False) -> list[Job]:
    """The image files among ``paths``; of a folder, those in it, and in its subfolders if ``recursive``.

    In order, each once. What in a folder is not read is named in a warning. Names with * or ? are expanded where the
    shell did not (Windows). Raises ``InputError`` for a path that does not exist, a folder without images, a name too
    long for its results, or two images whose results would have the same names.
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
        raise InputError(f"The folder '{folder}' has no images{deeper}; those that are read: {', '.join(SUFFIXES)}.")
    if skipped:
        warnings.warn(f"'{folder}': {_some(skipped)} not read, as no image: {_names(skipped)}.", Notice, stacklevel=3)
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
    return "1 file was" if len(paths) == 1 else f"{len(paths)} files were"


def _names(paths: Iterable[Path], most: int = 8) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_name(path: Path) -> None:
    """Raise ``InputError`` where the names of the results would be longer than a disk takes."""
    longest = max(len(os.fsencode(f".{path.stem}{ending}")) for ending in ENDINGS.values()) + 9  # while it is written
    if longest > LONGEST_NAME:
        raise InputError(
            f"The name '{path.name}' is too long by {longest - LONGEST_NAME} bytes for its results: rename the image."
        )


# ---------------------------------------------------------------- records


def read_record(path: Path) -> dict[str, Any]:
    """What an image's .json says; ``InputError`` for one that nucseg predict did not write, or that is damaged."""
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
    """A record with the hash of its own content, by which a change is seen."""
    about = {name: value for name, value in about.items() if name != "record_sha256"}
    return about | {"record_sha256": _digest(about)}


def unchanged(about: dict[str, Any]) -> bool:
    """Whether a record is as it was sealed; one of an older version, which has no seal, counts as unchanged."""
    content = {name: value for name, value in about.items() if name != "record_sha256"}
    return about.get("record_sha256", _digest(content)) == _digest(content)


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def recorded(about: dict[str, Any]) -> dict[str, str]:
    """The outputs that a record lists, with their SHA-256 ("" where an older version did not keep it)."""
    files = about.get("files")
    if isinstance(files, dict):
        return {name: str(value) for name, value in files.items() if name in OUTPUTS}
    return {name: "" for name in about.get("outputs", ()) if name in OUTPUTS}


def is_result(path: Path) -> bool:
    """Whether a file is a result of `nucseg predict`, or the record or summary of one: not an image to segment."""
    if path.name == "summary.csv":
        return is_summary(path)
    if path.suffix == ".json":
        return summary_row(path) is not None
    ending = next((end for end in ENDINGS.values() if path.name.endswith(end)), None)
    if ending is None:
        return False
    record = path.with_name(path.name.removesuffix(ending) + ".json")
    return record.is_file() and summary_row(record) is not None


# ---------------------------------------------------------------- whose files


@dataclass(frozen=True)
class Plan:
    """What is to be done for one image.

    ``about``: its record, None where it has none yet. ``missing``: the outputs to write. ``kept``: those already there.
    """

    job: Job
    about: dict[str, Any] | None
    missing: tuple[str, ...]
    kept: tuple[str, ...]


def plan(job: Job, out: Path, outputs: Sequence[str]) -> Plan:
    """Find out which outputs of an image are there and whose they are.

    Raises ``InputError`` for a file in the place of an output that nucseg did not write, and for a record that is to
    be written anew but has been changed.
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
            kept.append(name)  # as it was written, or corrected by hand since: the user's now
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
    """The outputs that a run had in place when it was stopped before it could write the record."""
    try:
        written = json.loads((work / "state.json").read_text(encoding="utf-8"))["written"]
        return {name: str(value) for name, value in written.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_work(work: Path) -> bool:
    if not work.is_dir():
        return False
    names = {path.name for path in work.iterdir() if not path.name.startswith(".state.")}  # one that is being written
    if names <= {".lock"}:
        return True
    try:
        state = json.loads((work / "state.json").read_text(encoding="utf-8"))
        return names <= set(WORK_FILES) and {"settings", "rows", "seconds"} <= state.keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def remove_work(work: Path) -> None:
    """Remove an image's work folder: the files that nucseg put there, and the folder if nothing else is in it."""
    for name in WORK_FILES:
        (work / name).unlink(missing_ok=True)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def check_folder(jobs: Sequence[Job], out: Path, outputs: Sequence[str]) -> list[Plan]:
    """The plan of every image; ``InputError`` for the first file in the way, with the number of others.

    Nothing is written, so that it can be called before anything is loaded.
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


def is_finished(one: Plan, adapters_sha256: Sequence[str], options: dict[str, Any]) -> bool:
    """Whether all outputs of an image are there, made with these adapters and options from the image as it is now."""
    about = one.about
    return (
        about is not None
        and not one.missing
        and about.get("adapters_sha256") == list(adapters_sha256)
        and about.get("options") == options
        and about.get("nucseg") == __version__
        and about.get("image_sha256") == sha256(one.job.path)
    )


# ---------------------------------------------------------------- the summary


def summary_row(record: Path) -> dict[str, Any] | None:
    """What the summary says of an image, given its record; None for any other file."""
    try:
        about = read_record(record)
        return {key: about[key] for key in SUMMARY}
    except (InputError, KeyError):
        return None


def summary_rows(out: Path) -> list[dict[str, Any]]:
    """A row for each image whose results are in ``out``, in the order of their names."""
    rows = []
    for record in sorted(out.rglob("*.json")):
        folder = record.parent.relative_to(out)
        row = None if any(part.startswith(".") for part in (*folder.parts, record.name)) else summary_row(record)
        if row is not None and Path(str(row["image"])).parent == folder:  # else it is of an --out of its own
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
    """Write ``summary.csv`` anew, if it is ours; returns its rows (`summary_rows`)."""
    rows, path = summary_rows(out), out / "summary.csv"
    if _exists(path) and not is_summary(path):  # put there since `check_folder`
        warnings.warn(f"'{path}' was not written by nucseg predict, and is kept as it is.", Notice, stacklevel=2)
    elif not (path.exists() and path.read_text(encoding="utf-8") == summary_text(rows)):
        with write_atomic(path) as part:
            part.write_text(summary_text(rows), encoding="utf-8", newline="")
    return rows


def is_summary(path: Path) -> bool:
    """Whether a summary.csv is one of ours, unchanged: its lines are what the records say, in their order.

    A line of an image whose record has been deleted counts as ours.
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
    return all(line in ours or _orphan(line, images) for line in lines)  # `in` uses ours up, so the order counts


def _orphan(line: str, images: set[str]) -> bool:
    """Whether a line has the form of ours, of an image that has no record."""
    [cells] = csv.reader([line])
    try:
        return len(cells) == len(SUMMARY) and cells[0] not in images and bool([float(c) for c in cells[1:] if c])
    except ValueError:
        return False
