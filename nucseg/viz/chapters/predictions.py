"""Figures and tables of the chapter that looks at predictions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from scipy import ndimage

from nucseg.data.datasets import Sample
from nucseg.instances import RIDGE
from nucseg.metrics import Errors
from nucseg.viz import figures
from nucseg.viz.chapters.crossvalidation import short_name

KINDS = {  # kinds of errors, by what they are called in the gallery
    "merged": "one object for several nuclei",
    "split": "several objects for one nucleus",
    "missed": "no object fits the nucleus",
    "spurious": "the object fits no nucleus",
}
SYSTEMS = {"instance": "nuinsseg-1", "report": "preset report"}  # the recorded systems of results/stain


def _outline(ax: Axes, labels: np.ndarray, colour: str, width: float) -> None:
    for line, px in (("black", width + 1.2), (colour, width)):
        xy = [xy for _, xy in figures.outlines(labels)]
        ax.add_collection(LineCollection(xy, colors=line, linewidths=px, alpha=0.6 if line == "black" else 1))


def _panel(ax: Axes, title: str, picture: np.ndarray, **how: Any) -> Axes:
    ax.imshow(picture, **how)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(title)
    return ax


def plot_decoding(
    sample: Sample, foreground: np.ndarray, height: np.ndarray, peaks: np.ndarray, labels: np.ndarray
) -> Figure:
    """Draw the steps from target maps to nuclei, and the heights along a cut between two of them.

    ``foreground``: (H, W) bool. ``height``: (H, W) smoothed distance map. ``peaks``: (H, W) label map with one basin
    per peak. ``labels``: (H, W) label map after basins were merged, consecutive. The last panel follows the line
    between the peaks of the two nuclei that share most of their border; it is empty if no two touch.
    """
    figure, axes = plt.subplots(2, 3, figsize=(figures.WIDTH, 4.5))
    image, where, hill, seeds, nuclei, profile = axes.flat
    _panel(image, "image, truth", sample.image)
    _outline(image, sample.labels, figures.TRUTH, 1.2)
    _panel(where, "foreground", foreground, cmap="gray_r", vmin=0, vmax=1.6)
    _panel(hill, "smoothed distance", height, cmap="cividis", vmin=0, vmax=1)
    _panel(seeds, "peaks, watershed", height, cmap="cividis", vmin=0, vmax=1)
    _outline(seeds, peaks, figures.PREDICTION, 1.0)
    y, x = np.array(ndimage.maximum_position(height, peaks, np.unique(peaks[peaks > 0]))).reshape(-1, 2).T
    seeds.plot(x, y, "o", color="white", markeredgecolor="black", markersize=4, linestyle="none")
    _panel(nuclei, "merged over ridges", sample.image)
    _outline(nuclei, labels, figures.PREDICTION, 1.2)
    if (pair := longest_border(labels)) is not None:
        _profile(profile, height, labels, pair, (hill, nuclei))
    else:
        profile.axis("off")
    figures.scale_bar(image)
    return figure


def longest_border(labels: np.ndarray) -> tuple[int, int] | None:
    """Ids of the two nuclei of an (H, W) label map that share most pixels of their border; None if no two touch."""
    pairs = []
    for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        meet = (a != b) & (a > 0) & (b > 0)
        pairs.append(np.sort(np.stack([a[meet], b[meet]], axis=1), axis=1))
    ids, counts = np.unique(np.concatenate(pairs), axis=0, return_counts=True)
    if not len(ids):
        return None
    first, second = ids[counts.argmax()].tolist()
    return first, second


def _profile(ax: Axes, height: np.ndarray, labels: np.ndarray, pair: tuple[int, int], drawn_in: Sequence[Axes]) -> None:
    (y0, x0), (y1, x1) = np.array(ndimage.maximum_position(height, labels, pair))
    steps = np.linspace(0, 1, 100)
    along = np.stack([y0 + (y1 - y0) * steps, x0 + (x1 - x0) * steps])
    values = ndimage.map_coordinates(height, along, order=1)
    px = steps * np.hypot(y1 - y0, x1 - x0)
    for other in drawn_in:
        other.plot([x0, x1], [y0, y1], color=figures.MISSED, linewidth=2)
    limit = RIDGE * min(values[0], values[-1])
    ax.plot(px, values, color=figures.MISSED)
    ax.axhline(limit, color="0.4", linestyle="--", linewidth=1)
    below = min(values.min(), limit) - 0.06  # where no line runs through it
    ax.text(px[-1] / 2, below, f"dashed: {RIDGE:g} ×\nlower peak", ha="center", va="top", fontsize=9)
    ax.set(xlabel="px along the line", ylim=(0, 1.15), yticks=[0, 0.5, 1])
    ax.set_title("height")


def plot_ranked(picked: Mapping[str, tuple[Sample, np.ndarray, pd.Series]]) -> Figure:
    """Draw images with their truth, their prediction and their errors, one row each under a line of text.

    ``picked``: by a word such as "best": the sample, its predicted label map, and its scores (``dice`` and ``pq``).
    """
    whole = plt.figure(figsize=(figures.WIDTH, 2.35 * len(picked)))
    rows = whole.subfigures(len(picked), 1, squeeze=False)
    for row, (word, (sample, labels, scores)) in zip(rows[:, 0], picked.items(), strict=True):
        axes = row.subplots(1, 3)
        found, missed, spurious = figures.errors(sample.labels, labels)
        counts = f"{len(found)} found, {len(missed)} missed, {len(spurious)} spurious"
        scored = f"Dice {scores['dice']:.2f}, PQ {scores['pq']:.2f}, {counts}"
        row.suptitle(f"{word}: {short_name(sample.tissue)}\n{scored}", x=0.01, ha="left", fontsize=9.5)
        figures.overlay(sample.image, sample.labels, axes[0])
        figures.overlay(sample.image, labels, axes[1])
        figures.error_map(sample.labels, labels, axes[2])
        axes[2].get_legend().remove()
    for row in rows[:, 0]:
        figures.scale_bar(row.axes[0])
    return whole


def failures(samples: Sequence[Sample], errors: Sequence[Errors], predicted: Sequence[np.ndarray]) -> pd.DataFrame:
    """One row per error: its kind, the image's number, the centre (y, x) and the area in px of what went wrong.

    ``errors`` and ``predicted``: those of each sample. A missed nucleus in a merger or a split, and a spurious object
    that is a merger or a piece, count once, as merged or split.
    """
    rows = []
    for n, (sample, found, labels) in enumerate(zip(samples, errors, predicted, strict=True)):
        inside = {i for ids in found.mergers.values() for i in ids} | set(found.splits)
        pieces = {j for ids in found.splits.values() for j in ids} | set(found.mergers)
        lists = {
            "merged": (labels, list(found.mergers)),
            "split": (sample.labels, list(found.splits)),
            "missed": (sample.labels, [i for i in found.missed if i not in inside]),
            "spurious": (labels, [j for j in found.spurious if j not in pieces]),
        }
        for kind, (where, ids) in lists.items():
            for i in ids:
                y, x = np.nonzero(where == i)
                rows.append((kind, n, y.mean(), x.mean(), len(y)))
    return pd.DataFrame(rows, columns=["kind", "image", "y", "x", "area"])


def plot_gallery(
    table: pd.DataFrame, samples: Sequence[Sample], predicted: Sequence[np.ndarray], each: int = 4, side: int = 80
) -> Figure:
    """Draw the largest `failures` of each kind, at most one per image, as squares of ``side`` px.

    Orange: truth; blue: prediction. A kind without failures has an empty row.
    """
    figure, axes = plt.subplots(len(KINDS), each, figsize=(figures.WIDTH, figures.WIDTH / each * len(KINDS) + 1.0))
    for row, (kind, words) in zip(axes, KINDS.items(), strict=True):
        some = table[table["kind"] == kind].sort_values("area", ascending=False).drop_duplicates("image").head(each)
        row[0].set_title(f"{kind}: {words}", fontsize=9.5)
        for ax in row[len(some) :]:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for ax, one in zip(row, some.to_dict("records"), strict=False):
            sample, labels = samples[one["image"]], predicted[one["image"]]
            top, left = (
                int(np.clip(c - side / 2, 0, max(0, n - side)))
                for c, n in zip((one["y"], one["x"]), labels.shape, strict=True)
            )
            window = np.s_[top : top + side, left : left + side]
            ax.imshow(sample.image[window])
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            _outline(ax, sample.labels[window], figures.TRUTH, 2.0)
            _outline(ax, labels[window], figures.PREDICTION, 1.2)
    figures.scale_bar(axes[0, 0])
    return figure


def density_table(scores: pd.DataFrame) -> Styler:
    """Compare the half of the images with fewer nuclei with the half with more.

    ``scores``: one row per image, with ``nuclei_true``, ``dice``, ``aji``, ``pq``, and the numbers of true nuclei that
    are ``merged`` and ``split``.
    """
    dense = scores["nuclei_true"] > scores["nuclei_true"].median()
    columns = {}
    for words, part in (("sparse half", scores[~dense]), ("dense half", scores[dense])):
        nuclei = part["nuclei_true"].sum()
        columns[words] = {
            "images": f"{len(part)}",
            "nuclei per image": f"{part['nuclei_true'].mean():.0f}",
            "share of nuclei merged": f"{part['merged'].sum() / nuclei:.3f}",
            "share of nuclei split": f"{part['split'].sum() / nuclei:.3f}",
            **{name: f"{part[key].mean():.3f}" for key, name in (("dice", "Dice"), ("aji", "AJI"), ("pq", "PQ"))},
        }
    return pd.DataFrame(columns).style.set_caption("Images with fewer nuclei, and images with more")


def plot_stains(image: np.ndarray, change: Callable[[np.ndarray, tuple[float, float, float]], np.ndarray]) -> Figure:
    """Draw an image with half, the usual and double the amount of each stain.

    ``change``: takes the image and the factors of haematoxylin, eosin and the rest, and returns the changed image.
    """
    figure, axes = plt.subplots(2, 3, figsize=(figures.WIDTH, 4.4))
    for row, (stain, place) in zip(axes, (("haematoxylin", 0), ("eosin", 1)), strict=True):
        for ax, factor in zip(row, (0.5, 1.0, 2.0), strict=True):
            factors = [1.0, 1.0, 1.0]
            factors[place] = factor
            _panel(ax, f"{factor:g} × {stain}", change(image, (factors[0], factors[1], factors[2])))
    figures.scale_bar(axes[0, 0])
    return figure


def plot_stain_curves(measured: pd.DataFrame) -> Figure:
    """Draw mean Dice and PQ over the factor of each stain. ``measured``: columns stain, factor, dice and pq."""
    figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 2.8), sharey=True)
    for ax, (stain, part) in zip(axes, measured.groupby("stain", sort=False), strict=True):
        means = part.groupby("factor")[["dice", "pq"]].mean()
        for key, name, marker, colour in (("dice", "Dice", "s", 1), ("pq", "PQ", "o", 0)):
            ax.plot(means.index, means[key], marker=marker, markersize=4, color=figures.SERIES[colour], label=name)
        _stain_axis(ax, str(stain), list(means.index))
        ax.set_ylim(0, 1)
    axes[0].set_ylabel("score")
    axes[0].legend(ncols=2, loc="lower right")
    return figure


def _stain_axis(ax: Axes, stain: str, factors: Sequence[float]) -> None:
    ax.set(xlabel=f"amount of {stain}", xscale="log")
    ax.set_xticks(factors, [f"{f:g}" for f in factors], rotation=45 if len(factors) > 5 else 0)
    ax.set_xticks([], minor=True)
    ax.axvline(1, color="0.6", linestyle=":", linewidth=1)


def plot_recorded_stain(changes: pd.DataFrame) -> Figure:
    """Draw PQ of each system over the factor of each stain, with 95% bands of the paired change.

    ``changes``: one row per model, stain and factor, with ``plain`` (PQ of the unchanged images), ``difference``,
    ``low`` and ``high``.
    """
    figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 3.1), sharey=True)
    for ax, stain in zip(axes, ("haematoxylin", "eosin"), strict=True):
        for (name, label), colour in zip(SYSTEMS.items(), figures.SERIES, strict=False):
            part = changes[(changes["model"] == name) & (changes["stain"] == stain)]
            still = {"factor": 1.0, "plain": part["plain"].iloc[0], "difference": 0.0, "low": 0.0, "high": 0.0}
            part = pd.concat([part, pd.DataFrame([still])]).sort_values("factor")
            low, high = part["plain"] + part["low"], part["plain"] + part["high"]
            ax.fill_between(part["factor"], low, high, color=colour, alpha=0.25, linewidth=0)
            style = {"color": colour, "marker": "o", "markersize": 4, "label": label}
            ax.plot(part["factor"], part["plain"] + part["difference"], **style)
        _stain_axis(ax, stain, sorted({*changes["factor"], 1.0}))
    axes[0].set(ylabel="PQ", ylim=(0, 0.6))
    axes[1].legend(ncols=1, loc="upper right")
    return figure


def stain_table(changes: pd.DataFrame) -> Styler:
    """Changes of PQ with haematoxylin, for both systems: absolute and relative. ``changes``: as above."""
    part = changes[changes["stain"] == "haematoxylin"].sort_values("factor")
    columns = {}
    for name, label in SYSTEMS.items():
        rows = part[part["model"] == name].to_dict("records")
        words = [f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})" for row in rows]
        columns[label, "change of PQ"] = [text.replace("-", "−") for text in words]
        shares = [f"{row['difference'] / row['plain']:+.0%}" for row in rows]
        columns[label, "of its PQ"] = [text.replace("-", "−") for text in shares]
    index = [f"{factor:g} ×" for factor in sorted(set(part["factor"]))]
    shown = pd.DataFrame(columns, index=pd.Index(index)).style
    narrow: list[Any] = [{"selector": "th, td", "props": "padding: 0.15rem 0.4rem"}]
    return shown.set_table_styles(narrow).set_caption(
        "Change of PQ with the amount of haematoxylin: absolute, relative"
    )
