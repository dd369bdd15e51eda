"""From an image of any size to its nuclei: overlapping fields, one label map without seams.

>>> import numpy as np, nucseg
>>> image = np.full((64, 80, 3), 240, np.uint8)  # (H, W, 3) uint8 RGB
>>> nucseg.segment(image).shape  # (H, W) int32 label map, 0 = background
(64, 80)

The network sees fields of the size it was trained on. Of each field only the core is kept, so every pixel is
predicted once, with its surroundings in view. The label map is cut from the maps block by block; each block looks
beyond its border, and a nucleus belongs to the block that its centroid lies in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from nucseg.config import FIELD
from nucseg.errors import InputError
from nucseg.files import sha256
from nucseg.images.export import Block
from nucseg.images.slides import PLAUSIBLE_UM, Slide, open_slide
from nucseg.instances import MIN_AREA, RIDGE, SMOOTH_PX, labels_from, renumber
from nucseg.model.adapters import DEFAULT_ADAPTER, adapter_path
from nucseg.model.bases import Base
from nucseg.model.network import NucleiModel, load_model, pick_device, place, predict

MARGIN = 1 / 8  # of the field's side, at each rim, that is seen but not kept; a nucleus is about 1/16 across
BLOCK, HALO = 1536, 128  # px: what is decoded at once, and how far it looks beyond
BLANK = 225  # a field whose every value is at least this has no tissue, and the network is not asked


def load(adapter: str | Path = DEFAULT_ADAPTER, base: Base | str | None = None, device: str = "auto") -> NucleiModel:
    """Load an adapter, by its name (`adapters`) or its file, ready to segment with.

    ``base``: only where the adapter was trained on a base that is a file of yours. ``device``: auto, cpu, cuda, mps.
    Raises ``InputError`` for an unknown name, a damaged file, or another base than it was trained on.
    """
    path = adapter_path(adapter)
    model = load_model(path, base)
    model.adapter_name, model.adapter_sha256 = path.stem, sha256(path)
    return place(model, pick_device(device))


@dataclass(frozen=True)
class Segmenter:
    """How images are segmented: by which models, at which scale, cut where.

    - ``models``: one, or several whose maps are averaged (an ensemble).
    - ``um_per_px``: of the images; None where it is not known: they are then taken to be like the training images.
    - ``threshold``: foreground probability, 0..1, above which a pixel is a nucleus.
    - ``min_area``: px of these images; smaller objects are dropped. None: 50 px where nuclei are as large as
      NuInsSeg's, and as much less or more as they are smaller or larger.
    - ``ridge``: 0..1, how deep a valley parts two nuclei (`instances.decode`): lower cuts fewer apart.
    - ``flips``: average over the four ways to mirror a field, at four times the cost.
    """

    models: Sequence[NucleiModel]
    um_per_px: float | None = None
    threshold: float = 0.5
    min_area: int | None = None
    ridge: float = RIDGE
    tta: bool = False

    def check(self) -> None:
        """Raise ``InputError`` for values that nothing can be segmented with."""
        if not self.models:
            raise InputError("There is no model: give at least one adapter.")
        if len({(m.config.head == "instance" and m.config.without != "distance") for m in self.models}) > 1:
            raise InputError("The adapters predict different maps: an ensemble needs heads of one kind.")
        low, high = PLAUSIBLE_UM
        if self.um_per_px is not None and not low <= self.um_per_px <= high:
            raise InputError(
                f"um_per_px is {self.um_per_px!r}: give the µm per px of your images, {low:g} to {high:g} (40x: 0.25)."
            )
        if self.um_per_px and len({m.config.um_per_px > 0 for m in self.models}) > 1:
            raise InputError(
                "Some of the adapters know their training images' µm per px and some do not, so they would see these "
                "images at different scales: use adapters of one kind, or images without µm per px."
            )
        if not (0 <= self.threshold <= 1 and 0 <= self.ridge <= 1):
            raise InputError(f"threshold {self.threshold!r} and ridge {self.ridge!r} must both lie in 0..1.")
        if self.min_area is not None and self.min_area < 0:
            raise InputError(f"min_area is {self.min_area!r}: it must not be negative.")

    def zoom(self, model: NucleiModel) -> float:
        """Px of the model's training images for each px of these images; 1 where either resolution is unknown."""
        own = model.config.um_per_px
        return self.um_per_px / own if self.um_per_px and own else 1.0

    def nucleus_scale(self) -> float:
        """How large nuclei are taken to be in these images, in px, against NuInsSeg's."""
        return self.models[0].config.nucleus_scale / self.zoom(self.models[0])

    def smallest(self) -> int:
        """The area in px of these images below which an object is dropped."""
        return round(MIN_AREA * self.nucleus_scale() ** 2) if self.min_area is None else self.min_area

    def smooth(self) -> float:
        """What `instances.decode` smooths over, in px of these images."""
        return min(SMOOTH_PX * self.nucleus_scale(), 100)

    def maps(self, image: np.ndarray, model: NucleiModel) -> np.ndarray:
        """(H, W, 3) uint8 field -> (C, H, W) float32 maps of one model, 0..1."""
        scale = model.config.size / (model.config.field_px or FIELD) * self.zoom(model)
        ways: list[Any] = [np.s_[:, :]]
        if self.tta:
            ways += [np.s_[::-1, :], np.s_[:, ::-1], np.s_[::-1, ::-1]]
        maps = [predict(model, np.ascontiguousarray(image[way]), scale)[(slice(None), *way)] for way in ways]
        return np.mean(maps, axis=0)

    @property
    def n_maps(self) -> int:
        """Number of maps that the models predict: 2, or 1 where they have no distance map."""
        return self.models[0].n_maps

    def segment(self, image: str | Path | np.ndarray, *, progress: bool = False) -> np.ndarray:
        """Segment an image file, or an (H, W, 3) uint8 array, in memory: its (H, W) int32 label map, nuclei 1..n.

        A file's own pixel size is used if ``um_per_px`` is None. Raises ``InputError`` for an image that cannot be
        read, another dtype or shape, or settings out of range.
        """
        with open_slide(image) as slide:
            segmenter = self
            if self.um_per_px is None and slide.um_per_px is not None:
                segmenter = replace(self, um_per_px=slide.um_per_px)
            segmenter.check()
            maps = np.zeros((self.n_maps, *slide.shape), np.uint8)
            labels = np.zeros(slide.shape, np.int32)
            list(segmenter.predict_rows(slide, maps, progress=progress))  # each call fills its array
            list(segmenter.label_blocks(maps, labels))
        return labels

    def predict_rows(
        self, slide: Slide, maps: Any, start: int = 0, *, name: str = "", progress: bool = True
    ) -> Iterator[int]:
        """Fill ``maps``, (C, H, W) uint8 in steps of 1/255, row of fields after row of fields.

        Yields the number of rows that are done, from ``start`` on: the rows before it are taken to be in ``maps``.
        Models of an ensemble with fields of their own are averaged over the smallest of them.
        """
        side = max(64, min(round((m.config.field_px or FIELD) / self.zoom(m)) for m in self.models))
        rows, columns = (spans(length, side, round(side * MARGIN)) for length in slide.shape)
        bar = tqdm(total=len(rows) * len(columns), initial=start * len(columns), unit="field", disable=not progress)
        bar.set_description(name)
        with bar:
            for done, (top, low, high) in enumerate(rows[start:], start + 1):
                for left, first, last in columns:
                    bar.update()
                    image = slide.read(top, left, min(side, slide.shape[0]), min(side, slide.shape[1]))
                    if image.min() >= BLANK:
                        maps[:, low:high, first:last] = 0
                        continue
                    mean = np.mean([self.maps(image, model) for model in self.models], axis=0)
                    core = mean[:, low - top : high - top, first - left : last - left]
                    maps[:, low:high, first:last] = np.rint(core * 255).astype(np.uint8)
                yield done

    def label_blocks(self, maps: Any, labels: Any, block: int = BLOCK, halo: int = HALO) -> Iterator[Block]:
        """Cut the nuclei out of ``maps`` and write them into ``labels``, zeros of (H, W), block after block.

        Nuclei are numbered 1..n in the order of the blocks. A nucleus that is larger than ``halo`` may be cut.
        """
        height, width = labels.shape
        smallest, smooth, count = self.smallest(), self.smooth(), 0
        if min(height, width) < 1:
            return
        for top in range(0, height, block):
            for left in range(0, width, block):
                y, x = max(0, top - halo), max(0, left - halo)
                window = np.s_[y : min(height, top + block + halo), x : min(width, left + block + halo)]
                part = np.asarray(maps[(slice(None), *window)])
                if not (part[0] > 255 * self.threshold).any():
                    continue
                found = labels_from(part.astype(np.float32) / 255, self.threshold, smallest, self.ridge, smooth)
                core = (top - y, min(top + block, height) - y, left - x, min(left + block, width) - x)
                own = _owned(found, core)
                taken = np.asarray(labels[window])
                own[taken > 0] = 0  # two windows saw a clump differently: what the first one said stays
                own = renumber(own, smallest, count + 1)
                new = len(np.unique(own)) - bool((own == 0).any())
                if new:
                    labels[window] = np.where(own > 0, own, taken)
                    count += new
                    yield Block(y, x, own, new)


def segment(
    image: np.ndarray,
    model: NucleiModel | str | Path = DEFAULT_ADAPTER,
    *,
    um_per_px: float | None = None,
    threshold: float = 0.5,
    min_area: int | None = None,
    ridge: float = RIDGE,
    tta: bool = False,
    progress: bool = False,
) -> np.ndarray:
    """Segment the nuclei of one image: (H, W, 3) uint8 RGB of any size -> (H, W) int32 label map, nuclei 1..n.

    ``model``: an adapter's name or file, or a loaded model (`load`), which saves time over many images. The other
    arguments are those of `Segmenter`. Raises ``InputError`` for another dtype or shape, or a value out of range.
    """
    loaded = model if isinstance(model, NucleiModel) else load(model)
    segmenter = Segmenter([loaded], um_per_px, threshold, min_area, ridge, tta)
    return segmenter.segment(image, progress=progress)


def spans(length: int, side: int, margin: int) -> list[tuple[int, int, int]]:
    """Fields along one side of an image: (start of the field, start and end of its core), px.

    The cores follow each other without a gap, and lie ``margin`` px or more inside their field, except at the
    image's own border. The last field ends with the image; where one field is enough, its core is all of it.

    >>> spans(1000, 512, 64)
    [(0, 0, 448), (384, 448, 832), (488, 832, 1000)]
    """
    if length <= side:
        return [(0, 0, length)]
    result, end = [], 0
    while end < length:
        start = min(max(end - margin, 0), length - side)
        high = length if start + side >= length else start + side - margin
        result.append((start, end, high))
        end = high
    return result


def _owned(found: np.ndarray, core: tuple[int, int, int, int]) -> np.ndarray:
    """The nuclei of ``found`` whose centroid lies in ``core`` (rows from, to, columns from, to)."""
    n = int(found.max(initial=0)) + 1
    rows, columns = np.nonzero(found)
    ids = found[rows, columns]
    area = np.maximum(np.bincount(ids, minlength=n), 1)
    y, x = (np.bincount(ids, at, n) / area for at in (rows, columns))
    inside = (y >= core[0]) & (y < core[1]) & (x >= core[2]) & (x < core[3])
    inside[0] = False
    return np.where(inside[found], found, 0)
