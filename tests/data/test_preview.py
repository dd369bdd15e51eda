"""The preview of NuInsSeg: which images it has, how it is recognised, and the pictures that the pages show."""

from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image

from nucseg.data import splits
from nucseg.data.datasets import NuInsSeg, nuinsseg_list
from nucseg.data.preview import (
    attribution,
    check_no_preview,
    is_preview,
    pictures,
    preview_list,
    whole_dataset,
)
from nucseg.data.synth import Synthetic
from nucseg.errors import InputError
from nucseg.records.provenance import provenance_note

REAL = "NuInsSeg (Mahbod et al. 2024), CC BY 4.0"


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("NUCSEG_DATA", raising=False)


def rows(table):
    return list(table[["tissue", "stem"]].itertuples(index=False, name=None))


def lay_out(root, names, size=8):
    """Files of NuInsSeg with these names; each image's red is its number in the benchmark's list, modulo 256."""
    number = {name: i for i, name in enumerate(rows(nuinsseg_list()))}
    for tissue, stem in names:
        for folder in ("tissue images", "label masks modify"):
            (root / tissue / folder).mkdir(parents=True, exist_ok=True)
        image = np.full((size, size, 3), number[tissue, stem] % 256, np.uint8)
        Image.fromarray(image).save(root / tissue / "tissue images" / f"{stem}.png", compress_level=0)
        labels = np.zeros((size, size), np.uint16)
        labels[2:4, 2:4] = 1
        tifffile.imwrite(root / tissue / "label masks modify" / f"{stem}.tif", labels)
    return root


def test_the_list_follows_its_rule():
    """Recomputed from the benchmark's folds."""
    whole = nuinsseg_list()
    parts = [list(split.test) for split in splits.folds(SimpleNamespace(table=whole))]
    tested = whole.iloc[parts[0]]
    wanted = set(rows(tested.groupby("tissue").head(1))) | set(rows(tested)[::8])
    others = whole[~whole["tissue"].isin(tested["tissue"])]
    wanted |= set(rows(others.groupby("tissue").head(1)))
    listed = preview_list()
    assert rows(listed) == [name for name in rows(whole) if name in wanted]
    assert listed["tissue"].nunique() == whole["tissue"].nunique() == 31 and len(listed) == 45
    fold = {name: k for k, part in enumerate(parts, start=1) for name in rows(whole.iloc[part])}
    assert list(listed["fold"]) == [fold[name] for name in rows(listed)] and (listed["fold"] == 1).sum() == 42


def test_names_are_safe_on_every_system():
    for name in [word for row in rows(preview_list()) for word in row]:
        assert not set(name) & set('<>:"/\\|?*') and name == name.strip(" .") and name.isascii()


def test_a_preview_is_recognised_by_its_names():
    listed, whole = preview_list(), nuinsseg_list()
    assert is_preview(listed) and is_preview(listed.iloc[:1]) and is_preview(SimpleNamespace(table=listed[::-1]))
    assert not is_preview(whole) and not is_preview(whole.iloc[:20]) and not is_preview(listed.iloc[:0])
    assert not is_preview(Synthetic(1, 64))


@pytest.mark.parametrize("protocol", ["benchmark", "report", "leave-one-tissue-out"])
def test_no_protocol_divides_a_preview(protocol):
    with pytest.raises(InputError, match=r"These 45 images .* preview.* all 665 images with nucseg fetch nuinsseg"):
        splits.PROTOCOLS[protocol](SimpleNamespace(table=preview_list()))
    assert splits.PROTOCOLS[protocol](SimpleNamespace(table=nuinsseg_list()))
    check_no_preview(nuinsseg_list())


def test_training_on_a_preview_stops_with_one_sentence(tmp_path, capsys, monkeypatch):
    from nucseg.cli import main

    monkeypatch.setenv("NUCSEG_DATA", str(lay_out(tmp_path / "data", rows(preview_list()))))
    assert main(["train", "--data", "nuinsseg", "--base", "random", "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "preview" in told and "Traceback" not in told and not (tmp_path / "run").exists()


def test_without_data_the_pictures_are_synthetic():
    shown = pictures(2, size=64, seed=3, tissues=["human liver", "mouse heart"])
    plain = Synthetic(2, 64, 3, ["human liver", "mouse heart"])
    assert len(shown) == 4 and shown.table.equals(plain.table)
    assert all(np.array_equal(one.image, two.image) for one, two in zip(shown, plain, strict=True))
    assert not shown.real and shown.attribution == attribution() == "synthetic tissue"
    assert shown.unseen == [0, 1, 2, 3] and shown.tissues == ["human liver", "mouse heart"]
    assert shown.of("mouse heart").stem == plain[2].stem
    assert "synthetic tissue" in provenance_note(shown)


def test_preview_and_whole_give_the_same_pictures(tmp_path, monkeypatch):
    preview = pictures(root=lay_out(tmp_path / "preview", rows(preview_list())))
    some = rows(preview_list()) + rows(nuinsseg_list())[:60:7]
    whole = pictures(root=lay_out(tmp_path / "more", some))
    for shown in (preview, whole):
        assert rows(shown.table) == rows(preview_list()) and shown.real and shown.attribution == REAL
        assert shown.unseen == [i for i, fold in enumerate(preview_list()["fold"]) if fold == 1]
    assert all(np.array_equal(one.image, two.image) for one, two in zip(preview, whole, strict=True))
    number = rows(nuinsseg_list()).index(("mouse thymus", "mouse_thymus_01"))
    assert preview.of("mouse thymus").image[0, 0, 0] == number % 256
    assert "NuInsSeg (Mahbod et al. 2024) (45 images of 31 tissues)" in provenance_note(preview)
    with pytest.raises(InputError, match=r"no image of 'human ear': choose one of human bladder, "):
        preview.of("human ear")
    monkeypatch.setenv("NUCSEG_DATA", str(tmp_path / "preview"))
    assert rows(pictures().table) == rows(preview.table) and attribution() == REAL
    assert is_preview(NuInsSeg(tmp_path / "preview")) and whole_dataset() is None


def test_a_folder_without_pictures_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere"):
        pictures()
    with pytest.raises(InputError, match="nowhere"):
        whole_dataset()
    other = [name for name in rows(nuinsseg_list()) if name not in rows(preview_list())][:2]
    with pytest.raises(InputError, match=r"none of the 45 images .* nucseg fetch nuinsseg --preview, or unset NUCSEG"):
        pictures(root=lay_out(tmp_path / "data", other))


def test_the_whole_dataset_is_all_of_it(tmp_path):
    assert whole_dataset() is None
    names = rows(nuinsseg_list())
    root = lay_out(tmp_path / "data", names[:-1], size=4)
    assert whole_dataset(root) is None
    lay_out(root, names[-1:], size=4)
    assert len(whole_dataset(root)) == 665
