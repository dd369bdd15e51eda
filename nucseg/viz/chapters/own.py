"""Figures and tables of the chapter *Your own images*."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from nucseg.data.datasets import Sample
from nucseg.metrics import score
from nucseg.records.runs import results_folder
from nucseg.viz import figures
from nucseg.viz.chapters import changes

FILES = {
    ".labels.tif": "label map, for ImageJ, napari, scikit-image",
    ".nuclei.csv": "one row per nucleus: place, size, shape, haematoxylin",
    ".geojson": "polygons, for QuPath: drag it onto the image",
    ".rois.zip": "outlines, for ImageJ: drag it onto ImageJ",
    ".overlay.png": "the image with its nuclei outlined",
    ".json": "how it was made: adapter, settings, hashes of the files",
}
# The rows of results/own-images, and what they mean
IMAGES = {
    "0": "none: the adapter unchanged",
    "scale only": "none, but told the size of the nuclei",
    "5": "5 images",
    "10": "10 images",
    "20": "20 images",
}


# ---- three images --------------------------------------------------------------------------------------------


def plot_found(sample: Sample, **results: np.ndarray) -> Figure:
    """Draw a sample with its true outlines, and beside it with each label map of ``results``, PQ in the title."""
    shown = {"truth": sample.labels, **results}
    figure, axes = plt.subplots(1, len(shown), figsize=(figures.WIDTH, figures.WIDTH / len(shown) + 0.4))
    for ax, (name, labels) in zip(axes, shown.items(), strict=True):
        figures.overlay(sample.image, labels, ax)
        quality = "" if name == "truth" else f", PQ {score(sample.labels, labels).pq:.2f}"
        ax.set_title(f"{name}: {figures.count(labels)} nuclei{quality}")
    figures.scale_bar(axes[0])
    return figure


def plot_scale(image: np.ndarray, results: Mapping[str, np.ndarray], um_per_px: float) -> Figure:
    """Draw one image with the outlines of each label map in ``results``, and a scale bar."""
    figure, axes = plt.subplots(1, len(results), figsize=(figures.WIDTH, figures.WIDTH / len(results) + 0.4))
    for ax, (name, labels) in zip(axes, results.items(), strict=True):
        figures.overlay(image, labels, ax)
        ax.set_title(f"{name}: {labels.max()}")
    figures.scale_bar(axes[0], um_per_px)
    return figure


def plot_overlay(path: str | Path) -> Figure:
    """Draw an overlay file as `nucseg predict` wrote it, with a scale bar."""
    figure, ax = plt.subplots(figsize=(figures.WIDTH / 1.6, figures.WIDTH / 1.6))
    ax.imshow(np.asarray(Image.open(path)))
    ax.set_axis_off()
    figures.scale_bar(ax)
    return figure


def table_files(folder: str | Path, name: str) -> Any:
    """The files that `nucseg predict` wrote for the image ``name``, their sizes and what they are for."""
    rows = [
        (f"{name}{ending}", f"{(Path(folder) / f'{name}{ending}').stat().st_size / 1024:.0f} KiB", what)
        for ending, what in FILES.items()
    ]
    table = pd.DataFrame(rows, columns=["file", "size", "what it is for"])
    return table.style.hide(axis="index").set_caption("What is written for one image")


# ---- recorded measurements -----------------------------------------------------------------------------------


def own_images() -> tuple[dict[str, Any], pd.DataFrame]:
    """The experiment ``own-images``: its ``run.json`` and its scores, one row per draw, number of images and image."""
    folder = results_folder() / "own-images"
    about: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return about, pd.read_csv(folder / "scores.csv", dtype={"images": str})


def table_own_images(about: Mapping[str, Any], scores: pd.DataFrame) -> Any:
    """Mean scores by the number of images learnt from, the range of PQ over draws, epochs and minutes."""
    rows = []
    for name, label in IMAGES.items():
        group = scores[scores["images"] == name]
        by_draw = group.groupby("draw")["pq"].mean()
        epochs = [c["epochs_run"] for c in about["configs"] if str(c["images"]) == name]
        seconds: Sequence[float] = about["seconds"].get(name, ())
        rows.append(
            {
                "learnt from": label,
                "Dice": f"{group['dice'].mean():.3f}",
                "AJI": f"{group['aji'].mean():.3f}",
                "PQ": f"{group['pq'].mean():.3f}",
                "PQ, lowest to highest draw": f"{by_draw.min():.3f} to {by_draw.max():.3f}",
                "epochs": f"{min(epochs)} to {max(epochs)}" if epochs else "",
                "minutes": f"{np.median(seconds) / 60:.1f}" if seconds else "",
            }
        )
    return (
        pd.DataFrame(rows)
        .style.hide(axis="index")
        .set_caption(
            f"BBBC038's histology: means over {about['draws']} draws of the images to learn from, each scored on "
            f"{about['test_images']} others"
        )
    )


def robustness() -> pd.DataFrame:
    """The scores of the experiment ``robustness``: one row per head norm, condition and image."""
    return pd.read_csv(results_folder() / "robustness" / "scores.csv").assign(fold="")


def stain_changes(scores: pd.DataFrame, norm: str) -> dict[str, pd.DataFrame]:
    """Paired differences of each stain condition to the images as they are, for heads with one norm."""
    ways = dict(list(scores[scores["head_norm"] == norm].groupby("condition")))
    return {
        str(name).replace(" x ", " × "): changes.paired(part, ways["as it is"])
        for name, part in ways.items()
        if name not in ("as it is", "BBBC038")
    }


def table_robustness(scores: pd.DataFrame) -> Any:
    """Mean PQ by condition (rows) and head norm (columns)."""
    table = scores.pivot_table(index="condition", columns="head_norm", values="pq")
    names = {"as it is": "as it is", **{name: name for name in table.index if " x " in name}}
    norms = {"group": "GroupNorm", "layer": "LayerNorm", "batch": "BatchNorm"}
    table = table.loc[list(names), list(norms)].rename(columns=norms)
    table = table.rename(index=lambda name: name.replace(" x ", " × ")).rename_axis(None).rename_axis(columns=None)
    return table.style.format("{:.3f}").set_caption(
        "PQ on 24 validation images of fold 1 when one stain is halved or doubled, by the normalisation in the head"
    )


def table_seams(about: Mapping[str, Any], key: str, first: str) -> Any:
    """Dice, AJI and PQ of the experiment ``seams``: its entry ``key``, one row per image and way of dividing it."""
    rows = [
        {"image": image, first: name} | {word: row[word.lower()] for word in ("Dice", "AJI", "PQ")}
        for image, pairs in about[key].items()
        for name, row in pairs.items()
    ]
    styled = pd.DataFrame(rows).style.hide(axis="index").format(dict.fromkeys(["Dice", "AJI", "PQ"], "{:.3f}"))
    return styled.set_caption(f"Synthetic images of {about['side_px']:,} px")


def table_borders(about: Mapping[str, Any]) -> Any:
    """The same nuclei on a border between fields and clear of it: share found, mean IoU, and the paired difference."""
    rows = [
        {
            "image": image,
            "nuclei": row["nuclei"],
            "found on a border": f"{row['found_crossed']:.1%}",
            "clear of it": f"{row['found_clear']:.1%}",
            "IoU, border minus clear": changes.signed(
                row["iou_crossed"] - row["iou_clear"], *row["iou_difference_interval"]
            ),
        }
        for image, row in about["nuclei_on_borders"].items()
    ]
    return pd.DataFrame(rows).style.hide(axis="index").set_caption("Intervals: 95%, nuclei drawn")
