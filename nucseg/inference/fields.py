"""How an image is cut into the fields that the network sees, and how one is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nucseg.images.slides import Slide

GRID = 224  # px of the encoder's view: windows of 7 tokens at stride 8 and 16, and of 14 at stride 16, all end there
MARGIN = GRID // 2  # px of the encoder's view at each rim of a field that are seen but not kept
SIDES = (1120, 1344, 1568)  # px of the encoder's view, of fields: larger ones gain little, and take more memory
BLANK = 225  # a field whose every value is at least this has no tissue, and the network is not asked


@dataclass(frozen=True)
class Span:
    """A field along one side of an image. ``start`` to ``stop``: what it shows, ``low`` to ``high``: its core, px.

    ``side``: the side of the encoder's view of it in px. At the image's end it may reach beyond ``stop``.
    """

    start: int
    stop: int
    low: int
    high: int
    side: int


def spans(
    length: int, scale: float = 1.0, sides: Sequence[int] = SIDES, margin: int = MARGIN, grid: int = GRID
) -> list[Span]:
    """Lay fields along one side of an image of ``length`` px, of which the encoder sees ``scale`` px for each px.

    They start on a grid of ``grid`` px of the encoder's view. The cores follow each other without a gap, and lie
    ``margin`` px of the view or more inside their field, except at the image's own border. Of the ``sides`` in px of
    the view, the one with the least to compute is taken; where one field is enough, its core is all of it. A side
    without its two margins must be a multiple of the grid.

    >>> [(s.start, s.stop, s.low, s.high) for s in spans(2048)]
    [(0, 1344, 0, 1008), (672, 2016, 1008, 1680), (1344, 2048, 1680, 2048)]
    """
    view = max(1, math.ceil(length * scale))
    if view <= max(sides):
        return [Span(0, length, 0, length, view + -view % 64)]

    def count(side: int) -> int:
        return 1 + math.ceil((view - side) / (side - 2 * margin))

    side = min(sides, key=lambda side: (count(side) * side, side))
    last = math.ceil((view - side) / grid)  # the last field, in steps of the grid
    starts = [grid * round(i * last / (count(side) - 1)) for i in range(count(side))]
    cuts = [0, *(round((a + side + b) / 2 / scale) for a, b in pairwise(starts)), length]
    return [
        Span(round(start / scale), min(length, round((start + side) / scale)), low, high, side)
        for start, (low, high) in zip(starts, pairwise(cuts), strict=True)
    ]


@dataclass(frozen=True)
class Field:
    """What is read for one field: the image, where it is black, and its px for each px of the largest level."""

    image: np.ndarray
    void: np.ndarray
    down: float


def read_field(level: Slide, shape: tuple[int, int], window: tuple[int, int, int, int]) -> Field | None:
    """Read a window (top, left, h, w) of an image of ``shape`` from one of its levels; None where all is glass."""
    top, left, height, width = window
    down, across = level.shape[0] / shape[0], level.shape[1] / shape[1]
    rows, columns = max(1, round(height * down)), max(1, round(width * across))
    y, x = min(round(top * down), level.shape[0] - rows), min(round(left * across), level.shape[1] - columns)
    image, void = level.read_tissue(y, x, rows, columns)
    return None if image.min() >= BLANK else Field(image, void, down)
