"""Means, bootstrap intervals, paired differences and explained variance of recorded scores."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from nucseg.errors import InputError

SCORES = ("dice", "iou", "aji", "aji_plus", "pq", "sq", "rq", "aji_matched_only")


def bootstrap_mean(
    values: np.ndarray, groups: np.ndarray | None = None, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean: (low, high), NaN where there are no values.

    ``values``: (n,), one an image. Without ``groups`` images are drawn, as if each were independent. With
    ``groups`` (n,), such as tissues, whole groups are drawn (the cluster bootstrap): images of one tissue are
    alike, so this is the interval for the mean over another choice of tissues, each of them seen in training
    (Davison & Hinkley 1997, section 3.8).
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

    Index: score. Columns: ``mean`` (over images), ``low``, ``high`` (images drawn), ``fold_mean`` (the mean of
    the folds' means, as the benchmark reports), ``tissue_low``, ``tissue_high`` (whole tissues drawn).
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
    """Paired differences ``ours - theirs`` of two per-image score tables over the images that both have.

    Index: score. Columns: ``difference`` (mean over images), ``low`` and ``high`` (95% bootstrap, images drawn),
    ``tissue_low`` and ``tissue_high`` (tissues drawn), ``images``. Pairing takes out what makes an image hard for
    both, so the interval is narrower than that of two means. Raises ``InputError`` without a common image.
    """
    keys = ["tissue", "stem"]
    both = ours.merge(theirs, on=keys, suffixes=("", "_theirs"), validate="one_to_one")
    if both.empty:
        raise InputError("The two tables of scores have no image in common, so they cannot be compared.")
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

    ``table``: one row a combination, each combination of the factors' values once (a full factorial), so that the
    effects are orthogonal and their sums of squares add up. The last entry, ``rest``, is what interactions and
    chance have left. Raises ``InputError`` for a grid with holes or repeats, or no variance at all.
    """
    levels = [table[name].nunique() for name in factors]
    if len(table) != np.prod(levels) or table.duplicated(list(factors)).any():
        raise InputError(f"The table is no full grid over {', '.join(factors)}: average repeats, fill holes first.")
    total = ((table[value] - table[value].mean()) ** 2).sum()
    if not total > 0:
        raise InputError(f"Column {value!r} does not vary, so there is nothing to explain.")
    shares = {}
    for name in factors:
        effect = table.groupby(name)[value].transform("mean") - table[value].mean()
        shares[name] = float((effect**2).sum() / total)
    return pd.Series(shares | {"rest": 1 - sum(shares.values())})
