"""The images for pretraining a base: four kinds, synthetic and real, generated anew in every epoch."""

import itertools
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from nucseg.data.bbbc038 import parts_of_histology
from nucseg.data.broad import generate_broad
from nucseg.data.datasets import ImageFolder, InMemory, Sample
from nucseg.data.restain import enlarge, recolour, restain
from nucseg.errors import InputError

# Shares of the training windows. Synthetic tissue brings variety of stain and size, BBBC038 real nuclei.
SHARES = {"synthetic": 0.5, "restained": 0.25, "histology": 0.2, "brightfield": 0.05}
WINDOWS = 960  # training windows per epoch
PER_IMAGE = 5  # windows cut from each image, because generating an image takes up to 0.4 s
SIZE = 512  # px, side of the images from which windows are cut
# Factors that bring the nuclei of BBBC038 to about the size in 40x scans (0.25 µm/px)
ENLARGE = {"histology": 1.6, "brightfield": 2.0}
RECOLOURED = 0.7  # share of the histology and brightfield images with new colours
VALIDATION = 16  # number of synthetic validation images, the same for every seed
_VALIDATION_SEED = 2**32 - 1  # training images have three seeds, so none is repeated


class PretrainingImages:
    """Training windows that differ in every epoch, with fixed validation and test images.

    ``bbbc038``: a folder created by ``nucseg fetch bbbc038``. ``seed``: of the training images. ``windows``: number of
    training rows, divided by ``shares`` among synthetic, restained (fluorescence as H&E), histology and brightfield.
    ``validation``: number of synthetic validation images.

    ``table`` has one row per image, with columns ``tissue`` (the kind), ``stem`` and ``part``: train (see `draw`), val
    (synthetic images and 13 histology images) or test (the 50 histology images that are held out). The histology
    images of val and test are enlarged by 1.6 and otherwise unchanged.

    Raises InputError if the folder lacks a kind that has a share, or if the shares do not add up to 1.
    """

    name = "broad synthetic tissue and BBBC038"

    def __init__(
        self,
        bbbc038: str | Path,
        seed: int = 0,
        windows: int = WINDOWS,
        shares: Mapping[str, float] = SHARES,
        validation: int = VALIDATION,
    ) -> None:
        self.seed = seed
        root = Path(bbbc038)
        self.source = ImageFolder(root / "images", root / "masks")  # `content_hash` reads it, to tell copies apart
        self._real = InMemory(self.source)
        self._sources = _sources(self._real.table)
        counts = _divide(windows, shares)
        for kind, count in counts.items():
            if count and kind != "synthetic" and not self._sources[kind]:
                raise InputError(f"'{bbbc038}' holds no images for {kind!r}: get them with nucseg fetch bbbc038.")
        self._slots = {kind: -(-count // PER_IMAGE) for kind, count in counts.items()}
        rows = [(kind, f"{kind}_{i:04d}", "train", i) for kind, count in counts.items() for i in range(count)]
        rows += [("synthetic", f"validation_{i:02d}", "val", i) for i in range(validation)]
        for part in ("val", "test"):
            rows += [("histology", self._real.table["stem"][i], part, i) for i in self._sources[part]]
        self._numbers = [number for *_, number in rows]
        self.table = pd.DataFrame([row[:3] for row in rows], columns=["tissue", "stem", "part"], dtype=str)
        self._weights = self._many_nuclei() if counts["restained"] else np.ones(0)
        self._drawn: dict[tuple[int, str, int], Sample] = {}
        self._fixed: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int, /) -> Sample:
        """Return a validation or test image, or the image of a training row in the first epoch."""
        kind, stem, part = self.table.iloc[index]
        if part == "train":
            return self.draw(0, index)
        if index not in self._fixed:
            number = self._numbers[index]
            if kind == "synthetic":
                sample = generate_broad((_VALIDATION_SEED, number), SIZE)
            else:
                sample = enlarge(self._real[number], ENLARGE[kind], SIZE, np.random.default_rng(0))
            self._fixed[index] = Sample(sample.image, sample.labels, kind, stem)
        return self._fixed[index]

    def draw(self, epoch: int, index: int) -> Sample:
        """Return the image from which row ``index`` is cut in ``epoch`` (from 0); `PER_IMAGE` rows share it.

        It depends only on seed, epoch and row, so that resuming reproduces the run.
        """
        kind, _, part = self.table.iloc[index]
        if part != "train":
            return self[index]
        key = (epoch, kind, self._numbers[index] // PER_IMAGE)
        if key not in self._drawn:
            if any(epoch != drawn for drawn, *_ in self._drawn):
                self._drawn.clear()
            self._drawn[key] = self._make(*key)
        return self._drawn[key]

    def _make(self, epoch: int, kind: str, slot: int) -> Sample:
        if kind == "synthetic":
            return generate_broad((self.seed, epoch, slot), SIZE)
        rng = np.random.default_rng([self.seed, epoch, slot, zlib.crc32(kind.encode())])
        if kind == "restained":
            source = int(rng.choice(self._sources[kind], p=self._weights))
            return restain(self._real[source], rng, SIZE)
        factor = ENLARGE[kind] * float(np.exp(rng.uniform(np.log(0.85), np.log(1.35))))
        sample = enlarge(self._real[self._in_turn(kind, epoch, slot)], factor, SIZE, rng)
        return recolour(sample, rng) if rng.random() < RECOLOURED else sample

    def _in_turn(self, kind: str, epoch: int, slot: int) -> int:
        """Position of a source image; all of a kind are used once before any is used again."""
        sources = self._sources[kind]
        turn, place = divmod(epoch * self._slots[kind] + slot, len(sources))
        order = np.random.default_rng([self.seed, turn, zlib.crc32(kind.encode()), 1]).permutation(len(sources))
        return sources[int(order[place])]

    def _many_nuclei(self) -> np.ndarray:
        """Probability of each fluorescence image, proportional to its number of nuclei, clipped to 3 to 40."""
        counts = np.array([np.count_nonzero(np.unique(self._real[i].labels)) for i in self._sources["restained"]])
        weights = counts.clip(3, 40).astype(float)
        return weights / weights.sum()


def _sources(table: pd.DataFrame) -> dict[str, list[int]]:
    """Positions of the images in the folder by use: a kind to train on, val or test."""
    sources: dict[str, list[int]] = {name: [] for name in ("restained", "histology", "brightfield", "val", "test")}
    parts = parts_of_histology()
    for i, (kind, stem) in enumerate(zip(table["tissue"], table["stem"], strict=True)):
        if kind == "histology":
            part = parts.get(stem[:12], "train")
            sources["histology" if part == "train" else part].append(i)
        elif kind in ("fluorescence", "brightfield"):
            sources["restained" if kind == "fluorescence" else kind].append(i)
    return sources


def _divide(windows: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Number of windows of each kind; they add up to ``windows``."""
    if set(shares) != set(SHARES) or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-9:
        raise InputError(f"Shares {dict(shares)} must be of {', '.join(SHARES)}, 0 or more, and add up to 1.")
    ends = [round(windows * end) for end in itertools.accumulate(shares.values())]
    return {kind: end - start for kind, start, end in zip(shares, [0, *ends], ends, strict=False)}
