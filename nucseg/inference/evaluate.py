"""A trained model over images: one row of scores an image."""

from collections.abc import Callable, Iterable
from dataclasses import asdict

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from nucseg.data.augment import resize
from nucseg.data.datasets import Dataset, Sample
from nucseg.errors import InputError
from nucseg.instances import MIN_AREA, SMOOTH_PX, labels_from
from nucseg.metrics import score
from nucseg.model.network import NucleiModel, predict

# Smallest predicted object that is kept, px. benchmark: at the image's own size. report: at the size that the
# encoder sees, every component kept; its AJI is the column aji_matched_only.
SCORINGS = {"benchmark": MIN_AREA, "report": 0}


def segment_whole(
    model: NucleiModel, image: np.ndarray, threshold: float = 0.5, min_area: int = MIN_AREA
) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) int32 label map, nuclei 1..n; the network sees the image in one piece.

    ``threshold``: foreground probability, 0..1. ``min_area``: smaller objects are dropped; px where nuclei are as large
    as NuInsSeg's, and as much less or more as they are smaller or larger (``ModelConfig.nucleus_scale``).
    """
    scale = model.config.nucleus_scale
    return labels_from(predict(model, image), threshold, round(min_area * scale**2), smooth=SMOOTH_PX * scale)


def score_sample(model: NucleiModel, sample: Sample, scoring: str = "benchmark", threshold: float = 0.5) -> dict:
    """Predict one sample and score it under one of ``SCORINGS``: the scores by name."""
    if scoring not in SCORINGS:
        raise InputError(f"Scoring {scoring!r} is not known: choose one of {', '.join(SCORINGS)}.")
    if scoring == "report":
        sample = resize(sample, model.config.size)
    predicted = segment_whole(model, sample.image, threshold, SCORINGS[scoring])
    return asdict(score(sample.labels, predicted))


def evaluate(
    model: NucleiModel,
    dataset: Dataset,
    indices: Iterable[int],
    *,
    fold: str = "",
    scoring: str = "benchmark",
    threshold: float = 0.5,
    segment: Callable[[int], np.ndarray] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Score the model on the dataset's images ``indices``: columns fold, tissue, stem and those of ``score``.

    Means over the rows are the benchmark's scores (mean of per-image values); mean PQ is not mean SQ x mean RQ.
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
