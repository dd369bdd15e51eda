"""Figures and tables of the chapter *Beyond the report*."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from nucseg.data.datasets import Sample
from nucseg.instances import RIDGE, SMOOTH_PX
from nucseg.metrics import weighted_mean
from nucseg.records.runs import Run, results_folder
from nucseg.records.statistics import summarise
from nucseg.viz import figures
from nucseg.viz.chapters import changes

# The runs of the study `ablation`, and what each is compared with: runs whose head starts from random weights with
# the one that differs from them in one thing only.
ABLATION = {
    "lora-8": ("LoRA, rank 8", ""),
    "rank-0": ("head only, no LoRA", "lora-8"),
    "lora-4": ("LoRA, rank 4", "lora-8"),
    "lora-16": ("LoRA, rank 16", "lora-8"),
    "full": ("all weights, no LoRA", "lora-8"),
    "random": ("base: random weights", "lora-8"),
    "fresh-head": ("head: random at the start", "lora-8"),
    "linear": ("the report’s linear head", "fresh-head"),
    "without-distance": ("without the distance map", "fresh-head"),
    "without-stem": ("without the stem", "fresh-head"),
    "without-middle": ("without stride-8 features", "fresh-head"),
    "without-fine": ("without stride-4 features", "fresh-head"),
}
# The pieces of the study `recipe`; the heads that start from random weights are compared with one another.
RECIPE = {
    "combined": ("weights + EMA + Conv2d", "reference"),
    "lora-conv": ("LoRA on Conv2d too", "reference"),
    "weights": ("borders and valleys weighted", "reference"),
    "ema": ("moving average (EMA)", "reference"),
    "geometry": ("stronger geometry", "reference"),
    "strong": ("stronger geometry and stain", "reference"),
    "px-512": ("512 px instead of 384", "reference"),
    "fresh-group": ("head: random at the start", "reference"),
    "fresh-batch": ("fresh head: BatchNorm", "fresh-group"),
    "fresh-layer": ("fresh head: LayerNorm", "fresh-group"),
    "fresh-wide": ("fresh head: wider", "fresh-group"),
    "broad": ("base broad, BatchNorm", "reference"),
    "broad-statistics": ("base broad, estimated statistics", "reference"),
}


# ---- maps and decoding ---------------------------------------------------------------------------------------


def plot_two_maps(sample: Sample, maps: np.ndarray, labels: np.ndarray) -> Figure:
    """Draw an image with its true outlines, its two target maps, and the label map decoded from them."""
    figure, axes = plt.subplots(2, 2, figsize=(figures.WIDTH, figures.WIDTH))
    figures.overlay(sample.image, sample.labels, axes[0, 0])
    axes[0, 0].set_title(f"truth: {sample.labels.max()} nuclei")
    for ax, one, title in ((axes[0, 1], maps[0], "foreground"), (axes[1, 0], maps[1], "distance")):
        _grey(ax, one, title)
    figures.overlay(sample.image, labels, axes[1, 1])
    axes[1, 1].set_title(f"decoded: {labels.max()} nuclei")
    figures.scale_bar(axes[0, 0])
    return figure


def plot_ridges(distance: np.ndarray, results: Mapping[float, np.ndarray]) -> Figure:
    """Draw a distance map, and beside it the outlines of its nuclei for each ridge in ``results``."""
    count = len(results) + 1
    figure, axes = plt.subplots(1, count, figsize=(figures.WIDTH, figures.WIDTH / count + 0.4))
    _grey(axes[0], distance, "distance")
    for ax, (ridge, labels) in zip(axes[1:], results.items(), strict=True):
        grey = np.repeat((np.clip(distance, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)
        figures.overlay(grey, labels, ax, colour=figures.TRUTH)
        ax.set_title(f"ridge {ridge:g}: {labels.max()}")
    figures.scale_bar(axes[0])
    return figure


def _grey(ax: Any, image: np.ndarray, title: str) -> None:
    ax.imshow(image, cmap="gray", vmin=0, vmax=1)
    ax.set(title=title, xticks=[], yticks=[])


def table_representations(compared: pd.DataFrame, stride: int = 2) -> Any:
    """PQ of the round trip by representation (rows) and disturbance (columns), best at the strongest first."""
    pivot = compared[compared["stride"] == stride].pivot_table(index="representation", columns="noise", values="pq")
    order = ["none", *sorted(set(pivot.columns) - {"none"})]
    best_first = pivot[order].sort_values(order[-1], ascending=False).rename_axis(columns=None)
    return best_first.style.format("{:.3f}").set_caption(
        "PQ of the round trip at every second pixel: Gaussian blur in px, noise as a share of the map's range"
    )


# ---- other images ----------------------------------------------------------------------------------------------


def unlike() -> pd.DataFrame:
    """Scores of adapters on images unlike those they were trained on: one row per adapter, condition and image."""
    scores = pd.read_csv(results_folder() / "generalisation" / "scores.csv", dtype={"stem": str})
    return scores.fillna({"tissue": ""}).assign(fold="fold 1")


SIZES = {"half": "half the size", "double": "twice the size"}


def against(scores: pd.DataFrame, ours: str, theirs: str) -> dict[str, pd.DataFrame]:
    """Paired differences of two adapters in `unlike`, by condition, over the images that both have scored."""
    mine, other = (scores[scores["adapter"] == name] for name in (ours, theirs))
    pairs = {condition: other[other["condition"] == condition] for condition in mine["condition"].unique()}
    return {
        SIZES.get(condition, condition.replace(" x ", " × ")): changes.paired(
            mine[mine["condition"] == condition], rows
        )
        for condition, rows in pairs.items()
        if len(rows)
    }


def augmented() -> dict[str, pd.DataFrame]:
    """Paired differences of two stronger augmentations to the preset's, by augmentation and condition."""
    scores = pd.read_csv(results_folder() / "augmentations" / "scores.csv", dtype={"stem": str})
    scores = scores.fillna({"tissue": ""}).assign(fold="fold 1").rename(columns={"run": "adapter"})
    return {
        f"{name}, {condition}": rows
        for name in ("geometry", "strong")
        for condition, rows in against(scores, f"{name}-fold_1", "reference-fold_1").items()
    }


# ---- the ablation --------------------------------------------------------------------------------------------


def training_costs() -> pd.DataFrame:
    """What a training step costs, by run of the ablation: seconds, images a second, peak memory in MiB."""
    return pd.read_csv(results_folder() / "training-cost" / "costs.csv", index_col="variant")


def table_ablation(runs: Mapping[str, Run], costs: pd.DataFrame) -> Any:
    """The ablation's runs: trained weights, mean test scores, and what a training step costs."""
    rows = []
    for name, (label, _) in ABLATION.items():
        if name in runs:
            mean = summarise(runs[name].scores)["mean"]
            rows.append(
                {
                    "run": label,
                    "trained weights": runs[name].about["parameters"]["trainable"],
                    **{changes.NAMES[score]: mean[score] for score in ("dice", "aji", "pq")},
                    "s per step": costs["seconds_a_step"].get(name),
                    "GiB": costs["peak_memory_mib"].get(name, np.nan) / 1024,
                }
            )
    formats: Any = {"trained weights": "{:,}", **dict.fromkeys(["Dice", "AJI", "PQ"], "{:.3f}")}
    formats |= {"s per step": "{:.2f}", "GiB": "{:.1f}"}
    styled = pd.DataFrame(rows).style.hide(axis="index").format(formats)
    return styled.set_caption("Means over the test images of fold 1, one run and one seed per row")


def ablation_changes(runs: Mapping[str, Run]) -> dict[str, pd.DataFrame]:
    """Paired differences of the ablation's runs to what `ABLATION` compares them with, by label."""
    return {
        label: changes.paired(runs[name].scores, runs[other].scores)
        for name, (label, other) in ABLATION.items()
        if other and name in runs
    }


def plot_ablation(runs: Mapping[str, Run]) -> Figure:
    """Forest plot of the ablation's changes in PQ, coloured by what each run is compared with."""
    kinds = {"lora-8": "against LoRA, rank 8", "fresh-head": "against a fresh head"}
    series = {label: kinds[other] for label, other in ABLATION.values() if other}
    return changes.plot(ablation_changes(runs), series=series)


def plot_pareto(runs: Mapping[str, Run], costs: pd.DataFrame) -> Figure:
    """PQ against trained weights and against seconds per training step; a line joins the points nothing beats."""
    names = [name for name in ("rank-0", "lora-4", "lora-8", "lora-16", "full", "linear") if name in runs]
    points = pd.DataFrame(
        {
            "label": [ABLATION[name][0] for name in names],
            "weights": [runs[name].about["parameters"]["trainable"] for name in names],
            "seconds": [costs["seconds_a_step"][name] for name in names],
            "pq": [runs[name].scores["pq"].mean() for name in names],
        }
    )
    figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 3.6), sharey=True)
    for ax, cost, text in zip(axes, ("weights", "seconds"), ("trained weights", "seconds per step"), strict=True):
        front = points[changes.pareto(points[cost], points["pq"])].sort_values(cost)
        ax.plot(front[cost], front["pq"], color="0.7", linewidth=1.2, zorder=0, drawstyle="steps-post")
        for i, point in points.iterrows():
            marker, colour = "osD^vP"[int(str(i))], (*figures.SERIES, "#000000")[int(str(i))]
            ax.plot(point[cost], point["pq"], marker, color=colour, markersize=7, label=point["label"])
        ax.set(xlabel=text, ylim=(0.2, 0.45))
    axes[0].set(xscale="log", ylabel="PQ, fold 1", xlim=(1e5, 1e7))
    axes[1].set(xlim=(0.3, 0.7))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


# ---- the recipe ----------------------------------------------------------------------------------------------


def recipe_changes(runs: Mapping[str, Run]) -> dict[str, pd.DataFrame]:
    """Paired differences of the recipe's pieces to what `RECIPE` compares them with, by label, over their folds."""
    recorded = {name.rpartition("-fold_")[0] for name in runs}
    return {
        label: changes.by_fold(runs, name, other)
        for name, (label, other) in RECIPE.items()
        if {name, other} <= recorded
    }


def table_recipe(runs: Mapping[str, Run]) -> Any:
    """The recipe's pieces: the number of folds, and the mean differences with their intervals."""
    found = recipe_changes(runs)
    cells = changes.cells(found)
    cells.insert(0, "folds", [part["fold"].nunique() for part in found.values()])
    styled = cells.style.set_table_styles(changes.TIGHT)
    caption = "Paired differences on validation images, with 95% intervals over images"
    compared = {RECIPE.get(name.rpartition("-fold_")[0], ("", ""))[1] for name in runs}
    if "fresh-group" in compared:
        caption += (
            ". BatchNorm and LayerNorm in a fresh head: against a fresh head with GroupNorm; all others: against the "
            "reference"
        )
    return styled.set_caption(caption)


def plot_recipe(runs: Mapping[str, Run]) -> Figure:
    """Forest plot of the recipe's pieces, a mark per fold, in AJI and PQ."""
    return changes.plot(recipe_changes(runs), ("aji", "pq"), split=True)


# ---- decoding ------------------------------------------------------------------------------------------------


def plot_ridge_sweep(decoded: pd.DataFrame) -> Figure:
    """Validation AJI and PQ over the ridge, for the smoothing in use: a thin line per fold, and their mean."""
    both = (decoded["distance"] == "predicted") & (decoded["foreground"] == "predicted")
    swept = decoded[both & (decoded["smooth_px"] == SMOOTH_PX)]
    figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 2.8), sharex=True)
    for ax, score in zip(axes, ("aji", "pq"), strict=True):
        curve: dict[str, Any] = {"data": swept, "x": "ridge", "y": score, "ax": ax, "color": figures.SERIES[0]}
        sns.lineplot(**curve, units="fold", estimator=None, linewidth=0.7, alpha=0.6)
        sns.lineplot(**curve, errorbar=None, linewidth=2, marker="o")
        ax.axvline(RIDGE, color="0.5", linestyle=":")
        ax.set(xlabel="ridge", ylabel=f"validation {changes.NAMES[score]}")
    return figure


# ---- objects with a confidence -------------------------------------------------------------------------------


def confidence_changes(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Paired differences to the default decoding, by fold: tuned alone, and tuned with the confidence."""
    way = dict(list(scores.groupby("way")))
    parts = {}
    for fold in sorted(scores["fold"].unique()):
        one = {name: table[table["fold"] == fold] for name, table in way.items()}
        for name in ("tuned", "tuned with confidence"):
            parts[f"{fold}: {name}"] = changes.paired(one[name], one["default"])
    return parts


def plot_calibration(reliability: pd.DataFrame) -> Figure:
    """Share of true nuclei against predicted probability, a line per run; below it, the objects in each bin."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(figures.WIDTH, 4.8), sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":")
    for number, (run, bins) in enumerate(reliability.groupby("run")):
        style: dict[str, Any] = {
            "color": figures.SERIES[number],
            "label": str(run).rpartition("-")[2].replace("_", " "),
        }
        top.plot(bins["probability"], bins["true"], marker="os^D"[number % 4], markersize=4, **style)
        shift = 0.045 * (number - (reliability["run"].nunique() - 1) / 2)
        bottom.bar((bins["low"] + bins["high"]) / 2 + shift, bins["objects"], width=0.04, **style)
    top.set(ylabel="share of true nuclei", xlim=(0, 1), ylim=(0, 1))
    top.legend(loc="upper left")
    bottom.set(xlabel="object confidence", ylabel="objects")
    return figure


def calibration_error(reliability: pd.DataFrame) -> float:
    """Expected calibration error: mean distance of confidence and share of true nuclei, weighted by the objects."""
    distance = (reliability["probability"] - reliability["true"]).abs()
    return float(np.average(distance, weights=reliability["objects"]))


# ---- averages and corrections --------------------------------------------------------------------------------


def table_options(scores: pd.DataFrame, seconds: Mapping[str, float]) -> Any:
    """Averages over views and over adapters: mean AJI and PQ, the change of PQ with its interval, and the time."""
    ways = {name: table.assign(fold="") for name, table in scores.groupby("way", sort=False)}
    rows = []
    for name, part in ways.items():
        change = changes.signed(*changes.interval(changes.paired(part, ways["one adapter"])))
        rows.append(
            {
                "way": name,
                "AJI": f"{part['aji'].mean():.3f}",
                "PQ": f"{part['pq'].mean():.3f}",
                "change of PQ (95% interval)": "" if name == "one adapter" else change,
                "s per image": f"{seconds[str(name)]:.2f}",
            }
        )
    caption = f"Averaging, {scores['stem'].nunique()} test images of fold 1, one thread of a CPU"
    return pd.DataFrame(rows).style.hide(axis="index").set_caption(caption)


def corrected_means(ways: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice, AJI and PQ by way of scoring; the last row weights the images of the one before by their nuclei."""
    names: Sequence[str] = ["dice", "aji", "pq"]
    table = ways.groupby("way", sort=False)[list(names)].mean()
    last = ways[ways["way"] == table.index[-1]]
    weighted = [weighted_mean(last[name], last["nuclei_true"]) for name in names]
    table.loc[f"{table.index[-1]}, images weighted by nuclei"] = weighted
    return table


def table_corrected(means: pd.DataFrame) -> Any:
    """`corrected_means` with the change of PQ, as the page shows it."""
    shown = means.rename(columns=changes.NAMES)
    shown["change of PQ"] = shown["PQ"] - shown["PQ"].iloc[0]
    formats: Any = dict.fromkeys(["Dice", "AJI", "PQ"], "{:.3f}") | {"change of PQ": "{:+.3f}"}
    return shown.style.format(formats).set_caption("The five folds' predictions, scored in other ways")


def about(name: str) -> dict[str, Any]:
    """The ``run.json`` of an experiment in the results folder."""
    found: dict[str, Any] = json.loads((results_folder() / name / "run.json").read_text(encoding="utf-8"))
    return found
