"""Pixel sizes (µm/px) from the metadata of image files, with an estimate for files without."""

import math
import re
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from nucseg.errors import Notice

PLAUSIBLE_UM = (0.05, 4.0)  # µm/px; values beyond this range are some program's default
NUCLEUS_UM = 8.0  # median diameter of a nucleus in NuInsSeg: 32 px at 0.25 µm/px (assets/nuinsseg_tissue_stats.csv)

_UNITS = {"nm": 1e-3, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "pm": 1e-6, "angstrom": 1e-4, "in": 25_400.0}
_NAMES = {
    "å": "angstrom",
    "inch": "in",
    "inches": "in",
    "micron": "um",
    "microns": "um",
    "micra": "um",
    "mikron": "um",
    "mcm": "um",
} | {
    prefix + metre: symbol
    for prefix, symbol in (("nano", "nm"), ("micro", "um"), ("milli", "mm"), ("centi", "cm"), ("pico", "pm"), ("", "m"))
    for metre in ("meter", "metre", "meters", "metres")
}


def in_um(value: float | str, unit: str | None) -> float | None:
    """Convert a length to µm; None if the value is not a number, or the unit is unknown or not a length (pixel).

    ``unit``: any spelling used by microscopes or ImageJ: nm, µm with either mu, um, micron, mm, inch.
    """
    name = (unit or "um").strip().casefold()
    name = re.sub(r"\\u00b5|&#(181|956|xb5|x3bc);|&micro;|µ|μ|Âµ", "u", name)
    try:
        length = float(value) * _UNITS[_NAMES.get(name, name)]
    except (KeyError, ValueError, TypeError):
        return None
    return length if math.isfinite(length) else None


def plausible(value: float | None) -> float | None:
    """Return ``value`` if it is a plausible pixel size of a microscope image (µm/px), else None."""
    low, high = PLAUSIBLE_UM
    return value if value is not None and low <= value <= high else None


def of_sides(across: float | None, down: float | None, path: Path | None = None) -> float | None:
    """µm/px of pixels ``across`` µm wide and ``down`` µm high: their geometric mean, with a warning if they differ.

    ``down`` None: as ``across``. More than 5% of difference stretches nuclei more than the microscope's error does.
    """
    if across is None or down is None or across == down:
        return across
    if plausible(across) and plausible(down) and max(across, down) > 1.05 * min(across, down):
        warnings.warn(
            f"'{path or 'The image'}' has pixels of {across:g} x {down:g} µm, which are not square, so its nuclei look "
            "stretched: scale it to equal sides first.",
            Notice,
            stacklevel=3,
        )
    return round(math.sqrt(across * down), 6) if across > 0 and down > 0 else across


def from_ome(text: str, shape: tuple[int, int], index: int = 0, path: Path | None = None) -> float | None:
    """Pixel size (µm/px), plausible or not, of the image in an OME-XML text that has ``shape``.

    ``index``: which of several images. ``path``: the file, for a warning. None if the text is not XML, or states no
    size or several different ones.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None
    pixels = [element for element in root.iter() if element.tag.rpartition("}")[2] == "Pixels"]
    size = {"SizeY": str(shape[0]), "SizeX": str(shape[1])}
    fitting = [p for p in pixels if all(p.get(name) == value for name, value in size.items())]
    if index < len(pixels) and pixels[index] in fitting:
        fitting = [pixels[index]]
    names = ("PhysicalSizeX", "PhysicalSizeXUnit", "PhysicalSizeY", "PhysicalSizeYUnit")
    sizes = {tuple(map(p.get, names)) for p in fitting or pixels[:1]}
    if len(sizes) != 1:
        return None
    across, unit, down, unit_down = sizes.pop()
    if across is None:
        return None
    return of_sides(in_um(across, unit), None if down is None else in_um(down, unit_down or unit), path)


def from_magnification(value: float | str, path: Path) -> float | None:
    """Guess µm/px as 10 / objective power, the average of scanners (40x: 0.25), and warn that it is a guess."""
    try:
        guess = plausible(10 / float(value))
    except (ValueError, TypeError, ZeroDivisionError):
        return None
    if guess is not None:
        warnings.warn(
            f"'{path}' states its magnification ({float(value):g}x) but no pixel size: {guess:g} µm/px are assumed; "
            "pass --um-per-px if you know better.",
            Notice,
            stacklevel=3,
        )
    return guess


def from_tiff(tiff: tifffile.TiffFile, page: Any, shape: tuple[int, int], index: int, path: Path) -> float | None:
    """µm/px of a TIFF's ``page``: from OME-XML, Aperio's description, ImageJ's or the resolution tags, in this order.

    ``shape``: (rows, columns) of the image. ``index``: its position among the file's series. A resolution per inch is
    used only if plausible: 72 dpi is a printer's default, but 101,600 dpi is 0.25 µm/px. None if no source has a size.
    """
    if tiff.ome_metadata:
        found = from_ome(tiff.ome_metadata, shape, index, path)
        if plausible(found) is not None:
            return found
        if found is not None:
            warnings.warn(
                f"'{path}' states {found:g} µm/px, which no microscope has: its pixel size is taken as unknown.",
                Notice,
                stacklevel=2,
            )
    power = None
    for text in dict.fromkeys((str(page.description or ""), str(tiff.pages.first.description or ""))):
        if text.startswith("Aperio"):
            fields = dict(re.findall(r"\|\s*(\w+)\s*=\s*([^|\r\n]+)", text))
            found = plausible(in_um(fields.get("MPP", ""), "um"))
            if found is not None:
                return found
            power = power or fields.get("AppMag")
    found = _from_tags(tiff, page, path)
    return found if found is not None or power is None else from_magnification(power, path)


def _from_tags(tiff: tifffile.TiffFile, page: Any, path: Path) -> float | None:
    unit = {2: "inch", 3: "cm", 4: "mm", 5: "um"}.get(int(page.resolutionunit))
    if tiff.is_imagej and tiff.imagej_metadata and "unit" in tiff.imagej_metadata:
        unit = str(
            tiff.imagej_metadata["unit"]
        )  # ImageJ's unit takes precedence: it writes px per that unit into the same tag
    one = in_um(1, unit) if unit else None
    if one is None or not page.resolution[0]:
        return None
    across, down = (one / per_unit if per_unit else None for per_unit in page.resolution[:2])
    return plausible(of_sides(across, down, path))


def estimate(diameter_px: float) -> float:
    """Estimate µm/px from the nuclei's median diameter in px, assuming that they are as large as NuInsSeg's (8 µm)."""
    return NUCLEUS_UM / diameter_px


def diameters(areas_px: np.ndarray | float) -> np.ndarray:
    """Diameters in px of discs with these areas in px."""
    return 2 * np.sqrt(np.asarray(areas_px, float) / np.pi)
