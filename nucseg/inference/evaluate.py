"""A trained model over images: one row of scores an image."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from nucseg.data.augment import resize
from nucseg.data.datasets import Dataset, Sample
from nucseg.errors import InputError
from nucseg.inference.decoding import Decoding
from nucseg.instances import MIN_AREA
from nucseg.metrics import score
from nucseg.model.network import NucleiModel, predict

# Smallest predicted object that is kept, px. benchmark: at the image's own size. report: at the size that the
# encoder sees, every component kept; its AJI is the column aji_matched_only.
SCORINGS = {"benchmark": MIN_AREA, "report": 0}


def decoding_of(model: NucleiModel) -> Decoding:
    """Return the decoding that the model's adapter was tuned with; the default one if it was not tuned."""
    return Decoding.from_dict(getattr(model, "decoding", {}))


def segment_whole(
    model: NucleiModel,
    image: np.ndarray,
    threshold: float | None = None,
    min_area: float | None = None,
    decoding: Decoding | None = None,
) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) int32 label map, nuclei 1..n; the network sees the image in one piece.

    ``threshold``: foreground probability, 0..1. ``min_area``: smaller objects are dropped, px of images whose nuclei
    are as large as NuInsSeg's (scaled by ``ModelConfig.nucleus_scale``). None: those of ``decoding``, which is by
    default what the adapter was tuned with.
    """
    how = decoding or decoding_of(model)
    how = replace(how, threshold=how.threshold if threshold is None else threshold)
    how = replace(how, min_area=how.min_area if min_area is None else min_area)
    return how.decode(predict(model, image), model.config.nucleus_scale)[0]


def score_sample(
    model: NucleiModel, sample: Sample, scoring: str = "benchmark", threshold: float | None = None
) -> dict[str, Any]:
    """Predict one sample and score it under one of ``SCORINGS``: the scores by name.

    ``threshold`` None: the adapter's decoding as it was tuned, or the default one.
    """
    if scoring not in SCORINGS:
        raise InputError(f"Scoring {scoring!r} is not known: choose one of {', '.join(SCORINGS)}.")
    if scoring == "report":
        sample = resize(sample, model.config.size)
    how = decoding_of(model) if threshold is None else Decoding(threshold)
    if scoring == "report":
        how = replace(how, min_area=SCORINGS[scoring], min_confidence=0.0)
    predicted = segment_whole(model, sample.image, decoding=how)
    return asdict(score(sample.labels, predicted))


def evaluate(
    model: NucleiModel,
    dataset: Dataset,
    indices: Iterable[int],
    *,
    fold: str = "",
    scoring: str = "benchmark",
    threshold: float | None = 0.5,
    segment: Callable[[int], np.ndarray] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Score the model on the dataset's images ``indices``: columns fold, tissue, stem and those of ``score``.

    Means over the rows are the benchmark's scores (mean of per-image values); mean PQ is not mean SQ x mean RQ.
    ``threshold``: foreground probability; None: all decoding parameters as the adapter was tuned, or the defaults.
    ``segment``: gives the label map of the sample at a position, where the network is not to see images in one piece.
    The model is put in eval mode for it, and back afterwards.
    """
    training, rows = model.training, []
    model.eval()
    try:
        for index in tqdm(list(indices), desc="scoring", unit="image", disable=not progress, leave=False):
            sample = dataset[index]
            where = {"fold": fold, "tissue": sample.tissue, "stem": sample.stem}
            if segment is None:
                rows.append(where | score_sample(model, sample, scoring, threshold))
            else:
                rows.append(where | asdict(score(sample.labels, segment(index))))
    finally:
        model.train(training)
    return pd.DataFrame(rows)
