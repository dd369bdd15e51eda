"""Pretraining of the base ``offline``: MobileSAM's encoder from random weights, without NuInsSeg.

The images are synthetic tissue and BBBC038 (CC0): its histology and brightfield images, and its fluorescence images
restained as H&E, all generated anew in every epoch (`nucseg.data.mixture`). The whole encoder and the instance head are
trained together and stored in the base, because a run that starts from the trained head needs fewer images
(``head_start``).
"""

import json
from pathlib import Path

import pandas as pd
from safetensors.torch import save_file
from torch import nn

from nucseg.config import Config, preset
from nucseg.data.bbbc038 import held_out_histology
from nucseg.data.mixture import SHARES, PretrainingImages
from nucseg.errors import InputError
from nucseg.files import write_atomic
from nucseg.model.bases import INSTANCE_HEAD
from nucseg.model.network import load_model
from nucseg.records.provenance import command_line
from nucseg.training.loop import train

# Synthetic tissues that the first edition of the base was not trained on, so that the book can train on them live.
# The second edition is not trained on any of NuInsSeg's tissues.
HELD_OUT = (
    "human kidney",
    "human liver",
    "human pancreas",
    "human placenta",
    "human salivory gland",
    "mouse kidney",
)
EDITION = "2"  # the first used NuInsSeg's statistics per tissue and all of BBBC038's histology


def pretrain(bbbc038: str | Path, folder: str | Path, config: Config | None = None, *, progress: bool = True) -> Path:
    """Train a base, write it as ``offline.safetensors`` (float16) in ``folder``, and return its path.

    ``bbbc038``: a folder created by ``nucseg fetch bbbc038``. ``config``: by default the preset ``pretrain``. Repeat
    the call to resume. ``scores.csv`` has the scores on the held-out histology images
    (`nucseg.data.bbbc038.held_out_histology`), enlarged by 1.6, without fine-tuning.

    Raises ``InputError`` for a config that does not train the whole encoder with the instance head, or if the folder
    lacks one of the kinds of images.
    """
    config = config or preset("pretrain")
    if config.lora_target != "full" or config.head != "instance" or config.protocol != "parts":
        raise InputError(
            "Pretraining trains the whole encoder, with head 'instance' and protocol 'parts': do not change these."
        )
    command = command_line(config, Path(folder)).replace("nucseg train", "nucseg pretrain --bbbc038 BBBC038", 1)
    dataset = PretrainingImages(bbbc038, config.seed)
    scores = train(config, dataset, folder, progress=progress, command=command)
    return export(folder, {"pq": float(scores["pq"].mean()), "dice": float(scores["dice"].mean())})


def export(run: str | Path, scores: dict[str, float]) -> Path:
    """Write the encoder and head of a pretraining run as a base, in float16, with a card in the file's header.

    ``scores``: mean scores on the held-out images, for the card. Returns the path of the file.
    """
    run = Path(run)
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    epochs = len(pd.read_csv(run / "history.csv"))
    model = load_model(run / "best.safetensors")
    parts: dict[str, nn.Module] = {"image_encoder.": model.encoder, INSTANCE_HEAD: model.head}
    tensors = {prefix + n: t for prefix, module in parts.items() for n, t in module.state_dict().items()}
    state = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in SHARES.items())
    card = {
        "what": "MobileSAM's image encoder and nucseg's instance head, trained from random weights. "
        "These are not MobileSAM's weights.",
        "edition": EDITION,
        "data": f"synthetic tissue from broad ranges (CC0, made by nucseg) and BBBC038v1 (CC0); windows: {shares}",
        "BBBC038 sha256": about["data"].get("sha256", ""),
        "held out": "NuInsSeg, all of it; of BBBC038's histology every second field, "
        f"{len(held_out_histology())} images (nucseg.data.bbbc038.held_out_histology)",
        "date": about["date"],
        "commit": about["commit"],
        "device": about["device"],
        "seconds": str(about["seconds"]),
        "epochs": f"{epochs} of {about['config']['epochs']} planned",
        "seed": str(about["config"]["seed"]),
        "command": about["command"],
        "scores on held out": json.dumps({name: round(value, 4) for name, value in scores.items()}),
    }
    path = run / "offline.safetensors"
    with write_atomic(path) as part:
        save_file({n: t.contiguous() for n, t in state.items()}, part, metadata=card)
    return path
