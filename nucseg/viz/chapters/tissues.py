"""Figures and tables of the chapter on tissues."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from nucseg.errors import InputError
from nucseg.records.runs import Run
from nucseg.records.statistics import bootstrap_mean
from nucseg.viz import figures
from nucseg.viz.chapters.changes import TIGHT
from nucseg.viz.chapters.crossvalidation import short_name

NAMES = {"dice": "Dice", "aji": "AJI", "pq": "PQ"}
PROPERTIES = {  # columns of nuinsseg_tissue_stats.csv, in words
    "nuclei_per_image_mean": "nuclei per image",
    "area_px_median": "area of a nucleus, px",
    "touching_fraction": "share that touches",
}
LOGARITHMIC = ("nuclei_per_image_mean", "area_px_median")


def report_table(printed: pd.DataFrame, files: pd.DataFrame, ours: pd.DataFrame) -> Styler:
    """The tissues of the report's Table 2: as printed, in the mean of its folds, and in ours.

    All with tissues as index and columns ``dice``, ``aji`` and ``pq``; the rows are those of ``printed``.
    """
    sides = {"printed": printed, "its five folds": files, "ours": ours}
    parts = {words: table.loc[printed.index, ["dice", "pq"]] for words, table in sides.items()}
    table = pd.concat(parts, axis=1).rename(columns=NAMES).rename(index=short_name).rename_axis(None)
    shown = table.style.format("{:.3f}").set_table_styles(TIGHT)
    return shown.set_caption("The report's Table 2: as printed, as the mean of its five folds, and ours")


def plot_ranking(scores: pd.DataFrame) -> Figure:
    """Draw mean PQ and AJI of every tissue with 95% intervals over its images, best PQ first; dots: single images."""
    order = scores.groupby("tissue")["pq"].mean().sort_values(ascending=False).index
    counts = scores["tissue"].value_counts()
    figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 7.4), sharey=True)
    for ax, key, colour in zip(axes, ("pq", "aji"), figures.SERIES, strict=False):
        rows = {"data": scores, "x": key, "y": "tissue", "order": order, "ax": ax}
        sns.stripplot(**rows, color="0.75", size=2, jitter=0.25, zorder=0)
        dots = {"linestyle": "none", "markersize": 4, "err_kws": {"linewidth": 1.4}}
        sns.pointplot(**rows, color=colour, errorbar=bootstrap_mean, **dots)
        ax.axvline(scores[key].mean(), color="0.6", linewidth=1)
        ax.set(xlabel=NAMES[key], ylabel="", xlim=(0, 0.9))
    labels = [f"{short_name(tissue)} ({counts[tissue]})" for tissue in order]
    axes[0].set_yticks(range(len(order)), labels, fontsize=9)
    return figure


def tissue_table(columns: Mapping[str, Mapping[str, Run]]) -> Styler:
    """Mean scores of all tissues as a heat map, best PQ of the first column first; darker is lower.

    ``columns``: recorded runs of the folds by base and budget. Of the second column and further ones only PQ is shown.
    """
    tables = {name: pd.concat([run.scores for run in runs.values()]) for name, runs in columns.items()}
    first, *others = tables
    means = tables[first].groupby("tissue")[list(NAMES)].mean().rename(columns=NAMES)
    for name in others:
        means[f"PQ, {name}"] = tables[name].groupby("tissue")["pq"].mean()
    heat = list(means.columns)
    means.insert(0, "images", tables[first]["tissue"].value_counts())
    shown = means.sort_values("PQ", ascending=False).rename(index=short_name).rename_axis("tissue").reset_index()
    marked = pd.DataFrame("heat", index=shown.index, columns=heat)
    style = shown.style.hide(axis="index").format(dict.fromkeys(heat, "{:.2f}"))
    style = style.background_gradient(
        subset=pd.Index(heat),
        cmap="cividis",
        low=1.0,
        text_color_threshold=0.0,  # the upper half of the colours, on which black can be read
    )
    return (
        style.set_td_classes(marked).set_table_styles(TIGHT).set_caption("All tissues, best PQ first; darker is lower")
    )


def standardised(statistics: pd.DataFrame) -> pd.DataFrame:
    """The three `PROPERTIES` of the tissues, the first two as logarithms, each with mean 0 and standard deviation 1."""
    values = statistics[list(PROPERTIES)].copy()
    values[list(LOGARITHMIC)] = np.log(values[list(LOGARITHMIC)])
    return (values - values.mean()) / values.std()


def plot_effects(effects: Mapping[str, np.ndarray]) -> Figure:
    """Draw what one standard deviation of each property changes in a tissue's score, with 95% intervals.

    ``effects``: by score, (3, 3): one row per property, with the effect and the ends of its interval.
    Raises ``InputError`` for arrays of another shape.
    """
    if any(np.shape(rows) != (len(PROPERTIES), 3) for rows in effects.values()):
        raise InputError("plot_effects needs one row per property: the effect, and both ends of its interval.")
    figure, axes = plt.subplots(1, len(effects), figsize=(figures.WIDTH, 2.3), sharey=True, sharex=True)
    for ax, (name, rows), colour in zip(np.atleast_1d(axes), effects.items(), figures.SERIES, strict=False):
        ax.axvline(0, color="0.6", linewidth=1)
        for i, (value, low, high) in enumerate(np.asarray(rows)):
            clear = low > 0 or high < 0
            ax.plot([low, high], [i, i], color=colour, linewidth=2)
            ax.plot(value, i, "o", color=colour, markerfacecolor=colour if clear else "white", markersize=6)
        ax.set(title=name, ylim=(len(PROPERTIES) - 0.5, -0.5))
    words = [text.removesuffix(", px") for text in PROPERTIES.values()]
    np.atleast_1d(axes)[0].set_yticks(range(len(words)), words)
    figure.supxlabel("change of the score with one standard deviation", fontsize=10)
    return figure


def plot_properties(statistics: pd.DataFrame, ours: pd.DataFrame) -> Figure:
    """Draw the mean PQ of the tissues over each of their three `PROPERTIES`; the extremes are named.

    ``statistics`` and ``ours``: with tissues as index.
    """
    figure, axes = plt.subplots(1, 3, figsize=(figures.WIDTH, 2.8), sharey=True)
    side: dict[str, Any]
    for ax, (column, label) in zip(axes, PROPERTIES.items(), strict=True):
        ax.scatter(statistics.loc[ours.index, column], ours["pq"], s=16, color=figures.SERIES[0])
        ax.set_xlabel(label, fontsize=9.5)
        if column in LOGARITHMIC:
            _logarithmic(ax)
        middle = statistics.loc[ours.index, column].median()
        for tissue in {str(ours["pq"].idxmin()), str(ours["pq"].idxmax())}:
            at = statistics.loc[tissue, column], ours.loc[tissue, "pq"]
            side = {"xytext": (-4, 5), "ha": "right"} if at[0] > middle else {"xytext": (4, 5), "ha": "left"}
            ax.annotate(tissue.split(" ", 1)[1], at, textcoords="offset points", fontsize=8.5, **side)
        if (tissue := "mouse thymus") in ours.index:  # it lies among the others, so its name stands apart, with a line
            at = statistics.loc[tissue, column], ours.loc[tissue, "pq"]
            last = (statistics.loc[ours.index, column] > at[0]).mean() < 0.2
            side = {"xytext": (0.99, 0.73), "ha": "right"} if last else {"xytext": (0.03, 0.73), "ha": "left"}
            line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.7, "shrinkB": 3}
            ax.annotate("thymus", at, textcoords="axes fraction", fontsize=8.5, arrowprops=line, **side)
    axes[0].set(ylabel="PQ", ylim=(0.2, 0.7))
    return figure


def _logarithmic(ax: Axes) -> None:
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xticks([tick for tick in (10, 30, 100, 300, 1000) if low < tick < high], minor=False)
    ax.set_xticks([], minor=True)
    ax.xaxis.set_major_formatter("{x:.0f}")


def left_out(runs: Mapping[str, Run], scores: pd.DataFrame) -> pd.DataFrame:
    """Pair the scores of each image by a model that was not trained on its tissue, and by one that was.

    ``runs``: one per tissue left out. ``scores``: of the folds, where a tissue's other images were trained on. One row
    per image, with the scores of both (``pq`` and ``pq_in`` for example) and ``train``, the size of the training part.
    """
    parts = [
        run.scores.merge(scores, on=["tissue", "stem"], suffixes=("", "_in")).assign(train=run.about["split"]["train"])
        for run in runs.values()
    ]
    return pd.concat(parts, ignore_index=True)


def left_out_table(pairs: pd.DataFrame) -> Styler:
    """Mean PQ of each tissue left out, in both models, and the paired difference with its interval (images drawn)."""
    rows = []
    for tissue, part in pairs.groupby("tissue"):
        change = part["pq"] - part["pq_in"]
        low, high = bootstrap_mean(change.to_numpy())
        words = f"{change.mean():+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")
        means = {"seen": part["pq_in"].mean(), "left out": part["pq"].mean()}
        rows.append({"tissue": short_name(str(tissue)), "images": len(part)} | means | {"difference": words})
    shown = pd.DataFrame(rows).style.hide(axis="index").format({"seen": "{:.3f}", "left out": "{:.3f}"})
    shown = shown.set_table_styles([*TIGHT, {"selector": "td.col4", "props": "white-space: nowrap"}])
    return shown.set_caption("PQ of the same images: by a model that had seen the tissue, and by one that had not")


def plot_left_out(pairs: pd.DataFrame) -> Figure:
    """Draw the paired change of PQ for each tissue left out: single images, and the mean with its interval."""
    data = pairs.assign(change=pairs["pq"] - pairs["pq_in"], tissue=pairs["tissue"].map(short_name))
    order = data.groupby("tissue")["change"].mean().sort_values().index
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 3))
    rows = {"data": data, "x": "change", "y": "tissue", "order": order, "ax": ax}
    sns.stripplot(**rows, color="0.7", size=3, jitter=0.2, zorder=0)
    dots = {"linestyle": "none", "markersize": 6, "err_kws": {"linewidth": 2}}
    sns.pointplot(**rows, color=figures.SERIES[0], errorbar=bootstrap_mean, **dots)
    ax.axvline(0, color="0.5", linewidth=1)
    ax.set(xlabel="change of PQ when the tissue is left out", ylabel="")
    return figure
