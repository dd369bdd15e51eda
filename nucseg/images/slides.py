"""Images of any size, read window by window: PNG and JPEG whole, TIFF tile by tile, pyramids at full resolution."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr

from nucseg.errors import InputError
from nucseg.images.raster import is_tiff, read_image, reading

PLAUSIBLE_UM = (0.05, 4.0)  # µm per px; what a file claims outside of it is a default of some program
LARGEST_CHUNK = 2**30  # bytes of a tile or strip once unpacked; a whole-image strip cannot be read in parts


@dataclass(frozen=True)
class Slide:
    """An open image: ``slide.read(top, left, height, width)`` gives a window of it as RGB.

    - ``shape``: (rows, columns) in px.
    - ``um_per_px``: what the file says, or None where it says nothing that can be believed.
    """

    path: Path
    shape: tuple[int, int]
    um_per_px: float | None
    pixels: Any  # a NumPy or Zarr array: (H, W), (H, W, S) or (S, H, W)
    planar: bool = False

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB; ``InputError`` where the file is damaged there."""
        window = np.s_[top : top + height, left : left + width]
        with reading(self.path):
            if self.planar:
                part = np.moveaxis(np.asarray(self.pixels[(slice(None), *window)]), 0, -1)
            else:
                part = np.asarray(self.pixels[window])
        if part.ndim == 2:
            part = part[..., None]
        # a copy always: what is drawn on it must not end in the caller's image
        return np.array(np.repeat(part[..., :1], 3, axis=2) if part.shape[2] < 3 else part[..., :3])


@contextmanager
def open_slide(image: str | Path | np.ndarray) -> Iterator[Slide]:
    """Open an image file, or wrap an (H, W, 3) or (H, W) uint8 array, for reading by windows.

    Of a pyramid the largest level is read. A TIFF is read tile by tile, so its size does not matter; other files are
    read whole. Raises ``InputError`` for a file that is missing, damaged, not RGB or grey, has more than 8 bits a
    channel or several pages, or whose parts are too large to be read one by one.
    """
    if isinstance(image, np.ndarray):
        grey = image.ndim == 2
        if image.dtype != np.uint8 or not (grey or (image.ndim == 3 and image.shape[2] in (3, 4))) or not image.size:
            raise InputError(f"An image must be uint8 of shape (H, W, 3), not {image.dtype} of shape {image.shape}.")
        yield Slide(Path("the array"), (image.shape[0], image.shape[1]), None, image)
        return
    path = Path(image)
    with reading(path), open(path, "rb") as handle:
        header = handle.read(4)
    if not is_tiff(header):
        pixels = read_image(path)
        yield Slide(path, (pixels.shape[0], pixels.shape[1]), None, pixels)
        return
    with reading(path):
        tiff = tifffile.TiffFile(path)
    with tiff:
        with reading(path):
            slide = _tiff_slide(path, tiff)
        yield slide


def _tiff_slide(path: Path, tiff: tifffile.TiffFile) -> Slide:
    series = tiff.series[0]
    level = series.levels[0]
    axes, page = level.axes, tiff.pages.first
    if level.dtype != np.uint8:
        raise InputError(f"The image '{path}' has {level.dtype} values: convert it to 8 bit RGB first.")
    shape = dict(zip(axes, level.shape, strict=True))
    samples = shape.get("S", 1)
    if axes not in ("YX", "YXS", "SYX") or samples not in (1, 2, 3, 4):
        raise InputError(f"The image '{path}' has axes {axes} of {level.shape}: save it as a single flat RGB image.")
    if page.photometric in (tifffile.PHOTOMETRIC.PALETTE, tifffile.PHOTOMETRIC.SEPARATED):
        raise InputError(
            f"The image '{path}' is {tifffile.PHOTOMETRIC(page.photometric).name} colour: convert it to RGB first."
        )
    keyframe = level.keyframe
    if math.prod(keyframe.chunks) > LARGEST_CHUNK:
        raise InputError(f"The image '{path}' is stored in one piece of {keyframe.chunks}: save it as a tiled TIFF.")
    pixels = zarr.open(series.aszarr(level=0), mode="r")
    inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    if inverted:
        raise InputError(f"The image '{path}' counts white as 0: convert it to 8 bit RGB first.")
    return Slide(path, (shape["Y"], shape["X"]), _resolution(tiff), pixels, planar=axes == "SYX")


def _resolution(tiff: tifffile.TiffFile) -> float | None:
    """µm per px as OME, Aperio or the resolution tags have it; None where they have nothing plausible."""
    page = tiff.pages.first
    for text, pattern in (
        (tiff.ome_metadata, r'PhysicalSizeX="([0-9.eE+-]+)"(?![^>]*PhysicalSizeXUnit="(?!(?:µ|&#181;|u|\\u00b5)m))'),
        (page.description if page.description.startswith("Aperio") else "", r"MPP\s*=\s*([0-9.]+)"),
    ):
        found = re.search(pattern, text or "")
        if found and _plausible(value := _number(found[1])):
            return value
    units = {int(tifffile.RESUNIT.CENTIMETER): 1e4, int(tifffile.RESUNIT.MICROMETER): 1.0}
    unit = units.get(int(page.resolutionunit))
    if tiff.imagej_metadata and tiff.imagej_metadata.get("unit") in ("micron", "um", "µm", "\\u00B5m"):
        unit = 1.0
    across = page.resolution[0] if unit else 0  # px per unit; inches are a printer's default, not a microscope's
    return unit / across if unit and across and _plausible(unit / across) else None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _plausible(value: float) -> bool:
    return PLAUSIBLE_UM[0] <= value <= PLAUSIBLE_UM[1]
