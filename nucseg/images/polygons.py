"""Nuclei as polygons: from a mask to its outline and back, in GeoJSON (QuPath) and ImageJ's ROI files."""

import json
import math
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import roifile
from skimage.draw import polygon2mask
from skimage.measure import find_contours, regionprops

from nucseg.errors import InputError
from nucseg.images.raster import reading

LINE = (240, 228, 66)  # yellow of Okabe & Ito: seen on the purple and pink of H&E by every kind of eye
ROI_SUFFIXES = (".zip", ".roi")
MOST_ROIS, LARGEST_ROI = 200_000, 10_000_000  # entries, and bytes of one, that are read from a zip
Ring = np.ndarray  # (n, 2) x, y in px; 0, 0 is the top left corner of the top left pixel; the last point is the first


def rings(mask: np.ndarray, top: int = 0, left: int = 0) -> list[list[Ring]]:
    """(h, w) bool -> polygons, each its outer ring and then its holes, in px of the image that it is a window of.

    The rings run between the centres of the pixels in and outside (marching squares), so that filling them gives
    the mask back, pixel for pixel. Outer rings turn counterclockwise in (x, y), holes clockwise (RFC 7946, 3.1.6).
    """
    padded = np.pad(mask, 1)
    outer: list[list[Ring]] = []
    holes = []
    for contour in find_contours(padded.astype(np.float32), 0.5, fully_connected="low"):
        ring = _straightened(contour[:, ::-1] + (left - 0.5, top - 0.5))  # -1 for the padding, +0.5 for the corner
        area = _signed_area(ring)
        if area * _OUTER > 0:
            outer.append([ring if area > 0 else ring[::-1]])
        else:
            holes.append(ring[::-1] if area > 0 else ring)
    for hole in holes:  # into the smallest outer ring around it
        around = [p for p in outer if _contains(p[0], hole)]
        min(around, key=lambda p: abs(_signed_area(p[0]))).append(hole)
    return outer


def _signed_area(ring: Ring) -> float:
    x, y = ring.T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


# which way find_contours turns around what is higher than the level, in (x, y): found out once, not assumed
_OUTER = math.copysign(1, _signed_area(find_contours(np.pad(np.ones((1, 1)), 1), 0.5)[0][:, ::-1]))


def _straightened(ring: Ring) -> Ring:
    """Without the points that lie on the straight line between their neighbours."""
    points = ring[:-1]
    before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    kept = points[turns]
    return np.concatenate([kept, kept[:1]])


def _contains(ring: Ring, other: Ring) -> bool:
    (low, high), (first, last) = ((r.min(0), r.max(0)) for r in (ring, other))
    return bool((low <= first).all() and (last <= high).all())


def filled(polygons: Iterable[list[Ring]], shape: tuple[int, int], top: int = 0, left: int = 0) -> np.ndarray:
    """(h, w) bool: the pixels of a window at ``top``, ``left`` whose centres lie in the polygons (as from `rings`)."""
    mask = np.zeros(shape, bool)
    for outer, *holes in polygons:
        mask |= _fill(outer, shape, top, left)
        for hole in holes:
            mask &= ~_fill(hole, shape, top, left)
    return mask


def _fill(ring: Ring, shape: tuple[int, int], top: int, left: int) -> np.ndarray:
    return polygon2mask(shape, ring[:, ::-1] - (top + 0.5, left + 0.5))


def nuclei_rings(labels: np.ndarray, top: int = 0, left: int = 0) -> Iterator[tuple[int, list[list[Ring]]]]:
    """(id, polygons) of every nucleus of a label map, in the order of the ids."""
    for region in regionprops(labels):
        yield region.label, rings(region.image, top + region.bbox[0], left + region.bbox[1])


GEOJSON_HEAD, GEOJSON_TAIL = '{"type": "FeatureCollection", "features": [', "\n]}\n"


def feature(name: str, nucleus: int, polygons: list[list[Ring]], measurements: dict[str, float]) -> dict[str, Any]:
    """One nucleus as a GeoJSON feature that QuPath (0.4 and newer) takes for a detection, coordinates in px."""
    coordinates = [[ring.round(2).tolist() for ring in polygon] for polygon in polygons]
    one = len(coordinates) == 1
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name}/{nucleus}")),
        "geometry": {
            "type": "Polygon" if one else "MultiPolygon",
            "coordinates": coordinates[0] if one else coordinates,
        },
        "properties": {
            "objectType": "detection",
            "classification": {"name": "Nucleus", "color": list(LINE)},
            "measurements": measurements,
        },
    }


def write_geojson(path: Path, features: Iterable[dict[str, Any]]) -> None:
    """Write a FeatureCollection, one feature a line."""
    with open(path, "w", encoding="utf-8") as handle:
        handle.write(GEOJSON_HEAD)
        for i, one in enumerate(features):
            handle.write(("," if i else "") + "\n" + json.dumps(one, allow_nan=False))
        handle.write(GEOJSON_TAIL)


def read_geojson(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) int32 label map of the polygons of a GeoJSON file, numbered 1..n in their order; later ones lie on top.

    Raises ``InputError`` for a file that is no FeatureCollection of polygons.
    """
    path = Path(path)
    labels = np.zeros(shape, np.int32)
    try:
        features = json.loads(path.read_text(encoding="utf-8"))["features"]
        for number, one in enumerate(features, 1):
            shapes = one["geometry"]["coordinates"]
            if one["geometry"]["type"] == "Polygon":
                shapes = [shapes]
            elif one["geometry"]["type"] != "MultiPolygon":
                raise InputError(f"'{path}': feature {number} is a {one['geometry']['type']}: only polygons are read.")
            _paint(labels, [[np.asarray(ring, float)[:, :2] for ring in polygon] for polygon in shapes], number)
    except FileNotFoundError as error:
        raise InputError(f"The file '{path}' does not exist: check the path.") from error
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"'{path}' is not a GeoJSON FeatureCollection of polygons: export it again.") from error
    return labels


def _paint(labels: np.ndarray, polygons: list[list[Ring]], number: int) -> None:
    """Put a nucleus into a label map; what lies outside is cut off."""
    points = np.concatenate([ring for polygon in polygons for ring in polygon])
    if not np.isfinite(points).all():
        raise ValueError("coordinates that are no numbers")
    size = np.array(labels.shape)[::-1]
    low = np.clip(np.floor(points.min(0)), 0, size).astype(int)
    high = np.clip(np.ceil(points.max(0)), 0, size).astype(int)
    window = np.s_[low[1] : high[1], low[0] : high[0]]
    if labels[window].size:
        labels[window][filled(polygons, labels[window].shape, int(low[1]), int(low[0]))] = number


def roi(nucleus: int, polygons: list[list[Ring]]) -> bytes:
    """One nucleus as an ImageJ ROI, its largest outer ring: ImageJ's polygons have no holes."""
    outer = max((polygon[0] for polygon in polygons), key=lambda ring: abs(_signed_area(ring)))
    return roifile.ImagejRoi.frompoints(outer[:-1].astype(np.float32), name=f"{nucleus:06d}").tobytes()


def read_rois(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) int32 label map of the ROIs in an ImageJ zip (or one .roi file), numbered 1..n; later ones lie on top.

    Polygons, freehand and traced outlines, rectangles, ovals and composites of outlines are read. Raises ``InputError``
    for a damaged file, for other kinds (lines, points), where no ROI lies within the image, and for a zip with more or
    larger entries than any annotation has.
    """
    path = Path(path)
    labels = np.zeros(shape, np.int32)
    with reading(path):
        if path.suffix.lower() == ".roi":
            entries = [(path.name, path.read_bytes())]
        else:
            entries = list(_zip_entries(path))
        for number, (name, data) in enumerate(entries, 1):
            one, where = roifile.ImagejRoi.frombytes(data), f"{path}: {name}"
            if one.composite:
                _paint_parts(labels, one, where, number)
            else:
                _paint(labels, [[_roi_ring(one, where)]], number)
    if entries and not labels.any():
        raise InputError(f"'{path}' has no ROI within the image of {shape[1]} x {shape[0]} px: check whose it is.")
    return labels


def _zip_entries(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.lower().endswith(".roi")]
        if archive.infolist() and not entries:  # one without any entry is an image without nuclei
            raise InputError(f"'{path}' holds no ROI: save the ROI manager's ROIs as a zip (More » Save).")
        if len(entries) > MOST_ROIS or any(entry.file_size > LARGEST_ROI for entry in entries):
            raise InputError(f"'{path}' has more or larger entries than ROIs are: check what it holds.")
        for entry in sorted(entries, key=lambda entry: entry.filename):
            yield entry.filename, archive.read(entry)


def _paint_parts(labels: np.ndarray, one: roifile.ImagejRoi, where: str, number: int) -> None:
    """A composite ROI: what an odd number of its outlines encloses, as ImageJ fills it."""
    parts = [np.asarray(part, float) for part in one.coordinates(multi=True)]
    parts = [part for part in parts if part.ndim == 2 and len(part) > 2]
    if not parts:
        raise InputError(f"'{where}' has no outline: remove it.")
    mask = np.zeros(labels.shape, bool)
    for part in parts:
        inside = np.zeros(labels.shape, np.int32)
        _paint(inside, [[np.concatenate([part, part[:1]])]], 1)
        mask ^= inside > 0
    labels[mask] = number


def _roi_ring(one: roifile.ImagejRoi, where: str) -> Ring:
    kinds = roifile.ROI_TYPE
    if one.roitype in (kinds.POLYGON, kinds.FREEHAND, kinds.TRACED):
        points = np.asarray(one.coordinates(), float)
    elif one.roitype in (kinds.RECT, kinds.OVAL):
        low, high = np.array([one.left, one.top], float), np.array([one.right, one.bottom], float)
        turn = np.linspace(0, 2 * np.pi, 65)[:-1] if one.roitype == kinds.OVAL else np.pi * np.arange(0.25, 2, 0.5)
        reach = 1 if one.roitype == kinds.OVAL else np.sqrt(2)
        points = (low + high) / 2 + (high - low) / 2 * reach * np.stack([np.cos(turn), np.sin(turn)], 1)
    else:
        raise InputError(f"'{where}' is a {one.roitype.name.lower()}: only outlined areas are nuclei; remove it.")
    if points.ndim != 2 or len(points) < 3:
        raise InputError(f"'{where}' has no outline: remove it.")
    return np.concatenate([points, points[:1]])
