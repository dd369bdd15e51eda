"""An adapter for one's own images: a few of them with masks, and an adapter that knows nuclei already."""

import math
import shlex
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

from nucseg.config import Config, ModelConfig, preset
from nucseg.data.datasets import Dataset, ImageFolder
from nucseg.data.own import median_diameter, open_own
from nucseg.data.splits import own_images
from nucseg.errors import Notice
from nucseg.inference.evaluate import evaluate
from nucseg.inference.segmenter import FIELD, Segmenter, load
from nucseg.model.adapters import DEFAULT_ADAPTER, adapter_path, read_adapter
from nucseg.training import loop

NUCLEUS_PX = 32.0  # median diameter of NuInsSeg's nuclei (assets/nuinsseg_tissue_stats.csv), in images of FIELD px
WINDOWS = 800  # training windows altogether: about five minutes on two cores


def finetune_config(dataset: Dataset, start: str | Path = DEFAULT_ADAPTER, base: str = "", **changes) -> Config:
    """What to train one's own images with: the adapter's own model, and a budget that fits their number.

    The images are seen at a scale at which their nuclei are as large as those that the adapter knows (``field``).
    ``base``: only where the adapter's base is a file of yours. ``changes``: options of `Config` that win.
    """
    _, stored, _ = read_adapter(adapter_path(start))
    known = {field.name for field in fields(ModelConfig)}
    model = {k: v for k, v in stored.items() if k in known} | {"um_per_px": 0.0}  # that of the adapter's own images
    config = replace(preset("finetune"), **model, start=str(start))
    if base:
        config = replace(config, base=base)
    field = round(median_diameter(dataset) / NUCLEUS_PX * FIELD)
    split = own_images(dataset)[0]
    smallest = min(min(dataset[i].labels.shape) for i in split.train)
    crop = min(256, config.size, 64 * max(1, math.floor(smallest * config.size / field / 64)))
    epochs = int(np.clip(round(WINDOWS / len(split.train)), 10, 100))
    return replace(config, **({"field_px": field, "crop": crop, "epochs": epochs} | changes))


def finetune(
    folder: str | Path | Dataset,
    out: str | Path,
    start: str | Path = DEFAULT_ADAPTER,
    *,
    base: str = "",
    progress: bool = True,
    **changes,
) -> Path:
    """Fine-tune an adapter on one's own images and masks; returns the new adapter's path, ``out/best.safetensors``.

    ``folder``: with ``images`` and ``masks`` in it (`ImageFolder`); 5 to 50 images are a good number, 3 are the least.
    A fifth of them, two at least (one of three), are not trained on and select the epoch that is kept; their scores are
    in ``out/scores.csv``. ``start``, ``base`` and ``changes`` as for `finetune_config`. Run it again to resume.
    """
    dataset = open_own(folder) if isinstance(folder, str | Path) else folder
    config = finetune_config(dataset, start, base, **changes)
    if not any(dataset[i].labels.any() for i in own_images(dataset)[0].val):
        warnings.warn(
            "The images that select the epoch hold no nucleus, so that any of them is as good: annotate more images.",
            Notice,
            stacklevel=2,
        )
    given = {"start": Path(start).name} | ({"base": Path(base).name} if base else {}) | changes
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = shlex.join(["nucseg", "finetune", "FOLDER", "--out", Path(out).name, *options])
    loop.train(config, dataset, out, progress=progress, command=command)
    return Path(out) / "best.safetensors"


def scores_before(
    folder: str | Path | Dataset, config: Config, base: str = "", *, progress: bool = True
) -> dict[str, pd.DataFrame]:
    """What the adapter that ``config`` starts from scores on the images that choose the epoch.

    Under ``unchanged``: as ``nucseg predict`` would use it, at the scale that a file's µm per px ask for. Under
    ``rescaled``: at the scale of ``config``, at which the nuclei are as large as those that it knows
    (`um_per_px_for`).
    """
    dataset = open_own(folder) if isinstance(folder, str | Path) else folder
    model = load(config.start, base or None, config.device)
    images, source = own_images(dataset)[0].val, getattr(dataset, "source", dataset)

    def as_it_is(index: int) -> np.ndarray:
        image = source.image_path(index) if isinstance(source, ImageFolder) else dataset[index].image
        return Segmenter([model]).segment(image)

    fold = "own images"
    before = evaluate(model, dataset, images, fold=fold, segment=as_it_is, leave_out_vague=True, progress=progress)
    model.config = replace(model.config, field_px=config.field_px)
    told = evaluate(model, dataset, images, fold=fold, leave_out_vague=True, progress=progress)
    return {"unchanged": before, "rescaled": told}


def um_per_px_for(config: Config) -> float | None:
    """The µm per px to tell the adapter that ``config`` starts from, so that it sees the images at ``config``'s scale.

    That is not their true resolution but the one at which their nuclei have the size it knows. None where the
    adapter does not know the resolution of its own images.
    """
    _, stored, _ = read_adapter(adapter_path(config.start))
    own = stored.get("um_per_px", 0.0)
    return own * (stored.get("field_px") or FIELD) / config.field_px if own else None
