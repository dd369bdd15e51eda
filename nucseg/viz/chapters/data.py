"""Figures and tables of the chapter on the data."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from pandas.io.formats.style import Styler

from nucseg.data.datasets import Sample
from nucseg.data.splits import Split
from nucseg.viz import figures
from nucseg.viz.chapters.crossvalidation import short_name

MEASURES = {
    "nuclei_per_image_mean": "nuclei per image",
    "area_px_median": "median area, px",
    "touching_fraction": "touching fraction",
}
PARTS = {"training": "#d9d9d9", "validation": "#9fc9e3", "test": "#e69f00", "training and test": figures.MISSED}


def crop(sample: Sample, size: int) -> Sample:
    """The square of ``size`` px, out of 25, in which most of the area is nuclei; ids keep their order, from 1."""
    tops, lefts = (np.linspace(0, side - size, 5).astype(int) for side in sample.labels.shape)
    windows = [np.s_[top : top + size, left : left + size] for top in tops for left in lefts]
    window = max(windows, key=lambda w: int(np.count_nonzero(sample.labels[w])))
    _, labels = np.unique(np.append(0, sample.labels[window]), return_inverse=True)
    labels = labels[1:].reshape(size, size).astype(np.int32)
    return Sample(sample.image[window], labels, sample.tissue, sample.stem)


def plot_flow() -> Figure:
    """Draw the way of one image, from the file to a row of scores, with the functions that it passes through."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 4.4))
    boxes = {
        "image": (0.0, 3.3, "image", "(H, W, 3) uint8"),
        "truth": (3.6, 3.3, "label map", "(H, W) int32"),
        "predicted": (0.0, 1.65, "predicted maps", "(2, H, W), 0 to 1"),
        "target": (3.6, 1.65, "target maps", "(2, H, W), 0 to 1"),
        "labels": (0.0, 0.0, "predicted label map", "(H, W) int32"),
        "scores": (3.6, 0.0, "scores", "one row per image"),
    }
    width, height = 2.35, 0.72
    for x, y, name, shape in boxes.values():
        ax.add_patch(Rectangle((x, y), width, height, facecolor="#eef4f8", edgecolor="0.3", linewidth=0.8))
        ax.text(x + width / 2, y + 0.47, name, ha="center", va="center", fontsize=10, weight="bold")
        ax.text(x + width / 2, y + 0.2, shape, ha="center", va="center", fontsize=9)
    down = [("image", "predicted", "network"), ("truth", "target", "encode"), ("predicted", "labels", "decode")]
    for start, end, name in down:
        x = boxes[start][0] + width / 2
        _arrow(ax, (x, boxes[start][1]), (x, boxes[end][1] + height))
        ax.text(x + 0.1, boxes[start][1] - 0.47, name, va="center", family="monospace", fontsize=10)
    _arrow(ax, (width, 2.01), (3.6, 2.01), "<|-|>")
    ax.text(2.97, 2.11, "loss", ha="center", va="bottom", fontsize=10)
    _arrow(ax, (width, 0.36), (3.6, 0.36))
    ax.text(2.97, 0.46, "score", ha="center", va="bottom", family="monospace", fontsize=10)
    side = 6.15  # the true label map goes to the scores past the target maps
    ax.plot([3.6 + width, side, side, 3.6 + width], [3.66, 3.66, 0.36, 0.36], color="0.35", linewidth=0.9)
    _arrow(ax, (side, 0.36), (3.6 + width, 0.36))
    ax.plot([width, 3.6], [3.66, 3.66], color="0.35", linewidth=0.9, linestyle=":")
    ax.text(2.97, 3.76, "a sample", ha="center", va="bottom", fontsize=10)
    ax.set(xlim=(-0.03, 6.22), ylim=(-0.05, 4.1))
    ax.axis("off")
    return figure


def _arrow(ax: plt.Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-|>") -> None:
    arrow = FancyArrowPatch(
        start, end, arrowstyle=style, mutation_scale=9, color="0.35", linewidth=0.9, shrinkA=0, shrinkB=0
    )
    ax.add_patch(arrow)


def plot_tissues(samples: Sequence[Sample], columns: int = 4, size: int = 176) -> Figure:
    """Draw a crop of each sample with outlined nuclei, under the tissue's name; the scale bar is in the first."""
    rows = -(-len(samples) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(figures.WIDTH, 1.85 * rows), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, sample in zip(axes.flat, samples, strict=False):
        small = crop(sample, size)
        figures.overlay(small.image, small.labels, ax, width=0.7)
        ax.set_title("\n".join(textwrap.wrap(sample.tissue.replace("_", " "), 15)), fontsize=9)
    figures.scale_bar(axes[0, 0], um=10)
    return figure


def plot_counts(listing: pd.DataFrame, here: pd.DataFrame, source: str) -> Figure:
    """Draw the share of images with at most so many nuclei: NuInsSeg and ``here``, named ``source``.

    Both tables have one row per image, with columns ``tissue`` and ``nuclei``. All tissues count the same.
    """
    table = pd.concat(
        [
            rows.assign(weight=1 / rows["tissue"].map(rows["tissue"].value_counts()), source=name)
            for name, rows in (("NuInsSeg", listing), (source, here))
        ],
        ignore_index=True,
    )
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 2.8))
    sns.ecdfplot(table, x="nuclei", weights="weight", hue="source", ax=ax)
    ax.lines[-1].set_linestyle("--")  # distinct without colour too: NuInsSeg, drawn last
    legend = ax.get_legend()
    assert legend is not None
    legend.get_lines()[0].set_linestyle("--")
    sns.move_legend(ax, "lower right", title=None)
    ax.set(xlabel="nuclei in an image", ylabel="share of images", xlim=(0, None))
    return figure


def plot_agreement(real: pd.DataFrame, here: pd.DataFrame) -> Figure:
    """Draw the measurements ``here`` against those of NuInsSeg, one dot per tissue."""
    figure, axes = plt.subplots(1, 3, figsize=(figures.WIDTH, 2.5))
    for ax, (column, words) in zip(axes, MEASURES.items(), strict=True):
        top = 1.08 * max(real[column].max(), here[column].max())
        ax.plot([0, top], [0, top], color="0.75", linewidth=1, zorder=0)
        ax.scatter(real[column], here[column], s=12, color=figures.SERIES[0])
        ax.set(title=words, xlim=(0, top), ylim=(0, top), aspect="equal", xlabel="NuInsSeg")
        ax.locator_params(nbins=3)
    axes[0].set_ylabel("this page")
    return figure


def agreement_table(real: pd.DataFrame, here: pd.DataFrame) -> Styler:
    """Table of the measurements of NuInsSeg and ``here``, one row per tissue."""
    sides = {"NuInsSeg": real, "here": here}  # both may be real
    columns = {
        words: pd.DataFrame({side: table[column] for side, table in sides.items()})
        for column, words in MEASURES.items()
    }
    digits: dict[Any, Any] = {
        (words, side): "{:.2f}" if "fraction" in words else "{:,.0f}" for words in columns for side in sides
    }
    return pd.concat(columns, axis=1).rename(index=short_name).style.format(digits)


def plot_stains(sample: Sample, dyes: np.ndarray) -> Figure:
    """Draw a crop and the amounts of haematoxylin and eosin in it, the first two channels of ``dyes``."""
    figure, axes = plt.subplots(1, 3, figsize=(figures.WIDTH, 2.3))
    axes[0].imshow(sample.image)
    axes[0].set_title(sample.tissue)
    for ax, channel, title in zip(axes[1:], (0, 1), ("haematoxylin", "eosin"), strict=True):
        low, high = np.quantile(dyes[..., channel], (0.01, 0.99))
        ax.imshow(dyes[..., channel], cmap="gray_r", vmin=low, vmax=high)
        ax.set_title(title)
    for ax in axes:
        ax.axis("off")
    figures.scale_bar(axes[0])
    return figure


def plot_encoding(sample: Sample, maps: np.ndarray) -> Figure:
    """Draw a sample's image, its label map in colours, and its two target maps."""
    figure, axes = plt.subplots(1, 4, figsize=(figures.WIDTH, 1.85))
    pictures = (sample.image, _coloured(sample.labels), maps[0], maps[1])
    titles = ("image", "label map", "foreground", "distance map")
    for ax, picture, title in zip(axes, pictures, titles, strict=True):
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1 if picture.ndim == 2 else None)
        ax.set_title(title)
        ax.axis("off")
    figures.scale_bar(axes[0], um=10)
    return figure


def plot_decoding(steps: Mapping[str, np.ndarray]) -> Figure:
    """Draw label maps side by side in colours, each under its name and its number of objects."""
    figure, axes = plt.subplots(1, len(steps), figsize=(figures.WIDTH, 2.05))
    for ax, (name, labels) in zip(axes, steps.items(), strict=True):
        ax.imshow(_coloured(labels))
        ax.set_title(f"{name}\n{len(np.unique(labels[labels > 0]))} objects")
        ax.axis("off")
    return figure


def _coloured(labels: np.ndarray) -> np.ndarray:
    """A label map as (H, W, 3) RGB, 0..1, in which neighbours differ, on black."""
    palette = np.zeros((int(labels.max()) + 1, 3))
    for i, colour in figures.neighbour_colours(labels).items():
        palette[i] = to_rgb(figures.OUTLINES[colour % 5])
    return palette[labels]


def plot_leaks(listing: pd.DataFrame, protocols: Mapping[str, Split], tissues: Sequence[str]) -> Figure:
    """Draw which images train, validate and test: a row per tissue, a square per image, a panel per protocol.

    An image in more than one part is drawn as "training and test", validation counting as training.
    """
    figure, axes = plt.subplots(1, len(protocols), figsize=(figures.WIDTH, 0.34 * len(tissues) + 1.0), sharey=True)
    for ax, (title, split) in zip(axes, protocols.items(), strict=True):
        part = parts_of(listing, split)
        for row, tissue in enumerate(tissues):
            for column, name in enumerate(part[(listing["tissue"] == tissue).to_numpy()]):
                if name:
                    ax.add_patch(Rectangle((column, row), 0.86, 0.86, **_fill(name), linewidth=0.4))
        widest = listing["tissue"].value_counts()[list(tissues)].max()
        ax.set(xlim=(-0.2, widest), ylim=(len(tissues), -0.1), xticks=[], xlabel="images")
        ax.set_title("\n".join(textwrap.wrap(title, 16)), fontsize=10)
        ax.set_yticks(np.arange(len(tissues)) + 0.43, [tissue.removeprefix("human ") for tissue in tissues])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    handles = [Patch(**_fill(name), label=name) for name in PARTS]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1, handlelength=1)
    return figure


def _fill(part: str) -> dict[str, Any]:
    return {"facecolor": PARTS[part], "edgecolor": "0.2", "hatch": "////" if part == "training and test" else None}


def parts_of(listing: pd.DataFrame, split: Split) -> np.ndarray:
    """The part of each image, a key of `PARTS`; '' for images that a protocol leaves out."""
    part = np.full(len(listing), "", dtype=object)
    for name, indices in (("test", split.test), ("validation", split.val), ("training", split.train)):
        before = part[list(indices)]
        part[list(indices)] = np.where(before == "test", "training and test", name)
    return part


def plot_vague(sample: Sample, vague: np.ndarray, prediction: np.ndarray) -> Figure:
    """Draw a crop twice: with the true outlines and the hatched vague area, and with the predicted outlines."""
    figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 3.2))
    for ax, labels, colour, title in (
        (axes[0], sample.labels, figures.TRUTH, "truth, vague area hatched"),
        (axes[1], prediction, figures.PREDICTION, "prediction"),
    ):
        figures.overlay(sample.image, labels, ax, colour=colour, width=1.3)
        ax.set_title(title)
    axes[0].contourf(vague, levels=[0.5, 1.5], colors="none", hatches=["////"])
    outline = [xy for _, xy in figures.outlines(vague.astype(np.int32))]
    axes[0].add_collection(LineCollection(outline, colors="black", linewidths=1))
    figures.scale_bar(axes[0], um=10)
    return figure
