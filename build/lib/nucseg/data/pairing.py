"""Pairing of images and masks by name, ignoring what programs add to the names."""

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nucseg.errors import InputError, Notice
from nucseg.images.coco import coco_images
from nucseg.images.masks import MASK_FORMS, MASK_SUFFIXES, is_coco
from nucseg.images.raster import SUFFIXES

MASK_MARKS = (".ome", ".labels", ".label", ".rois", "_cp_masks", "_masks", "_mask", "_labels", "_seg")
IMAGE_MARKS = (".ome",)
JUNK = ("thumbs.db", "desktop.ini")
OWN = (".overlay.png", ".nuclei.csv", "summary.csv")  # other files that nucseg predict writes


@dataclass(frozen=True)
class Pair:
    """An image and its mask. ``tissue``: their subfolder, "" without one. ``stem``: their common name."""

    tissue: str
    stem: str
    image: Path
    mask: Path


def find_pairs(images: str | Path, masks: str | Path) -> list[Pair]:
    """Pair the images of a folder with the masks of another (or of one COCO file), sorted by tissue and stem.

    ``images/x.png`` belongs to ``masks/x.tif``, ``images/liver/y.ome.tif`` to ``masks/liver/y_cp_masks.png``: names and
    subfolders must agree, except for endings and the marks in `MASK_MARKS`. Other files are named in a warning.

    Raises ``InputError`` for a missing folder, no images, an image without a mask or the reverse, an image with two
    masks, and a mask in an unsupported format.
    """
    images, masks = _folder(images, "image"), Path(masks)
    if not masks.is_file():
        masks = _folder(masks, "mask")
    a, b = images.resolve(), masks.resolve()
    if a.is_relative_to(b) or b.is_relative_to(a):  # otherwise masks would be read as images
        raise InputError(f"'{images}' and '{masks}' overlap: put images and masks into separate folders.")
    image_files, others = _images(images)
    if not image_files:
        raise InputError(f"'{images}' holds no images: it needs files that end in {', '.join(SUFFIXES)}.")
    mask_files, unread = _masks(masks, image_files)
    for name in sorted(image_files.keys() - mask_files.keys()):
        _refuse_unmasked(image_files, mask_files, name, masks, unread)
    others += [path for path in unread if path.name not in OWN and not path.name.endswith(OWN)]
    if others:
        names = ", ".join(path.name for path in others[:8]) + (" ..." if len(others) > 8 else "")
        count = "1 file is" if len(others) == 1 else f"{len(others)} files are"
        warnings.warn(f"{count} neither a readable image nor a readable mask: {names}.", Notice, stacklevel=2)
    return [Pair(*name, image_files[name], mask_files[name]) for name in sorted(image_files)]


def _folder(path: str | Path, what: str) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"The {what} folder '{path}' does not exist: check the path.")
    return path


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """(tissue, file) of every visible file, sorted."""
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__MACOSX")
        tissue = "" if Path(folder) == root else Path(folder).relative_to(root).as_posix()
        for name in sorted(names):
            if not name.startswith(".") and name.casefold() not in JUNK:
                yield tissue, Path(folder) / name


def _without(stem: str, marks: Iterable[str]) -> Iterator[str]:
    """Yield the stem, and then the stem with one more mark removed from its end each time."""
    yield stem
    found = True
    while found:
        mark = next((m for m in marks if stem.casefold().endswith(m) and len(stem) > len(m)), "")
        found, stem = bool(mark), stem[: len(stem) - len(mark)]
        if found:
            yield stem


def _images(root: Path) -> tuple[dict[tuple[str, str], Path], list[Path]]:
    files: dict[tuple[str, str], Path] = {}
    others = []
    for tissue, path in _walk(root):
        if path.suffix.lower() not in SUFFIXES:
            others.append(path)
            continue
        name = (tissue, list(_without(path.stem, IMAGE_MARKS))[-1])
        if name in files:
            both = f"'{files[name]}' and '{path.name}'"
            raise InputError(f"{both} have the same name: remove one, as masks are found by name.")
        files[name] = path
    return files, others


def _masks(root: Path, images: dict[tuple[str, str], Path]) -> tuple[dict[tuple[str, str], Path], list[Path]]:
    files: dict[tuple[str, str], Path] = {}
    unread = []
    for tissue, path in [("", root)] if root.is_file() else list(_walk(root)):
        if path.suffix.lower() not in MASK_SUFFIXES or path.name.endswith(OWN) or _is_record(path):
            unread.append(path)
            continue
        if is_coco(path):
            listed = set(coco_images(path))
            names = [name for name, image in images.items() if image.name in listed and name[0] in (tissue, name[0])]
        else:
            names = [(tissue, key) for key in _without(path.stem, MASK_MARKS) if (tissue, key) in images][:1]
            if not names:
                raise InputError(f"The mask '{path}' has no image of the same name: add the image, or remove the mask.")
        for name in names:
            if name in files and files[name] != path:
                raise InputError(
                    f"The image '{images[name]}' has two masks, '{files[name].name}' and '{path.name}': keep one."
                )
            files[name] = path
    return files, unread


def _is_record(path: Path) -> bool:
    """Whether a .json file is an image's record, written by nucseg predict."""
    return path.suffix.lower() == ".json" and b'"image_sha256"' in path.read_bytes()[:4096]


def _refuse_unmasked(
    images: dict[tuple[str, str], Path],
    masks: dict[tuple[str, str], Path],
    name: tuple[str, str],
    where: Path,
    unread: list[Path],
) -> None:
    near = [path for path in unread if name[1] in _without(path.stem, MASK_MARKS) and not path.name.endswith(OWN)]
    if near and not _is_record(near[0]):
        raise InputError(f"The mask '{near[0]}' has an unsupported format: save it as one of {MASK_FORMS}.")
    more = len(images.keys() - masks.keys()) - 1
    raise InputError(
        f"The image '{images[name]}' has no mask of the same name in '{where}'"
        f"{f' (nor have {more} more)' if more else ''}: add or remove."
    )
