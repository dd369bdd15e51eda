"""Segmentation of image files of any size into result files; an interrupted call resumes."""

import json
import math
import os
import shutil
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import tifffile
import zarr

import nucseg
from nucseg.data.own import warn_unknown
from nucseg.data.prefetch import ahead
from nucseg.errors import Busy, InputError, Notice, is_out_of_memory
from nucseg.files import move_new, only_one, sha256, write_json
from nucseg.images import export, measure, polygons
from nucseg.images.pixel_size import diameters
from nucseg.images.slides import Slide, open_slide
from nucseg.inference.folder import (
    ENDINGS,
    OUTPUTS,
    SUMMARY,
    Job,
    Plan,
    check_folder,
    find_images,
    plan,
    recorded,
    remove_work,
    sealed,
    write_summary,
    written_so_far,
)
from nucseg.inference.segmenter import Segmenter, free_memory, known_blocks


class Scratch:
    """An array in a file, read and written window by window, so that it uses disk space instead of memory.

    The whole file is allocated at once, so that a full disk raises ``InputError`` before the work starts.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: type):
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        size = math.prod(shape) * self.dtype.itemsize
        if not path.exists() or path.stat().st_size != size:
            self.fresh = True
            path.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free
            if free < size:
                raise InputError(
                    f"'{path.parent}' has {free / 2**30:.1f} GiB free, but {size / 2**30:.1f} GiB are needed while the "
                    "image is segmented: choose another --out."
                )
            with open(path, "wb") as handle:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle.fileno(), 0, max(size, 1))
                handle.truncate(size)
        else:
            self.fresh = False

    def _view(self) -> np.ndarray:
        # reopened for each access, because pages that stay mapped count as this process's memory
        return np.memmap(self.path, self.dtype, "r+", shape=self.shape)

    def __getitem__(self, window: Any) -> np.ndarray:
        return np.array(self._view()[window])

    def __setitem__(self, window: Any, values: Any) -> None:
        self._view()[window] = values


# ---------------------------------------------------------------- many images


def predict_files(
    paths: Sequence[str | Path],
    out: str | Path,
    segmenter: Segmenter,
    outputs: Sequence[str] = OUTPUTS,
    *,
    recursive: bool = False,
    progress: bool = True,
) -> tuple[pd.DataFrame, dict[Path, str]]:
    """Segment image files into ``out``; return one row per image, and the failures with their reasons.

    For an image ``a.png``, the files written are ``a.labels.tif``, ``a.nuclei.csv``, ``a.geojson``, ``a.overlay.png``
    and ``a.rois.zip`` (those chosen in ``outputs``), and last ``a.json``, a record of the settings and of the files'
    hashes. ``summary.csv`` has one row for each image with results in ``out``. With ``recursive``, images in
    subfolders are segmented into subfolders of the same names.

    Only files that nucseg wrote are replaced. A finished image is not segmented again: missing outputs are made from
    its current label map. An interrupted image resumes after its last complete row of fields. Several processes may
    share ``out``. If one image fails, or does not fit into memory, the others are still segmented.

    Raises ``InputError``, before any work, for problems with the images or options (`find_images`,
    ``Segmenter.check``) and for files of the user's in place of results (`check_folder`).
    """
    segmenter.check()
    jobs = find_images(paths, recursive)
    check_folder(jobs, Path(out), outputs)
    return predict_jobs(jobs, Path(out), segmenter, outputs, progress=progress)


def predict_jobs(
    jobs: Iterable[Job],
    out: Path,
    segmenter: Segmenter,
    outputs: Sequence[str] = OUTPUTS,
    *,
    progress: bool = True,
    logs: Path | None = None,
) -> tuple[pd.DataFrame, dict[Path, str]]:
    """Segment images whose folder has been checked, as `predict_files` does; return the same.

    ``logs``: folder for a file NAME.log with the reason for each failure, removed once the image succeeds.
    """
    failures: dict[Path, str] = {}
    done, unknown = [], _Unknown()
    for job in jobs:
        done.append(job)
        try:
            predict_file(job, out, segmenter, outputs, progress=progress, unknown=unknown)
        except Busy:  # another process is segmenting it
            continue
        except (InputError, OSError) as error:
            failures[job.path] = str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            failures[job.path] = OUT_OF_MEMORY
            free_memory()
        if logs is not None:
            _log(logs / f"{job.name}.log", failures.get(job.path, ""))
    unknown.warn(segmenter)
    rows = write_summary(out)
    mine = {
        job.name for job in done if job.path not in failures
    }  # without images that another process has not finished
    summary = pd.DataFrame(rows, columns=list(SUMMARY))
    return summary[summary["image"].isin(mine)].reset_index(drop=True), failures


def _log(path: Path, reason: str) -> None:
    if reason:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(reason + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


OUT_OF_MEMORY = (
    "it does not fit into memory: close other programs, pass --device cpu if it was GPU memory, or cut it into tiles"
)


class _Unknown:
    """The diameters of nuclei in images of unknown pixel size, collected for a single warning."""

    def __init__(self) -> None:
        self.images = 0
        self.diameters: list[np.ndarray] = []

    def warn(self, segmenter: Segmenter) -> None:
        """Warn if there are such images and an adapter would use their pixel size."""
        own = next((m.config.um_per_px for m in segmenter.models if m.config.um_per_px), 0)
        if self.images and own:
            warn_unknown(own, np.concatenate([np.zeros(0), *self.diameters]))


# ---------------------------------------------------------------- one image


def predict_file(
    job: Job,
    out: Path,
    segmenter: Segmenter,
    outputs: Sequence[str] = OUTPUTS,
    *,
    progress: bool = True,
    unknown: _Unknown | None = None,
) -> dict[str, Any]:
    """Segment one image file into ``out`` as in `predict_files`; return its record.

    Raises ``InputError`` for an image that cannot be read, for results made with other settings, and for files of the
    user's in place of results; ``Busy`` if another process works on this image; ``OSError`` if writing fails.
    """
    record, work, options = job.record(out), job.work(out), segmenter.options()
    with open_slide(job.path, segmenter.series) as slide:
        if segmenter.um_per_px and not any(model.config.um_per_px for model in segmenter.models):
            warnings.warn(
                "The adapter does not know its training images' µm per px, so --um-per-px changes no scale, only the "
                "units of the results; images should be like those it was trained on.",
                Notice,
                stacklevel=2,
            )
        segmenter = replace(segmenter, um_per_px=segmenter.um_per_px or slide.um_per_px)
        slide = replace(slide, um_per_px=segmenter.um_per_px)
        segmenter.check()
        settings = _settings(job, segmenter) | {"options": options}
        if _whole(todo := plan(job, out, outputs), settings, record):
            return todo.about or {}
        with only_one(work):
            if not _whole(
                todo := plan(job, out, outputs), settings, record
            ):  # another process may have finished it since
                todo = replace(todo, about=_complete(slide, todo, out, segmenter, settings, progress, unknown))
    remove_work(work)
    return todo.about or {}


def _settings(job: Job, segmenter: Segmenter) -> dict[str, Any]:
    """Everything that the results depend on."""
    return {
        "image": job.name,
        "image_sha256": sha256(job.path),
        "adapters": [model.adapter_name for model in segmenter.models],
        "adapters_sha256": [model.adapter_sha256 for model in segmenter.models],
        **segmenter.options(),
        **{name: getattr(segmenter.decoding(), name) for name in ("threshold", "ridge", "min_confidence")},
        **({"object_confidence": True} if segmenter.decoding().classifier else {}),
        "min_area": segmenter.smallest(),
        "nucseg": nucseg.__version__,
    }


def _whole(todo: Plan, settings: dict[str, Any], record: Path) -> bool:
    """Whether nothing is left to do. Raises ``InputError`` if the recorded settings differ."""
    for name, value in settings.items():
        if todo.about is not None and name != "options" and todo.about.get(name) != value:
            then = todo.about.get(name)
            raise InputError(f"'{record}' was made with {name} = {then!r}, not {value!r}: choose another --out.")
    return todo.about is not None and not todo.missing


def _complete(
    slide: Slide,
    todo: Plan,
    out: Path,
    segmenter: Segmenter,
    settings: dict[str, Any],
    progress: bool,
    unknown: _Unknown | None,
) -> dict[str, Any]:
    """Write the missing outputs, then the record; return the record."""
    job, about = todo.job, todo.about
    began, work = time.monotonic(), job.work(out)
    before = _state(work, settings, segmenter.row_ends(slide.shape))
    labels = None if about is None else _known_labels(job, out, slide, about)
    tissue = segmenter.tissue(slide)
    seconds, written_before = before["seconds"], before["written"]
    with ExitStack() as stack:
        if labels is None:
            labels = _Labels(work, segmenter.n_maps, slide.shape, before)
            rows = _predict(slide, labels.maps, work, segmenter, before, tissue, progress)
            filled = stack.enter_context(closing(ahead(rows, 0)))  # the network runs on while nuclei are cut out
            blocks: Iterable[export.Block] = segmenter.label_blocks(labels.maps, labels, filled=filled)
        else:
            blocks = _with_confidence(known_blocks(labels), job, out, about or {})
        written, areas = _write(slide, todo, out, labels, blocks, tissue, settings, before, written_before)
    count = len(areas) if about is None else about["nuclei"]
    if unknown is not None and slide.um_per_px is None:
        unknown.images += 1
        unknown.diameters.append(diameters(areas))
    if about is None:
        height, width = slide.shape
        mm2 = height * width * (slide.um_per_px / 1000) ** 2 if slide.um_per_px else None
        about = settings | {
            "height_px": height,
            "width_px": width,
            "nuclei": count,
            "area_px_mean": round(float(areas.mean()), 2) if count else None,
            "nuclei_per_mm2": round(count / mm2, 2) if mm2 else None,
            "coordinates": polygons.ORIGIN,
            "seconds": round(seconds + time.monotonic() - began, 1),
        }
    about = sealed(about | {"files": recorded(about) | written})
    write_json(job.record(out), about, replace=todo.about is not None)
    return about


def _with_confidence(
    blocks: Iterable[export.Block], job: Job, out: Path, about: dict[str, Any]
) -> Iterator[export.Block]:
    """Add the nuclei's confidence from the table that was written before, if it is still there, else NaN."""
    if not about.get("object_confidence"):
        yield from blocks
        return
    path, hashes = job.target(out, ENDINGS["csv"]), recorded(about)
    known = pd.Series(dtype=float)
    if "csv" in hashes and path.is_file() and sha256(path) == hashes["csv"]:
        known = pd.read_csv(path, index_col="id")["confidence"]
    for block in blocks:
        ids = np.unique(block.labels[block.labels > 0])
        yield replace(block, confidence=known.reindex(ids).to_numpy(float))


def _state(work: Path, settings: dict[str, Any], row_ends: list[int]) -> dict[str, Any]:
    """The progress of an interrupted run with the same settings and rows of fields, or that of a new run."""
    nothing = {"settings": settings, "row_ends": row_ends, "rows": 0, "seconds": 0.0, "written": written_so_far(work)}
    try:
        state = json.loads((work / "state.json").read_text(encoding="utf-8"))
        if state["settings"] != settings or state["row_ends"] != row_ends:  # rows of another layout end elsewhere
            return nothing
        return nothing | {"rows": int(state["rows"]), "seconds": float(state["seconds"])}
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: start again
        return nothing


class _Labels(Scratch):
    """The label map in the work folder, and the maps that it is cut from, from a stopped run or empty."""

    def __init__(self, work: Path, n_maps: int, shape: tuple[int, int], before: dict[str, Any]):
        write_json(work / "state.json", before)  # first, so that the folder is known as ours
        self.maps = Scratch(work / "maps", (n_maps, *shape), np.uint8)
        if self.maps.fresh:
            before["rows"] = 0
        (work / "labels").unlink(missing_ok=True)  # cut again from the start: it takes less than the maps
        super().__init__(work / "labels", shape, np.int32)


def _predict(
    slide: Slide, maps: Any, work: Path, segmenter: Segmenter, state: dict[str, Any], tissue: Any, progress: bool
) -> Iterator[int]:
    """Fill the maps from where a stopped run was, and update ``state``; yields how many rows of px are filled."""
    began, seconds, ends = time.monotonic(), state["seconds"], segmenter.row_ends(slide.shape)
    options = {"name": slide.path.name, "progress": progress, "tissue": tissue}
    if state["rows"]:
        yield ends[state["rows"] - 1]
    for rows in segmenter.predict_rows(slide, maps, state["rows"], **options):
        state |= {"rows": rows, "seconds": seconds + time.monotonic() - began}
        write_json(work / "state.json", state)
        yield ends[rows - 1]


def _known_labels(job: Job, out: Path, slide: Slide, about: dict[str, Any]) -> Any:
    """The current label map of a finished image, (H, W) integers read by windows; None if there is none."""
    path, hashes = job.target(out, ENDINGS["labels"]), recorded(about)
    if "labels" in hashes and path.is_file():
        if hashes["labels"] and sha256(path) != hashes["labels"]:
            warnings.warn(
                f"'{path}' has been changed since it was written: it is kept, and what was missing is made from it as "
                "it is now.",
                Notice,
                stacklevel=2,
            )
        try:
            labels = zarr.open(tifffile.imread(path, aszarr=True), mode="r")
            shape, kind = labels.shape, labels.dtype.kind  # type: ignore[union-attr]
        except Exception as error:  # tifffile raises nearly anything on damaged bytes
            raise InputError(f"'{path}' cannot be read as a label map: remove it to have it made again.") from error
        if shape != slide.shape or kind not in "iu":
            raise InputError(f"'{path}' is not a label map of its image's size any more: move it, or export it again.")
        return labels
    path = job.target(out, ENDINGS["geojson"])
    if "geojson" in hashes and path.is_file() and math.prod(slide.shape) < 2**28:
        return polygons.read_geojson(path, slide.shape)  # filling the outlines gives the label map back
    return None


def _write(
    slide: Slide,
    todo: Plan,
    out: Path,
    labels: Any,
    blocks: Iterable[export.Block],
    tissue: Any,
    settings: dict[str, Any],
    state: dict[str, Any],
    written: dict[str, str],
) -> tuple[dict[str, str], np.ndarray]:
    """Write the missing outputs, all or none; return the hashes of all outputs, and the areas of the nuclei in px."""
    job = todo.job
    areas = [np.zeros(0)]
    with ExitStack() as stack:
        # in the work folder, where a killed run leaves no strays, since all this takes as long as the network
        parts = {name: job.work(out) / f"new{ENDINGS[name]}" for name in todo.missing}
        for part in parts.values():
            stack.callback(part.unlink, missing_ok=True)
        tables = _Tables(parts, slide, _key(settings), "object_confidence" in settings, stack)
        for block in blocks:
            areas.append(tables.add(block))
        tables.finish()
        found = np.concatenate(areas)
        if "labels" in parts:
            export.write_labels(parts["labels"], labels, len(found), slide.um_per_px)
        if "overlay" in parts:
            export.write_overlay(parts["overlay"], slide, labels, tissue=tissue)
        hashes = {name: written[name] for name in todo.kept if name in written}
        hashes |= {name: sha256(part) for name, part in parts.items()}
        # recorded before they get their names: if this process is killed now, they are still recognised as nucseg's
        write_json(job.work(out) / "state.json", state | {"written": written | hashes})
        for name, part in parts.items():
            move_new(part, job.target(out, ENDINGS[name]))
    return hashes, found


def _key(settings: dict[str, Any]) -> str:
    """A key of the image, adapters and settings: equal if all of them are equal."""
    return json.dumps({name: value for name, value in settings.items() if name != "options"}, sort_keys=True)


class _Tables:
    """The table, the GeoJSON file and the ROI zip, each written block by block."""

    def __init__(self, parts: dict[str, Path], slide: Slide, key: str, confidence: bool, stack: ExitStack):
        self.parts, self.slide, self.key, self.empty = parts, slide, key, True
        self.geojson: IO[str] | None = None
        self.zip: zipfile.ZipFile | None = None
        if "rois" in parts:
            self.zip = stack.enter_context(zipfile.ZipFile(parts["rois"], "w", zipfile.ZIP_DEFLATED))
        if "csv" in parts:
            columns = measure.COLUMNS + (["confidence"] if confidence else [])
            head = measure.in_um(pd.DataFrame(columns=columns, dtype=float), slide.um_per_px)
            head.to_csv(parts["csv"], index=False)
        if "geojson" in parts:
            self.geojson = stack.enter_context(parts["geojson"].open("w", encoding="utf-8"))
            self.geojson.write(polygons.GEOJSON_HEAD)

    def add(self, block: export.Block) -> np.ndarray:
        """Write a block's nuclei; return their areas in px."""
        if not self.parts.keys() & {"csv", "geojson", "rois"}:
            areas = np.bincount(block.labels.ravel())[1:]
            return areas[areas > 0].astype(float)
        table, features, rois = export.export_block(block, self.slide, self.key)
        areas = table["area_px"].to_numpy(float)
        if "csv" in self.parts:
            table = measure.in_um(table, self.slide.um_per_px)
            places = [str(name) for name in table if str(name).startswith("centroid")]
            table[places] = table[places].map("{:.2f}".format)  # six significant digits are too few on a large slide
            table.to_csv(self.parts["csv"], mode="a", header=False, index=False, float_format="%.6g")
        if self.geojson:
            for one in features:
                self.geojson.write(("" if self.empty else ",") + "\n" + json.dumps(one, allow_nan=False))
                self.empty = False
        if self.zip:
            for number, data in zip(table["id"], rois, strict=True):
                self.zip.writestr(
                    zipfile.ZipInfo(f"{number:06d}.roi"), data, zipfile.ZIP_DEFLATED
                )  # without a time, so that equal results give equal bytes
        return areas

    def finish(self) -> None:
        if self.geojson:
            self.geojson.write(polygons.GEOJSON_TAIL)
            self.geojson.close()
        if self.zip:
            self.zip.close()
