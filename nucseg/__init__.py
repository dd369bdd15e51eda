"""nucseg: LoRA fine-tuning of MobileSAM for nuclei instance segmentation in H&E images."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "segment"]

if TYPE_CHECKING:
    from nucseg.predict import load, segment


def __getattr__(name: str) -> Any:
    if name in ("load", "segment"):  # on first use: torch takes seconds to import
        from nucseg import predict

        return getattr(predict, name)
    raise AttributeError(f"module 'nucseg' has no attribute {name!r}")
