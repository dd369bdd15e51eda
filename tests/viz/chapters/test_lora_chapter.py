"""Figures of the chapter on LoRA: what they say in numbers is what the model has."""

import numpy as np
import pandas as pd
import pytest
import torch

from nucseg.config import ModelConfig
from nucseg.model import lora
from nucseg.model.network import build_model, parameter_ledger
from nucseg.viz.chapters import lora as figures_of


def words(figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


class TestArchitecture:
    def test_the_layers_in_the_boxes_are_the_models(self):
        model = build_model(ModelConfig(base="random", size=64, rank=1, alpha=1))
        said = words(figures_of.plot_architecture())
        layers = list(lora.lora_layers(model.encoder))
        for stage in range(1, 4):
            count = sum(name.startswith(f"layers.{stage}.") for name in layers)
            blocks = len(model.encoder.layers[stage].blocks)
            text = said[said.index(f"stage {stage + 1}") + 1]
            assert text.startswith(f"{blocks} attention blocks, LoRA in {count} layers")
        assert sum(name.startswith("layers.") for name in layers) == len(layers)

    def test_the_shapes_in_the_boxes_are_the_encoders(self):
        model = build_model(ModelConfig(base="random", size=64, lora_target="none"))
        said = words(figures_of.plot_architecture())
        x = torch.zeros(1, 3, 64, 128)
        shapes = [y.shape for y in model.encoder.features(x)]
        for name, (_, channels, height, width) in zip(("stage 1", "stage 2", "stage 4", "neck"), shapes, strict=True):
            text = said[said.index(name) + 1]
            assert 64 // height == 128 // width
            assert text.endswith(f"{channels} × H/{64 // height} × W/{64 // height}")

    @pytest.mark.parametrize(("head", "name"), [("instance", "instance head"), ("linear", "the report’s head")])
    def test_the_weights_of_the_heads_are_the_models(self, head, name):
        model = build_model(ModelConfig(base="random", size=64, head=head, lora_target="none"))
        said = words(figures_of.plot_architecture())
        assert f"{parameter_ledger(model)['head']:,} weights" in said[said.index(name) + 1]


def test_the_matrices_are_drawn_to_scale_with_their_shapes():
    figure = figures_of.plot_to_scale(320, 960, 4)
    sizes = {(patch.get_width(), patch.get_height()) for patch in figure.axes[0].patches}
    assert sizes == {(320, 960), (4, 960), (320, 4)}
    said = "\n".join(words(figure))
    assert all(shape in said for shape in ("960 × 320", "960 × 4", "4 × 320")) and r"$\times$" in said


def test_only_the_reported_cell_is_marked():
    counts = pd.DataFrame({2: [10, 20], 4: [20, 41]}, index=["all", "late"])
    html = figures_of.ledger_table(counts, 41).to_html()
    assert "rank 4" in html and html.count("text-decoration: underline") == 1
    (marked,) = [line for line in html.splitlines() if line.startswith("#T_")]
    assert marked.split()[0].endswith("_row1_col1")


def test_the_ledger_has_a_dot_for_each_count_and_a_line_at_the_reports():
    counts = pd.DataFrame({2: [1000, 2000], 4: [2000, 4100]}, index=["all", "late"])
    ax = figures_of.plot_ledger(counts, 4100).axes[0]
    dots = {(x, y) for dots in ax.collections for x, y in dots.get_offsets().tolist()}
    assert dots == {(1000, 1), (2000, 1), (2000, 0), (4100, 0)}
    assert [text.get_text() for text in ax.get_yticklabels()] == ["late", "all"]
    assert any(set(line.get_xdata()) == {4100} for line in ax.lines)


def test_lines_are_labelled():
    ax = figures_of.plot_drift({"ours": [0, 0, 0], "theirs": [0, 0.1, 0.2]}).axes[0]
    assert [(t.get_text(), t.xy) for t in ax.texts] == [("ours", (2, 0)), ("theirs", (2, 0.2))]
    ax = figures_of.plot_learning({1: [1, 0.5], 2: [1, 0.1]}).axes[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["rank 1", "rank 2"]


def test_rows_are_named_in_their_order():
    orders = {"a": np.array([0, 1, 2, 0, 1, 2]), "b": np.array([0, 0, 1, 1, 2, 2])}
    figure = figures_of.plot_rows(orders)
    assert ["".join(t.get_text() for t in ax.texts) for ax in figure.axes] == ["qkvqkv", "qkv"]
    assert [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes] == ["a", "b"]
