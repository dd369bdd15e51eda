"""Figures and tables of the chapter on fine-tuning."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from nucseg.config import apply, preset
from nucseg.data.datasets import Sample
from nucseg.records.statistics import SCORES
from nucseg.viz import figures
from nucseg.viz.chapters import finetuning as figures_of


@pytest.fixture
def sample() -> Sample:
    labels = np.zeros((40, 40), np.int32)
    labels[5:15, 5:15], labels[5:15, 20:30] = 1, 2
    return Sample(np.full((40, 40, 3), 200, np.uint8), labels, "human liver", "a")


def title(ax) -> str:
    return ax.get_title(loc="left") or ax.get_title()


def test_dice_notices_a_prediction_of_nothing_and_cross_entropy_hardly():
    left, right = figures_of.plot_losses().axes
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    assert lines["Dice loss"].min() > 0.8 and lines["cross-entropy"][0] < 0.1
    focal, entropy = (np.asarray(line.get_ydata()) for line in right.lines)
    assert (focal < entropy).all()


def test_a_batch_is_images_above_their_maps():
    images, targets = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 2, 8, 8)
    images[1], targets[1, 0], targets[0, 1] = 255, 1, 0.5
    axes = np.array(figures_of.plot_batch(images, targets).axes).reshape(3, 2)
    means = [[float(ax.images[0].get_array().mean()) for ax in line] for line in axes]
    assert means == [[0, 255], [0, 1], [0.5, 0]]
    assert [line[0].get_ylabel() for line in axes] == ["image", "foreground", "distance"]


def test_only_options_that_differ_are_listed_each_with_what_it_is():
    here = apply(preset("report"), {"rank": 4, "lr": 0.01}, "test")
    table = figures_of.config_table(here, preset("report"), ("a", "b")).data
    assert table.loc["rank", ["a", "b"]].tolist() == ["4", "8"] and set(table.index) == {"rank", "lr"}
    assert "LoRA rank" in table.loc["rank", "what it is"]


def test_before_and_after_have_their_scores(sample):
    fused = (sample.labels > 0).astype(np.int32)
    fused[5:15, 15:20] = 1
    axes = figures_of.plot_before_after(sample, fused, sample.labels).axes
    assert title(axes[0]) == "truth: 2 nuclei"
    assert title(axes[1]).startswith("before: 1 objects") and "PQ 0.00" in title(axes[1])
    assert title(axes[2]) == "after: 2 objects\nDice 1.00, PQ 1.00"


def test_nuclei_of_a_tile_are_counted_though_their_ids_have_gaps(sample):
    tile = replace(sample, labels=sample.labels * 40)
    axes = figures_of.plot_before_after(tile, sample.labels, sample.labels).axes
    assert title(axes[0]) == "truth: 2 nuclei"


def test_maps_are_drawn_beside_the_image(sample):
    maps = np.stack([sample.labels > 0, 0.5 * (sample.labels > 0)]).astype(np.float32)
    axes = figures_of.plot_maps(sample, maps, sample.labels).axes
    assert [title(ax) for ax in axes] == ["image", "foreground", "distance", "decoded"]
    assert axes[2].images[0].get_array().max() == 0.5


def test_scores_have_means_and_intervals():
    scores = pd.DataFrame({name: [0.25, 0.75] for name in SCORES})
    scores = scores.assign(fold="fold 1", tissue="a")
    table = figures_of.scores_table({"a": scores, "b": scores}).data
    assert table.loc["PQ", ("a", "mean")] == "0.500"
    assert table.loc["AJI, matched only", ("b", "95% interval")] == "0.250 to 0.750"


def test_two_cycles_restart_in_the_middle():
    configs = {str(n): apply(preset("report"), {"cycles": n}, "test") for n in (1, 2)}
    ax = figures_of.plot_learning_rates(configs).axes[0]
    one, two = (np.asarray(line.get_ydata()) for line in ax.lines)
    assert (np.diff(one) < 0).all() and (np.diff(two) > 0).sum() == 1
    assert ax.lines[0].get_xdata()[-1] < configs["1"].epochs


def test_costs_are_those_of_the_named_variants():
    costs = pd.DataFrame(
        {
            "variant": ["full", "rank-0"],
            "trainable": [6_240_110, 174_578],
            "seconds_a_step": [0.5968, 0.381],
            "peak_memory_mib": [1739, 1102],
        }
    )
    html = figures_of.costs_table(costs, {"rank-0": "head alone"}).to_html()
    assert "head alone" in html and ">174,578<" in html and ">0.38<" in html and "6,240,110" not in html


def test_no_line_runs_through_the_legend_of_learning_curves():
    history = pd.DataFrame({"epoch": [1, 2], "train_loss": [1.0, 0.5], "val_dice": [0.1, 0.9], "val_pq": [0.0, 0.2]})
    figure = figures.learning_curves(history, "pq")
    figure.canvas.draw()
    right = figure.axes[1]
    assert right.get_legend().get_window_extent().y1 < right.get_window_extent().y0
