"""Paired differences between recorded runs: their intervals, a table and a forest plot. Shared by several chapters."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nucseg.records.runs import Run
from nucseg.records.statistics import bootstrap_mean
from nucseg.viz import figures

NAMES = {"dice": "Dice", "aji": "AJI", "pq": "PQ", "sq": "SQ", "rq": "RQ"}
KEYS = ["fold", "tissue", "stem"]
TIGHT: list[Any] = [{"selector": "th, td", "props": "padding: 0.15rem 0.4rem"}]  # so that a wide table fits the page


def paired(ours: pd.DataFrame, theirs: pd.DataFrame, names: Sequence[str] = ("dice", "aji", "pq")) -> pd.DataFrame:
    """Differences ``ours - theirs`` of two per-image score tables: one row per fold and image, a column per score."""
    both = ours.merge(theirs, on=KEYS, suffixes=("", "_theirs"), validate="one_to_one")
    return both[KEYS].assign(**{name: both[name] - both[f"{name}_theirs"] for name in names})


def interval(differences: pd.DataFrame, name: str = "pq") -> tuple[float, float, float]:
    """Mean difference of the score ``name`` and its 95% bootstrap interval, as (mean, low, high).

    Images are resampled; an image that several folds score is drawn as one.
    """
    image = differences["tissue"] + "/" + differences["stem"]
    groups = image.to_numpy() if image.duplicated().any() else None
    return float(differences[name].mean()), *bootstrap_mean(differences[name].to_numpy(), groups)


def signed(mean: float, low: float, high: float, decimals: int = 3) -> str:
    """A difference as the pages print it: "+0.014 (+0.008 to +0.021)", with a proper minus sign."""
    text = f"{mean:+.{decimals}f} ({low:+.{decimals}f} to {high:+.{decimals}f})"
    return text.replace("-", "−")


def by_fold(runs: Mapping[str, Run], name: str, reference: str) -> pd.DataFrame:
    """Paired differences of the runs ``NAME-fold_N`` to ``REFERENCE-fold_N``, over the folds that have both."""
    folds = [run.removeprefix(name) for run in runs if run.startswith(f"{name}-fold_")]
    pairs = [(runs[name + fold], runs[reference + fold]) for fold in folds if reference + fold in runs]
    return pd.concat([paired(ours.scores, theirs.scores) for ours, theirs in pairs])


def cells(rows: Mapping[str, pd.DataFrame], names: Sequence[str] = ("dice", "aji", "pq")) -> pd.DataFrame:
    """Mean differences and their intervals as text: one row per entry of ``rows``, a column per score."""
    texts = {
        label: {NAMES[name]: signed(*interval(differences, name)) for name in names}
        for label, differences in rows.items()
    }
    return pd.DataFrame(texts).T


def table(rows: Mapping[str, pd.DataFrame], caption: str, names: Sequence[str] = ("dice", "aji", "pq")) -> Any:
    """`cells` with a caption."""
    return cells(rows, names).style.set_caption(caption)


def plot(
    rows: Mapping[str, pd.DataFrame],
    names: Sequence[str] = ("pq",),
    *,
    series: Mapping[str, str] | None = None,
    split: bool = False,
) -> Figure:
    """Forest plot of mean differences with 95% intervals over images: a panel per score, a line per entry of ``rows``.

    ``series``: what each entry is compared with, by label; each gets a colour. ``split``: one mark per fold instead.
    """
    shown = [(label, part) for label, whole in rows.items() for part in _parts(whole, split)]
    kinds = list(dict.fromkeys(series.values() if series else (part["fold"].iloc[0] for _, part in shown)))
    figure, axes = plt.subplots(
        1, len(names), figsize=(figures.WIDTH, 0.9 + 0.3 * len(rows)), sharey=True, squeeze=False
    )
    places = {label: -i for i, label in enumerate(rows)}
    for ax, name in zip(axes[0], names, strict=True):
        for label, part in shown:
            kind = series[label] if series else part["fold"].iloc[0]
            number = kinds.index(kind) if series or split else 0
            shift = (0.5 * (len(kinds) - 1) - number) * 0.22 if split else 0.0
            mean, low, high = interval(part, name)
            colour = figures.SERIES[number % len(figures.SERIES)]
            ax.plot([low, high], [places[label] + shift] * 2, color=colour, linewidth=2, solid_capstyle="butt")
            ax.plot(mean, places[label] + shift, "os^D"[number % 4], color=colour, markersize=5)
        ax.axvline(0, color="0.5", linewidth=1, zorder=0)
        ax.set(xlabel=f"change in {NAMES[name]}", ylim=(-len(rows) + 0.4, 0.6))
        ax.set_yticks(list(places.values()), list(places))
        ax.locator_params(axis="x", nbins={1: 6, 2: 4}.get(len(names), 3), steps=[1, 2, 5, 10])  # short labels
    if series or split:
        handles = [
            plt.Line2D([], [], color=figures.SERIES[i % len(figures.SERIES)], marker="os^D"[i % 4], label=str(kind))
            for i, kind in enumerate(kinds)
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(kinds))
    return figure


def _parts(differences: pd.DataFrame, split: bool) -> list[pd.DataFrame]:
    return [part for _, part in differences.groupby("fold")] if split else [differences]


def pareto(cost: Sequence[float] | pd.Series, gain: Sequence[float] | pd.Series) -> np.ndarray:
    """(n,) bool: the points that no other point beats, costing no more and gaining no less, one of them strictly."""
    c, g = np.asarray(cost, float), np.asarray(gain, float)
    beats = (c[:, None] <= c) & (g[:, None] >= g) & ((c[:, None] < c) | (g[:, None] > g))
    return np.asarray(~beats.any(axis=0))
