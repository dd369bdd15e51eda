"""Files in, files out: many images of any size, one after the other, resumed where it was stopped."""

import json
import math
import os
import shutil
import time
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

import nucseg
from nucseg.errors import Busy, InputError
from nucseg.files import only_one, sha256, write_atomic, write_json
from nucseg.images import export, measure, polygons
from nucseg.images.raster import SUFFIXES
from nucseg.images.slides import Slide, open_slide
from nucseg.inference.segmenter import Segmenter

OUTPUTS = ("labels", "csv", "geojson", "overlay", "rois")
_ENDINGS = {
    "labels": ".labels.tif",
    "csv": ".nuclei.csv",
    "geojson": ".geojson",
    "overlay": ".overlay.png",
    "rois": ".rois.zip",
}
_SUMMARY = ("image", "height_px", "width_px", "um_per_px", "nuclei", "area_px_mean", "nuclei_per_mm2", "seconds")


class Scratch:
    """An array in a file, read and written window by window, so that it takes disk and not memory.

    The file's whole size is taken at once: a disk that is too small is found out before the work, in a clear error,
    and not in the middle of it.
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
                    f"'{path.parent}' has {free / 2**30:.1f} GiB free and {size / 2**30:.1f} are needed while the "
                    "image is segmented: choose another --out."
                )
            with open(path, "wb") as handle:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle.fileno(), 0, max(size, 1))
                handle.truncate(size)
        else:
            self.fresh = False

    def _view(self) -> np.ndarray:
        # opened anew each time: pages that stay mapped would count as this process's memory
        return np.memmap(self.path, self.dtype, "r+", shape=self.shape)

    def __getitem__(self, window: Any) -> np.ndarray:
        return np.array(self._view()[window])

    def __setitem__(self, window: Any, values: Any) -> None:
        self._view()[window] = values


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The image files among ``paths``; of a folder, those in it. In order, each once.

    Raises ``InputError`` for a path that does not exist, a folder without images, or two images of one name, whose
    results would overwrite each other.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
            files = [p for p in files if not _is_result(p)]
            if not files:
                raise InputError(f"The folder '{path}' has no images ({', '.join(SUFFIXES)}): check the path.")
        elif path.is_file():
            files = [path]
        else:
            raise InputError(f"There is no file or folder '{path}': check the path.")
        for file in files:
            if file.stem in found and found[file.stem].resolve() != file.resolve():
                raise InputError(
                    f"'{found[file.stem]}' and '{file}' have the same name: segment them into two folders."
                )
            found[file.stem] = file
    return list(found.values())


def _is_result(path: Path) -> bool:
    """Whether it was written by `predict_files`, into the folder of the images."""
    ending = next((end for end in _ENDINGS.values() if path.name.endswith(end)), None)
    return ending is not None and path.with_name(path.name.removesuffix(ending) + ".json").exists()


def predict_files(
    paths: Sequence[str | Path],
    out: str | Path,
    segmenter: Segmenter,
    outputs: Sequence[str] = OUTPUTS,
    *,
    progress: bool = True,
) -> tuple[pd.DataFrame, dict[Path, str]]:
    """Segment image files into ``out``; returns a row an image, and the failures with their reasons.

    For an image ``a.png`` it holds ``a.labels.tif``, ``a.nuclei.csv``, ``a.geojson``, ``a.overlay.png``,
    ``a.rois.zip`` (those of ``outputs``) and ``a.json``, which says how they were made and is written last.
    ``summary.csv`` has a row for each image whose results are in ``out``. An image that is finished is not repeated;
    one that was stopped goes on after its last whole row of fields. Several processes may share ``out``. One image
    that fails does not stop the others.

    Raises ``InputError`` for what is wrong with all of them (`find_images`, `Segmenter.check`), or where ``out``
    holds results that were made in another way.
    """
    segmenter.check()
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs:
        raise InputError(f"Output {(unknown or [''])[0]!r} is not known: choose from {', '.join(OUTPUTS)}.")
    images, out, failures = find_images(paths), Path(out), {}
    for image in images:
        try:
            predict_file(image, out, segmenter, outputs, progress=progress)
        except Busy:  # it is another process's
            continue
        except (InputError, OSError) as error:
            failures[image] = str(error)
    rows = [row for path in sorted(out.glob("*.json")) if (row := _summary_row(path))]
    mine = {image.name for image in images if image not in failures}  # or not finished, where Busy
    summary = pd.DataFrame(rows, columns=list(_SUMMARY))
    with write_atomic(out / "summary.csv") as part:
        summary.to_csv(part, index=False)
    return summary[summary["image"].isin(mine)].reset_index(drop=True), failures


def predict_file(
    path: Path, out: Path, segmenter: Segmenter, outputs: Sequence[str] = OUTPUTS, *, progress: bool = True
) -> dict[str, Any]:
    """Segment one image file into ``out``, as `predict_files` says; returns what its ``.json`` holds.

    Raises ``InputError`` for an image that cannot be read, or results that were made in another way; ``Busy`` where
    another process works on this image; ``OSError`` for a disk that cannot be written.
    """
    done, work = out / f"{path.stem}.json", out / f".{path.stem}.part"
    given = segmenter.um_per_px is not None
    with open_slide(path) as slide:
        if segmenter.um_per_px is None and slide.um_per_px is not None:
            segmenter = replace(segmenter, um_per_px=slide.um_per_px)
        slide = replace(slide, um_per_px=segmenter.um_per_px)
        if slide.um_per_px is None and any(model.config.um_per_px for model in segmenter.models):
            warnings.warn(  # the same words for all images, so that they are said once
                "Of some images the µm per px are not known, so they are taken to be the training images', "
                f"{next(m.config.um_per_px for m in segmenter.models if m.config.um_per_px):g}; pass --um-per-px.",
                stacklevel=2,
            )
        if given and not any(model.config.um_per_px for model in segmenter.models):
            warnings.warn(
                "The adapter does not know its training images' µm per px, so --um-per-px changes no scale, only the "
                "units of the results; images should be like those it was trained on.",
                stacklevel=2,
            )
        segmenter.check()
        settings = _settings(path, segmenter, outputs)
        whole = lambda: done.exists() and all((out / (path.stem + _ENDINGS[name])).exists() for name in outputs)
        if whole():
            return _same(done, settings)
        with only_one(work):
            if whole():  # by another process, since it was first asked
                return _same(done, settings)
            if done.exists():  # one of its files was deleted
                _same(done, settings)
            about = _segment_into(slide, out, work, segmenter, outputs, settings, progress)
            write_json(done, about)
    shutil.rmtree(work, ignore_errors=True)
    return about


def _settings(path: Path, segmenter: Segmenter, outputs: Sequence[str]) -> dict[str, Any]:
    """All that the results depend on."""
    return {
        "image": path.name,
        "image_sha256": sha256(path),
        "adapters": [model.adapter_name for model in segmenter.models],
        "adapters_sha256": [model.adapter_sha256 for model in segmenter.models],
        "um_per_px": segmenter.um_per_px,
        "threshold": segmenter.threshold,
        "min_area": segmenter.smallest(),
        "ridge": segmenter.ridge,
        "tta": segmenter.tta,
        "outputs": sorted(outputs),
        "nucseg": nucseg.__version__,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(about, dict) and "nuclei" in about:
            return about
    except ValueError:
        pass
    raise InputError(f"'{path}' is damaged: delete it, and the image is segmented again.")


def _summary_row(path: Path) -> dict[str, Any] | None:
    """What the summary says of a result, given its ``.json``; None for any other file of that kind."""
    try:
        about = _read(path)
        return {key: about[key] for key in _SUMMARY}
    except (InputError, OSError, KeyError):
        return None


def _same(done: Path, settings: dict[str, Any]) -> dict[str, Any]:
    about = _read(done)
    for name, value in settings.items():
        if about.get(name) != value:
            then = about.get(name)
            raise InputError(f"'{done}' was made with {name} = {then!r}, not {value!r}: choose another --out.")
    return about


def _segment_into(
    slide: Slide, out: Path, work: Path, segmenter: Segmenter, outputs: Sequence[str], settings: dict, progress: bool
) -> dict[str, Any]:
    began, state = time.monotonic(), work / "state.json"
    before = _state(state)
    maps = Scratch(work / "maps", (segmenter.n_maps, *slide.shape), np.uint8)
    start = before["rows"] if before["settings"] == settings and not maps.fresh else 0
    if not start:
        before["seconds"] = 0.0
    for rows in segmenter.predict_rows(slide, maps, start, name=slide.path.name, progress=progress):
        write_json(state, {"settings": settings, "rows": rows, "seconds": before["seconds"] + time.monotonic() - began})
    (work / "labels").unlink(missing_ok=True)  # cut again from the start: it takes a hundredth of the time
    labels = Scratch(work / "labels", slide.shape, np.int32)
    area, count = 0.0, 0
    with ExitStack() as stack:
        parts = {name: stack.enter_context(write_atomic(out / (slide.path.stem + _ENDINGS[name]))) for name in outputs}
        tables = _Tables(parts, slide, stack)
        for block in segmenter.label_blocks(maps, labels):
            area += tables.add(block)
            count += block.count
        tables.finish()
        if "labels" in parts:
            export.write_labels(parts["labels"], labels, count, slide.um_per_px)
        if "overlay" in parts:
            export.write_overlay(parts["overlay"], slide, labels)
    height, width = slide.shape
    mm2 = height * width * (slide.um_per_px / 1000) ** 2 if slide.um_per_px else None
    return settings | {
        "height_px": height,
        "width_px": width,
        "nuclei": count,
        "area_px_mean": round(area / count, 2) if count else None,
        "nuclei_per_mm2": round(count / mm2, 2) if mm2 else None,
        "seconds": round(before["seconds"] + time.monotonic() - began, 1),
    }


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": state["settings"], "rows": int(state["rows"]), "seconds": float(state["seconds"])}
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: start again
        return {"settings": None, "rows": 0, "seconds": 0.0}


class _Tables:
    """The table, the GeoJSON file and the ROI zip, each written as the blocks come."""

    def __init__(self, parts: dict[str, Path], slide: Slide, stack: ExitStack):
        self.parts, self.slide, self.empty = parts, slide, True
        self.geojson: IO[str] | None = None
        self.zip: zipfile.ZipFile | None = None
        if "rois" in parts:
            self.zip = stack.enter_context(zipfile.ZipFile(parts["rois"], "w", zipfile.ZIP_DEFLATED))
        if "csv" in parts:
            head = measure.in_um(pd.DataFrame(columns=measure.COLUMNS, dtype=float), slide.um_per_px)
            head.to_csv(parts["csv"], index=False)
        if "geojson" in parts:
            self.geojson = stack.enter_context(parts["geojson"].open("w", encoding="utf-8"))
            self.geojson.write(polygons.GEOJSON_HEAD)

    def add(self, block: Any) -> float:
        """Write a block's nuclei; returns the sum of their areas in px."""
        table, features, rois = export.export_block(block, self.slide, self.slide.path.stem)
        if "csv" in self.parts:
            table = measure.in_um(table, self.slide.um_per_px)
            places = [str(name) for name in table if str(name).startswith("centroid")]
            table[places] = table[places].map("{:.2f}".format)  # six digits would not do on a large slide
            table.to_csv(self.parts["csv"], mode="a", header=False, index=False, float_format="%.6g")
        if self.geojson:
            for one in features:
                self.geojson.write(("" if self.empty else ",") + "\n" + json.dumps(one, allow_nan=False))
                self.empty = False
        if self.zip:
            for number, data in zip(table["id"], rois, strict=True):
                self.zip.writestr(f"{number:06d}.roi", data)
        return float(table["area_px"].sum())

    def finish(self) -> None:
        if self.geojson:
            self.geojson.write(polygons.GEOJSON_TAIL)
            self.geojson.close()
        if self.zip:
            self.zip.close()
