"""Pairing of images and masks under the names that other programs give them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nucseg.data.pairing import _without, find_pairs
from nucseg.errors import InputError


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root / "images", root / "masks"


def pairs(images, masks):
    return [(p.tissue, p.stem, p.image.name, p.mask.name) for p in find_pairs(images, masks)]


@pytest.mark.parametrize("image, mask", [
    ("x.png", "x.tif"), ("x.ome.tif", "x.png"), ("x.ome.tif", "x.ome.labels.tif"), ("x.svs", "x.geojson"),
    ("x.jpg", "x_mask.png"), ("x.jpg", "x_masks.tif"), ("x.jpg", "x_cp_masks.png"), ("x.jpg", "x_seg.npy"),
    ("x.png", "x.rois.zip"), ("x.png", "x.labels.tif"), ("x.png", "x.mat"), ("X_Mask.png", "X_Mask.tif"),
    ("x.png", "x_Masks.TIF"),
])  # fmt: skip
def test_names_that_belong_together(tmp_path, image, mask):
    found = pairs(*tree(tmp_path, f"images/a/{image}", f"masks/a/{mask}", "images/Thumbs.db", "masks/a/._x.tif"))
    stem = image.split(".")[0]
    assert found == [("a", stem, image, mask)]


def test_the_name_itself_goes_before_what_is_left_of_it(tmp_path):
    found = pairs(*tree(tmp_path, "images/x.png", "images/x_mask.png", "masks/x.tif", "masks/x_mask.tif"))
    assert found == [("", "x", "x.png", "x.tif"), ("", "x_mask", "x_mask.png", "x_mask.tif")]


@pytest.mark.parametrize("names, words", [
    (["images/x.png", "masks/x.tif", "masks/x.zip"], "two masks, 'x.tif' and 'x.zip'"),
    (["images/x.png", "masks/x.labels.tif", "masks/x.geojson"], "two masks"),
    (["images/x.png", "images/x.ome.tif", "masks/x.tif"], "same name"),
    (["images/x.png", "masks/x.xcf"], r"x\.xcf' has an unsupported format: save it as one of label maps"),
    (["images/x.png", "images/y.png", "masks/x.tif"], r"y\.png' has no mask"),
    (["images/x.png", "masks/x.tif", "masks/y.tif"], r"y\.tif' has no image"),
    (["images/x.png", "masks/y.tif"], r"y\.tif' has no image"),
    (["images/notes.txt", "masks/y.tif"], "holds no images"),
])  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, names, words):
    with pytest.raises(InputError, match=words):
        find_pairs(*tree(tmp_path, *names))


def test_nothing_is_passed_over_in_silence(tmp_path):
    images, masks = tree(tmp_path, "images/x.png", "images/notes.docx", "masks/x.tif", "masks/scan.czi")
    with pytest.warns(UserWarning, match=r"2 files are neither.*notes\.docx, scan\.czi"):
        find_pairs(images, masks)


def test_what_predict_writes_beside_its_masks_is_no_mask(tmp_path, recwarn):
    names = ["x.labels.tif", "x.overlay.png", "x.nuclei.csv", "summary.csv"]
    images, masks = tree(tmp_path, "images/x.png", *(f"masks/{name}" for name in names))
    (masks / "x.json").write_text(json.dumps({"image": "x.png", "image_sha256": "0" * 64}))
    assert [p.mask.name for p in find_pairs(images, masks)] == ["x.labels.tif"]


def test_one_coco_file_for_all(tmp_path):
    images, _ = tree(tmp_path, "images/a/x.png", "images/y.jpg")
    listed = [{"id": i, "file_name": name} for i, name in enumerate(("x.png", "somewhere/y.jpg", "z.png"))]
    coco = tmp_path / "all.json"
    coco.write_text(json.dumps({"images": listed, "annotations": [], "categories": []}))
    assert pairs(images, coco) == [("", "y", "y.jpg", "all.json"), ("a", "x", "x.png", "all.json")]
    coco.write_text(json.dumps({"images": listed[:1], "annotations": [], "categories": []}))
    with pytest.raises(InputError, match=r"y\.jpg' has no mask"):
        find_pairs(images, coco)


@given(st.text(max_size=20))
def test_marks_are_taken_off_until_none_is_left(stem):
    found = list(_without(stem, ("_mask", ".ome")))
    assert found[0] == stem and all(stem.startswith(one) for one in found)
    assert len(found[-1]) <= 5 or not found[-1].casefold().endswith(("_mask", ".ome"))
