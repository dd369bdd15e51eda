"""Fine-tune a pretrained adapter on a few annotated images."""

import math
import shlex
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

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
WINDOWS = 800  # training windows in total: about five minutes on two cores


def finetune_config(dataset: Dataset, start: str | Path = DEFAULT_ADAPTER, base: str = "", **changes: Any) -> Config:
    """Return the configuration for your own images: the adapter's model, with a budget for their number.

    ``field_px`` is set so that the nuclei are as large as in the adapter's training images.
    ``base``: needed only if the adapter's base is your own file. ``changes``: options of `Config` to override.
    """
    _, stored, _ = read_adapter(adapter_path(start))
    known = {field.name for field in fields(ModelConfig)}
    model = {k: v for k, v in stored.items() if k in known}
    model["um_per_px"] = 0.0  # the stored value is that of the adapter's own training images
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
    **changes: Any,
) -> Path:
    """Fine-tune an adapter on your own images and masks; return the path of the new one, ``out/best.safetensors``.

    ``folder``: has subfolders ``images`` and ``masks`` (`ImageFolder`); use 5 to 50 images, at least 3. A fifth of
    them, at least two (one of three), are validation images, which select the epoch; their scores are in
    ``out/scores.csv``. ``start``, ``base`` and ``changes`` as in `finetune_config`. Repeat the call to resume an
    interrupted run. Raises ``InputError`` for invalid images, masks or options.
    """
    dataset = open_own(folder) if isinstance(folder, str | Path) else folder
    config = finetune_config(dataset, start, base, **changes)
    if not any(dataset[i].labels.any() for i in own_images(dataset)[0].val):
        warnings.warn(
            "The validation images hold no nucleus, so that they cannot select an epoch: annotate more images.",
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
    """Score the adapter that ``config`` starts from on the validation images, before it is fine-tuned.

    Returns two tables of scores. ``unchanged``: as in ``nucseg predict``, at the scale given by the file's pixel size.
    ``rescaled``: at the scale of ``config``, where nuclei are as large as in the adapter's training images
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
    """Return the pixel size (µm/px) at which ``nucseg predict`` sees your images at the scale of ``config``.

    It is not their true pixel size, but makes nuclei as large as in the adapter's training images. None if the pixel
    size of those is unknown.
    """
    _, stored, _ = read_adapter(adapter_path(config.start))
    own = stored.get("um_per_px", 0.0)
    return own * (stored.get("field_px") or FIELD) / config.field_px if own else None
