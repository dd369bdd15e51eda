"""nucseg: LoRA fine-tuning of MobileSAM for nuclei instance segmentation in H&E images.

The names below are the public API. Each is imported on first use, because PyTorch takes seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "segment": "nucseg.inference.segmenter",
    "load": "nucseg.inference.segmenter",
    "train": "nucseg.training.loop",
    "finetune": "nucseg.training.finetune",
    "evaluate": "nucseg.inference.evaluate",
    "score": "nucseg.metrics",
    "encode": "nucseg.instances",
    "decode": "nucseg.instances",
    "Config": "nucseg.config",
    "preset": "nucseg.config",
    "NuInsSeg": "nucseg.data.datasets",
    "ImageFolder": "nucseg.data.datasets",
    "Synthetic": "nucseg.data.synth",
}

__all__ = [
    "Config",
    "ImageFolder",
    "NuInsSeg",
    "Synthetic",
    "__version__",
    "decode",
    "encode",
    "evaluate",
    "finetune",
    "load",
    "preset",
    "score",
    "segment",
    "train",
]

if TYPE_CHECKING:
    from nucseg.config import Config, preset
    from nucseg.data.datasets import ImageFolder, NuInsSeg
    from nucseg.data.synth import Synthetic
    from nucseg.inference.evaluate import evaluate
    from nucseg.inference.segmenter import load, segment
    from nucseg.instances import decode, encode
    from nucseg.metrics import score
    from nucseg.training.finetune import finetune
    from nucseg.training.loop import train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nucseg' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
