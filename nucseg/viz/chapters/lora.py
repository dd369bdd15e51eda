"""Figures of the chapter on LoRA."""

import itertools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from pandas.io.formats.style import Styler

from nucseg.viz import figures

FROZEN, ADAPTED, TRAINED = "#d9d9d9", "#9fc9e3", "#f3c489"  # fills that carry black text
QKV = ("#56b4e9", "#e69f00", "#c9c9c9")


def plot_to_scale(inputs: int, outputs: int, rank: int) -> Figure:
    """Draw the frozen weight and the two matrices of LoRA beside it, all to scale."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 3.6))
    gap = 200
    ax.add_patch(Rectangle((0, 0), inputs, outputs, color=FROZEN))
    ax.add_patch(Rectangle((inputs + gap, 0), rank, outputs, color=figures.SERIES[1]))
    ax.add_patch(Rectangle((inputs + 2 * gap, (outputs - rank) / 2), inputs, rank, color=figures.SERIES[0]))
    middle = outputs / 2
    ax.text(inputs / 2, middle, f"$W_0$, frozen\n{outputs} × {inputs}", ha="center", va="center")
    ax.text(inputs + gap / 2, middle, r"$+\;\frac{\alpha}{r}\,\cdot$", ha="center", va="center", fontsize=15)
    ax.text(inputs + 1.5 * gap, middle, r"$\times$", ha="center", va="center", fontsize=15)
    ax.text(inputs + gap + 20, 0, f"$B$\n{outputs} × {rank}", va="top", color=figures.SERIES[1])
    ax.text(
        inputs * 1.5 + 2 * gap, middle + 30, f"$A$\n{rank} × {inputs}", ha="center", va="top", color=figures.SERIES[0]
    )
    ax.set(xlim=(-10, 2 * (inputs + gap) + 10), ylim=(outputs + 10, -10), aspect="equal")
    ax.axis("off")
    return figure


def plot_learning(losses: Mapping[int, Sequence[float]]) -> Figure:
    """Draw the loss over the training steps, one line for each rank, labelled at its end."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 2.8))
    for (rank, values), colour, style in zip(losses.items(), figures.SERIES, ("-", "--", "-.", ":"), strict=False):
        ax.plot(values, style, color=colour, label=f"rank {rank}")
    ax.set(xlabel="training step", ylabel="loss", yscale="log")
    ax.legend(ncols=len(losses), loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def plot_architecture() -> Figure:
    """Draw MobileSAM's encoder with its shapes, where LoRA sits, and the two heads."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 7.4))
    left, width, height = 0.0, 3.45, 0.66
    rows = [
        ("image", "3 × H × W", "white"),
        ("patch embedding", "2 convolutions\n64 × H/4 × W/4", FROZEN),
        ("stage 1", "2 blocks of convolutions\n64 × H/4 × W/4", FROZEN),
        ("stage 2", "2 attention blocks, LoRA in 8 layers\n128 × H/8 × W/8", ADAPTED),
        ("stage 3", "6 attention blocks, LoRA in 24 layers\n160 × H/16 × W/16", ADAPTED),
        ("stage 4", "2 attention blocks, LoRA in 8 layers\n320 × H/16 × W/16", ADAPTED),
        ("neck", "2 convolutions\n256 × H/16 × W/16", FROZEN),
    ]
    step, top = 1.06, 6.7
    centres = [top - step * row for row in range(len(rows))]
    for (name, text, colour), y in zip(rows, centres, strict=True):
        _box(ax, left, y, width, height, colour, name, text)
    for above, below in itertools.pairwise(centres):
        _arrow(ax, (left + width / 2, above - height / 2), (left + width / 2, below + height / 2))
    x, wide = 4.15, 1.85
    instance, linear = centres[2], centres[6]
    _box(
        ax,
        x,
        instance,
        wide,
        1.3,
        TRAINED,
        "instance head",
        "174,578 weights\nforeground and\ndistance map\n2 × H/2 × W/2",
    )
    _box(ax, x, linear, wide, 1.05, TRAINED, "the report’s head", "1 × 1 convolution\n257 weights\n1 × H/16 × W/16")
    for row, target in ((0, 0.5), (2, 0.0), (3, -0.25), (5, -0.5)):
        _arrow(ax, (left + width, centres[row]), (x, instance + target))
    _arrow(ax, (left + width, centres[6]), (x, linear))
    handles = [
        Patch(facecolor=colour, edgecolor="0.3", label=label)
        for colour, label in ((FROZEN, "frozen"), (ADAPTED, "frozen, with LoRA"), (TRAINED, "trained"))
    ]
    ax.legend(handles=handles, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), columnspacing=1)
    ax.set(xlim=(-0.02, 6.02), ylim=(centres[-1] - 0.55, top + 0.36))
    ax.axis("off")
    return figure


def _box(ax: Axes, x: float, y: float, width: float, height: float, colour: str, name: str, text: str) -> None:
    """A box around (x, y), its left edge's middle, with a name in bold above some text."""
    ax.add_patch(Rectangle((x, y - height / 2), width, height, facecolor=colour, edgecolor="0.3", linewidth=0.8))
    lines = text.count("\n") + 1
    line = 0.16
    start = y + line * lines / 2
    ax.text(x + width / 2, start, name, ha="center", va="center", fontsize=10, weight="bold")
    ax.text(x + width / 2, start - line / 2, text, ha="center", va="top", fontsize=9, linespacing=1.1)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    arrow = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=9, color="0.35", linewidth=0.9, shrinkA=0, shrinkB=0
    )
    ax.add_patch(arrow)


def ledger_table(trainable: pd.DataFrame, reported: int) -> Styler:
    """Format the trainable weights by target modules (rows) and rank (columns); mark the cell that is ``reported``."""
    return (
        trainable.rename(columns="rank {}".format)
        .style.format("{:,}")
        .highlight_between(left=reported, right=reported, props="font-weight: bold; text-decoration: underline")
    )


def plot_ledger(trainable: pd.DataFrame, reported: int) -> Figure:
    """Draw the trainable weights by target modules and rank as dots, with a line at the ``reported`` count."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 0.45 * len(trainable) + 0.9))
    for row, name in enumerate(trainable.index[::-1]):
        counts = trainable.loc[name]
        ax.plot(counts, [row] * len(counts), color="0.8", zorder=1)
        ax.scatter(counts, [row] * len(counts), s=190, color=figures.SERIES[0], zorder=2)
        for rank, count in counts.items():
            ax.text(float(count), row - 0.02, str(rank), ha="center", va="center", color="white", fontsize=9)
    ax.axvline(reported, color=figures.SERIES[1], zorder=0)
    ax.text(reported * 1.04, len(trainable) - 0.5, "the report’s count", color=figures.SERIES[1], fontsize=9)
    ax.set(xscale="log", xlabel="trainable weights (logarithmic)", ylim=(-0.5, len(trainable) - 0.1))
    ax.set_yticks(range(len(trainable)), list(trainable.index[::-1]))
    ticks = [20, 50, 100, 200, 500]
    ax.set_xticks([1000 * tick for tick in ticks], [f"{tick},000" for tick in ticks])
    ax.minorticks_off()
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    return figure


def plot_drift(drifts: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the relative change of a frozen encoder's output over forward passes, one labelled line each."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 2.7))
    for (name, changes), colour, line in zip(drifts.items(), figures.SERIES, ("-", "--"), strict=False):
        ax.plot(changes, line, color=colour)
        end = (len(changes) - 1, changes[-1])
        ax.annotate(name, end, xytext=(6, 0), textcoords="offset points", va="center", color=colour)
    passes = max(map(len, drifts.values())) - 1
    ax.set(xlabel="forward passes in training mode", ylabel="change of output", xlim=(0, 1.45 * passes))
    ax.set_xticks(range(0, passes + 1, 2))
    ax.yaxis.set_major_formatter("{x:.0%}")
    return figure


def plot_rows(orders: Mapping[str, np.ndarray]) -> Figure:
    """Draw which rows of a fused layer are queries, keys and values (0, 1, 2): one bar for each order."""
    figure, axes = plt.subplots(len(orders), 1, figsize=(figures.WIDTH, 1.9), sharex=True)
    for ax, (title, order) in zip(axes, orders.items(), strict=True):
        edges = np.flatnonzero(np.diff(order, prepend=-1, append=-1))
        for start, end in itertools.pairwise(edges):
            ax.axvspan(start, end, color=QKV[order[start]], linewidth=0)
            ax.text((start + end) / 2, 0.5, "qkv"[order[start]], ha="center", va="center", fontsize=11)
        ax.set(title=title, yticks=[], xlim=(0, len(order)))
        ax.spines[:].set_visible(False)
    axes[-1].set_xlabel("row of the weight")
    return figure
