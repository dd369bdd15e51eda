"""Pixels of small image files: readable formats, conversion of colours to RGB, and errors in one sentence."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from nucseg.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".webp", ".gif", ".jp2", ".j2k", ".jpx", ".jxl", ".ppm", ".pgm")
TIFFS = (".tif", ".tiff", ".btf", ".tf8", ".qptiff")
SLIDES = (".svs", ".ndpi", ".scn", ".mrxs", ".vms", ".vmu", ".bif", ".svslide", ".dcm")
SUFFIXES = PICTURES + TIFFS + SLIDES
"""The endings of image files that every command reads, in lower case; capitals work too."""

WHITE = 255


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any error raised while ``path`` is read into one `InputError` that names it."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"The file '{path}' does not exist: check the path.") from error
    except IsADirectoryError as error:
        raise InputError(f"'{path}' is a folder: give an image file.") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"'{path}' has more pixels than are read at once: cut it into tiles.") from error
    except MemoryError as error:
        raise InputError(f"'{path}' does not fit into memory: close other programs, or cut it into tiles.") from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
        raise InputError(f"'{path}' cannot be read as an image ({reason}): copy or export it again.") from error


def header(path: Path, length: int = 32) -> bytes:
    """The first ``length`` bytes of a file."""
    with open(path, "rb") as handle:
        return handle.read(length)


def is_tiff(head: bytes) -> bool:
    """Whether a file that starts with these bytes is a TIFF or BigTIFF."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_jpegxl(head: bytes) -> bool:
    """Whether a file that starts with these bytes is a JPEG XL, as a codestream or in its container."""
    return head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"))


def check_size(path: Path, height: int, width: int) -> None:
    """Raise ``InputError`` for more than twice Pillow's ``MAX_IMAGE_PIXELS`` (179 million px, unless changed)."""
    if Image.MAX_IMAGE_PIXELS and height * width > 2 * Image.MAX_IMAGE_PIXELS:
        raise InputError(f"'{path}' has more pixels than are read at once: cut it into tiles.")


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open an image file with Pillow. Raises ``InputError`` if it has several frames."""
    with Image.open(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames != 1 and image.format != "MPO":  # MPO is a camera's JPEG: the picture, followed by previews
            raise InputError(f"'{path}' has {frames} pages: save it as a single flat image.")
        yield image


def read_picture(path: Path) -> tuple[np.ndarray, float | None]:
    """Read a file other than a TIFF: (H, W, 3) uint8 RGB, and the µm/px stated in its header, or None.

    Orientation tags (EXIF) are not applied, as in ImageJ and QuPath.
    """
    head = header(path)
    if is_jpegxl(head):
        import imagecodecs

        pixels = imagecodecs.jpegxl_decode(path.read_bytes())
        if pixels.dtype != np.uint8:
            raise _deep(path)
        check_size(path, *pixels.shape[:2])
        return picture_to_rgb(pixels), None
    if head.startswith(b"\x89PNG") and head[24:25] == b"\x10":  # Pillow would silently cut 16 bits to 8
        raise _deep(path)
    with open_picture(path) as image:
        if image.mode.startswith(("I", "F")):
            raise _deep(path)
        density = image.info.get("dpi", (0, 0))[0]
        return pil_to_rgb(image), 25_400 / float(density) if density else None


def _deep(path: Path) -> InputError:
    return InputError(f"The image '{path}' has more than 8 bits per channel: convert it to 8 bit RGB first.")


def pil_to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image of any 8 bit mode to (H, W, 3) uint8 RGB, blending transparency over white."""
    if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        return picture_to_rgb(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def picture_to_rgb(pixels: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 1), grey and alpha, RGB or RGBA, all uint8 -> (H, W, 3) uint8, alpha blended over white.

    An alpha channel that is 0 everywhere is treated as unused and dropped.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    samples = pixels.shape[2]
    colour = np.repeat(pixels[..., :1], 3, axis=2) if samples < 3 else pixels[..., :3]
    if samples in (2, 4) and pixels[..., -1].any():
        return over_white(colour, pixels[..., -1])
    return np.array(colour)


def over_white(colour: np.ndarray, alpha: np.ndarray, premultiplied: bool = False) -> np.ndarray:
    """Blend (H, W, 3) uint8 colours over white by an (H, W) uint8 alpha channel, 255 opaque."""
    if alpha.min(initial=WHITE) == WHITE:
        return np.array(colour)
    opacity = alpha[..., None].astype(np.uint16)
    part = colour.astype(np.uint16) * (WHITE if premultiplied else opacity)
    return np.minimum((part + (WHITE - opacity) * WHITE + 127) // WHITE, WHITE).astype(np.uint8)


def ycbcr_to_rgb(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 YCbCr (ITU-R BT.601, full range, as in JPEG) -> RGB."""
    y, cb, cr = np.moveaxis(pixels.astype(np.float32), -1, 0)
    rgb = np.stack([y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)])
    return np.moveaxis(np.clip(np.rint(rgb), 0, 255).astype(np.uint8), 0, -1)


def cmyk_to_rgb(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 ink, 255 full -> (H, W, 3) RGB as Pillow converts it, without a colour profile."""
    ink, black = WHITE - pixels[..., :3].astype(np.uint16), WHITE - pixels[..., 3:4].astype(np.uint16)
    return ((ink * black + 127) // WHITE).astype(np.uint8)


def lossy_picture(path: Path) -> str:
    """The name of the lossy format of a file, or "". Lossy compression alters labels.

    JPEG 2000 and JPEG XL also have lossless modes, but files do not state plainly which was used.
    """
    head = header(path, 64)
    if is_jpegxl(head):
        return "JPEG XL"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        with open(path, "rb") as handle:  # VP8L is the lossless codec
            return "" if b"VP8L" in io.BytesIO(handle.read(256)).read() else "WebP"
    with open_picture(path) as image:
        return {"JPEG": "JPEG", "MPO": "JPEG", "JPEG2000": "JPEG 2000", "AVIF": "AVIF"}.get(image.format or "", "")
