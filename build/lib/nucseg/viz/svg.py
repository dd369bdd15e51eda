"""Pieces of the widgets' pictures: outlines as SVG path data, and images as data URIs."""

import base64
import io

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.measure import approximate_polygon

from nucseg.viz import figures

Known = dict[tuple[int, int, int, bytes], str]  # paths by top, left, width and pixels of the nucleus


def outline_paths(labels: np.ndarray, known: Known | None = None) -> dict[int, str]:
    """SVG path data of each nucleus's outline, in half pixels, simplified by less than a pixel.

    ``labels``: (H, W) label map. A nucleus in pieces has one path with several closed lines. Draw the paths in a
    ``viewBox`` of ``0 0 2W 2H``. ``known``: paths of earlier calls, extended by this one; a nucleus that two label maps
    have in common is then traced once.
    """
    known = {} if known is None else known
    paths: dict[int, str] = {}
    for i, window in enumerate(ndimage.find_objects(labels), start=1):
        if window is not None:
            mask = labels[window] == i
            key = window[0].start, window[1].start, mask.shape[1], mask.tobytes()
            if key not in known:
                known[key] = _path(mask, key[0], key[1])
            paths[i] = known[key]
    return paths


def _path(mask: np.ndarray, top: int, left: int) -> str:
    """SVG path data of the outlines of an (h, w) bool mask whose first pixel is at row ``top``, column ``left``."""
    path = ""
    for _, xy in figures.outlines(mask.astype(np.int32)):
        simple = approximate_polygon(xy, 0.7)
        if len(simple) <= 3:  # a nucleus of a few pixels would vanish when simplified
            simple = xy
        points = np.rint(2 * np.add(simple, (left, top)) + 1).astype(int)
        (x, y), steps = points[0], np.diff(points, axis=0)[:-1]
        path += f"M{x} {y}l{' '.join(f'{dx} {dy}' for dx, dy in steps)}z".replace(" -", "-")
    return path


def data_uri(image: np.ndarray, size: int, quality: int = 68) -> tuple[str, int, int]:
    """Encode an (H, W, 3) uint8 image as a WebP data URI of at most ``size`` px a side: (URI, width, height)."""
    picture = Image.fromarray(image)
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=6)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", *picture.size
