"""Pretraining of the base ``offline``: MobileSAM's encoder trained from random weights, never on NuInsSeg.

The images are synthetic tissue and the histology and brightfield images of BBBC038 (CC0). The whole encoder is
trained, together with the instance head. Both make up the base: the head is small, and a run that starts from it
needs fewer images (``head_start``).
"""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from nucseg.config import Config, preset
from nucseg.data.datasets import ImageFolder, InMemory, Joined, Tiles
from nucseg.data.synth import TISSUES, Synthetic
from nucseg.errors import InputError
from nucseg.files import write_atomic
from nucseg.model.bases import INSTANCE_HEAD
from nucseg.model.network import load_model
from nucseg.records.provenance import command_line
from nucseg.training.loop import train

# The book trains on these tissues live, so the base must not have seen them
HELD_OUT = (
    "human kidney",
    "human liver",
    "human pancreas",
    "human placenta",
    "human salivory gland",
    "mouse kidney",
)
KINDS = ("histology", "brightfield")  # of BBBC038; fluorescence has no stain to learn from


def pretraining_data(bbbc038: str | Path, per_tissue: int = 12, seed: int = 100) -> Joined:
    """Synthetic images of all tissues but ``HELD_OUT``, and BBBC038's images of ``KINDS``.

    ``bbbc038``: a folder with ``images/<kind>/<id>.png`` and ``masks/<kind>/<id>.png``. Its nuclei are small
    (median 273 px of area in histology); at 320 or 256 px scaled to the encoder's 512 they are as large as
    NuInsSeg's.
    """
    tissues = tuple(tissue for tissue in TISSUES if tissue not in HELD_OUT)
    root = Path(bbbc038)
    real = Tiles(InMemory(ImageFolder(root / "images", root / "masks")), KINDS)
    real.name = "BBBC038"
    return Joined(Synthetic(per_tissue, 512, seed, tissues), real)


def pretrain(bbbc038: str | Path, folder: str | Path, config: Config | None = None, *, progress: bool = True) -> Path:
    """Train the base and write its encoder, float16, as ``offline.safetensors`` in ``folder``; returns its path.

    ``config``: by default the preset ``pretrain``. An interrupted run is resumed by the same call.
    """
    config = config or preset("pretrain")
    if config.lora_target != "full" or config.head != "instance":
        raise InputError("Pretraining trains the whole encoder with the head 'instance': leave both options.")
    command = command_line(config, Path(folder)).replace("nucseg train", "nucseg pretrain --bbbc038 BBBC038", 1)
    scores = train(config, pretraining_data(bbbc038), folder, progress=progress, command=command)
    return export(folder, {"pq": float(scores["pq"].mean()), "dice": float(scores["dice"].mean())})


def export(run: str | Path, scores: dict[str, float]) -> Path:
    """Write a pretraining run's encoder and head as a base: float16 safetensors, what it is in the header."""
    run = Path(run)
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    model = load_model(run / "best.safetensors")
    parts: dict[str, nn.Module] = {"image_encoder.": model.encoder, INSTANCE_HEAD: model.head}
    tensors = {prefix + n: t for prefix, module in parts.items() for n, t in module.state_dict().items()}
    state = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    card = {
        "what": "MobileSAM's image encoder and nucseg's instance head, trained from random weights. "
        "These are not MobileSAM's weights.",
        "data": "synthetic tissue (CC0, made by nucseg) and BBBC038v1 (CC0)",
        "date": about["date"],
        "commit": about["commit"],
        "device": about["device"],
        "epochs": str(about["config"]["epochs"]),
        "seed": str(about["config"]["seed"]),
        "scores": json.dumps(scores),
    }
    path = run / "offline.safetensors"
    with write_atomic(path) as part:
        save_file({n: t.contiguous() for n, t in state.items()}, part, metadata=card)
    return path
