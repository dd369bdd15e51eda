"""From an image of any size to its nuclei: overlapping fields, one label map without seams.

>>> import numpy as np, nucseg
>>> image = np.full((64, 80, 3), 240, np.uint8)  # (H, W, 3) uint8 RGB
>>> nucseg.segment(image).shape  # (H, W) int32 label map, 0 = background
(64, 80)

The network sees large fields on a grid of 224 px, on which the windows of its attention fall alike wherever a field
begins. Of each field only the core is kept, so that every pixel is predicted once, with its surroundings in view. The
label map is cut from the maps block by block; each block looks beyond its border, and a nucleus belongs to the block
that its centroid lies in.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import nn
from tqdm.auto import tqdm

from nucseg.config import FIELD
from nucseg.data.prefetch import ahead
from nucseg.errors import InputError
from nucseg.files import sha256
from nucseg.images.export import Block
from nucseg.images.slides import Slide, as_pixels, open_slide
from nucseg.images.tissue import tissue_mask
from nucseg.inference import engines
from nucseg.inference.decoding import Decoding, decoding_of
from nucseg.inference.engines import predict
from nucseg.inference.fields import SIDES, Field, Span, read_field, spans
from nucseg.inference.options import check_options
from nucseg.instances import labels_from, renumber
from nucseg.model.adapters import DEFAULT_ADAPTER, adapter_path
from nucseg.model.bases import Base
from nucseg.model.network import NucleiModel, load_model, pick_device, place

BLOCK, HALO = 1536, 128  # px: what is decoded at once, and how far it looks beyond
LARGE = 4096  # px: images with a longer side get a tissue mask
BATCH = 8  # fields that a GPU gets at once
MANY = 50  # fields of an image from which on it pays to compile the network for them (engine auto)


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
    - ``engine``: what runs the network (`engines`): torch, openvino, or auto: openvino for images of many fields, on a
      CPU, where it is installed; else torch.
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
    engine: str = "auto"

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
        for model in self.models:
            engines.resolve(self.engine, model)

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

    def maps(
        self,
        images: Sequence[np.ndarray],
        model: NucleiModel,
        scale: float = 0.0,
        engine: str = "",
        side: tuple[int, int] | None = None,
    ) -> list[np.ndarray]:
        """(H, W, 3) uint8 fields of one size -> (C, H, W) float32 maps of one model each, 0..1.

        ``scale``: px that the model sees for each px. ``side``: (rows, columns) in px of the encoder's view to fill the
        fields up to by reflection; None: the next multiples of 64.
        """
        scale, run = (
            scale or self.scale(model),
            engines.engine_for(model, engine or ("torch" if self.engine == "auto" else self.engine)),
        )
        ways: list[Any] = [np.s_[:, :]]
        if self.tta:
            ways += [np.s_[::-1, :], np.s_[:, ::-1], np.s_[::-1, ::-1]]
        views = [predict(run, [image[way] for image in images], scale, side) for way in ways]
        return [
            np.mean([view[i][(slice(None), *way)] for view, way in zip(views, ways, strict=True)], axis=0)
            for i in range(len(images))
        ]

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

        Yields the number of rows of fields that are done, from ``start`` on: the rows before it are taken to be in
        ``maps`` (`row_ends` says how far down they reach). The models of an ensemble see the same fields. A slide is
        read at the level that is nearest to what the models see, ahead of the network in a thread. Black areas, and
        fields outside ``tissue``, have no nuclei.
        """
        rows, columns = self.layout(slide.shape)
        level = slide.at(max(self.scale(model) for model in self.models))
        engine = self.engine
        if engine == "auto" and len(rows) * len(columns) < MANY:
            engine = "torch"
        batch = BATCH if self.models[0].mean.device.type == "cuda" else 1

        def fields() -> Iterator[Field | None]:
            for row in rows[start:]:
                for column in columns:
                    window = (row.start, column.start, row.stop - row.start, column.stop - column.start)
                    empty = tissue is not None and not _part(tissue, slide.shape, window).any()
                    yield None if empty else read_field(level, slide.shape, window)

        bar = tqdm(
            total=len(rows) * len(columns),
            initial=start * len(columns),
            desc=name or "segmenting",
            unit="field",
            disable=not progress,
        )
        with bar, closing(ahead(fields(), batch + 2)) as read:
            for done, row in enumerate(rows[start:], start + 1):
                waiting: list[tuple[Span, Field]] = []
                for column in columns:
                    field = next(read)
                    if field is None:
                        maps[:, row.low : row.high, column.low : column.high] = 0
                        bar.update()
                        continue
                    # fields at the image's edge are smaller: only those of one size go together
                    if waiting and waiting[0][1].image.shape != field.image.shape:
                        self._fill(maps, row, waiting, engine, bar)
                        waiting = []
                    waiting.append((column, field))
                    if len(waiting) == batch:
                        self._fill(maps, row, waiting, engine, bar)
                        waiting = []
                self._fill(maps, row, waiting, engine, bar)
                yield done

    def _fill(self, maps: Any, row: Span, fields: Sequence[tuple[Span, Field]], engine: str, bar: "tqdm[Any]") -> None:
        """Predict fields of one row, and put their cores into ``maps``."""
        if not fields:
            return
        images = [field.image for _, field in fields]
        means: Any = 0
        for model in self.models:
            scale, side = self.scale(model) / fields[0][1].down, (row.side, fields[0][0].side)
            fits = scale == self.scale(self.models[0]) / fields[0][1].down
            own = self.maps(images, model, scale, engine, side if fits else None)
            means = means + np.stack(own) / len(self.models)
        for (column, field), mean in zip(fields, means, strict=True):
            mean[:, field.void] = 0
            height, width = row.stop - row.start, column.stop - column.start
            if mean.shape[1:] != (height, width):
                resized = (Image.fromarray(one).resize((width, height), Image.Resampling.BILINEAR) for one in mean)
                mean = np.stack([np.asarray(one) for one in resized])
            core = mean[:, row.low - row.start : row.high - row.start, column.low - column.start :]
            core = core[:, :, : column.high - column.low]
            maps[:, row.low : row.high, column.low : column.high] = np.rint(core * 255).astype(np.uint8)
            bar.update()

    def layout(self, shape: tuple[int, int]) -> tuple[list[Span], list[Span]]:
        """The fields of an image of ``shape``: rows and columns.

        Heads that normalise over the field get fields of the size that they were trained on: in larger ones they see
        other statistics, and find fewer nuclei.
        """
        how: dict[str, Any] = {"sides": SIDES}
        if normalising := [model.config.size for model in self.models if _normalises(model)]:
            how = {"sides": (min(normalising),), "margin": min(normalising) // 8, "grid": 16}
        scale = self.scale(self.models[0])
        return spans(shape[0], scale, **how), spans(shape[1], scale, **how)

    def row_ends(self, shape: tuple[int, int]) -> list[int]:
        """How far down, in px, the maps are filled after each row of fields."""
        return [row.high for row in self.layout(shape)[0]]

    def label_blocks(
        self, maps: Any, labels: Any, block: int = BLOCK, halo: int = HALO, filled: Iterator[int] | None = None
    ) -> Iterator[Block]:
        """Cut the nuclei out of ``maps`` and write them into ``labels``, zeros of (H, W), block after block.

        Nuclei are numbered 1..n in the order of the blocks. A nucleus that is larger than ``halo`` may be cut.
        ``filled``: says how many rows of px the maps are filled to, each time that more are; None: they are whole.
        """
        height, width = labels.shape
        smallest, smooth, count = self.smallest(), self.smooth(), 0
        how, scale = self.decoding(), self.nucleus_scale()
        if min(height, width) < 1:
            return
        reached = 0
        for top in range(0, height, block):
            while filled is not None and reached < min(height, top + block + halo):
                reached = next(filled)
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


def _normalises(model: NucleiModel) -> bool:
    """Whether the head normalises over the whole field, so that its maps depend on what else is in the field."""
    return any(isinstance(module, nn.GroupNorm) for module in model.head.modules())


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
