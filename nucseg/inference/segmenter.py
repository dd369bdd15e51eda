"""Segmentation of an image of any size: overlapping fields, and one label map without seams.

>>> import numpy as np, nucseg
>>> image = np.full((64, 80, 3), 240, np.uint8)  # (H, W, 3) uint8 RGB
>>> nucseg.segment(image).shape  # (H, W) int32 label map, 0 = background
(64, 80)

The network sees large fields. They start on a grid of 224 px, so that its attention windows fall on the same pixels
wherever a field begins. Only the core of each field is kept, so that every pixel is predicted once, with its
surroundings in view. The maps are decoded block by block; each block looks beyond its border, and a nucleus belongs to
the block that holds its centroid.
"""

import math
import os
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
from nucseg.data.prefetch import ahead, in_threads
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

BLOCK, HALO = 1536, 128  # px: side of a block that is decoded at once, and how far it looks beyond its border
LARGE = 4096  # px: images with a longer side get a tissue mask
DECODERS = 4  # threads at most that decode blocks beside a GPU
BATCH_PX = 20_000_000  # encoder pixels at most in a batch of several fields, on a GPU
MANY_PX = 120_000_000  # encoder pixels in an image above which compiling the network pays off (engine auto)


def load(adapter: str | Path = DEFAULT_ADAPTER, base: Base | str | None = None, device: str = "auto") -> NucleiModel:
    """Load an adapter for segmentation, by its name (`adapters`) or its file.

    ``base``: needed only if the adapter was trained on a base that is a file of yours. ``device``: auto, cpu, cuda or
    mps. Raises ``InputError`` for an unknown name, a damaged file, or a base other than the adapter's.
    """
    path = adapter_path(adapter)
    model = load_model(path, base)
    model.adapter_name, model.adapter_sha256 = path.stem, sha256(path)
    return place(model, pick_device(device))


@dataclass(frozen=True)
class Segmenter:
    """The models and options with which images are segmented.

    - ``models``: one model, or several whose maps are averaged (an ensemble).
    - ``um_per_px``: pixel size of the images, µm/px; None: unknown, assumed to match the training images.
    - ``threshold``: foreground probability, 0..1, above which a pixel is a nucleus.
    - ``min_area``: area of the smallest object that is kept, in image pixels; None: scaled with the size of the nuclei.
    - ``ridge``: highest ridge that still separates two nuclei, relative to the lower peak, 0..1 (`instances.decode`);
      a lower value separates fewer.
    - ``tta``: test-time augmentation: average over four flips of each field, at four times the cost.
    - ``tissue_mask``: skip the fields of large images (`LARGE`) that lie outside the tissue.
    - ``min_confidence``: lowest probability of being a nucleus for an object to be kept, 0..1; above 0 only with tuned
      adapters (`inference.decoding`).
    - ``engine``: torch, openvino or auto (`engines`); auto: openvino for images of many fields on a CPU, if it is
      installed, else torch.
    - ``series``: image to read from a file with several, counted from 1; 0: the largest (`open_slide`).
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
        """Return all options as given, without the models."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "models"}

    def check(self) -> None:
        """Raise ``InputError`` for options or models with which no image can be segmented."""
        if not self.models:
            raise InputError("There is no model: give at least one adapter.")
        if len({(m.config.head == "instance" and m.config.without != "distance") for m in self.models}) > 1:
            raise InputError("The adapters predict different maps: an ensemble needs heads of one kind.")
        if self.um_per_px and len({m.config.um_per_px > 0 for m in self.models}) > 1:
            raise InputError(
                "Some of the adapters store the pixel size of their training images and some do not, so they would see "
                "these images at different scales: use adapters of one kind, or leave out um_per_px."
            )
        check_options(**self.options())
        self.decoding().check()
        for model in self.models:
            engines.resolve(self.engine, model)

    def decoding(self) -> Decoding:
        """Return how maps are decoded: the given options, else the first adapter's tuned values, else the defaults.

        Lengths and areas are in pixels of images whose nuclei are as large as NuInsSeg's.
        """
        given = {"threshold": self.threshold, "ridge": self.ridge, "min_confidence": self.min_confidence}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(decoding_of(self.models[0]), **changes)

    def zoom(self, model: NucleiModel) -> float:
        """Return the pixels of the model's training images per image pixel; 1 if either pixel size is unknown."""
        own = model.config.um_per_px
        return self.um_per_px / own if self.um_per_px and own else 1.0

    def nucleus_scale(self) -> float:
        """Return the size of the nuclei in these images relative to NuInsSeg's, both in px."""
        return self.models[0].config.nucleus_scale / self.zoom(self.models[0])

    def smallest(self) -> int:
        """Return the area, in image pixels, below which an object is dropped."""
        if self.min_area is not None:
            return self.min_area
        return round(self.decoding().min_area * self.nucleus_scale() ** 2)

    def smooth(self) -> float:
        """Return the standard deviation of the smoothing in `instances.decode`, in image pixels."""
        return min(self.decoding().smooth_px * self.nucleus_scale(), 100)

    def scale(self, model: NucleiModel) -> float:
        """Return the encoder pixels per image pixel."""
        return model.config.size / (model.config.field_px or FIELD) * self.zoom(model)

    def maps(
        self,
        images: Sequence[np.ndarray],
        model: NucleiModel,
        scale: float = 0.0,
        engine: str = "",
        side: tuple[int, int] | None = None,
    ) -> list[np.ndarray]:
        """Predict the maps of fields of one size with one model: (H, W, 3) uint8 -> (C, H, W) float32 each, 0..1.

        ``scale``: encoder pixels per image pixel; 0: `scale`. ``side``: (rows, columns) in encoder pixels, to which
        fields are padded by reflection; None: the next multiples of 64.
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
        """Number of maps that the models predict: 2, or 1 without a distance map."""
        return self.models[0].n_maps

    def segment(self, image: str | Path | np.ndarray, *, progress: bool = False) -> np.ndarray:
        """Segment an image file or an (H, W, 3) uint8 array in memory; return an (H, W) int32 label map, nuclei 1..n.

        The file's pixel size is used if ``um_per_px`` is None. Raises ``InputError`` for an image that cannot be read,
        another dtype or shape, or options out of range.
        """
        with open_slide(image, self.series) as slide:
            segmenter = self
            if self.um_per_px is None and slide.um_per_px is not None:
                segmenter = replace(self, um_per_px=slide.um_per_px)
            segmenter.check()
            maps = np.zeros((self.n_maps, *slide.shape), np.uint8)
            labels = np.zeros(slide.shape, np.int32)
            rows = segmenter.predict_rows(slide, maps, progress=progress, tissue=segmenter.tissue(slide))
            list(rows)  # the iterators fill the arrays
            list(segmenter.label_blocks(maps, labels))
        return labels

    def tissue(self, slide: Slide) -> np.ndarray | None:
        """Find the tissue of a large image: (h, w) bool at low magnification. None for others: predict all of it."""
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
        """Fill ``maps``, (C, H, W) uint8 in steps of 1/255, one row of fields after the other.

        Yields the number of finished rows of fields. ``start``: number of rows that ``maps`` already holds (`row_ends`
        says how far down they reach). The models of an ensemble see the same fields. A slide is read at the level
        nearest to the encoder's scale, ahead of the network in a thread. Black areas, and fields outside ``tissue``,
        get no nuclei.
        """
        rows, columns = self.layout(slide.shape)
        level = slide.at(max(self.scale(model) for model in self.models))
        engine = self.engine
        seen = sum(row.side for row in rows) * sum(column.side for column in columns)
        if engine == "auto" and seen < MANY_PX:
            engine = "torch"
        # OpenVINO compiles for each size: the last field is padded to that of the others
        if engines.resolve(engine, self.models[0]) == "openvino":
            rows, columns = ([replace(span, side=along[0].side) for span in along] for along in (rows, columns))
        batch = max(1, BATCH_PX // (rows[0].side * columns[0].side))
        batch = batch if self.models[0].mean.device.type == "cuda" else 1

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
                    # a batch holds fields of one size; the last of a row differs, at times in its padding alone
                    if waiting and _size(*waiting[0]) != _size(column, field):
                        self._fill(maps, row, waiting, engine, bar)
                        waiting = []
                    waiting.append((column, field))
                    if len(waiting) == batch:
                        self._fill(maps, row, waiting, engine, bar)
                        waiting = []
                self._fill(maps, row, waiting, engine, bar)
                yield done

    def _fill(self, maps: Any, row: Span, fields: Sequence[tuple[Span, Field]], engine: str, bar: "tqdm[Any]") -> None:
        """Predict fields of one row and write their cores to ``maps``."""
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
        """Lay out the fields of an image of ``shape``: the spans of the rows and of the columns.

        Heads that normalise over the field get fields of the size they were trained on, because in larger ones the
        statistics differ and they find fewer nuclei.
        """
        how: dict[str, Any] = {"sides": SIDES}
        if normalising := [model.config.size for model in self.models if _normalises(model)]:
            how = {"sides": (min(normalising),), "margin": min(normalising) // 8, "grid": 16}
        scale = self.scale(self.models[0])
        return spans(shape[0], scale, **how), spans(shape[1], scale, **how)

    def row_ends(self, shape: tuple[int, int]) -> list[int]:
        """Return how far down the maps are filled after each row of fields, in px."""
        return [row.high for row in self.layout(shape)[0]]

    def label_blocks(
        self, maps: Any, labels: Any, block: int = BLOCK, halo: int = HALO, filled: Iterator[int] | None = None
    ) -> Iterator[Block]:
        """Decode ``maps`` block by block; write the nuclei to ``labels``, (H, W) zeros, and yield each block.

        Nuclei are numbered 1..n in the order of the blocks. A nucleus larger than ``halo`` may be cut. ``filled``:
        yields the number of pixel rows that are filled, each time it grows; None: the maps are complete.
        """
        height, width = labels.shape
        smallest, smooth, count = self.smallest(), self.smooth(), 0
        how, scale = self.decoding(), self.nucleus_scale()
        if min(height, width) < 1:
            return

        def places() -> Iterator[tuple[int, int]]:
            reached = 0
            for top in range(0, height, block):
                while filled is not None and reached < min(height, top + block + halo):
                    reached = next(filled)
                for left in range(0, width, block):
                    yield top, left

        def window_of(top: int, left: int) -> tuple[slice, slice]:
            rows = slice(max(0, top - halo), min(height, top + block + halo))
            return rows, slice(max(0, left - halo), min(width, left + block + halo))

        def found_at(place: tuple[int, int]) -> tuple[tuple[int, int], np.ndarray | None, np.ndarray]:
            part = np.asarray(maps[(slice(None), *window_of(*place))])
            if not (part[0] > 255 * how.threshold).any():
                return place, None, np.zeros(0)
            part = part.astype(np.float32) / 255
            found = labels_from(part, how.threshold, smallest, how.ridge, smooth)
            return place, *how.select(found, part, scale)

        # on a CPU the network needs the cores; a GPU is faster than one thread decodes
        threads = 1 if self.models[0].mean.device.type == "cpu" else min(DECODERS, os.cpu_count() or 1)
        for (top, left), found, confidence in in_threads(found_at, places(), threads):
            if found is None:
                continue
            window = window_of(top, left)
            y, x = window[0].start, window[1].start
            core = (top - y, min(top + block, height) - y, left - x, min(left + block, width) - x)
            own = _owned(found, core)
            taken = np.asarray(labels[window])
            own[taken > 0] = 0  # if two blocks divide a clump differently, the first one wins
            old, own = own, renumber(own, smallest, count + 1)
            old = np.unique(old[own > 0])  # in the order of the new numbers
            if len(old):
                labels[window] = np.where(own > 0, own, taken)
                count += len(old)
                yield Block(y, x, own, len(old), confidence[old - 1] if how.classifier else None)


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

    ``image``: an array, or a Pillow image of any 8-bit mode; grey and transparent images are converted. ``model``: an
    adapter's name or file, or a loaded model (`load`), which saves time over many images. The other arguments are those
    of `Segmenter`. Raises ``InputError`` for another dtype or shape, or a value out of range.
    """
    pixels = as_pixels(image)
    loaded = load(model) if isinstance(model, str | Path) else model
    segmenter = Segmenter([loaded], um_per_px, threshold, min_area, ridge, tta, min_confidence=min_confidence)
    return segmenter.segment(pixels, progress=progress)


def _normalises(model: NucleiModel) -> bool:
    """Whether the head normalises over the whole field, so that its maps depend on the rest of the field."""
    return any(isinstance(module, nn.GroupNorm) for module in model.head.modules())


def known_blocks(labels: Any, block: int = BLOCK, halo: int = HALO) -> Iterator[Block]:
    """Yield the nuclei of an existing label map, (H, W) of any integer type, block by block as `label_blocks` does."""
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
            own[np.isin(own, list(new & given))] = 0  # larger than the halo, so no block sees it whole
            given |= new
            if own.any():
                yield Block(y, x, own.astype(np.int32), int(np.count_nonzero(np.unique(own))))


def _size(column: Span, field: Field) -> tuple[int, ...]:
    """The width in encoder pixels to which a field is padded, and the shape of its image."""
    return column.side, *field.image.shape


def _part(mask: np.ndarray, shape: tuple[int, int], window: tuple[int, int, int, int]) -> np.ndarray:
    """Cut from a mask, a reduced image of ``shape``, the part that shows a window (top, left, h, w) of the image."""
    top, left, height, width = window
    down, across = mask.shape[0] / shape[0], mask.shape[1] / shape[1]
    low, high = math.floor(top * down), math.ceil((top + height) * down)
    return mask[low:high, math.floor(left * across) : math.ceil((left + width) * across)]


def free_memory() -> None:
    """Release the memory that PyTorch keeps in reserve on a GPU, so that the next image may fit after one did not."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _owned(found: np.ndarray, core: tuple[int, int, int, int]) -> np.ndarray:
    """Keep the nuclei of ``found`` whose centroid lies in ``core`` (first row, end, first column, end)."""
    n = int(found.max(initial=0)) + 1
    rows, columns = np.nonzero(found)
    ids = found[rows, columns]
    area = np.maximum(np.bincount(ids, minlength=n), 1)
    y, x = (np.bincount(ids, at, n) / area for at in (rows, columns))
    inside = (y >= core[0]) & (y < core[1]) & (x >= core[2]) & (x < core[3])
    inside[0] = False
    return np.where(inside[found], found, 0)
