"""The layout of the overlapping fields in which the network sees an image, and reading one of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nucseg.images.slides import Slide

GRID = 224  # encoder pixels: attention windows of 7 tokens at strides 8 and 16, and of 14 at stride 16, all end there
MARGIN = GRID // 2  # encoder pixels at each border of a field that are seen but not kept
SIDES = tuple(range(1120, 2241, GRID))  # encoder pixels: larger fields gain little and take more memory
BLANK = 225  # a field whose values are all at least this shows glass, and the network is skipped


@dataclass(frozen=True)
class Span:
    """One field along one side of an image, which shows ``start`` to ``stop`` and keeps ``low`` to ``high`` (px).

    ``side``: its side in encoder pixels, with padding; at the image's end this may reach beyond ``stop``.
    """

    start: int
    stop: int
    low: int
    high: int
    side: int


def spans(
    length: int, scale: float = 1.0, sides: Sequence[int] = SIDES, margin: int = MARGIN, grid: int = GRID
) -> list[Span]:
    """Lay fields along one side of an image of ``length`` px, at ``scale`` encoder pixels per image pixel.

    ``sides``, ``margin`` and ``grid`` are in encoder pixels. Fields start at multiples of ``grid``. Their cores follow
    each other without a gap, at least ``margin`` inside their field, except at the image's border. The one of ``sides``
    with the least to compute is used; if one field is enough, its core is the whole field. The last field ends where
    the whole image would end if it were padded to a multiple of 64, so it may be smaller than the others, or up to 63
    larger. A side without its two margins must be a multiple of the grid.

    >>> [(s.start, s.stop, s.low, s.high, s.side) for s in spans(4096)]
    [(0, 2240, 0, 2128, 2240), (2016, 4096, 2128, 4096, 2080)]
    """
    view = max(1, math.ceil(length * scale))
    if view <= max(sides):
        return [Span(0, length, 0, length, _padded(view))]
    layouts = [_starts(view, side, margin, grid) for side in sides]
    side, starts = min(zip(sides, layouts, strict=True), key=lambda layout: (layout[0] * len(layout[1]), layout[0]))
    cuts = [0, *(round((a + side + b) / 2 / scale) for a, b in pairwise(starts)), length]
    return [
        Span(
            round(start / scale),
            min(length, round((start + side) / scale)),
            low,
            high,
            _padded(view) - start if high == length else side,
        )
        for start, (low, high) in zip(starts, pairwise(cuts), strict=True)
    ]


def _starts(view: int, side: int, margin: int, grid: int) -> list[int]:
    """Where fields of one side start, evenly spread on the grid over ``view`` encoder pixels."""
    count = 1 + max(0, math.ceil((view - side) / (side - 2 * margin)))
    last = math.ceil((view - side) / grid)  # the last field, in steps of the grid
    return [grid * round(i * last / max(1, count - 1)) for i in range(count)]


def _padded(length: int) -> int:
    return length + -length % 64


@dataclass(frozen=True)
class Field:
    """One field as read: (h, w, 3) uint8 ``image``, (h, w) bool ``void`` where it is black, and ``down``.

    ``down``: pixels of the image per pixel of the slide's largest level.
    """

    image: np.ndarray
    void: np.ndarray
    down: float


def read_field(level: Slide, shape: tuple[int, int], window: tuple[int, int, int, int]) -> Field | None:
    """Read a window (top, left, h, w) of an image of ``shape`` from one of its levels; None if it shows only glass."""
    top, left, height, width = window
    down, across = level.shape[0] / shape[0], level.shape[1] / shape[1]
    rows, columns = max(1, round(height * down)), max(1, round(width * across))
    y, x = min(round(top * down), level.shape[0] - rows), min(round(left * across), level.shape[1] - columns)
    image, void = level.read_tissue(y, x, rows, columns)
    return None if image.min() >= BLANK else Field(image, void, down)
