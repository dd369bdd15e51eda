"""Nuclei as polygons: converting masks to outlines and back, in GeoJSON (QuPath) and ImageJ's ROI files."""

import json
import re
import uuid
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import roifile
from skimage.draw import polygon2mask

from nucseg.errors import InputError, Notice
from nucseg.images.raster import reading

LINE = (240, 228, 66)  # yellow of Okabe & Ito: visible on H&E's purple and pink with every kind of colour vision
ROI_SUFFIXES = (".zip", ".roi")
MOST_ROIS, LARGEST_ROI = 200_000, 10_000_000  # limits of a zip: entries, and bytes per entry
LARGEST_SIDE, LARGEST_AREA = 2**24, 2**28  # px: larger coordinates, or areas of composite ROIs, mean a damaged file

Ring = np.ndarray  # (n, 2) x, y in px; 0, 0 is the top left corner of the top left pixel; the last point is the first


# ---------------------------------------------------------------- outlines


def rings(mask: np.ndarray, top: int = 0, left: int = 0) -> list[list[Ring]]:
    """(h, w) bool -> polygons, each an outer ring followed by its holes, in px of the whole image.

    ``top``, ``left``: position of the mask in the image. The rings run between the centres of pixels inside and
    outside (marching squares), so that filling them restores the mask exactly. Outer rings turn counterclockwise in
    (x, y), holes clockwise (RFC 7946, 3.1.6).
    """
    return next((polygons for _, polygons in nuclei_rings(mask.astype(np.uint8), top, left)), [])


def nuclei_rings(labels: np.ndarray, top: int = 0, left: int = 0) -> Iterator[tuple[int, list[list[Ring]]]]:
    """(id, polygons) of every nucleus of a label map, in the order of the ids; the polygons as from `rings`."""
    for nucleus, group in groupby(_traced(labels, top, left), key=itemgetter(0)):
        contours = [ring for _, ring in group]
        areas = [_signed_area(ring) for ring in contours]
        outer = [[ring] for ring, area in zip(contours, areas, strict=True) if area > 0]
        for hole in (ring for ring, area in zip(contours, areas, strict=True) if area < 0):
            around = [p for p in outer if _inside(hole[0], p[0])]
            min(around, key=lambda p: _signed_area(p[0])).append(hole)  # the smallest outer ring around it
        yield nucleus, outer


def _traced(labels: np.ndarray, top: int, left: int) -> Iterator[tuple[int, Ring]]:
    """Trace the contours of all nuclei of a label map at once: (id, ring) of each, in the order of the ids.

    The rings are those of ``skimage.measure.find_contours`` (``fully_connected="low"``) for each nucleus alone, less
    the points on straight lines, in half the time. Outer ones turn clockwise on the screen, holes the other way.
    A point lies between a pixel of a nucleus and one of its four neighbours outside. From there the contour goes on
    around the corner of that pixel, straight on, or into the corner of the next.
    """
    flat, width = np.pad(labels, 1).ravel(), labels.shape[1] + 2
    steps = np.array([-width, 1, width, -1])  # up, right, down, left: each a quarter turn after the one before
    inside = np.flatnonzero(flat)
    at = np.sort(np.concatenate([4 * inside[flat[inside] != flat[inside + step]] + k for k, step in enumerate(steps)]))
    pixel, k = at // 4, at % 4
    own, ahead = flat[pixel], pixel + steps[(k + 1) % 4]
    beside = ahead + steps[k]
    around, straight = 4 * pixel + (k + 1) % 4, 4 * ahead + k
    follows = np.where(flat[ahead] != own, around, np.where(flat[beside] != own, straight, 4 * beside + (k - 1) % 4))
    cell = pixel + np.array([-width, 0, -1, -width - 1])[k]  # 2 x 2 px around the corner to the next point
    order = np.lexsort((pixel, cell, own))  # as find_contours meets the points: this gives the start of each ring
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    after = rank[np.searchsorted(at, follows[order])]
    pixel, k, own = pixel[order], k[order], own[order]
    points = np.stack([pixel % width + left - 0.5, pixel // width + top - 0.5], axis=1)
    points += np.array([(0, -0.5), (0.5, 0), (0, 0.5), (-0.5, 0)])[k]
    leaving = points[after] - points
    arriving = np.empty_like(leaving)
    arriving[after] = leaving
    turns = (arriving[:, 0] * leaving[:, 1] != arriving[:, 1] * leaving[:, 0]).tolist()
    successors = after.tolist()
    for start in range(len(successors)):
        ring, point = [], start
        while (following := successors[point]) >= 0:
            ring.append(point)
            successors[point], point = -1, following
        if not ring:  # part of an earlier one
            continue
        first = ring.index(max(ring)) + 1
        kept = [i for i in ring[first:] + ring[:first] if turns[i]]
        yield int(own[start]), points[[*kept, kept[0]]]


def _signed_area(ring: Ring) -> float:
    x, y = ring.T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


def _inside(point: np.ndarray, ring: Ring) -> bool:
    """Whether a point lies inside a ring: a ray from it crosses the ring an odd number of times."""
    (x, y), (low, high) = point, (ring.min(0), ring.max(0))
    if not (low[0] <= x <= high[0] and low[1] <= y <= high[1]):
        return False
    (x0, y0), (x1, y1) = ring[:-1].T, ring[1:].T
    crosses = (y0 > y) != (y1 > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = x0 + (y - y0) / (y1 - y0) * (x1 - x0)
    return bool(np.count_nonzero(crosses & (x < at)) % 2)


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


# ---------------------------------------------------------------- GeoJSON

ORIGIN = "px from the top left corner of the top left pixel; x to the right, y down"
GEOJSON_HEAD = f'{{"type": "FeatureCollection", "units": "{ORIGIN}", "features": ['
GEOJSON_TAIL = "\n]}\n"


def feature(name: str, nucleus: int, polygons: list[list[Ring]], measurements: dict[str, float]) -> dict[str, Any]:
    """Return a nucleus as a GeoJSON feature, a detection in QuPath (0.4 and newer), with coordinates in px.

    ``name``: identifies the segmentation; ids differ between names, as QuPath keeps only one of two objects of one id.
    """
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
    """Write a FeatureCollection, one feature per line."""
    with open(path, "w", encoding="utf-8") as handle:
        handle.write(GEOJSON_HEAD)
        for i, one in enumerate(features):
            handle.write(("," if i else "") + "\n" + json.dumps(one, allow_nan=False))
        handle.write(GEOJSON_TAIL)


def read_geojson(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """Read the polygons of a GeoJSON file as an (H, W) int32 label map; `geojson_annotation` has the details."""
    return geojson_annotation(path, shape)[0]


def geojson_annotation(path: str | Path, shape: tuple[int, int]) -> "Annotation":
    """Read the nuclei and the areas that were not annotated from a GeoJSON file, as exported by QuPath.

    ``shape``: (rows, columns) of the image. The file holds a FeatureCollection, a GeometryCollection, a bare array of
    features or a single one, in UTF-8 or UTF-16. A cell is read as its ``nucleusGeometry``. Features of the classes
    *ignore* and *region* are areas (`paint`). Raises ``InputError`` for a missing or damaged file, geometries other
    than polygons, polygons of several planes, or none within the image.
    """
    path = Path(path)
    outlines = []
    planes = set()
    try:
        data = path.read_bytes()
        value = json.loads(data.decode(json.detect_encoding(data)))  # also UTF-16, which PowerShell writes
        features = value
        if isinstance(value, dict):
            features = value.get("features", value.get("geometries", value))
        if isinstance(features, dict):
            features = [features]
        if not isinstance(features, list):
            raise ValueError("no features")
        for number, one in enumerate(features, 1):
            geometry = one.get("nucleusGeometry") or one.get("geometry") or one  # a bare geometry
            if geometry["type"] == "Feature":
                raise InputError(f"'{path}': feature {number} has no geometry: remove it.")
            if geometry["type"] not in ("Polygon", "MultiPolygon"):
                raise InputError(f"'{path}': feature {number} is a {geometry['type']}, not a polygon: remove it.")
            shapes = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
            plane = geometry.get("plane") or {}
            planes.add((plane.get("z", 0), plane.get("t", 0)))
            polygons = [[np.asarray(ring, float)[:, :2] for ring in polygon] for polygon in shapes]
            outlines.append(Outline(f"feature {number}", polygons, _class_of(one)))
        if len(planes) > 1:
            raise InputError(f"'{path}' has polygons of {len(planes)} planes: save those of one plane for one image.")
        return paint(outlines, shape, path)
    except FileNotFoundError as error:
        raise InputError(f"The file '{path}' does not exist: check the path.") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"'{path}' is not a GeoJSON FeatureCollection of polygons: export it again.") from error


def _class_of(one: dict[str, Any]) -> str:
    """The name of a feature's class, as written by any version of QuPath; "" without one."""
    about = (one.get("properties") or {}).get("classification") or ""
    if isinstance(about, dict):
        about = about.get("name") or ": ".join(map(str, about.get("names") or ()))
    return str(about)


# ---------------------------------------------------------------- outlines to label maps


@dataclass(frozen=True)
class Outline:
    """A drawn object: its name in the file, its polygons (outer ring, then holes), and the name of its class."""

    name: str
    polygons: list[list[Ring]]
    kind: str = ""

    @property
    def area(self) -> float:
        """Area in px, without holes."""
        rings_ = [(1 if i == 0 else -1, ring) for polygon in self.polygons for i, ring in enumerate(polygon)]
        return sum(sign * abs(_signed_area(ring)) for sign, ring in rings_)


@dataclass(frozen=True)
class Annotation:
    """A label map, (H, W) int32, nuclei 1..n; and (H, W) bool, True where nothing was annotated (None: nowhere)."""

    labels: np.ndarray
    ignore: np.ndarray | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.labels, self.ignore))

    def __getitem__(self, index: int) -> Any:
        return (self.labels, self.ignore)[index]


def area_kind(name: str) -> str:
    """ "ignore" or "region" for a class or ROI with that name (Ignore*, region-2, ...), "" for any other."""
    found = re.fullmatch(r"(ignore|region)\*?([-_ ]?\d+)?", name.strip().casefold())
    return found[1] if found else ""


def paint(outlines: Sequence[Outline], shape: tuple[int, int], path: Path) -> Annotation:
    """Draw outlines as a label map and the area to ignore, both (H, W).

    Nuclei are numbered 1..n in the order given. Large ones are painted first, so that smaller ones inside them remain.
    Outlines of the class *ignore* are areas to ignore; if any outline has the class *region*, everything outside the
    regions is ignored too. Outlines without a pixel are named in a warning. Raises ``InputError`` if there are
    outlines, but none lies within the image.
    """
    labels = np.zeros(shape, np.int32)
    areas: dict[str, np.ndarray] = {}
    for outline in outlines:
        if kind := area_kind(outline.kind):
            area = areas.setdefault(kind, np.zeros(shape, bool))
            _paint(area, outline.polygons, True)
    nuclei = [outline for outline in outlines if not area_kind(outline.kind)]
    outside = []
    for index in sorted(range(len(nuclei)), key=lambda i: -nuclei[i].area):
        if not _paint(labels, nuclei[index].polygons, index + 1):
            outside.append(index)
    if outlines and len(outside) == len(nuclei) and not any(area.any() for area in areas.values()):
        raise InputError(f"'{path}' has no outline within the image of {shape[1]} x {shape[0]} px: check its image.")
    left = np.bincount(labels.ravel(), minlength=len(nuclei) + 1)[1:] > 0
    covered = [i for i in np.flatnonzero(~left) if i not in outside]
    for lost, why in ((sorted(outside), "outside the image"), (covered, "completely covered by others")):
        if lost:
            names = ", ".join(nuclei[i].name for i in lost[:5]) + ("" if len(lost) <= 5 else ", ...")
            warnings.warn(f"'{path}': {len(lost)} of {len(nuclei)} outlines are {why}: {names}.", Notice, stacklevel=2)
    _warn_of_areas(nuclei, path)
    number = np.concatenate([[0], np.where(left, np.cumsum(left), 0)]).astype(np.int32)
    ignore = areas.get("ignore")
    if "region" in areas:
        ignore = ~areas["region"] if ignore is None else ignore | ~areas["region"]
    return Annotation(number[labels], ignore)


def _warn_of_areas(nuclei: Sequence[Outline], path: Path) -> None:
    """Warn about outlines far too large for a nucleus, such as tissue areas drawn along with the nuclei."""
    sizes = np.array([outline.area for outline in nuclei])
    if len(sizes) < 3:
        return
    for index in np.flatnonzero(sizes > 20 * np.median(sizes))[:5]:
        kind = f" ({nuclei[index].kind})" if nuclei[index].kind else ""
        times = sizes[index] / np.median(sizes)
        warnings.warn(
            f"'{path}': {nuclei[index].name}{kind} has an area of {sizes[index]:.0f} px, {times:.0f} times the median, "
            "and counts as a nucleus. Give it the class Region* if only its inside is annotated, Ignore* to ignore it, "
            "or remove it.",
            Notice,
            stacklevel=3,
        )


def _paint(labels: np.ndarray, polygons: list[list[Ring]], number: int) -> bool:
    """Fill the polygons with ``number`` in an array; return False if they lie outside it."""
    points = np.concatenate([ring for polygon in polygons for ring in polygon])
    if not np.isfinite(points).all():
        raise ValueError("coordinates that are no numbers")
    size = np.array(labels.shape)[::-1]
    low = np.clip(np.floor(points.min(0)), 0, size).astype(int)
    high = np.clip(np.ceil(points.max(0)), 0, size).astype(int)
    window = np.s_[low[1] : high[1], low[0] : high[0]]
    if not labels[window].size:
        return False
    inside = filled(polygons, labels[window].shape, int(low[1]), int(low[0]))
    labels[window][inside] = number
    return bool(inside.any())


# ---------------------------------------------------------------- ImageJ


def roi(nucleus: int, polygons: list[list[Ring]]) -> bytes:
    """Return a nucleus as an ImageJ ROI: a polygon, or a composite if it has holes or several parts."""
    name = f"{nucleus:06d}"
    outlines = [ring for polygon in polygons for ring in polygon]
    if len(outlines) == 1:
        return roifile.ImagejRoi.frompoints(outlines[0][:-1].astype(np.float32), name=name).tobytes()
    path: list[float] = []  # codes of Java's shapes: 0 move to, 1 line to, 4 close
    for ring in outlines:
        path += [0, *ring[0]]
        for point in ring[1:-1]:
            path += [1, *point]
        path += [4]
    points = np.concatenate(outlines)
    (left, top), (right, bottom) = np.floor(points.min(0)).astype(int), np.ceil(points.max(0)).astype(int)
    one = roifile.ImagejRoi(roitype=roifile.ROI_TYPE.RECT, left=left, top=top, right=right, bottom=bottom, name=name)
    one.multi_coordinates, one.shape_roi_size = np.array(path, np.float32), len(path)
    return one.tobytes()


def read_rois(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """Read the ROIs of an ImageJ zip or .roi file as an (H, W) int32 label map; `roi_annotation` has the details."""
    return roi_annotation(path, shape)[0]


def roi_annotation(path: str | Path, shape: tuple[int, int]) -> Annotation:
    """Read the nuclei and the areas that were not annotated from an ImageJ zip or .roi file.

    ``shape``: (rows, columns) of the image. Polygons, freehand and traced outlines, rectangles, ovals and composites
    of outlines are read; ROIs named *ignore* or *region* are areas (`paint`). Raises ``InputError`` for a damaged
    file, other kinds of ROI (lines, points), ROIs of several slices, or none within the image, and for a zip with more
    or larger entries than annotations have.
    """
    path = Path(path)
    outlines, places = [], set()
    with reading(path):
        if path.suffix.lower() == ".roi":
            entries = [(path.name, path.read_bytes())]
        else:
            entries = list(_zip_entries(path))
        for name, data in entries:
            one, where = roifile.ImagejRoi.frombytes(data), f"{path}: {name}"
            own_name = re.sub(r"\.roi$", "", one.name or Path(name).name, flags=re.IGNORECASE)
            polygons = _roi_parts(one, where) if one.composite else [[_roi_ring(one, where)]]
            outlines.append(Outline(own_name, polygons, area_kind(own_name)))
            places.add(("slice", one.position) if one.position else ("z, t", one.z_position, one.t_position))
        places -= {("z, t", 0, 0)}  # visible on every slice
        if len(places) > 1:
            raise InputError(f"'{path}' has ROIs of {len(places)} slices: save the ROIs of one slice for one image.")
        return paint(outlines, shape, path)


def _zip_entries(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.lower().endswith(".roi")]
        # macOS adds a file of its own for each
        entries = [e for e in entries if "__MACOSX" not in e.filename and not Path(e.filename).name.startswith("._")]
        if archive.infolist() and not entries:  # an empty zip stands for an image without nuclei
            raise InputError(f"'{path}' holds no ROI: save the ROI manager's ROIs as a zip (More » Save).")
        if len(entries) > MOST_ROIS or any(entry.file_size > LARGEST_ROI for entry in entries):
            raise InputError(f"'{path}' has more or larger entries than ROIs are: check what it holds.")
        for entry in sorted(entries, key=lambda entry: entry.filename):
            yield entry.filename, archive.read(entry)


def _roi_parts(one: roifile.ImagejRoi, where: str) -> list[list[Ring]]:
    """The polygons of a composite ROI: the area enclosed by an odd number of its outlines, as ImageJ fills it."""
    parts = [np.asarray(part, float) for part in one.coordinates(multi=True)]
    parts = [np.concatenate([part, part[:1]]) for part in parts if part.ndim == 2 and len(part) > 2]
    if not parts:
        raise InputError(f"'{where}' has no outline: remove it.")
    points = np.concatenate(parts)
    if not np.isfinite(points).all():
        raise ValueError("coordinates that are no numbers")
    low, high = np.floor(points.min(0)).astype(int), np.ceil(points.max(0)).astype(int)
    if (np.abs([low, high]) > LARGEST_SIDE).any() or np.prod(high - low) > LARGEST_AREA:
        raise InputError(f"'{where}' is larger than any nucleus: remove it.")
    mask = np.zeros((high - low)[::-1], bool)
    for part in parts:
        mask ^= _fill(part, mask.shape, int(low[1]), int(low[0]))
    return rings(mask, int(low[1]), int(low[0]))


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
