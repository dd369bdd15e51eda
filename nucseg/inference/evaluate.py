"""Scoring a model on a dataset, one row per image, and recording the scores as a run."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from nucseg.config import Config
from nucseg.data.augment import resize
from nucseg.data.datasets import Dataset, Sample
from nucseg.data.splits import Split
from nucseg.data.vague import fold_in, take_out
from nucseg.errors import InputError
from nucseg.files import write_atomic, write_json
from nucseg.inference.decoding import Decoding, decoding_of
from nucseg.instances import MIN_AREA
from nucseg.metrics import score
from nucseg.model.network import NucleiModel, predict
from nucseg.records.provenance import describe

# Area of the smallest predicted object kept, px. benchmark: at the image's own size. report: at the encoder's input
# size, every component kept; the report's AJI is the column aji_matched_only.
SCORINGS = {"benchmark": MIN_AREA, "report": 0}


def segment_whole(
    model: NucleiModel,
    image: np.ndarray,
    threshold: float | None = None,
    min_area: float | None = None,
    decoding: Decoding | None = None,
) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) int32 label map, nuclei 1..n; the network sees the whole image at once.

    ``threshold``: foreground probability, 0..1. ``min_area``: smaller objects are dropped; px in images whose nuclei
    are as large as NuInsSeg's (scaled by ``ModelConfig.nucleus_scale``). If None, both come from ``decoding``, by
    default the decoding stored in the adapter.
    """
    how = decoding or decoding_of(model)
    how = replace(how, threshold=how.threshold if threshold is None else threshold)
    how = replace(how, min_area=how.min_area if min_area is None else min_area)
    return how.decode(predict(model, image), model.config.nucleus_scale)[0]


def score_sample(
    model: NucleiModel,
    sample: Sample,
    scoring: str = "benchmark",
    threshold: float | None = None,
    leave_out_vague: bool = False,
) -> dict[str, Any]:
    """Segment one sample and score it as one of ``SCORINGS``; return the scores by name.

    ``threshold``: foreground probability; None: the adapter's tuned decoding, or the default one.
    ``leave_out_vague``: ignore pixels and nuclei in the sample's vague area (`metrics.score`).
    Raises ``InputError`` for an unknown scoring.
    """
    if scoring not in SCORINGS:
        raise InputError(f"Scoring {scoring!r} is not known: choose one of {', '.join(SCORINGS)}.")
    if scoring == "report":
        sample = take_out(resize(fold_in(sample), model.config.size))
    decoding = decoding_of(model) if threshold is None else Decoding(threshold)
    if scoring == "report":
        decoding = replace(decoding, min_area=SCORINGS[scoring], min_confidence=0.0)
    predicted = segment_whole(model, sample.image, decoding=decoding)
    return asdict(score(sample.labels, predicted, vague=sample.vague if leave_out_vague else None))


def evaluate(
    model: NucleiModel,
    dataset: Dataset,
    indices: Iterable[int],
    *,
    fold: str = "",
    scoring: str = "benchmark",
    threshold: float | None = None,
    segment: Callable[[int], np.ndarray] | None = None,
    leave_out_vague: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Score the model on the dataset's images ``indices``: columns fold, tissue, stem and the fields of `Scores`.

    The benchmark's scores are means over the rows, so mean PQ is not mean SQ x mean RQ.
    ``threshold``: foreground probability; None: the adapter's tuned decoding, or the default one.
    ``segment``: returns the label map of the image at an index; by default the network sees each whole image at once.
    ``leave_out_vague``: as for `score_sample`; for your own images, whose vague areas are those not annotated.
    The model is in eval mode during scoring.

    >>> import nucseg
    >>> data = nucseg.Synthetic(1, size=128, tissues=["human liver"])
    >>> nucseg.evaluate(nucseg.load(device="cpu"), data, [0], progress=False)["nuclei_true"].item() > 0
    True
    """
    training, rows = model.training, []
    model.eval()
    try:
        for index in tqdm(list(indices), desc="scoring", unit="image", disable=not progress, leave=False):
            sample = dataset[index]
            name = {"fold": fold, "tissue": sample.tissue, "stem": sample.stem}
            if segment is None:
                rows.append(name | score_sample(model, sample, scoring, threshold, leave_out_vague))
            else:
                vague = sample.vague if leave_out_vague else None
                rows.append(name | asdict(score(sample.labels, segment(index), vague=vague)))
    finally:
        model.train(training)
    return pd.DataFrame(rows)


def evaluate_and_record(
    model: NucleiModel,
    config: Config,
    dataset: Dataset,
    split: Split,
    folder: Path,
    *,
    adapter: Path,
    command: str,
    started: float,
    commit: str = "",
    seen_as: Mapping[int, str] | None = None,
    more: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Score the split's test part as set in ``config``, and write ``scores.csv`` and ``run.json`` into ``folder``.

    - ``adapter``: the model's file, whose SHA-256 is recorded. ``command``: the command that repeats the run.
    - ``started``: ``time.monotonic()`` at the start of the run, to record its duration.
    - ``commit``: commit of the code that trained the model; empty: that of the running code.
    - ``seen_as``: for each image, the split part in which the model was given it (column ``part``); others: ``none``.
    - ``more``: further entries for ``run.json``.

    Returns the scores, one row per test image.
    """
    scores = evaluate(
        model,
        dataset,
        split.test,
        fold=split.name,
        scoring=config.scoring,
        threshold=None if config.tune_decoding or (config.start and model.decoding) else config.threshold,
        leave_out_vague=config.data == "own",
        progress=progress,
    )
    if seen_as is not None:
        scores.insert(3, "part", [seen_as.get(i, "none") for i in split.test])
    with write_atomic(folder / "scores.csv") as part:
        scores.to_csv(part, index=False, float_format="%.6f")
    about = (
        describe(config, dataset, split, model, adapter, command)
        | ({"commit": commit} if commit else {})
        | dict(more or {})
    )
    write_json(folder / "run.json", about | {"seconds": round(time.monotonic() - started, 1)})
    return scores
