"""Reading masks of every supported format as a label map and the area that was not annotated.

A label map of wrong nuclei is worse than none: a mask that looks binary, inverted or coloured, or seems to hold
classes, is refused with a sentence that says what it seems to be and how to convert it.
"""

import importlib
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from scipy.ndimage import find_objects
from skimage.measure import label as connected_components

from nucseg.errors import InputError, Notice
from nucseg.images.coco import coco_annotation
from nucseg.images.polygons import ROI_SUFFIXES, Annotation, geojson_annotation, roi_annotation
from nucseg.images.raster import TIFFS, check_size, header, is_tiff, lossy_picture, open_picture, reading

PICTURE_MASKS = (".png", *TIFFS, ".bmp", ".gif", ".webp", ".pgm")
LOSSY_MASKS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jp2",
    ".j2k",
    ".jpx",
    ".jxl",
)  # listed, so that they are refused with a reason
ARRAY_MASKS = (".npy", ".mat")
OUTLINE_MASKS = (".geojson", ".json", *ROI_SUFFIXES)
MASK_SUFFIXES = PICTURE_MASKS + LOSSY_MASKS + ARRAY_MASKS + OUTLINE_MASKS
"""The endings of mask files, in lower case; capitals work too."""
MASK_FORMS = (
    "label maps (.tif, .png, .bmp), ImageJ's ROIs (.zip, .roi), QuPath's .geojson, NumPy's .npy, Cellpose's _seg.npy, "
    "HoVer-Net's .mat, COCO's .json"
)

Instances = Literal["ids", "components"]
INSTANCES = ("ids", "components")

# Compressions of TIFF whose values may not be those that were saved: JPEG, JPEG 2000, WebP and JPEG XL
_LOSSY = {6: "JPEG", 7: "JPEG", 33007: "JPEG", 34892: "JPEG", 33003: "JPEG 2000", 33004: "JPEG 2000"}
_LOSSY |= {33005: "JPEG 2000", 34712: "JPEG 2000", 34927: "WebP", 50001: "WebP", 50002: "JPEG XL", 52546: "JPEG XL"}


def read_mask(
    path: str | Path, shape: tuple[int, int], instances: Instances = "ids", image_name: str = ""
) -> Annotation:
    """Read the mask of an image of (rows, columns) ``shape``: its label map, and the area that was not annotated.

    ``instances``: "components" for a binary mask, whose 8-connected components become the nuclei.
    ``image_name``: the image's file name in a COCO file.
    Raises ``InputError`` as `read_labels`, `geojson_annotation`, `roi_annotation` and `coco_annotation` do, and if
    the sizes of mask and image differ.
    """
    path, ending = Path(path), Path(path).suffix.lower()
    if ending in ROI_SUFFIXES:
        return roi_annotation(path, shape)
    if ending in (".geojson", ".json"):
        if is_coco(path):
            return coco_annotation(path, shape, image_name)
        return geojson_annotation(path, shape)
    return Annotation(read_labels(path, instances=instances))


def is_coco(path: Path) -> bool:
    """Whether a .json file holds COCO annotations."""
    if path.suffix.lower() != ".json":
        return False
    with reading(path), open(path, encoding="utf-8-sig", errors="replace") as handle:
        return '"annotations"' in handle.read()


def read_labels(path: str | Path, *, instances: Instances = "ids", trusted: bool = False) -> np.ndarray:
    """Read a mask file as a label map: (H, W) int32, 0 = background, nuclei renumbered 1..n in the order of their ids.

    Accepted are integers of any type, whole floats, palette indices, and grey saved as RGB.
    ``instances``: "components" turns the 8-connected components of a binary mask into nuclei. ``trusted``: skips the
    checks for binary, class, inverted or colour masks, for data sets whose masks are known to be label maps.

    Raises `InputError` for a file that is missing, damaged, truncated or lossy; for several pages or colours, negative
    ids, fractions or no background; and for a mask that seems binary, inverted or coloured, or to hold classes.
    """
    path = Path(path)
    if instances not in INSTANCES:
        raise InputError(f"Option instances = {instances!r} is not known: choose ids or components.")
    with reading(path):
        mask, palette = _stored(path)
        check_size(path, *(mask.shape if mask.ndim == 2 else (1, 1)))
    mask = _one_channel(path, mask)
    values, ids = _renumbered(path, mask)
    if instances == "components":
        return _components(path, values, ids)
    if not trusted:
        _look(path, values, ids, palette)
    return ids


# ---------------------------------------------------------------- stored values


def _stored(path: Path) -> tuple[np.ndarray, bool]:
    """The mask as stored, of any shape and type, and whether its values are palette indices."""
    ending = path.suffix.lower()
    if ending == ".npy":
        return _numpy_mask(path), False
    if ending == ".mat":
        return _matlab_mask(path), False
    head = header(path)
    if is_tiff(head):
        return _tiff_mask(path)
    if lossy := lossy_picture(path):
        name = "a JPEG" if lossy == "JPEG" else f"{lossy}-compressed"
        raise InputError(f"The mask '{path}' is {name}, which alters labels: export it as PNG or TIFF.")
    if head.startswith(b"\x89PNG") and head[24:25] == b"\x10" and head[25:26] in (b"\2", b"\4", b"\6"):
        raise InputError(f"The mask '{path}' is in 16 bit colour: save it with one channel, one id per nucleus.")
    with open_picture(path) as image:
        return np.array(image), image.mode in ("P", "PA")


def _tiff_mask(path: Path) -> tuple[np.ndarray, bool]:
    with tifffile.TiffFile(path) as tiff:
        main = [s for s in tiff.series if not int(s.keyframe.subfiletype) & 1] or list(tiff.series)
        if len(main) != 1 or len(main[0].pages) != 1:
            raise InputError(f"'{path}' has {len(tiff.pages)} pages: save it as a single flat image.")
        page = main[0].keyframe
        if lossy := _LOSSY.get(int(page.compression)):
            raise InputError(f"The mask '{path}' is {lossy}-compressed, which alters labels: export it as PNG or TIFF.")
        check_size(path, page.imagelength, page.imagewidth)
        mask = main[0].asarray().squeeze()
        if mask.ndim == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            mask = np.moveaxis(mask, 0, -1)
        if mask.ndim < 2:
            mask = mask.reshape(page.imagelength, page.imagewidth)
        return mask, page.photometric == tifffile.PHOTOMETRIC.PALETTE


_ARRAY_PARTS = (
    "numpy.ndarray",
    "numpy.dtype",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer",
)


class _Inert:
    """A stand-in for every object in a pickle that is not an array; it does nothing and keeps nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _ArraysOnly(pickle.Unpickler):
    """An unpickler for arrays and plain containers; nothing else in the file is imported or run."""

    def find_class(self, module: str, name: str) -> Any:
        inner = module.replace("numpy.core", "numpy._core")  # the module's name before NumPy 2
        if f"{inner}.{name}" in _ARRAY_PARTS:
            return getattr(importlib.import_module(inner if hasattr(np, "_core") else module), name)
        return _Inert


def _numpy_mask(path: Path) -> np.ndarray:
    """The (H, W) array of an .npy file, or ``masks`` in a file saved by Cellpose (x_seg.npy)."""
    with open(path, "rb") as handle:
        version = np.lib.format.read_magic(handle)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(handle)
        if not dtype.hasobject:
            handle.seek(0)
            return np.load(handle, allow_pickle=False)
        stored = _ArraysOnly(handle).load()
    about = stored.item() if isinstance(stored, np.ndarray) and shape == () else None
    if isinstance(about, dict) and isinstance(about.get("masks"), np.ndarray):
        return about["masks"]
    raise InputError(f"'{path}' has no array 'masks' in it: save the label map itself with numpy.save.")


# SciPy's reader crashes the interpreter on some damaged files, so it runs in a process of its own.
_READ_MATLAB = """
import io, sys
import numpy as np
from scipy.io import matlab
try:
    names = [name for name, _, _ in matlab.whosmat(sys.argv[1])]
    known = [name for name in ("inst_map", "instance_map", *(names if len(names) == 1 else ())) if name in names]
    if not known:
        sys.exit("no array inst_map (only " + (", ".join(names) or "nothing") + "): give the label map that name")
    array = np.asarray(matlab.loadmat(sys.argv[1], variable_names=known[:1])[known[0]])
except NotImplementedError:
    sys.exit("is a MATLAB 7.3 file: save it with save(..., '-v7')")
whole = io.BytesIO()
np.save(whole, array, allow_pickle=False)
sys.stdout.buffer.write(whole.getvalue())
"""


def _matlab_mask(path: Path) -> np.ndarray:
    """HoVer-Net's ``inst_map``, or the only array in the file."""
    done = subprocess.run([sys.executable, "-c", _READ_MATLAB, str(path)], capture_output=True)
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode == 1 and said.startswith("no array"):
        raise InputError(f"'{path}' has {said}.")
    if done.returncode == 1 and said.startswith("is a MATLAB"):
        raise InputError(f"'{path}' {said}.")
    if done.returncode:
        raise InputError(f"'{path}' cannot be read as a MATLAB file: it is damaged, so save it again.")
    return np.load(io.BytesIO(done.stdout), allow_pickle=False)


# ---------------------------------------------------------------- interpretation


def _one_channel(path: Path, mask: np.ndarray) -> np.ndarray:
    """Reduce a mask with equal colour channels to (H, W). Raises ``InputError`` for a colour picture."""
    if mask.dtype.kind not in "buif":
        raise InputError(f"The mask '{path}' holds {mask.dtype} values: save it as whole numbers (uint16).")
    if not mask.size:
        raise InputError(f"The mask '{path}' has no pixels: export it again.")
    if mask.ndim > 2:
        mask = mask.squeeze() if 1 in mask.shape else mask
    if mask.ndim == 3 and mask.shape[2] in (2, 3, 4):
        colours = mask[..., : 1 if mask.shape[2] == 2 else 3]
        opaque = mask.shape[2] == 3 or (mask[..., -1] == mask[..., -1].max()).all()
        if opaque and (colours == colours[..., :1]).all():
            return colours[..., 0]
        raise InputError(
            f"The mask '{path}' is a colour picture: save it with one channel, 0 for background and one id per nucleus."
        )
    if mask.ndim != 2:
        shape = " x ".join(map(str, mask.shape))
        raise InputError(f"The mask '{path}' has shape {shape}: save it with one channel, one id per nucleus.")
    return mask


def _renumbered(path: Path, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values, ascending with 0 first, and an (H, W) int32 map of positions in that list."""
    if mask.dtype.kind == "f":
        if not np.isfinite(mask).all() or (mask != np.rint(mask)).any():
            raise InputError(
                f"The mask '{path}' holds fractions, as a probability map does: save a label map of whole numbers."
            )
        mask = mask.astype(np.int64)
    values, ids = np.unique(mask, return_inverse=True)
    ids = ids.reshape(mask.shape)
    if values[0] < 0:
        raise InputError(f"The mask '{path}' holds negative ids: use 0 for background, 1..n for nuclei.")
    if values[0] > 0:
        raise InputError(f"The mask '{path}' has no background: give the pixels outside nuclei the value 0.")
    return values, ids.astype(np.int32)


def _components(path: Path, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The components of a binary mask, thresholded at half of its largest value because edges may be soft."""
    if len(values) > 2 and _dominant(ids) != len(values) - 1:
        raise InputError(f"The mask '{path}' has {len(values) - 1} values besides 0: components are for binary masks.")
    inside = ids > np.searchsorted(values, int(values[-1]) / 2, side="left") - 1
    inside &= ids > 0
    _refuse_inverted(path, values, inside.astype(np.int32), False)
    return connected_components(inside, connectivity=2).astype(np.int32)


def _dominant(ids: np.ndarray) -> int:
    """The id with the largest area, 0 excluded."""
    return int(np.bincount(ids.ravel())[1:].argmax()) + 1 if ids.any() else 0


def _look(path: Path, values: np.ndarray, ids: np.ndarray, palette: bool) -> None:
    """Raise ``InputError`` for a mask that does not look like a label map."""
    n = len(values) - 1
    if not n:
        return
    _refuse_inverted(path, values, ids, palette)
    parts = connected_components(ids, connectivity=2)  # each component has a single value
    areas = np.bincount(parts.ravel())[1:]
    owner = np.zeros(len(areas) + 1, np.int64)
    owner[parts.ravel()] = ids.ravel()
    owner = owner[1:]
    scattered = _scattered(parts, areas, owner, ids, n)
    binary = "(--instances components makes a nucleus of each connected component of a binary mask)"
    if n == 1:
        if np.count_nonzero(areas >= 0.1 * areas.max()) > 1:
            raise InputError(
                f"The mask '{path}' seems to be binary: all of its {len(areas)} separate areas have the value "
                f"{int(values[1])}; give each nucleus its own id {binary}."
            )
        return
    covered = np.bincount(ids.ravel(), minlength=n + 1)[1:]
    few = scattered.sum() < n / 3 and covered[scattered[1:]].sum() < covered.sum() / 2
    if few or len(areas) < n + 2:  # one stray pixel is no evidence
        for number in np.flatnonzero(scattered):
            _point_out(path, int(values[number]), int(np.count_nonzero(owner == number)))
        return
    main = _dominant(ids)
    if covered[main - 1] > covered.sum() / 2 and (scattered.sum() > 1 or values[main] in (255, 65_535)) and n != 2:
        kind = "a binary mask with soft edges or stray values"
    elif values[main] in (255, 65_535):
        kind = "a binary mask with stray values"
    else:
        raise InputError(
            f"The mask '{path}' seems to hold classes and not nuclei: {n} values for {len(areas)} separate areas; give "
            "each nucleus its own id."
        )
    raise InputError(f"The mask '{path}' seems to be {kind}: give each nucleus its own id {binary}.")


def _point_out(path: Path, value: int, places: int) -> None:
    """Refuse a mask whose 255 is a border or "ignore" value; name any other id that lies in several places."""
    if value in (255, 65_535):
        raise InputError(
            f"The mask '{path}' has the value {value} in {places} separate places, as a border or an area to ignore "
            "has it: give these pixels the value 0."
        )
    warnings.warn(
        f"'{path}': the id {value} lies in {places} separate places; if they are several nuclei, give each its own id.",
        Notice,
        stacklevel=4,
    )


def _refuse_inverted(path: Path, values: np.ndarray, ids: np.ndarray, palette: bool) -> None:
    """Raise ``InputError`` if one id covers far more than any other and reaches all sides, as background does."""
    areas = np.bincount(ids.ravel(), minlength=2)[1:]
    main, others = int(areas.argmax()) + 1, np.sort(areas)[:-1]
    sides = all((side == main).any() for side in (ids[0], ids[-1], ids[:, 0], ids[:, -1]))
    if not sides or areas[main - 1] < 0.2 * ids.size or areas[main - 1] < 4 * others[-1:].sum():
        return
    if palette:
        raise InputError(
            f"The mask '{path}' seems to have been made from a colour picture: its background is palette index "
            f"{int(values[main])} and not 0; save the label map itself, 0 for background."
        )
    raise InputError(
        f"The mask '{path}' seems to be inverted: {(ids == main).mean():.0%} of it has the value {int(values[main])}; "
        "give the pixels outside nuclei the value 0."
    )


def _scattered(parts: np.ndarray, areas: np.ndarray, owner: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    """(n + 1,) bool: ids with areas further apart than the pieces of one nucleus would be."""
    boxes = find_objects(parts)
    sizes = np.array([np.hypot(*(s.stop - s.start for s in box)) for box in boxes])
    largest_area, largest_size = np.zeros(n + 1), np.zeros(n + 1)
    np.maximum.at(largest_area, owner, areas)
    counted = areas >= 0.1 * largest_area[owner]
    np.maximum.at(largest_size, owner[counted], sizes[counted])
    low, high = np.full((n + 1, 2), np.inf), np.full((n + 1, 2), -np.inf)
    starts = np.array([[s.start for s in box] for box in boxes], float)
    stops = np.array([[s.stop for s in box] for box in boxes], float)
    np.minimum.at(low, owner[counted], starts[counted])
    np.maximum.at(high, owner[counted], stops[counted])
    places = np.bincount(owner[counted], minlength=n + 1)
    reach = np.hypot(*np.where(places[:, None] > 1, high - low, 0).T)
    return (places > 3) | ((places > 1) & (reach > 2.5 * largest_size))
