"""Checks of the segmentation options, before anything is loaded: nothing here imports PyTorch."""

from nucseg.errors import InputError
from nucseg.images.pixel_size import PLAUSIBLE_UM

ENGINES = ("auto", "torch", "openvino")  # see `engines`


def check_options(
    um_per_px: float | None,
    threshold: float | None,
    min_area: int | None,
    ridge: float | None,
    tta: bool,
    tissue_mask: bool,
    series: int,
    engine: str,
    min_confidence: float | None = None,
) -> None:
    """Raise ``InputError`` for values that no image can be segmented with; they are those of `segmenter.Segmenter`."""
    if engine not in ENGINES:
        raise InputError(f"Engine {engine!r} is not known: choose one of {', '.join(ENGINES)}.")
    low, high = PLAUSIBLE_UM
    if um_per_px is not None and not low <= um_per_px <= high:
        raise InputError(
            f"um_per_px is {um_per_px!r}: give the µm per px of your images, {low:g} to {high:g} (40x: 0.25)."
        )
    for name, value in {"threshold": threshold, "ridge": ridge, "min_confidence": min_confidence}.items():
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"{name} is {value!r}: it must lie in 0..1.")
    if min_area is not None and min_area < 0:
        raise InputError(f"min_area is {min_area!r}: it must not be negative.")
    if series < 0:
        raise InputError(f"series is {series!r}: give the number of an image in the file, from 1.")
