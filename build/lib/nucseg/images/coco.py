"""COCO annotations: one JSON file for many images, nuclei as polygons or run-length codes."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nucseg.errors import InputError
from nucseg.images.polygons import Annotation, Outline, paint, rings


def coco_annotation(path: Path, shape: tuple[int, int], image_name: str) -> Annotation:
    """Read the nuclei of one image, found by its file name, and the area that was not annotated (`paint`).

    ``shape``: (rows, columns) of the image. Polygons and run-length codes (as lists or text) are read. Annotations of
    the categories *ignore* and *region*, and those marked ``iscrowd``, are areas. Raises ``InputError`` for a file
    that does not list the image, or is damaged.
    """
    try:
        about = _load(str(path), path.stat().st_mtime_ns)
        name = Path(image_name).name
        chosen = [one for one in about["images"] if Path(str(one["file_name"]).replace("\\", "/")).name == name]
        if not chosen and len(about["images"]) == 1 and path.stem == Path(name).stem:
            chosen = about["images"]
        if len(chosen) != 1:
            raise InputError(f"'{path}' lists the image '{name}' {len(chosen)} times: it needs one entry of that name.")
        kinds = {one["id"]: str(one.get("name", "")) for one in about.get("categories", [])}
        outlines = []
        for one in about["annotations"]:
            if one["image_id"] == chosen[0]["id"]:
                kind = "ignore" if one.get("iscrowd") == 1 else kinds.get(one.get("category_id"), "")
                outlines.append(Outline(f"annotation {one.get('id')}", _polygons(one["segmentation"], shape), kind))
        return paint(outlines, shape, path)
    except FileNotFoundError as error:
        raise InputError(f"The file '{path}' does not exist: check the path.") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"'{path}' is not a file of COCO annotations: export it again.") from error


def coco_images(path: Path) -> list[str]:
    """The file names that a COCO file lists. Raises ``InputError`` if it is damaged."""
    try:
        about = _load(str(path), path.stat().st_mtime_ns)
        return [Path(str(one["file_name"]).replace("\\", "/")).name for one in about["images"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"'{path}' is not a file of COCO annotations: export it again.") from error


@lru_cache(maxsize=2)  # one file for all images
def _load(path: str, changed: int) -> dict[str, Any]:
    return json.loads(Path(path).read_bytes().decode("utf-8-sig"))


def _polygons(segmentation: Any, shape: tuple[int, int]) -> list[list[np.ndarray]]:
    if isinstance(segmentation, dict):
        height, width = (int(side) for side in segmentation["size"])
        if (height, width) != shape:
            raise ValueError("run-length code whose size differs from the image's")
        return rings(_from_runs(segmentation["counts"], height, width))
    polygons = []
    for flat in segmentation:
        points = np.asarray(flat, float).reshape(-1, 2)
        if len(points) < 3:
            raise ValueError("polygon of fewer than three points")
        polygons.append([np.concatenate([points, points[:1]])])
    return polygons


def _from_runs(counts: Any, height: int, width: int) -> np.ndarray:
    """COCO's run-length code, lengths of alternating runs of 0 and 1 in column-major order -> (H, W) bool."""
    lengths = np.asarray(_from_text(counts) if isinstance(counts, str) else counts, np.int64)
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError("run-length code that does not fill the image")
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, lengths).reshape(width, height).T


def _from_text(text: str) -> list[int]:
    """Decode COCO's compressed runs: 5 bits per character; from the 4th run on, differences to the run two before."""
    runs: list[int] = []
    at = 0
    while at < len(text):
        value = shift = 0
        more = True
        while more:
            bits = ord(text[at]) - 48
            value |= (bits & 31) << shift
            more = bool(bits & 32)
            at, shift = at + 1, shift + 5
            if not more and bits & 16:
                value |= -1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs
