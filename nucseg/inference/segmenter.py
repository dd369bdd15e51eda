"""From an image of any size to its nuclei: overlapping fields, one label map without seams.

>>> import numpy as np, nucseg
>>> image = np.full((64, 80, 3), 240, np.uint8)  # (H, W, 3) uint8 RGB
>>> nucseg.segment(image).shape  # (H, W) int32 label map, 0 = background
(64, 80)

The network sees fields of the size it was trained on. Of each field only the core is kept, so every pixel is
predicted once, with its surroundings in view. The label map is cut from the maps block by block; each block looks
beyond its border, and a nucleus belongs to the block that its centroid lies in.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from tqdm.auto import tqdm

from nucseg.config import FIELD
from nucseg.errors import InputError
from nucseg.files import sha256
from nucseg.images.export import Block
from nucseg.images.slides import Slide, as_pixels, open_slide
from nucseg.images.tissue import tissue_mask
from nucseg.inference.decoding import Decoding, decoding_of
from nucseg.inference.options import check_options
from nucseg.instances import labels_from, renumber
from nucseg.model.adapters import DEFAULT_ADAPTER, adapter_path
from nucseg.model.bases import Base
from nucseg.model.network import NucleiModel, load_model, pick_device, place, predict

MARGIN = 1 / 8  # of the field's side, at each rim, that is seen but not kept; a nucleus is about 1/16 across
BLOCK, HALO = 1536, 128  # px: what is decoded at once, and how far it looks beyond
LARGE = 4096  # px: images with a longer side get a tissue mask
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
    - ``min_area``: area of the smallest object that is kept, px of these images. None: scaled with the size of nuclei.
    - ``ridge``: 0..1, how deep a valley separates two nuclei (`instances.decode`): lower separates fewer.
    - ``tta``: test-time augmentation: average over the four ways to mirror a field, at four times the cost.
    - ``tissue_mask``: skip the fields of large images (`LARGE`) that lie outside the tissue.
    - ``min_confidence``: 0..1; objects that are less probably true nuclei are dropped. Above 0 only with adapters that
      were tuned (`inference.decoding`).
    - ``series``: which image of a file that holds several, from 1; 0: the largest (`open_slide`).
    """

    models: Sequence[NucleiModel]
    um_per_px: float | None = None
    threshold: float | None = None
    min_area: int | None = None
    ridge: float | None = None
    tta: bool = False
    tissue_mask: bool = True
    series: int = 0
    min_confidence: float | None = None

    def options(self) -> dict[str, Any]:
        """All fields but the models, as given."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "models"}

    def check(self) -> None:
        """Raise ``InputError`` for values that nothing can be segmented with."""
        if not self.models:
            raise InputError("There is no model: give at least one adapter.")
        if len({(m.config.head == "instance" and m.config.without != "distance") for m in self.models}) > 1:
            raise InputError("The adapters predict different maps: an ensemble needs heads of one kind.")
        if self.um_per_px and len({m.config.um_per_px > 0 for m in self.models}) > 1:
            raise InputError(
                "Some of the adapters know their training images' µm per px and some do not, so they would see these "
                "images at different scales: use adapters of one kind, or images without µm per px."
            )
        check_options(**self.options())
        self.decoding().check()

    def decoding(self) -> Decoding:
        """How maps are decoded: as the first adapter was tuned (or by default), unless an option is given.

        Its lengths and areas are in px of images whose nuclei are as large as NuInsSeg's.
        """
        given = {"threshold": self.threshold, "ridge": self.ridge, "min_confidence": self.min_confidence}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(decoding_of(self.models[0]), **changes)

    def zoom(self, model: NucleiModel) -> float:
        """Px of the model's training images for each px of these images; 1 where either resolution is unknown."""
        own = model.config.um_per_px
        return self.um_per_px / own if self.um_per_px and own else 1.0

    def nucleus_scale(self) -> float:
        """How large nuclei are taken to be in these images, in px, against NuInsSeg's."""
        return self.models[0].config.nucleus_scale / self.zoom(self.models[0])

    def smallest(self) -> int:
        """The area in px of these images below which an object is dropped."""
        if self.min_area is not None:
            return self.min_area
        return round(self.decoding().min_area * self.nucleus_scale() ** 2)

    def smooth(self) -> float:
        """What `instances.decode` smooths over, in px of these images."""
        return min(self.decoding().smooth_px * self.nucleus_scale(), 100)

    def scale(self, model: NucleiModel) -> float:
        """Px that the model's encoder sees for each px of these images."""
        return model.config.size / (model.config.field_px or FIELD) * self.zoom(model)

    def maps(self, image: np.ndarray, model: NucleiModel, scale: float = 0.0) -> np.ndarray:
        """(H, W, 3) uint8 field -> (C, H, W) float32 maps of one model, 0..1, which sees it scaled by ``scale``."""
        scale = scale or self.scale(model)
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
        with open_slide(image, self.series) as slide:
            segmenter = self
            if self.um_per_px is None and slide.um_per_px is not None:
                segmenter = replace(self, um_per_px=slide.um_per_px)
            segmenter.check()
            maps = np.zeros((self.n_maps, *slide.shape), np.uint8)
            labels = np.zeros(slide.shape, np.int32)
            rows = segmenter.predict_rows(slide, maps, progress=progress, tissue=segmenter.tissue(slide))
            list(rows)  # each call fills its array
            list(segmenter.label_blocks(maps, labels))
        return labels

    def tissue(self, slide: Slide) -> np.ndarray | None:
        """(h, w) bool, True where a large image shows tissue, at low magnification; None: all of it is predicted."""
        if not self.tissue_mask or max(slide.shape) <= LARGE:
            return None
        return ndimage.binary_dilation(tissue_mask(slide.overview()), iterations=2)

    def predict_rows(
        self,
        slide: Slide,
        maps: Any,
        start: int = 0,
        *,
        name: str = "",
        progress: bool = True,
        tissue: np.ndarray | None = None,
    ) -> Iterator[int]:
        """Fill ``maps``, (C, H, W) uint8 in steps of 1/255, row of fields after row of fields.

        Yields the number of rows that are done, from ``start`` on: the rows before it are taken to be in ``maps``.
        Models of an ensemble with fields of their own are averaged over the smallest of them. A slide is read at the
        level that is nearest to what the models see. Black areas, and fields outside ``tissue``, have no nuclei.
        """
        side = max(64, min(round((m.config.field_px or FIELD) / self.zoom(m)) for m in self.models))
        rows, columns = (spans(length, side, round(side * MARGIN)) for length in slide.shape)
        height, width = min(side, slide.shape[0]), min(side, slide.shape[1])
        level = slide.at(max(self.scale(model) for model in self.models))
        bar = tqdm(
            total=len(rows) * len(columns),
            initial=start * len(columns),
            desc=name or "segmenting",
            unit="field",
            disable=not progress,
        )
        with bar:
            for done, (top, low, high) in enumerate(rows[start:], start + 1):
                for left, first, last in columns:
                    window = (top, left, height, width)
                    empty = tissue is not None and not _part(tissue, slide.shape, window).any()
                    mean = None if empty else self._field(level, slide.shape, window)
                    if mean is None:
                        maps[:, low:high, first:last] = 0
                    else:
                        core = mean[:, low - top : high - top, first - left : last - left]
                        maps[:, low:high, first:last] = np.rint(core * 255).astype(np.uint8)
                    bar.update()
                yield done

    def _field(self, level: Slide, shape: tuple[int, int], window: tuple[int, int, int, int]) -> np.ndarray | None:
        """(C, h, w) mean maps of a window (top, left, h, w) of an image of ``shape``, read from one of its levels.

        None where there is nothing but glass.
        """
        top, left, height, width = window
        down, across = level.shape[0] / shape[0], level.shape[1] / shape[1]
        rows, columns = max(1, round(height * down)), max(1, round(width * across))
        y, x = min(round(top * down), level.shape[0] - rows), min(round(left * across), level.shape[1] - columns)
        image, void = level.read_tissue(y, x, rows, columns)
        if image.min() >= BLANK:
            return None
        mean = np.mean([self.maps(image, model, self.scale(model) / down) for model in self.models], axis=0)
        mean[:, void] = 0
        if (rows, columns) != (height, width):
            resized = (Image.fromarray(one).resize((width, height), Image.Resampling.BILINEAR) for one in mean)
            mean = np.stack([np.asarray(one) for one in resized])
        return mean

    def label_blocks(self, maps: Any, labels: Any, block: int = BLOCK, halo: int = HALO) -> Iterator[Block]:
        """Cut the nuclei out of ``maps`` and write them into ``labels``, zeros of (H, W), block after block.

        Nuclei are numbered 1..n in the order of the blocks. A nucleus that is larger than ``halo`` may be cut.
        """
        height, width = labels.shape
        smallest, smooth, count = self.smallest(), self.smooth(), 0
        how, scale = self.decoding(), self.nucleus_scale()
        if min(height, width) < 1:
            return
        for top in range(0, height, block):
            for left in range(0, width, block):
                y, x = max(0, top - halo), max(0, left - halo)
                window = np.s_[y : min(height, top + block + halo), x : min(width, left + block + halo)]
                part = np.asarray(maps[(slice(None), *window)])
                if not (part[0] > 255 * how.threshold).any():
                    continue
                part = part.astype(np.float32) / 255
                found = labels_from(part, how.threshold, smallest, how.ridge, smooth)
                found, _ = how.select(found, part, scale)
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
    image: "np.ndarray | Image.Image",
    model: NucleiModel | str | Path = DEFAULT_ADAPTER,
    *,
    um_per_px: float | None = None,
    threshold: float | None = None,
    min_area: int | None = None,
    ridge: float | None = None,
    tta: bool = False,
    min_confidence: float | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Segment the nuclei of one image: (H, W, 3) uint8 RGB of any size -> (H, W) int32 label map, nuclei 1..n.

    ``image``: an array, or a Pillow image of any 8 bit mode; grey and transparent ones are converted.
    ``model``: an adapter's name or file, or a loaded model (`load`), which saves time over many images. The other
    arguments are those of `Segmenter`. Raises ``InputError`` for another dtype or shape, or a value out of range.
    """
    pixels = as_pixels(image)
    loaded = load(model) if isinstance(model, str | Path) else model
    segmenter = Segmenter([loaded], um_per_px, threshold, min_area, ridge, tta, min_confidence=min_confidence)
    return segmenter.segment(pixels, progress=progress)


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


def known_blocks(labels: Any, block: int = BLOCK, halo: int = HALO) -> Iterator[Block]:
    """The nuclei of a label map that is there already, (H, W) of any integers, block by block as `label_blocks`."""
    height, width = labels.shape
    given: set[int] = set()
    for top in range(0, height, block):
        for left in range(0, width, block):
            y, x = max(0, top - halo), max(0, left - halo)
            part = np.asarray(labels[y : min(height, top + block + halo), x : min(width, left + block + halo)])
            if not part.any():
                continue
            own = _owned(part, (top - y, min(top + block, height) - y, left - x, min(left + block, width) - x))
            new = set(np.unique(own).tolist()) - {0}
            own[np.isin(own, list(new & given))] = 0  # larger than the halo: no block sees it whole
            given |= new
            if own.any():
                yield Block(y, x, own.astype(np.int32), int(np.count_nonzero(np.unique(own))))


def _part(mask: np.ndarray, shape: tuple[int, int], window: tuple[int, int, int, int]) -> np.ndarray:
    """The part of a small picture of an image of ``shape`` that shows a window (top, left, h, w) of it."""
    top, left, height, width = window
    down, across = mask.shape[0] / shape[0], mask.shape[1] / shape[1]
    low, high = math.floor(top * down), math.ceil((top + height) * down)
    return mask[low:high, math.floor(left * across) : math.ceil((left + width) * across)]


def free_memory() -> None:
    """Return the memory that a GPU keeps in reserve, so that the next image may fit after one that did not."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
