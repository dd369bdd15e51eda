"""Pieces of the widgets' pictures: outlines as SVG path data, and images as data URIs."""

import base64
import io

import numpy as np
from PIL import Image
from skimage.measure import approximate_polygon

from nucseg.viz import figures


def outline_paths(labels: np.ndarray) -> dict[int, str]:
    """SVG path data of each nucleus's outline, in half pixels, simplified by less than a pixel.

    ``labels``: (H, W) label map. A nucleus in pieces has one path with several closed lines. Draw the paths in a
    ``viewBox`` of ``0 0 2W 2H``.
    """
    paths: dict[int, str] = {}
    for i, xy in figures.outlines(labels):
        simple = approximate_polygon(xy, 0.7)
        if len(simple) <= 3:  # a nucleus of a few pixels would vanish when simplified
            simple = xy
        points = np.rint(2 * simple + 1).astype(int)
        (x, y), steps = points[0], np.diff(points, axis=0)[:-1]
        path = f"M{x} {y}l{' '.join(f'{dx} {dy}' for dx, dy in steps)}z".replace(" -", "-")
        paths[i] = paths.get(i, "") + path
    return paths


def data_uri(image: np.ndarray, size: int, quality: int = 68) -> tuple[str, int, int]:
    """Encode an (H, W, 3) uint8 image as a WebP data URI of at most ``size`` px a side: (URI, width, height)."""
    picture = Image.fromarray(image)
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=6)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", *picture.size
