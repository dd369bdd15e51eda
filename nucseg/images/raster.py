"""Reading image and mask files, with one clear sentence for each that cannot be used."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from skimage.measure import label as connected_components

from nucseg.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
"""The file types of images and masks, in small letters; capitals work too."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while ``path`` is read into one sentence about it."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"The file '{path}' does not exist: check the path.") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"'{path}' has more pixels than are read at once: cut it into tiles.") from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"'{path}' cannot be read as an image ({reason}): copy or export it again.") from error


def _tiff_page(path: Path) -> tifffile.TiffPage:
    """The only page of a TIFF file, its pixels not yet read."""
    with tifffile.TiffFile(path) as tiff:
        if len(tiff.pages) != 1:
            raise InputError(f"'{path}' has {len(tiff.pages)} pages: save it as a single flat image.")
        page = tiff.pages.first
        if Image.MAX_IMAGE_PIXELS and page.imagewidth * page.imagelength > 2 * Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        return page


def is_tiff(header: bytes) -> bool:
    return header[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _is_deep(path: Path, header: bytes) -> bool:
    """Whether a channel has more than 8 bits; Pillow would cut a 16 bit RGB PNG down without a word."""
    if is_tiff(header):
        page = _tiff_page(path)
        return page.dtype is None or page.dtype.itemsize > 1
    return header.startswith(b"\x89PNG") and header[24:25] == b"\x10"  # the bit depth field of IHDR


def _open(path: Path) -> Image.Image:
    image = Image.open(path)
    pages = getattr(image, "n_frames", 1)
    if pages != 1:
        image.close()
        raise InputError(f"'{path}' has {pages} pages: save it as a single flat image.")
    return image


def _header(path: Path) -> bytes:
    with open(path, "rb") as handle:
        return handle.read(32)


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 RGB, 0-255.

    Grey, palette, RGBA and CMYK files are converted; an alpha channel is dropped, not blended.

    Raises `InputError` for a file that is missing, damaged, truncated, has several pages, more than 8 bits
    a channel, or more than twice Pillow's ``MAX_IMAGE_PIXELS`` (179 million px, unless it was changed).
    """
    path = Path(path)
    with reading(path):
        deep = _is_deep(path, _header(path))
        if not deep:
            with _open(path) as image:
                deep = image.mode.startswith(("I", "F"))
                if not deep:
                    through = "RGBA" if image.mode in ("P", "PA") else "RGB"  # else transparency warns
                    return np.array(image.convert(through).convert("RGB"))
    raise InputError(f"The image '{path}' has more than 8 bits a channel: convert it to 8 bit RGB first.")


def _read_mask(path: Path) -> np.ndarray:
    """The mask as it is stored, any shape and type."""
    if is_tiff(_header(path)):
        if _tiff_page(path).compression in (6, 7):  # old and new style JPEG
            raise InputError(f"The mask '{path}' is JPEG-compressed, which alters labels: export it as PNG.")
        mask = tifffile.imread(path, key=0)
        return mask.squeeze() if mask.ndim > 2 else mask
    with _open(path) as image:
        if image.format == "JPEG":
            raise InputError(f"The mask '{path}' is a JPEG, which alters labels: export it as PNG or TIFF.")
        return np.array(image)


def read_labels(path: str | Path, *, split_binary: bool = True) -> np.ndarray:
    """Read a mask file as a label map: (H, W) int32, 0 = background, nuclei renumbered 1..n.

    The order of the ids is kept. A mask with exactly one value other than 0 (bool, 0/1, 0/255) does not
    say where one nucleus ends: with ``split_binary`` its 8-connected components become the nuclei, without
    it all of it is one nucleus. The pixels of a palette image are its palette indices.

    Raises `InputError` for a file that is missing, damaged, truncated, lossy (JPEG), has several pages or
    channels, holds floating point numbers (whole ones too) or negative ids, has several ids and no background, or is
    too large (`read_image`).
    """
    path = Path(path)
    with reading(path):
        mask = _read_mask(path)
    if not mask.size:
        raise InputError(f"The mask '{path}' has no pixels: export it again.")
    if mask.ndim != 2:
        shape = " x ".join(map(str, mask.shape))
        raise InputError(f"The mask '{path}' has shape {shape}: save it with one channel, one id a nucleus.")
    if mask.dtype.kind not in "bui":
        raise InputError(f"The mask '{path}' holds {mask.dtype} values: save it as whole numbers (uint16).")
    values, inverse = np.unique(mask, return_inverse=True)
    if values[0] < 0:
        raise InputError(f"The mask '{path}' holds negative ids: use 0 for background, 1..n for nuclei.")
    if len(values) > 1 and values[0] > 0:
        raise InputError(f"The mask '{path}' has no background: give the pixels outside nuclei the value 0.")
    if split_binary and np.count_nonzero(values) == 1:
        return connected_components(mask > 0, connectivity=2).astype(np.int32)
    return (inverse.reshape(mask.shape) + int(values[0] > 0)).astype(np.int32)  # above 0: one nucleus fills it all
