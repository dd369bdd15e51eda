"""Predictions and figures of the chapter "Six ways to fool oneself"."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from scipy import ndimage

from nucseg.data.datasets import Sample
from nucseg.viz import figures

REACH = 3  # px between two nuclei that `disturb` may merge


def disturb(
    labels: np.ndarray, rng: np.random.Generator, missed: float = 0.15, merged: float = 0.7, shift: int = 3
) -> np.ndarray:
    """Make a prediction with known errors from a true (H, W) label map.

    Each nucleus is missed with probability ``missed``, or moved by up to ``shift`` px in each direction. If it then
    lies within `REACH` px of one drawn before, it is merged with it with probability ``merged``.
    """
    out = np.zeros_like(labels)
    last = np.array(labels.shape)[:, None] - 1
    for number, window in enumerate(ndimage.find_objects(labels), start=1):
        if window is None or rng.random() < missed:
            continue
        corner = np.array([[side.start] for side in window])
        pixels = np.array(np.nonzero(labels[window] == number)) + corner + rng.integers(-shift, shift + 1, (2, 1))
        pixels = np.clip(pixels, 0, last)
        steps = np.array([[REACH, 0], [-REACH, 0], [0, REACH], [0, -REACH]])[..., None]
        y, x = np.clip(pixels + steps, 0, last).swapaxes(0, 1)
        beside = out[y, x][out[y, x] > 0]
        out[tuple(pixels)] = beside[0] if beside.size and rng.random() < merged else number
    return out


def pixels(sample: Sample, count: int, rng: np.random.Generator, reach: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Draw pixels of an image with their surroundings, as features and answers of a small classifier.

    Returns (count, 3 * (2 reach + 1)²) float64 colours, standardised over the image, and (count,) float64, 1 in a
    nucleus.
    """
    image = sample.image.astype(float)
    image = (image - image.mean(axis=(0, 1))) / image.std(axis=(0, 1))
    y, x = rng.integers(reach, np.array(sample.labels.shape)[:, None] - reach, (2, count))
    windows = sliding_window_view(image, (2 * reach + 1, 2 * reach + 1), (0, 1))
    return windows[y - reach, x - reach].reshape(count, -1), (sample.labels[y, x] > 0).astype(float)


def plot_prediction(sample: Sample, prediction: np.ndarray) -> Figure:
    """Draw a sample with its true outlines, the predicted ones, and the errors."""
    figure, axes = plt.subplots(1, 3, figsize=(figures.WIDTH, 2.6))
    figures.overlay(sample.image, sample.labels, axes[0])
    figures.overlay(sample.image, prediction, axes[1])
    figures.error_map(sample.labels, prediction, axes[2])
    found, missed, _ = figures.errors(sample.labels, prediction)
    axes[2].get_legend().remove()
    counts = f"{len(found)} found, {len(missed)} missed"
    titles = (f"truth: {len(np.unique(sample.labels)) - 1}", f"prediction: {len(np.unique(prediction)) - 1}", counts)
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=9)
    figures.scale_bar(axes[0])
    return figure


def plot_folds(table: pd.DataFrame) -> Figure:
    """Draw the Dice of each fold: index the fold, columns ``new weights`` and ``carried over``."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 2.8))
    for column, style, marker, colour in (
        ("new weights", "-", "o", figures.SERIES[0]),
        ("carried over", "--", "^", figures.SERIES[1]),
    ):
        ax.plot(table.index, table[column], style, marker=marker, color=colour, label=column)
    ax.set(xlabel="fold", ylabel="test Dice", ylim=(0.5, 1.03), xticks=table.index)
    ax.legend(loc="lower right")
    return figure


def plot_printed(table: pd.DataFrame) -> Figure:
    """Draw what each mistake prints beside the true value: index the mistake, columns ``printed`` and ``true``."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 0.9 + 0.42 * len(table)))
    rows = range(len(table))
    ax.hlines(rows, table["true"], table["printed"], color="0.7", linewidth=2, zorder=0)
    ax.plot(table["true"], rows, "o", color=figures.SERIES[0], label="true")
    ax.plot(table["printed"], rows, "^", color=figures.SERIES[1], label="printed")
    ax.set_yticks(rows, table.index)
    ax.invert_yaxis()
    ax.set(xlabel="score", xlim=(0.4, 1))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure
