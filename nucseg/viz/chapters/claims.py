"""Figures of the chapter "What holds"."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import ndimage

from nucseg.data.datasets import Sample
from nucseg.errors import InputError
from nucseg.instances import components, foreground
from nucseg.viz import figures
from nucseg.viz.chapters.report import rate_name

MARGIN = 24  # px around the pair of nuclei in `plot_pair`


def plot_dropped(dropped: pd.DataFrame) -> Figure:
    """Draw two kinds of AJI over the share of nuclei deleted: index the share, columns ``report`` and ``Kumar``."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 2.8))
    last = dropped.index[-1]
    for column, words, colour, style, above in (
        ("report", "matched nuclei only", figures.SERIES[1], "--", -16),
        ("Kumar", "as Kumar et al. define it", figures.SERIES[0], "-", -22),
    ):
        ax.plot(dropped[column], style, color=colour, marker="o", markersize=4)
        at = (last, dropped.loc[last, column])
        ax.annotate(words, at, xytext=(0, above), textcoords="offset points", ha="right", color=colour)
    ax.set(xlabel="share of the nuclei deleted", ylabel="AJI", ylim=(0, 1.06))
    ax.xaxis.set_major_formatter("{x:.0%}")
    return figure


def plot_above(tissues: pd.DataFrame) -> Figure:
    """Draw AJI over IoU, and which results lie above the line: columns ``iou`` and ``aji``, a row per result."""
    above = tissues["aji"] > tissues["iou"]
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 3.6))
    ax.plot([0, 1], [0, 1], color="0.5", linewidth=1, zorder=0)
    for which, words, at, colour, marker in (
        (~above, "below the line", (0.56, 0.25), "#6e6e6e", "o"),
        (above, "above the line", (0.5, 0.72), figures.SERIES[0], "^"),
    ):
        dots = tissues[which]
        ax.scatter(dots["iou"], dots["aji"], s=18, color=colour, marker=marker)
        ax.text(*at, f"{words}: {len(dots)}", color=colour)
    ax.set(xlabel="IoU", ylabel="AJI, matched only", xlim=(0.35, 0.9), ylim=(0, 0.9))
    return figure


def plot_normalised(once: np.ndarray, twice: np.ndarray) -> Figure:
    """Draw the green channel of an image normalised once and twice, (H, W, 3) each, on one grey scale."""
    figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 2.9))
    for ax, pixels, title in zip(axes, (once, twice), ("normalised once", "normalised twice"), strict=True):
        shade = ax.imshow(pixels[..., 1], cmap="gray", vmin=-2.5, vmax=2.5)
        ax.set_title(title)
        ax.axis("off")
    figure.colorbar(shade, ax=axes, shrink=0.8, label="input of the encoder")
    figures.scale_bar(axes[0])
    return figure


def _pairs(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray, tuple[slice, ...]]]:
    """Size of the smaller nucleus, piece and window of the connected pieces of two nuclei well inside an image."""
    pieces = components(foreground(labels)[0])
    for number, slices in enumerate(ndimage.find_objects(pieces), start=1):
        piece = pieces == number
        sizes = np.unique(labels[piece], return_counts=True)[1]
        window = tuple(slice(s.start - MARGIN, s.stop + MARGIN) for s in slices)
        inside = all(s.start >= 0 and s.stop <= side for s, side in zip(window, labels.shape, strict=True))
        if len(sizes) == 2 and inside:
            yield int(sizes.min()), piece, window


def plot_pair(samples: list[Sample], designs: dict[str, list[np.ndarray]]) -> Figure:
    """Draw the largest pair of touching nuclei that the first design merges and the second one separates.

    ``designs``: {name: label maps of the samples}, two of them. The titles give the number of objects.
    Raises ``InputError`` if no sample has such a pair.
    """
    pairs = [(size, k, piece, window) for k, s in enumerate(samples) for size, piece, window in _pairs(s.labels)]
    for _, k, piece, place in sorted(pairs, key=lambda pair: -pair[0]):
        maps = {"truth": samples[k].labels} | {name: made[k] for name, made in designs.items()}
        views = {name: np.where(np.isin(m, m[piece & (m > 0)]), m, 0) for name, m in maps.items()}
        counts = [len(np.unique(view)) - 1 for view in views.values()]
        if counts == [2, 1, 2]:
            window = place
            break
    else:
        raise InputError("No two touching nuclei are merged by the one design and separated by the other.")
    figure, axes = plt.subplots(1, 3, figsize=(figures.WIDTH, 1.9))
    for ax, (title, view), count in zip(axes, views.items(), counts, strict=True):
        figures.overlay(samples[k].image[window], view[window], ax, width=2)
        ax.set_title(f"{title}: {count}", fontsize=9)
    figures.scale_bar(axes[0], um=5)
    return figure


def plot_search(search: pd.DataFrame, marked: dict[str, int]) -> Figure:
    """Draw the validation Dice of every configuration over its learning rate, rank and alpha.

    ``search``: columns ``rank``, ``alpha``, ``lr``, ``val_dice``. ``marked``: {words: row}, up to two, marked by a
    circle and a square.
    """
    rates, ranks = sorted(search["lr"].unique()), sorted(search["rank"].unique())
    x = search["lr"].map(rates.index) + 0.16 * (search["rank"].map(ranks.index) - (len(ranks) - 1) / 2)
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 3.6))
    for (alpha, group), colour, marker in zip(search.groupby("alpha"), figures.SERIES, ("v", "o", "^"), strict=False):
        ax.scatter(x[group.index], group["val_dice"], s=26, color=colour, marker=marker, label=f"alpha {alpha:g}")
    for (words, row), marker in zip(marked.items(), ("o", "s"), strict=False):
        at = (float(x[row]), float(search["val_dice"][row]))
        ax.scatter(*at, s=130, marker=marker, facecolor="none", edgecolor="black")
        ax.annotate(words, at, xytext=(0, 12), textcoords="offset points", ha="center")
    bottom = search["val_dice"].min() - 0.007
    for k, rank in enumerate(ranks):
        for rate in range(len(rates)):
            ax.text(rate + 0.16 * (k - (len(ranks) - 1) / 2), bottom, f"{rank:g}", ha="center", fontsize=9)
    ax.text(-0.42, bottom, "rank", ha="right", fontsize=9)
    top = search["val_dice"].max() + 0.008
    ax.set(xlabel="learning rate", ylabel="validation Dice", xlim=(-0.7, 2.5), ylim=(bottom - 0.003, top))
    ax.set_xticks(range(len(rates)), [rate_name(rate) for rate in rates])
    ax.legend(loc="upper left")
    return figure
