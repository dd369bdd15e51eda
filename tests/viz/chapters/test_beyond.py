import numpy as np
import pandas as pd
import pytest

from nucseg.data.synth import generate
from nucseg.instances import decode, encode
from nucseg.records.runs import results_folder, study_runs
from nucseg.viz.chapters import beyond, changes


@pytest.fixture(scope="module")
def ablation():
    return study_runs("ablation")["offline-small"]


def test_each_variant_is_compared_with_the_run_that_differs_in_one_thing(ablation):
    for name, (_, other) in beyond.ABLATION.items():
        if other:
            ours, theirs = (ablation[run].about["config"] for run in (name, other))
            changed = {option for option in ours if ours[option] != theirs[option]}
            one_thing = [
                {"rank", "alpha"},
                {"lora_target"},
                {"base"},
                {"head_start"},
                {"head", "head_start"},
                {"without"},
            ]
            assert changed in [*one_thing, {"head"}], name


def test_the_linear_head_is_drawn_where_the_text_says(ablation):
    expected = ablation["linear"].scores["pq"].mean() - ablation["fresh-head"].scores["pq"].mean()
    figure = beyond.plot_ablation(ablation)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    row = -labels.index("the report’s linear head")
    marks = {m.get_ydata()[0]: float(m.get_xdata()[0]) for m in figure.axes[0].lines if m.get_marker() in "os"}
    assert marks[row] == pytest.approx(expected)


def test_all_pieces_of_the_recipe_have_a_row():
    recipe = study_runs("recipe")["offline-small"]
    pieces = {name.rpartition("-fold_")[0] for name in recipe} - {"reference"}
    assert pieces <= set(beyond.RECIPE)
    table = beyond.table_recipe(recipe).data
    assert len(table) == len(pieces) and table.columns.tolist() == ["folds", "Dice", "AJI", "PQ"]


def test_tables_have_the_means(ablation):
    table = beyond.table_ablation(ablation, beyond.training_costs()).data.set_index("run")
    assert table.loc["LoRA, rank 8", "PQ"] == ablation["lora-8"].scores["pq"].mean()
    assert table.loc["head only, no LoRA", "trained weights"] == 174578


def test_the_pareto_plot_has_a_point_per_run_and_no_label_on_the_points(ablation):
    figure = beyond.plot_pareto(ablation, beyond.training_costs())
    for ax in figure.axes:
        assert len([line for line in ax.lines if line.get_marker() not in ("None", "", None)]) == 6
        assert not ax.texts
    assert len(figure.legends[0].get_texts()) == 6


def test_calibration_error_weighs_bins_by_their_objects():
    bins = pd.DataFrame({"probability": [0.2, 0.8], "true": [0.3, 0.8], "objects": [1, 3]})
    assert beyond.calibration_error(bins) == pytest.approx(0.025)


def test_confidence_changes_are_within_folds():
    row = {"tissue": "t", "stem": "a", "dice": 0.5, "aji": 0.5}
    ways = {("fold 1", "default"): 0.1, ("fold 1", "tuned"): 0.2, ("fold 1", "tuned with confidence"): 0.4}
    rows = [row | {"fold": fold, "way": way, "pq": pq} for (fold, way), pq in ways.items()]
    found = beyond.confidence_changes(pd.DataFrame(rows))
    means = {name: round(changes.interval(part)[0], 9) for name, part in found.items()}
    assert means == {"fold 1: tuned": 0.1, "fold 1: tuned with confidence": 0.3}


def test_corrected_means_weight_images_by_their_nuclei():
    rows = [
        {"way": way, "dice": 0.5, "aji": 0.5, "pq": pq, "nuclei_true": n}
        for way, values in (("plain", (0.1, 0.3)), ("zone", (0.4, 0.8)))
        for pq, n in zip(values, (1, 3), strict=True)
    ]
    means = beyond.corrected_means(pd.DataFrame(rows))["pq"]
    assert means.tolist() == pytest.approx([0.2, 0.6, 0.7])
    assert beyond.table_corrected(beyond.corrected_means(pd.DataFrame(rows))).to_html().count("+0.400") == 1


def test_options_are_compared_with_one_adapter():
    row = {"tissue": "t", "stem": "a", "dice": 0.5, "aji": 0.5}
    scores = pd.DataFrame([row | {"way": "one adapter", "pq": 0.1}, row | {"way": "views", "pq": 0.3}])
    table = beyond.table_options(scores, {"one adapter": 1.0, "views": 4.0}).data.set_index("way")
    column = "change of PQ (95% interval)"
    assert table[column].to_dict() == {"one adapter": "", "views": "+0.200 (+0.200 to +0.200)"}


def test_pictures_of_maps():
    sample = generate("human spleen", 0, size=64)
    maps = encode(sample.labels)
    assert len(beyond.plot_two_maps(sample, maps, decode(maps)).axes) == 4
    titles = [
        ax.get_title() for ax in beyond.plot_ridges(maps[1], {0.9: decode(maps), 0.0: np.ones_like(sample.labels)}).axes
    ]
    assert titles == ["distance", f"ridge 0.9: {decode(maps).max()}", "ridge 0: 1"]


def test_a_line_per_fold_and_one_for_their_mean():
    rows = [
        {
            "fold": f"fold {k}",
            "foreground": "predicted",
            "distance": "predicted",
            "smooth_px": 2.0,
            "ridge": r,
            "aji": r,
            "pq": r,
        }
        for k in (1, 2)
        for r in (0.8, 0.9)
    ]
    rows.append(rows[0] | {"distance": "true", "pq": 1.0, "ridge": 0.1})  # not drawn
    figure = beyond.plot_ridge_sweep(pd.DataFrame(rows))
    thick = figure.axes[1].lines[2]
    assert list(thick.get_xdata()) == [0.8, 0.9] and list(thick.get_ydata()) == [0.8, 0.9]


def test_adapters_are_compared_within_each_condition():
    row = {"fold": "fold 1", "tissue": "", "dice": 0.5, "aji": 0.5}
    scores = pd.DataFrame(
        [
            row | {"adapter": "a", "condition": "half", "stem": "1", "pq": 0.5},
            row | {"adapter": "b", "condition": "half", "stem": "1", "pq": 0.2},
            row | {"adapter": "a", "condition": "double", "stem": "1", "pq": 0.4},
            row | {"adapter": "b", "condition": "double", "stem": "1", "pq": 0.6},
            row | {"adapter": "a", "condition": "mine alone", "stem": "1", "pq": 0.4},
        ]
    )
    found = beyond.against(scores, "a", "b")
    assert {name: round(rows["pq"].item(), 6) for name, rows in found.items()} == {
        "half the size": 0.3,
        "twice the size": -0.2,
    }


def test_augmentations_are_compared_with_the_preset_s_in_every_condition():
    found = beyond.augmented()
    scores = pd.read_csv(results_folder() / "augmentations" / "scores.csv")
    conditions = scores["condition"].unique()
    assert len(found) == 2 * len(conditions) == 8
    means = scores[scores["condition"] == "haematoxylin x 2"].groupby("run")["pq"].mean()
    expected = means["strong-fold_1"] - means["reference-fold_1"]
    assert found["strong, haematoxylin × 2"]["pq"].mean() == pytest.approx(expected)
