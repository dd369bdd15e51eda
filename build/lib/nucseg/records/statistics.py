"""Means, bootstrap intervals, paired differences and explained variance of per-image scores."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from nucseg.errors import InputError

SCORES = ("dice", "iou", "aji", "aji_plus", "pq", "sq", "rq", "aji_matched_only")


def bootstrap_mean(
    values: np.ndarray, groups: np.ndarray | None = None, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, as (low, high); (NaN, NaN) without values.

    ``values``: (n,), one per image. ``level``: coverage, 0..1. ``draws``: number of resamples.
    Without ``groups`` images are resampled, which assumes that they are independent. With ``groups``, (n,), such as
    the images' tissues, whole groups are resampled (the cluster bootstrap; Davison & Hinkley 1997, section 3.8). Images
    of one tissue resemble each other, so this interval is wider: it covers another choice among tissues seen in
    training, but not tissues absent from it.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        return float("nan"), float("nan")
    _, code = np.unique(np.arange(len(values)) if groups is None else np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(code, weights=values), np.bincount(code)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Means of per-image scores with 95% bootstrap intervals.

    ``scores``: one row per image, with columns ``fold``, ``tissue`` and those of `SCORES`.
    Index of the result: score. Columns: ``mean`` (over images), ``low``, ``high`` (images resampled), ``fold_mean``
    (mean of the folds' means, as the benchmark reports), ``tissue_low``, ``tissue_high`` (whole tissues resampled).
    """
    rows = {}
    for name in SCORES:
        values = scores[name].to_numpy()
        low, high = bootstrap_mean(values)
        tissue_low, tissue_high = bootstrap_mean(values, scores["tissue"].to_numpy())
        rows[name] = {
            "mean": float(values.mean()),
            "low": low,
            "high": high,
            "fold_mean": float(scores.groupby("fold")[name].mean().mean()),
            "tissue_low": tissue_low,
            "tissue_high": tissue_high,
        }
    return pd.DataFrame(rows).T


def difference(ours: pd.DataFrame, theirs: pd.DataFrame, names: Sequence[str] = ("dice", "aji", "pq")) -> pd.DataFrame:
    """Paired differences ``ours - theirs`` of two per-image score tables, over the images in both.

    Index: score. Columns: ``difference`` (mean over images), ``low`` and ``high`` (95% bootstrap, images resampled),
    ``tissue_low`` and ``tissue_high`` (whole tissues resampled), ``images`` (their number). Pairing removes the
    variation between easy and hard images, so the interval is narrower than one made from two separate means.
    Raises ``InputError`` if the tables have no image in common.
    """
    keys = ["tissue", "stem"]
    both = ours.merge(theirs, on=keys, suffixes=("", "_theirs"), validate="one_to_one")
    if both.empty:
        raise InputError(
            "The two tables of scores have no image in common: compare scores of the same dataset and split."
        )
    rows = {}
    for name in names:
        values = (both[name] - both[f"{name}_theirs"]).to_numpy()
        low, high = bootstrap_mean(values)
        tissue_low, tissue_high = bootstrap_mean(values, both["tissue"].to_numpy())
        rows[name] = {
            "difference": float(values.mean()),
            "low": low,
            "high": high,
            "tissue_low": tissue_low,
            "tissue_high": tissue_high,
            "images": len(values),
        }
    return pd.DataFrame(rows).T


def variance_explained(table: pd.DataFrame, factors: Sequence[str], value: str) -> pd.Series:
    """Share of the variance of ``value`` that each factor's main effect explains (eta squared), 0..1.

    ``table``: a full factorial, with each combination of the factors' values in exactly one row, so that the effects
    are orthogonal and their sums of squares add up. The last entry, ``rest``, is the share of interactions and
    chance. Raises ``InputError`` if combinations are missing or repeated, or if ``value`` is constant.
    """
    levels = [table[name].nunique() for name in factors]
    if len(table) != np.prod(levels) or table.duplicated(list(factors)).any():
        raise InputError(
            f"The table is not a full grid over {', '.join(factors)}: average repeated rows and add missing ones."
        )
    total = ((table[value] - table[value].mean()) ** 2).sum()
    if not total > 0:
        raise InputError(f"Column {value!r} is constant, so it has no variance to explain: choose another column.")
    shares = {}
    for name in factors:
        effect = table.groupby(name)[value].transform("mean") - table[value].mean()
        shares[name] = float((effect**2).sum() / total)
    return pd.Series(shares | {"rest": 1 - sum(shares.values())})
