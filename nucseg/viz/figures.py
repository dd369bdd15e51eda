"""Figures in one style: outlined nuclei, error maps, scale bars and learning curves.

The colours are Okabe and Ito's, which readers with any colour vision can distinguish. In all figures, warm colours
stand for the truth and cold ones for a prediction.
"""

from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import ColorType
from scipy import ndimage
from skimage.measure import find_contours

from nucseg import metrics
from nucseg.data.datasets import Sample
from nucseg.errors import InputError

TRUTH, PREDICTION = "#e69f00", "#56b4e9"  # orange, sky blue
MISSED, SPURIOUS, FOUND = "#d55e00", "#0072b2", "#b5b5b5"  # vermilion, blue, grey
# Outlines of neighbouring nuclei: visible on pink, purple and white, and distinct when printed in grey
OUTLINES = ("#f0e442", "#56b4e9", "#ffffff", "#3ddc97", "#e69f00", "#000000")
# Lines and bars on white
SERIES = ("#0072b2", "#d55e00", "#009e73", "#a8578a", "#555555")
WIDTH = 6.0  # inches: makes text of 10 pt as large as the book's, and legible on a phone
MICROMETRES_PER_PIXEL = 0.25  # assumed: usual for a 40x scan, not stated by NuInsSeg's authors
_ROUND_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def use_style() -> None:
    """Set the book's style for Matplotlib and seaborn: white background, few lines, sharp on high-density screens."""
    sns.set_theme(
        context="paper",
        style="ticks",
        palette=SERIES,
        font="DejaVu Sans",  # Matplotlib's default, as not every machine has Arial, seaborn's first choice
        rc={
            "figure.figsize": (WIDTH, 3.4),
            "figure.dpi": 160,
            "savefig.dpi": 160,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.labelsize": 10,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 9,
            "lines.linewidth": 1.5,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "image.interpolation": "antialiased",
        },
    )


def ink(fill: ColorType) -> str:
    """The colour of text on ``fill``: black or white, whichever has the higher contrast (WCAG 2)."""
    return "black" if sns.utils.relative_luminance(fill) > 0.18 else "white"


def count(labels: np.ndarray) -> int:
    """Number of nuclei in a label map; their ids may have gaps, as in a tile cut from a larger image."""
    return len(np.unique(labels[labels > 0]))


def neighbour_colours(labels: np.ndarray, reach: int = 3) -> dict[int, int]:
    """Assign each id of an (H, W) label map a colour number, which differs between ids within ``reach`` px.

    Greedy colouring in smallest-last order (Matula & Beck 1983). Six colours are enough for nuclei that only touch,
    and nearly always enough for a larger ``reach``.
    """
    ids = [int(i) for i in np.unique(labels) if i]
    near: dict[int, set[int]] = {i: set() for i in ids}
    steps = [(dy, dx) for dy in range(reach + 1) for dx in range(-reach, reach + 1) if (dy, dx) > (0, 0)]
    height, width = labels.shape
    for dy, dx in steps:
        a = labels[dy:, max(dx, 0) : width + min(dx, 0)]
        b = labels[: height - dy, max(-dx, 0) : width + min(-dx, 0)]
        meet = (a != b) & (a > 0) & (b > 0)
        for i, j in np.unique(np.stack([a[meet], b[meet]], axis=-1), axis=0).tolist():
            near[i].add(j)
            near[j].add(i)
    order, left = [], {i: set(others) for i, others in near.items()}
    while left:
        i = min(left, key=lambda k: (len(left[k]), k))
        order.append(i)
        for j in left.pop(i):
            left[j].discard(i)
    colours: dict[int, int] = {}
    for n, i in enumerate(reversed(order)):
        taken = {colours[j] for j in near[i] if j in colours}
        usual = len(OUTLINES) - 1  # black, the last, is hard to see on nuclei: used only if the others are taken
        tries = [*((n + k) % usual for k in range(usual)), *range(usual, len(ids) + usual)]
        colours[i] = next(c for c in tries if c not in taken)
    return colours


def outlines(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each outline of a label map as its id and an (n, 2) array of x, y in px.

    Outlines run halfway between the pixels of a nucleus and those around it. A nucleus in pieces has several outlines.
    """
    for i, window in enumerate(ndimage.find_objects(labels), start=1):
        if window is not None:
            mask = np.pad(labels[window] == i, 1)
            offset = np.array([window[1].start - 1, window[0].start - 1])
            for line in find_contours(mask.astype(np.float32), 0.5):
                yield i, line[:, ::-1] + offset


def overlay(
    image: np.ndarray, labels: np.ndarray, ax: Axes | None = None, colour: str | None = None, width: float = 0.9
) -> Axes:
    """Draw an image with the outline of each nucleus, as lines that are smooth at any size.

    ``image``: (H, W, 3) uint8; ``labels``: (H, W) label map; ``width``: of the lines, in points.
    ``colour``: one colour for all, such as ``TRUTH``; by default neighbours get different colours.
    Raises ``InputError`` if image and labels differ in size.
    """
    if image.shape[:2] != labels.shape:
        raise InputError(
            f"Image and label map differ in size, {image.shape[:2]} and {labels.shape}: give those of one sample."
        )
    ax = _picture(image, ax)
    number = {} if colour else neighbour_colours(labels)
    lines = list(outlines(labels))
    colours = [colour or OUTLINES[number[i] % len(OUTLINES)] for i, _ in lines]
    ax.add_collection(LineCollection([xy for _, xy in lines], colors=colours, linewidths=width, capstyle="round"))
    return ax


def _picture(image: np.ndarray, ax: Axes | None) -> Axes:
    ax = ax or plt.subplots(figsize=(WIDTH / 2, WIDTH / 2))[1]
    ax.imshow(image)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return ax


def errors(truth: np.ndarray, prediction: np.ndarray) -> tuple[list[int], list[int], list[int]]:
    """Ids of the true nuclei found (IoU > 0.5), of those missed, and of the spurious predicted ones, as three lists."""
    all_errors = metrics.errors(truth, prediction)
    return all_errors.found, all_errors.missed, all_errors.spurious


def error_map(truth: np.ndarray, prediction: np.ndarray, ax: Axes | None = None) -> Axes:
    """Draw found, missed and spurious nuclei (PQ's threshold, IoU > 0.5), with their counts in the legend.

    True nuclei are filled, grey if found and vermilion if missed; spurious predictions are blue outlines.
    A blue outline around two vermilion nuclei is a merger; two blue outlines inside one are a split.
    """
    found, missed, spurious = errors(truth, prediction)
    plate = np.ones((*truth.shape, 3))
    plate[np.isin(truth, found)] = to_rgb(FOUND)
    plate[np.isin(truth, missed)] = to_rgb(MISSED)
    ax = _picture(plate, ax)
    for labels, colour, width in (
        (truth, "white", 0.6),
        (np.where(np.isin(prediction, spurious), prediction, 0), SPURIOUS, 1.2),
    ):
        lines = [xy for _, xy in outlines(labels)]
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=width))
    handles = [Patch(color=FOUND, label=f"found {len(found)}"), Patch(color=MISSED, label=f"missed {len(missed)}")]
    handles.append(Patch(facecolor="none", edgecolor=SPURIOUS, label=f"spurious {len(spurious)}"))
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, handlelength=1, fontsize=8)
    return ax


def scale_bar(ax: Axes, um_per_px: float = MICROMETRES_PER_PIXEL, um: float | None = None) -> Rectangle:
    """Draw a scale bar of ``um`` micrometres on an image; return the bar, in px.

    ``um``: by default the longest round length up to a third of the image's width. ``um_per_px``: pixel size; the
    default is an assumption for NuInsSeg, which the caption should mention. Call it after all other artists are on the
    figure: its layout is computed first, as the size of the axes decides how large the label is in image pixels.
    """
    whole = ax.get_figure(root=True)
    assert whole is not None
    whole.draw_without_rendering()
    left, right = sorted(ax.get_xlim())
    bottom = max(ax.get_ylim())  # the y axis points down
    if um is None:
        um = max((u for u in _ROUND_LENGTHS if u / um_per_px <= (right - left) / 3), default=1)
    length = um / um_per_px
    point = (right - left) / (
        ax.get_window_extent().width * 72 / ax.figure.dpi
    )  # image px per point, so that the bar keeps its proportion to the text
    width = max(length, 26 * point)
    x, y = right - 6 * point - (width + length) / 2, bottom - 9 * point
    plate = (right - 9 * point - width, y - 11 * point), width + 6 * point, 17 * point
    bar = Rectangle((x, y), length, 3 * point, color="black", linewidth=0, zorder=6)
    ax.add_patch(Rectangle(*plate, color="white", linewidth=0, zorder=5))
    ax.add_patch(bar)
    ax.text(x + length / 2, y - point, f"{um:g} µm", ha="center", va="bottom", fontsize=7, color="black", zorder=6)
    return bar


def show_row(*samples: Sample, outlined: bool = True, titles: Sequence[str] = ()) -> Figure:
    """Draw samples side by side, each under its tissue's name or one of ``titles``, with a scale bar on the first."""
    if not samples:
        raise InputError("There are no samples to show: give at least one.")
    figure, axes = plt.subplots(1, len(samples), figsize=(WIDTH, WIDTH / len(samples) + 0.3), squeeze=False)
    for ax, sample, title in zip(axes[0], samples, titles or [s.tissue for s in samples], strict=True):
        if outlined:
            overlay(sample.image, sample.labels, ax)
        else:
            _picture(sample.image, ax)
        ax.set_title(title, fontsize=8)
    scale_bar(axes[0, 0])
    return figure


def learning_curves(history: pd.DataFrame, monitor: str = "dice") -> Figure:
    """Draw a run's training loss, and its validation scores with the selected epoch.

    ``history``: the run's ``history.csv``. ``monitor``: the score that selected the epoch.
    Raises ``InputError`` if columns that ``nucseg.train`` writes are missing.
    """
    scores = [name for name in ("dice", "iou", "aji", "pq") if f"val_{name}" in history]
    if monitor not in scores or not {"epoch", "train_loss"} <= set(history):
        raise InputError(f"The history lacks a column epoch, train_loss or val_{monitor}: give a run's history.csv.")
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.8))
    marker = "o" if len(history) < 30 else None
    left.plot(history["epoch"], history["train_loss"], marker=marker, markersize=3, color=SERIES[4])
    left.set(title="Training loss", xlabel="epoch", ylim=(0, 1.08 * history["train_loss"].max()))
    names = {"dice": "Dice", "iou": "IoU", "aji": "AJI", "pq": "PQ"}
    for name, style in zip(scores, ("-", "--", "-.", ":"), strict=False):
        values = history[f"val_{name}"]
        right.plot(history["epoch"], values, style, marker=marker, markersize=3, label=names[name])
    best = history["epoch"].iloc[int(np.argmax(history[f"val_{monitor}"]))]
    right.axvline(best, color="0.7", linewidth=1, zorder=0)
    right.set(title="Validation", xlabel="epoch", ylim=(0, 1))
    right.set_title(f"kept: {best}", loc="right", fontsize=8, color="0.35")  # above, where no line runs through it
    right.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))  # below, where no line runs through it
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))  # no ticks between epochs
    return figure
