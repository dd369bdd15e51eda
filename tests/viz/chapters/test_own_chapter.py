import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nucseg.data.synth import generate
from nucseg.images.polygons import ORIGIN
from nucseg.inference.folder import ENDINGS
from nucseg.viz.chapters import changes, own


def test_every_file_that_predict_writes_is_explained():
    assert set(own.FILES) == {*ENDINGS.values(), ".json"}
    assert "top left corner" in ORIGIN  # as the page says


def test_the_table_of_files(tmp_path):
    for ending in own.FILES:
        (tmp_path / f"a{ending}").write_bytes(b"x" * 2048)
    table = own.table_files(tmp_path, "a").data
    assert table["size"].unique().tolist() == ["2 KiB"] and len(table) == len(own.FILES)


def test_pictures_name_what_was_found():
    sample = generate("human liver", 0, size=64)
    empty = np.zeros_like(sample.labels)
    titles = [ax.get_title() for ax in own.plot_found(sample, found=empty, again=sample.labels).axes]
    n = sample.labels.max()
    assert titles == [f"truth: {n} nuclei", "found: 0 nuclei, PQ 0.00", f"again: {n} nuclei, PQ 1.00"]
    shown = own.plot_scale(sample.image, {"unknown": empty, "told": sample.labels}, 0.5)
    assert [ax.get_title() for ax in shown.axes] == ["unknown: 0", f"told: {n}"]


def test_an_overlay_is_drawn_as_it_is(tmp_path):
    Image.fromarray(np.full((30, 40, 3), 200, np.uint8)).save(tmp_path / "a.png")
    assert own.plot_overlay(tmp_path / "a.png").axes[0].images[0].get_array().shape == (30, 40, 3)


def test_scores_by_the_number_of_images_learnt_from():
    about, scores = own.own_images()
    table = own.table_own_images(about, scores).data.set_index("learnt from")
    ten = scores[scores["images"] == "10"]
    assert table.loc["10 images", "PQ"] == f"{ten['pq'].mean():.3f}"
    draws = ten.groupby("draw")["pq"].mean()
    assert table.loc["10 images", "PQ, lowest to highest draw"] == f"{draws.min():.3f} to {draws.max():.3f}"
    assert table.loc["10 images", "minutes"] == f"{np.median(about['seconds']['10']) / 60:.1f}"


def test_stain_changes_are_within_a_norm():
    row = {"tissue": "t", "stem": "a", "dice": 0.5, "aji": 0.5, "fold": ""}
    rows = [
        row | {"head_norm": norm, "condition": condition, "pq": pq}
        for norm, values in (("group", (0.5, 0.3, 0.9)), ("layer", (0.4, 0.4, 0.9)), ("batch", (0.1, 0.2, 0.9)))
        for condition, pq in zip(("as it is", "eosin x 2", "BBBC038"), values, strict=True)
    ]
    found = own.stain_changes(pd.DataFrame(rows), "group")
    assert {name: round(changes.interval(part)[0], 9) for name, part in found.items()} == {"eosin × 2": -0.2}
    table = own.table_robustness(pd.DataFrame(rows)).data
    assert table.loc["eosin × 2"].to_dict() == pytest.approx({"GroupNorm": 0.3, "LayerNorm": 0.4, "BatchNorm": 0.2})
    assert "BBBC038" not in table.index  # the base saw these images: they have no place beside the others


def test_the_robustness_table_counts_its_images():
    scores = own.robustness()
    assert scores.groupby(["head_norm", "condition"])["stem"].nunique().unique().tolist() == [24]


def test_seams():
    pair = {"dice": 0.9, "aji": 0.8, "pq": 0.7}
    border = {"nuclei": 3, "found_crossed": 0.5, "found_clear": 1.0, "iou_crossed": 0.6, "iou_clear": 0.5}
    about = {"side_px": 64, "agreement": {"one": {"moved": pair}}}
    about["nuclei_on_borders"] = {"one": border | {"iou_difference_interval": [0.05, 0.15]}}
    about = json.loads(json.dumps(about))
    assert own.table_seams(about, "agreement", "compared").data.to_dict("records") == [
        {"image": "one", "compared": "moved", "Dice": 0.9, "AJI": 0.8, "PQ": 0.7}
    ]
    assert own.table_borders(about).data["IoU, border minus clear"].tolist() == ["+0.100 (+0.050 to +0.150)"]
