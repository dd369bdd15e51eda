"""Figures and tables of the chapter on fine-tuning."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from torch import Tensor
from torch.nn import functional as F

from nucseg import metrics
from nucseg.config import Config, options
from nucseg.data.datasets import Sample
from nucseg.records.statistics import summarise
from nucseg.training.loop import learning_rate
from nucseg.training.losses import dice_loss, focal_loss
from nucseg.viz import figures

NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "aji": "AJI",
    "aji_plus": "AJI+",
    "pq": "PQ",
    "sq": "SQ",
    "rq": "RQ",
    "aji_matched_only": "AJI, matched only",
}


def plot_losses() -> Figure:
    """Draw what each loss is sensitive to: Dice loss over the share of nuclei, focal loss over the probability."""
    shares = np.linspace(0.005, 0.5, 60)
    nothing = torch.full((1, 1, 100, 100), -3.0)  # p = 0.05 everywhere
    dice, entropy = [], []
    for share in shares:
        target = torch.zeros(1, 1, 100, 100)
        target.view(-1)[: int(share * 10_000)] = 1
        dice.append(dice_loss(nothing, target).item())
        entropy.append(F.binary_cross_entropy_with_logits(nothing, target).item())
    probability = torch.linspace(0.02, 0.99, 100)
    one = torch.ones(1, 1, 1, 1)
    focal = [focal_loss(p.logit().view(1, 1, 1, 1), one, alpha=1.0).item() for p in probability]
    figure, (left, right) = plt.subplots(1, 2, figsize=(figures.WIDTH, 2.8))
    left.plot(shares, dice, label="Dice loss")
    left.plot(shares, entropy, "--", label="cross-entropy")
    left.set(xlabel="share of nuclei in the image", ylabel="loss", ylim=(0, None))
    right.plot(probability, focal, label="focal loss, γ = 2")
    right.plot(probability, -torch.log(probability), "--", label="cross-entropy")
    right.set(xlabel="probability of the true class", ylabel="loss", ylim=(0, 4))
    for ax in (left, right):
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def plot_batch(images: Tensor, targets: Tensor) -> Figure:
    """Draw a batch: the images above their two target maps. (B, 3, H, W) uint8 and (B, 2, H, W), 0..1."""
    rows = [*images.permute(0, 2, 3, 1).numpy()[None], *targets.numpy().transpose(1, 0, 2, 3)]
    figure, axes = plt.subplots(3, len(images), figsize=(figures.WIDTH, 1.55 * 3), squeeze=False)
    for line, pictures, name in zip(axes, rows, ("image", "foreground", "distance"), strict=True):
        for ax, picture in zip(line, pictures, strict=True):
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(name)
    figures.scale_bar(axes[0, 0])
    return figure


def config_table(here: Config, there: Config, names: tuple[str, str]) -> Styler:
    """Table of the options in which two configurations differ, with what each option is."""
    known = options(Config)  # in an option such as --root a line must not break after its hyphens
    different = [name for name in known if getattr(here, name) != getattr(there, name)]
    table = pd.DataFrame(
        {
            names[0]: {name: str(getattr(here, name)) for name in different},
            names[1]: {name: str(getattr(there, name)) for name in different},
            "what it is": {name: known[name].metadata["why"].replace("--", "--\u2060") for name in different},
        }
    )
    left: Any = [
        {"selector": "td, th", "props": "text-align: left"},
        {"selector": "td.col2", "props": "min-width: 20em"},
    ]
    return table.style.set_table_styles(left)


def plot_before_after(sample: Sample, before: np.ndarray, after: np.ndarray) -> Figure:
    """Draw the truth, the label maps predicted before and after training with their scores, and the errors."""
    figure, axes = plt.subplots(2, 2, figsize=(figures.WIDTH, figures.WIDTH + 0.3))
    figures.overlay(sample.image, sample.labels, axes[0, 0])
    axes[0, 0].set_title(f"truth: {figures.count(sample.labels)} nuclei")
    for ax, labels, title in ((axes[0, 1], before, "before"), (axes[1, 0], after, "after")):
        figures.overlay(sample.image, labels, ax)
        result = metrics.score(sample.labels, labels)
        ax.set_title(f"{title}: {labels.max()} objects\nDice {result.dice:.2f}, PQ {result.pq:.2f}")
    figures.error_map(sample.labels, after, axes[1, 1])
    axes[1, 1].set_title("errors after training")
    figures.scale_bar(axes[0, 0])
    return figure


def plot_maps(sample: Sample, maps: np.ndarray, labels: np.ndarray) -> Figure:
    """Draw an image, the two maps predicted for it, and the label map decoded from them."""
    figure, axes = plt.subplots(1, 4, figsize=(figures.WIDTH, 1.9))
    for ax, picture, title in zip(axes, (sample.image, *maps), ("image", "foreground", "distance"), strict=False):
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
        ax.set_title(title)
        ax.axis("off")
    figures.overlay(sample.image, labels, axes[3], width=0.7)
    axes[3].set_title("decoded")
    figures.scale_bar(axes[0])
    return figure


def scores_table(runs: Mapping[str, pd.DataFrame]) -> Styler:
    """Table of the means of per-image scores with their 95% bootstrap intervals, two columns per entry of ``runs``."""
    columns = {}
    for name, scores in runs.items():
        table = summarise(scores).rename(index=NAMES)
        interval = [f"{low:.3f} to {high:.3f}" for low, high in zip(table["low"], table["high"], strict=True)]
        columns[name] = pd.DataFrame({"mean": table["mean"].map("{:.3f}".format), "95% interval": interval})
        columns[name].index = table.index
    return pd.concat(columns, axis=1).style


def plot_learning_rates(configs: Mapping[str, Config]) -> Figure:
    """Draw the learning rate over the epochs, one line per configuration."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH, 2.4))
    progress = np.linspace(0, 1, 400, endpoint=False)
    for (name, config), style in zip(configs.items(), ("-", "--", "-."), strict=False):
        rates = [learning_rate(config, t) for t in progress]
        ax.plot(progress * config.epochs, rates, style, label=name)
    ax.set(xlabel="epoch", ylabel="learning rate")
    ax.legend(ncols=len(configs), loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def costs_table(costs: pd.DataFrame, rows: Mapping[str, str]) -> Styler:
    """Table of what a training step costs: ``costs`` by variant, ``rows`` the variants to show with their names."""
    table = costs.set_index("variant").loc[list(rows)].rename(index=dict(rows)).rename_axis(None)
    names = {"trainable": "trained weights", "seconds_a_step": "seconds per step", "peak_memory_mib": "memory, MiB"}
    formats: dict[Any, Any] = {
        "trained weights": "{:,.0f}",
        "seconds per step": "{:.2f}",
        "memory, MiB": "{:,.0f}",
    }
    return table[list(names)].rename(columns=names).style.format(formats)
