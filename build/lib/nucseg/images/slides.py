"""Images of any size, read window by window. All commands open images here, and so see the same pixels.

PNG, JPEG and similar formats are read whole. Slides in vendor formats are read with OpenSlide (extra ``slides``), all
other TIFFs with tifffile, tile by tile.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from PIL import Image

from nucseg.errors import InputError
from nucseg.images.pixel_size import from_magnification, from_tiff, of_sides, plausible
from nucseg.images.raster import (
    PICTURES,
    SLIDES,
    check_size,
    cmyk_to_rgb,
    header,
    is_tiff,
    over_white,
    picture_to_rgb,
    pil_to_rgb,
    read_picture,
    reading,
    ycbcr_to_rgb,
)
from nucseg.images.tissue import BLACK, REACH, black

__all__ = ["Level", "Slide", "open_slide", "read_image"]

LARGEST_CHUNK = 2**30  # bytes of a tile or strip once unpacked; a whole-image strip cannot be read in parts
NOT_THE_IMAGE = re.compile(r"\b(label|macro|thumbnail|overview|barcode)\b|^map$")  # series that show something else

Read = Callable[[int, int, int, int], np.ndarray]  # top, left, height, width -> (height, width, 3) uint8 RGB


@dataclass(frozen=True)
class Level:
    """One resolution of an image. ``shape``: (rows, columns). ``read``: a window of it, in its own px, as RGB."""

    shape: tuple[int, int]
    read: Read


@dataclass(frozen=True)
class Slide:
    """An open image: ``slide.read(top, left, height, width)`` gives a window of it as RGB.

    - ``shape``: (rows, columns) of the largest level; all coordinates are in its px.
    - ``um_per_px``: the pixel size in the file, or None if it has no plausible one.
    - ``levels``: the stored resolutions, the largest first.
    """

    path: Path
    shape: tuple[int, int]
    um_per_px: float | None
    levels: tuple[Level, ...]

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Read a window as (height, width, 3) uint8 RGB, cropped at the image's edge.

        Raises ``InputError`` if the file is damaged there.
        """
        height, width = min(height, self.shape[0] - top), min(width, self.shape[1] - left)
        with reading(self.path):
            return self.levels[0].read(top, left, height, width)

    def read_tissue(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Read a window as in `read`, with black areas made white, and (height, width) bool: the black areas.

        The black areas do not depend on how the image is cut into windows.
        """
        image = self.read(top, left, height, width)
        if not (image.max(axis=-1) <= BLACK).any():
            return image, np.zeros(image.shape[:2], bool)
        y, x = max(0, top - REACH), max(0, left - REACH)
        around = self.read(y, x, top - y + image.shape[0] + REACH, left - x + image.shape[1] + REACH)
        void = black(around)[top - y :, left - x :][: image.shape[0], : image.shape[1]]
        image[void] = 255
        return image, void

    def at(self, scale: float) -> "Slide":
        """The slide without the levels larger than needed for at least ``scale`` px per px of this slide."""
        first = 0
        for number, level in enumerate(self.levels):
            # the tolerance allows for rounded sides
            if min(level.shape[0] / self.shape[0], level.shape[1] / self.shape[1]) >= scale * 0.99:
                first = number
        um_per_px = self.um_per_px and self.um_per_px * self.shape[0] / self.levels[first].shape[0]
        return Slide(self.path, self.levels[first].shape, um_per_px, self.levels[first:])

    def overview(self, largest: int = 2048) -> np.ndarray:
        """The whole image as (h, w, 3) uint8 RGB, longer side at most ``largest`` px, read from the nearest level."""
        shrink = min(1.0, largest / max(self.shape))
        level = self.at(shrink).levels[0]
        rows, columns = (max(1, round(side * shrink)) for side in self.shape)
        result = np.zeros((rows, columns, 3), np.uint8)
        step = max(1, 2048 * rows // level.shape[0])  # rows of the result at a time, as even this level may be large
        for first in range(0, rows, step):
            last = min(first + step, rows)
            low, high = (round(row * level.shape[0] / rows) for row in (first, last))
            with reading(self.path):
                part = level.read(low, 0, max(1, high - low), level.shape[1])
            small = Image.fromarray(part).resize((columns, last - first), Image.Resampling.BOX)
            result[first:last] = np.asarray(small)
        return result


@contextmanager
def open_slide(image: "str | Path | np.ndarray | Image.Image", series: int = 0) -> Iterator[Slide]:
    """Open an image file, or wrap an array or Pillow image, for reading by windows.

    ``image``: a path; an (H, W, 3), (H, W, 4) or (H, W) uint8 array; or a Pillow image. ``series``: the image to read
    from a file with several, counted from 1; 0: the largest one in colour, labels and thumbnails aside. All colours
    are converted to RGB; transparent areas and missing tiles become white. Orientation tags are not applied, as in
    ImageJ and QuPath.

    Raises ``InputError`` for a file that is missing, damaged, neither RGB nor grey, has more than 8 bits per channel,
    holds several images of equal rank, or has tiles too large to read; and for any other object.
    """
    if isinstance(image, str | Path):
        with _open_file(Path(image), series) as slide:
            yield slide
    else:
        yield _of_array(Path("the array"), as_pixels(image))


def as_pixels(image: Any) -> np.ndarray:
    """Convert an array or Pillow image to (H, W, 3) uint8 RGB. Raises ``InputError`` with a hint for other objects."""
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise InputError(f"The Pillow image has mode {image.mode}: scale it to 0..255 and convert it to 'RGB'.")
        return pil_to_rgb(image)
    wanted = "An image must be uint8 of shape (H, W, 3)"
    if not isinstance(image, np.ndarray):
        kind = type(image).__name__
        if kind == "Tensor":
            raise InputError(f"{wanted}, not a tensor: pass image.permute(1, 2, 0).cpu().numpy() if it is (3, H, W).")
        if isinstance(image, str | Path):
            raise InputError(f"{wanted}, not a path: open the file first, as in PIL.Image.open({str(image)!r}).")
        hint = ": pass numpy.asarray(image, dtype='uint8')" if isinstance(image, list | tuple) else ""
        raise InputError(f"{wanted}, not a {kind}{hint}.")
    shape = " x ".join(map(str, image.shape))
    if image.dtype != np.uint8:
        values = "0..1" if image.dtype.kind == "f" and image.size and image.max() <= 1 else "its own range"
        hint = "(255 * image).round().astype('uint8')" if values == "0..1" else "values scaled to 0..255"
        raise InputError(f"{wanted}, not {image.dtype} of shape {shape}: pass {hint}.")
    if image.ndim == 3 and image.shape[0] in (3, 4) and image.shape[2] not in (3, 4):
        raise InputError(f"{wanted}, not {shape}: pass numpy.moveaxis(image, 0, -1).")
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))) or not image.size:
        raise InputError(f"{wanted}, not of shape {shape}.")
    return picture_to_rgb(image)


def read_image(path: str | Path, series: int = 0) -> np.ndarray:
    """Read an image file whole, as `open_slide` does: (H, W, 3) uint8 RGB.

    Raises `InputError` as `open_slide` does, and for more than twice Pillow's ``MAX_IMAGE_PIXELS`` (179 million px).
    """
    with open_slide(Path(path), series) as slide:
        check_size(slide.path, *slide.shape)
        return slide.read(0, 0, *slide.shape)


# ---------------------------------------------------------------- files


@contextmanager
def _open_file(path: Path, series: int) -> Iterator[Slide]:
    with reading(path):
        head = header(path)
        own_format = not path.suffix.lower().endswith(PICTURES) and _openslide_knows(path, is_tiff(head))
    if own_format:
        with _open_with_openslide(path) as slide:
            yield slide
    elif is_tiff(head):
        with reading(path):
            tiff = tifffile.TiffFile(path)
        with tiff:
            with reading(path):
                slide = _of_tiff(path, tiff, series)
            yield slide
    else:
        with reading(path):
            pixels, um_per_px = read_picture(path)
        yield _of_array(path, pixels, plausible(um_per_px))


def _of_array(path: Path, pixels: np.ndarray, um_per_px: float | None = None) -> Slide:
    # each window is a copy, so that drawing on it leaves the caller's image unchanged
    def read(top: int, left: int, height: int, width: int) -> np.ndarray:
        return pixels[top : top + height, left : left + width].copy()

    shape = (pixels.shape[0], pixels.shape[1])
    return Slide(path, shape, um_per_px, (Level(shape, read),))


# ---------------------------------------------------------------- OpenSlide


def _openslide_knows(path: Path, tiff: bool) -> bool:
    """Whether the file is a slide in a vendor format that OpenSlide, if installed, can read."""
    try:
        import openslide
    except ImportError as error:
        if tiff or path.suffix.lower() not in SLIDES:  # tifffile reads most of them too
            return False
        raise InputError(f"'{path}' needs OpenSlide: pip install 'nucseg[slides]'.") from error
    return openslide.OpenSlide.detect_format(path) not in (None, "generic-tiff")


@contextmanager
def _open_with_openslide(path: Path) -> Iterator[Slide]:
    import openslide

    with reading(path):
        file = openslide.OpenSlide(path)
    with file:
        with reading(path):
            slide = _of_openslide(path, file)
        yield slide


def _of_openslide(path: Path, file: Any) -> Slide:
    about = file.properties
    x, y = (int(about.get(f"openslide.bounds-{side}", 0)) for side in "xy")
    width = int(about.get("openslide.bounds-width", file.dimensions[0] - x))
    height = int(about.get("openslide.bounds-height", file.dimensions[1] - y))
    levels = []
    for number, shrink in enumerate(file.level_downsamples):
        shape = (max(1, round(height / shrink)), max(1, round(width / shrink)))
        levels.append(Level(shape, partial(_read_region, file, number, shrink, x, y)))
    across, down = (float(value) if value else None for value in map(about.get, ("openslide.mpp-x", "openslide.mpp-y")))
    um_per_px = plausible(of_sides(down if across is None else across, down, path))
    if um_per_px is None and (power := about.get("openslide.objective-power")):
        um_per_px = from_magnification(power, path)
    return Slide(path, (height, width), um_per_px, tuple(levels))


def _read_region(
    file: Any, number: int, shrink: float, x: int, y: int, top: int, left: int, height: int, width: int
) -> np.ndarray:
    at = (x + round(left * shrink), y + round(top * shrink))  # in px of level 0, as OpenSlide expects
    part = np.asarray(file.read_region(at, number, (width, height)))
    return over_white(part[..., :3], part[..., 3])  # areas that were not scanned are transparent


def dicom_series(path: Path) -> str:
    """The series that a DICOM file belongs to: its levels are files of their own, and each opens the whole slide.

    "" where it is no DICOM slide, or OpenSlide is not installed.
    """
    try:
        import openslide

        with openslide.OpenSlide(path) as file:
            return file.properties.get("dicom.SeriesInstanceUID", "")
    except Exception:  # whoever opens it says what is wrong with it
        return ""


# ---------------------------------------------------------------- TIFF


def _of_tiff(path: Path, tiff: tifffile.TiffFile, series: int) -> Slide:
    index = _choose(path, tiff, series)
    chosen = tiff.series[index]
    levels = []
    for number, level in enumerate(chosen.levels):
        if number and (level.dtype != chosen.dtype or level.axes != chosen.axes):
            continue
        if math.prod(level.keyframe.chunks) > LARGEST_CHUNK:
            if number == 0:
                chunks = " x ".join(map(str, level.keyframe.chunks))
                raise InputError(f"The image '{path}' is stored in one piece of {chunks}: save it as a tiled TIFF.")
            continue
        levels.append(_tiff_level(path, chosen, number))
    shape = levels[0].shape
    levels = [level for level in levels if level is levels[0] or level.shape < shape]
    return Slide(path, shape, from_tiff(tiff, chosen.keyframe, shape, index, path), tuple(levels))


def _sizes(series: Any) -> dict[str, int]:
    return dict(zip(series.axes, series.shape, strict=True))


def _channel_stack(tiff: tifffile.TiffFile, series: Any) -> bool:
    """Whether a series holds the red, green and blue of one picture as three grey channels."""
    sizes = _sizes(series)
    return series.axes == "CYX" and sizes["C"] == 3 and (tiff.is_ome or tiff.is_imagej)


def _usable(tiff: tifffile.TiffFile, series: Any) -> bool:
    if series.dtype not in (np.uint8, np.bool_):
        return False
    if _channel_stack(tiff, series):
        return True
    return series.axes in ("YX", "YXS", "SYX") and _sizes(series).get("S", 1) in (1, 2, 3, 4)


def _choose(path: Path, tiff: tifffile.TiffFile, series: int) -> int:
    """The position of the series to read. Raises ``InputError`` if there is none, or the user has to choose."""
    every = list(tiff.series)
    if not every:
        raise InputError(f"'{path}' has no image in it: export it again.")
    if series:
        if not 1 <= series <= len(every):
            raise InputError(f"'{path}' has {len(every)} series: choose one of 1 to {len(every)}, not {series}.")
        if not _usable(tiff, every[series - 1]):
            raise _not_usable(path, tiff, every[series - 1])
        return series - 1
    usable = [i for i, one in enumerate(every) if _usable(tiff, one)]
    if not usable:
        raise _not_usable(path, tiff, max(every, key=lambda one: one.size))
    for better in (_is_main, _is_colour):  # narrow the choice, unless none would be left
        usable = [i for i in usable if better(every[i])] or usable
    area = {i: _sizes(every[i])["Y"] * _sizes(every[i])["X"] for i in usable}
    largest = max(usable, key=lambda i: area[i])
    rivals = [i for i in usable if area[i] >= area[largest] / 4 and not _is_half(every[i], every[largest])]
    if len(rivals) > 1:
        sizes = (f"{i + 1} ({_sizes(every[i])['X']} x {_sizes(every[i])['Y']} px)" for i in rivals)
        raise InputError(f"'{path}' holds several images, {', '.join(sizes)}: choose one with --series, or split it.")
    return largest


def _is_main(series: Any) -> bool:
    reduced = int(series.keyframe.subfiletype) & 1
    return not reduced and not NOT_THE_IMAGE.search(str(series.name).strip().casefold().replace("_", " "))


def _is_colour(series: Any) -> bool:
    sizes = _sizes(series)
    kind = tifffile.PHOTOMETRIC
    coloured = series.keyframe.photometric in (kind.PALETTE, kind.SEPARATED)
    return sizes.get("S", 1) >= 3 or sizes.get("C", 1) == 3 or coloured


def _is_half(one: Any, whole: Any) -> bool:
    """Whether a series is the other at half the size, and so a level that the file does not mark as one."""
    small, large = _sizes(one), _sizes(whole)
    return one is not whole and all(abs(2 * small[side] - large[side]) <= 2 for side in "YX")


def _not_usable(path: Path, tiff: tifffile.TiffFile, series: Any) -> InputError:
    if series.dtype not in (np.uint8, np.bool_):
        return InputError(f"The image '{path}' has {series.dtype} values, not 8 bit ones: convert it to 8 bit RGB.")
    shape = " x ".join(map(str, series.shape))
    return InputError(
        f"The image '{path}' has {len(tiff.pages)} pages, axes {series.axes} of {shape}: save it as a single flat "
        "RGB image."
    )


def _tiff_level(path: Path, series: Any, number: int) -> Level:
    level = series.levels[number]
    fill, convert = _colours(path, level.keyframe)
    pixels: Any = zarr.open(series.aszarr(level=number, fillvalue=fill), mode="r")
    planar = level.axes in ("SYX", "CYX")

    def read(top: int, left: int, height: int, width: int) -> np.ndarray:
        window = np.s_[top : top + height, left : left + width]
        if planar:
            part = np.moveaxis(np.asarray(pixels[(slice(None), *window)]), 0, -1)
        else:
            part = np.asarray(pixels[window])
        return convert(part[..., None] if part.ndim == 2 else part)

    sizes = dict(zip(level.axes, level.shape, strict=True))
    return Level((sizes["Y"], sizes["X"]), read)


def _colours(path: Path, page: Any) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """The value of missing tiles, and a function from (h, w, S) stored values to (h, w, 3) uint8 RGB."""
    kind, compression = page.photometric, int(page.compression)
    most = 1 if page.dtype == np.bool_ else 2 ** min(int(page.bitspersample), 8) - 1
    jpeg = compression in (6, 7)  # the JPEG decoder itself converts to RGB
    aperio_ycbcr = compression == 33003  # JPEG 2000 that stores YCbCr but is marked as RGB
    if aperio_ycbcr or (kind == tifffile.PHOTOMETRIC.YCBCR and not jpeg):
        subsampling = page.tags.valueof("YCbCrSubSampling", (1, 1)) if kind == tifffile.PHOTOMETRIC.YCBCR else (1, 1)
        if tuple(subsampling) != (1, 1) and compression not in (33003, 34712, 33004):
            raise InputError(f"The image '{path}' is YCbCr with subsampled chroma: convert it to RGB first.")
        return 255, _ycbcr
    if kind in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR):
        return 255, partial(_with_alpha, page.extrasamples, most)
    if kind == tifffile.PHOTOMETRIC.MINISBLACK:
        return most, partial(_with_alpha, page.extrasamples, most)
    if kind == tifffile.PHOTOMETRIC.MINISWHITE:
        return 0, lambda part: _scaled(most - part[..., :1].astype(np.uint8), most).repeat(3, axis=2)
    if kind == tifffile.PHOTOMETRIC.PALETTE:
        colours = np.asarray(page.colormap)
        colours = (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8).T  # (n, 3)
        return int(colours.sum(1, dtype=int).argmax()), lambda part: colours[part[..., 0]]
    if kind == tifffile.PHOTOMETRIC.SEPARATED and page.samplesperpixel >= 4:
        return 0, cmyk_to_rgb
    name = getattr(kind, "name", str(kind))
    raise InputError(f"The image '{path}' has the colour type {name}: convert it to 8 bit RGB first.")


def _ycbcr(part: np.ndarray) -> np.ndarray:
    rgb = ycbcr_to_rgb(part[..., :3])
    rgb[(part[..., :3] == 255).all(-1)] = 255  # a missing tile; no real colour is stored like this
    return rgb


def _scaled(part: np.ndarray, most: int) -> np.ndarray:
    return part if most == 255 else (part.astype(np.uint16) * 255 // most).astype(np.uint8)


def _with_alpha(extra: tuple[int, ...], most: int, part: np.ndarray) -> np.ndarray:
    part = _scaled(part.astype(np.uint8), most)
    samples = part.shape[-1]
    colour = part[..., :3] if samples >= 3 else part[..., :1].repeat(3, axis=2)
    if samples in (2, 4) and extra and int(extra[0]) in (1, 2):  # associated alpha is multiplied into the colours
        return over_white(colour, part[..., -1], premultiplied=int(extra[0]) == 1)
    return np.array(colour)
