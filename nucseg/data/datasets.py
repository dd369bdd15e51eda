"""Images with their label maps: NuInsSeg, and folders of images and masks of your own."""

import hashlib
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from PIL import Image

from nucseg.data.pairing import find_pairs
from nucseg.errors import InputError
from nucseg.files import sha256
from nucseg.images.masks import Instances, read_labels, read_mask
from nucseg.images.slides import read_image
from nucseg.images.tissue import whitened

Name = tuple[str, str]  # (tissue, stem)
# Some copies of NuInsSeg correct the authors' misspelt folders; the benchmark's list keeps them.
SPELLING = {"human salivary gland": "human salivory gland", "human tonsil": "human tonsile"}


@dataclass(frozen=True)
class Sample:
    """One image with its label map.

    ``image``: (H, W, 3) uint8 RGB. ``labels``: (H, W) int32 label map, 0 = background, nuclei 1..n.
    ``vague``: (H, W) bool, True where the annotators were unsure or did not annotate, so that pixels there are ignored;
    None if that is unknown.
    """

    image: np.ndarray
    labels: np.ndarray
    tissue: str
    stem: str
    vague: np.ndarray | None = None


class Dataset(Protocol):
    """The interface of a dataset: samples by position, and a table of their names."""

    @property
    def table(self) -> pd.DataFrame:
        """One row per sample, in the dataset's order, with the text columns ``tissue`` and ``stem``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@runtime_checkable
class Fresh(Protocol):
    """A dataset whose training images differ in every epoch."""

    def draw(self, epoch: int, index: int, /) -> Sample:
        """Return the image of row ``index`` in ``epoch`` (from 0); the same arguments give the same image."""


def _read_vague(path: Path) -> np.ndarray:
    """Read a vague area as (H, W) bool; the authors paint it in any value above 0."""
    return read_image(path).max(axis=-1) > 0


@dataclass(frozen=True)
class _Files:
    tissue: str
    stem: str
    image: Path
    labels: Path
    vague: Path | None = None


class _FileDataset:
    """Samples that are read from files on each access; nothing is kept in memory."""

    name = "folder"

    def __init__(self, rows: Sequence[_Files]) -> None:
        self._rows = list(rows)
        self.table = pd.DataFrame({"tissue": [r.tissue for r in rows], "stem": [r.stem for r in rows]}, dtype=str)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def image_path(self, index: int) -> Path:
        """The image file of a sample."""
        return self._rows[operator.index(index)].image

    def content_hash(self) -> str:
        """SHA-256 (64 hexadecimal digits) of the bytes of all images and masks, in their order."""
        files = [path for row in self._rows for path in (row.image, row.labels)]
        return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()

    def __getitem__(self, index: int, /) -> Sample:
        row = self._rows[operator.index(index)]
        image, labels, vague = self._read(row)
        for path, array in ((row.labels, labels), (row.vague or row.labels, vague)):
            if array is not None and array.shape != image.shape[:2]:
                size, right = f"{array.shape[1]} x {array.shape[0]}", f"{image.shape[1]} x {image.shape[0]}"
                turned = "; the image's orientation tag is not applied" if _turned(row.image) else ""
                raise InputError(f"'{path}' is {size} px, its image {right} px{turned}: export it again at that size.")
        return Sample(image, labels, row.tissue, row.stem, vague)

    def _read(self, row: _Files) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Read the image, its label map, and the area to ignore."""
        # an image with one nucleus in two pieces is not a binary mask
        labels = read_labels(row.labels, trusted=True)
        return read_image(row.image), labels, None if row.vague is None else _read_vague(row.vague)


def _turned(path: Path) -> bool:
    """Whether a picture has an orientation tag that turns it by a quarter, as cameras and phones write it."""
    try:
        with Image.open(path) as image:
            return image.getexif().get(274, 1) > 4
    except (OSError, ValueError, SyntaxError):
        return False


def _by_stem(files: Iterable[Path], suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The visible files of these types by stem; others (Thumbs.db, .DS_Store, ._x.png) are skipped."""
    found: dict[str, Path] = {}
    for path in sorted(files):
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file():
            if path.stem in found:
                both = f"'{found[path.stem]}' and '{path.name}'"
                raise InputError(f"{both} have the same name: remove one, as masks are found by name.")
            found[path.stem] = path
    return found


def _folder(path: str | Path, what: str) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"The {what} folder '{path}' does not exist: check the path.")
    return path


@cache
def _pinned() -> dict[Name, int]:
    table = nuinsseg_list()
    return {name: i for i, name in enumerate(zip(table["tissue"], table["stem"], strict=True))}


def nuinsseg_list() -> pd.DataFrame:
    """The 665 images of NuInsSeg in the benchmark's order: columns ``tissue``, ``stem``, ``nuclei``.

    The order is that of the full paths ``<tissue>/tissue images/<stem>.png``. The list ships with the package, because
    the benchmark's folds depend on the order as well as the seed: sorted by stem, 155 images would change fold.
    """
    text = resources.files("nucseg") / "assets" / "nuinsseg.csv"
    with text.open(encoding="utf-8") as handle:
        return pd.read_csv(handle, dtype={"tissue": str, "stem": str, "nuclei": int}, keep_default_na=False)


def _order(names: Sequence[Name]) -> list[int]:
    """Positions of ``names`` in the benchmark's order; names it does not know follow, by full path."""
    pinned = _pinned()
    paths = [f"{tissue}/tissue images/{stem}.png" for tissue, stem in names]
    return sorted(range(len(names)), key=lambda i: (pinned.get(names[i], len(pinned)), paths[i]))


class NuInsSeg(_FileDataset):
    """The dataset NuInsSeg (Mahbod et al. 2024, doi 10.1038/s41597-024-03117-2) in its authors' layout.

    ``root`` holds one folder per tissue (or a parent folder of them, as unzipping may create), each with
    ``tissue images/<stem>.png``, ``label masks modify/<stem>.tif`` and optionally
    ``vague areas/mask binary/<stem>.png`` (or ``mask binary_vague``). Files are paired by stem. Samples are in the
    benchmark's order (`nuinsseg_list`), followed by images not on the list; partial copies work. Tissues keep the
    authors' spelling, even if a copy has corrected a folder's name. ``vague`` is None for images without a vague mask.
    Files are read on each access.

    Raises `InputError` for a missing folder, one without tissues, or an image without its label map.
    """

    name = "nuinsseg"

    def __init__(self, root: str | Path) -> None:
        tissues = self._tissue_folders(_folder(root, "NuInsSeg"))
        rows = [row for folder in tissues for row in self._list(folder)]
        if not rows:
            raise InputError(f"'{root}' holds no '<tissue>/tissue images/*.png': give the unzipped NuInsSeg folder.")
        names = [(row.tissue, row.stem) for row in rows]
        _check_distinct(names)
        super().__init__([rows[i] for i in _order(names)])

    @staticmethod
    def _tissue_folders(root: Path) -> list[Path]:
        while True:
            folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith((".", "__MACOSX"))]
            tissues = [folder for folder in folders if (folder / "tissue images").is_dir()]
            if tissues or len(folders) != 1:
                return tissues
            root = folders[0]

    @staticmethod
    def _list(folder: Path) -> Iterator[_Files]:
        tissue = SPELLING.get(folder.name, folder.name)
        masks: dict[str, Path] = {}
        vague: dict[str, Path] = {}
        if (folder / "label masks modify").is_dir():
            masks = _by_stem((folder / "label masks modify").iterdir(), (".tif", ".tiff"))
        for name in ("mask binary_vague", "mask binary"):
            if (folder / "vague areas" / name).is_dir():
                vague |= _by_stem((folder / "vague areas" / name).iterdir(), (".png",))
        for stem, image in _by_stem((folder / "tissue images").iterdir(), (".png",)).items():
            if stem not in masks:
                wanted = folder / "label masks modify" / f"{stem}.tif"
                raise InputError(f"'{image}' has no label map '{wanted}': copy it too, or remove the image.")
            yield _Files(tissue, stem, image, masks[stem], vague.get(stem))


class ImageFolder(_FileDataset):
    """Your own data: a folder of images, and a folder of masks with the same names.

    ``images/x.png`` belongs to ``masks/x.tif``, ``images/liver/y.ome.tif`` to ``masks/liver/y_cp_masks.png``
    (`data.pairing.find_pairs`); ``masks`` may also be one COCO file. ``tissue`` is the subfolder's name, "" without
    one. Samples are sorted by tissue and stem. Masks are label maps, ImageJ's ROIs, QuPath's GeoJSON, NumPy's .npy,
    HoVer-Net's .mat or COCO's .json (`images.masks.read_mask`); areas of the classes *ignore* and *region* become
    ``vague``. Files are read on each access.

    ``instances``: "components" for binary masks, whose connected components become the nuclei.
    ``whiten``: make black padding white, as ``nucseg predict`` does.

    Raises `InputError` for a missing folder, no images, an image without a mask or the reverse, and, when a sample is
    read, if `read_image` or `read_mask` does or the sizes differ.
    """

    def __init__(
        self, images: str | Path, masks: str | Path, *, instances: Instances = "ids", whiten: bool = False
    ) -> None:
        self._instances: Instances = instances
        self._whiten = whiten
        super().__init__([_Files(p.tissue, p.stem, p.image, p.mask) for p in find_pairs(images, masks)])

    def _read(self, row: _Files) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        image = read_image(row.image)
        mask = read_mask(row.labels, (image.shape[0], image.shape[1]), self._instances, row.image.name)
        return whitened(image) if self._whiten else image, mask.labels, mask.ignore


class InMemory:
    """A dataset that caches its samples in memory: 1.8 MB per image of 512 px, 1.2 GB for all of NuInsSeg.

    Reading an image takes longer than all of its preprocessing. Processes forked later share what is in memory by then;
    one that is started in another way begins with an empty cache.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.source = dataset
        self._samples: dict[int, Sample] = {}
        self.table = dataset.table
        self.name = getattr(dataset, "name", "")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Sample:
        index = operator.index(index)
        if index not in self._samples:
            self._samples[index] = self.source[index]
        return self._samples[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_samples": {}}  # sending the images takes longer than reading them again

    def read(self, indices: Iterable[int]) -> None:
        """Read these samples into memory now."""
        for index in indices:
            self[index]


def content_hash(dataset: Dataset) -> str:
    """SHA-256 of your own images and masks (`ImageFolder`); "" for published or generated data."""
    source = getattr(dataset, "source", dataset)
    return source.content_hash() if isinstance(source, ImageFolder) else ""


def _check_distinct(names: Sequence[Name]) -> None:
    seen: set[Name] = set()
    for name in names:
        if name in seen:
            raise InputError(f"The dataset has two images '{name[0]}/{name[1]}': rename or remove one.")
        seen.add(name)


def _names(dataset: Dataset) -> list[Name]:
    names = list(zip(dataset.table["tissue"], dataset.table["stem"], strict=True))
    _check_distinct(names)
    return names


class Tiles:
    """The images of some tissues of a dataset; those larger than ``largest`` px are cut into squares of ``side`` px.

    Incomplete tiles at the right and the bottom are dropped. ``table`` names a tile by its top left corner.
    """

    def __init__(self, dataset: Dataset, tissues: tuple[str, ...], largest: int = 320, side: int = 256):
        self._dataset = dataset
        self.name = getattr(dataset, "name", "")
        self._places: list[tuple[int, tuple[slice, slice]]] = []
        rows = []
        for i, (tissue, stem) in enumerate(zip(dataset.table["tissue"], dataset.table["stem"], strict=True)):
            if tissue not in tissues:
                continue
            height, width = dataset[i].labels.shape
            if max(height, width) <= largest:
                corners, size = [(0, 0)], (height, width)
            else:
                grid = itertools.product(range(0, height - side + 1, side), range(0, width - side + 1, side))
                corners, size = list(grid), (side, side)
            for top, left in corners:
                self._places.append((i, np.s_[top : top + size[0], left : left + size[1]]))
                rows.append((tissue, stem if len(corners) == 1 else f"{stem}_{top}_{left}"))
        self.table = pd.DataFrame(rows, columns=["tissue", "stem"], dtype=str)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int, /) -> Sample:
        i, window = self._places[index]
        sample, row = self._dataset[i], self.table.iloc[index]
        vague = None if sample.vague is None else sample.vague[window]
        return Sample(sample.image[window], sample.labels[window], row["tissue"], row["stem"], vague)


class Joined:
    """Several datasets, concatenated."""

    def __init__(self, *datasets: Dataset):
        self.name = " and ".join(getattr(dataset, "name", "") for dataset in datasets)
        self.table = pd.concat([d.table[["tissue", "stem"]] for d in datasets], ignore_index=True)
        self._places = [(d, i) for d in datasets for i in range(len(d))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int, /) -> Sample:
        dataset, i = self._places[index]
        return dataset[i]
