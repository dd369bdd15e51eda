"""Fine-tuning on your own images: its configuration, and that it learns."""

import dataclasses
import json
import re

import numpy as np
import pandas as pd
import pytest
import tifffile
from blobs import Blobs
from PIL import Image

from nucseg.cli import main
from nucseg.config import ModelConfig, preset
from nucseg.data.splits import own_images
from nucseg.errors import InputError
from nucseg.images.polygons import nuclei_rings, roi
from nucseg.inference.evaluate import evaluate
from nucseg.inference.segmenter import load, segment
from nucseg.metrics import score
from nucseg.model.network import build_model, load_model, save_model
from nucseg.training.finetune import finetune, finetune_config, median_diameter, open_own, scores_before, um_per_px_for


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    save_model(path, build_model(ModelConfig(base="random", head="instance", size=128, rank=2, alpha=2.0, dropout=0.0)))
    return path


@pytest.fixture
def folder(tmp_path):
    """Ten images of discs; one mask is an ImageJ ROI zip, the others are label TIFFs."""
    import zipfile

    for part in ("images", "masks"):
        (tmp_path / "own" / part).mkdir(parents=True)
    for i, sample in enumerate(Blobs(10, 96)[k] for k in range(10)):
        Image.fromarray(sample.image).save(tmp_path / f"own/images/{i}.png")
        if i:
            tifffile.imwrite(tmp_path / f"own/masks/{i}.tif", sample.labels.astype(np.uint16))
        else:
            with zipfile.ZipFile(tmp_path / "own/masks/0.zip", "w") as archive:
                for number, polygons in nuclei_rings(sample.labels):
                    archive.writestr(f"{number}.roi", roi(number, polygons))
    return tmp_path / "own"


def test_the_scale_makes_the_nuclei_as_large_as_the_adapter_knows_them(folder, adapter):
    dataset = open_own(folder)
    assert len(dataset) == 10 and dataset[0].labels.max() >= 1
    sizes = [np.bincount(dataset[i].labels.ravel())[1:] for i in range(10)]
    expected = 2 * np.sqrt(np.median(np.concatenate(sizes)) / np.pi)
    assert median_diameter(dataset) == pytest.approx(expected)
    config = finetune_config(dataset, adapter)
    assert config.field_px == round(expected / 32 * 512) and config.size == 128 and config.rank == 2
    assert config.crop % 64 == 0 and config.crop <= 128 and config.um_per_px == 0
    assert finetune_config(dataset, adapter, field_px=300, epochs=3).field_px == 300


def test_images_that_train_do_not_choose():
    [split] = own_images(Blobs(10))
    assert split.val == split.test and len(split.val) == 2 and not set(split.train) & set(split.val)
    [split] = own_images(Blobs(3))  # the least
    assert (len(split.train), len(split.val)) == (2, 1)
    with pytest.raises(InputError, match="at least 3"):
        own_images(Blobs(2))


def test_it_learns_and_the_adapter_is_small(folder, adapter, tmp_path, capsys):
    words = ["finetune", str(folder), "--out", str(tmp_path / "run"), "--start", str(adapter), "--device", "cpu"]
    words += ["--epochs", "12", "--lr", "0.003", "--batch-size", "2", "--field-px", "128", "--crop", "64"]
    assert main(words) == 0
    said = capsys.readouterr().out
    shown = dict(re.findall(r"^  (unchanged|rescaled|fine-tuned) +(0\.\d+)   nucseg predict", said, re.MULTILINE))
    assert set(shown) == {"unchanged", "fine-tuned"} and f"--adapter {tmp_path / 'run' / 'best.safetensors'}" in said
    assert "--um-per-px" not in said  # this adapter does not know the pixel size of its training images
    config = finetune_config(open_own(folder), adapter, field_px=128)
    assert um_per_px_for(config) is None
    scores = scores_before(
        folder, dataclasses.replace(config, device="cpu"), progress=False
    )  # each by hand: the model's own field, and the config's
    model = load(adapter, device="cpu")
    own = open_own(folder)
    val = own_images(own)[0].val
    as_it_is = np.mean([score(own[i].labels, segment(own[i].image, model)).pq for i in val])
    model.config = dataclasses.replace(model.config, field_px=128)
    told = evaluate(model, own, val, progress=False)["pq"].mean()
    for way, by_hand in (("unchanged", as_it_is), ("rescaled", told)):
        assert scores[way]["pq"].mean() == pytest.approx(by_hand, abs=1e-6)
        if way in shown:
            assert float(shown[way]) == pytest.approx(by_hand, abs=6e-4)
    path = tmp_path / "run" / "best.safetensors"
    assert path.stat().st_size < 3e6
    others = Blobs(8, 96)
    before, after = (evaluate(load_model(p), others, range(8), progress=False)["dice"].mean() for p in (adapter, path))
    assert after > before + 0.2
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "--start start" in about["command"] and "--epochs 12" in about["command"]
    assert about["config"]["start"] == "start" and len(about["start_sha256"]) == 64
    assert str(tmp_path) not in json.dumps(about)
    scores = pd.read_csv(tmp_path / "run" / "scores.csv")
    assert len(scores) == 2 and scores["fold"].unique() == ["own images"]


def test_the_micrometres_that_stand_for_a_size(folder):
    config = finetune_config(open_own(folder))  # from the adapter that ships: fields of 512 px at 0.25 µm a px
    assert um_per_px_for(config) == pytest.approx(0.25 * 512 / config.field_px)


def test_a_ready_adapter_is_evaluated_by_its_name(folder, capsys):
    words = ["--images", str(folder / "images"), "--masks", str(folder / "masks"), "--device", "cpu"]
    assert main(["evaluate", "nuinsseg-1", *words]) == 0
    assert "10 images in 1 fold; 95% intervals: bootstrap over images" in capsys.readouterr().out
    assert main(["evaluate", "nuinsseg-9", *words]) == 2
    assert "nuinsseg-1" in capsys.readouterr().err


def test_training_goes_on_from_the_adapters_weights(folder, adapter, tmp_path):
    finetune(folder, tmp_path / "run", adapter, epochs=1, lr=1e-12, min_lr=0.0, progress=False, device="cpu")
    start, end = (load_model(p).adapter_state() for p in (adapter, tmp_path / "run" / "best.safetensors"))
    for name, tensor in start.items():
        np.testing.assert_allclose(end[name], tensor, atol=1e-6)


def test_an_adapter_of_another_base_is_refused(folder, adapter, tmp_path):
    with pytest.raises(InputError, match="base"):
        finetune(folder, tmp_path / "run", adapter, base="offline", progress=False)


def test_folders_that_are_not_ready(tmp_path, folder, adapter):
    with pytest.raises(InputError, match="subfolder 'images'"):
        open_own(tmp_path)
    for path in (folder / "masks").iterdir():
        if path.suffix == ".tif":
            tifffile.imwrite(path, np.zeros((96, 96), np.uint16))
    (folder / "masks" / "0.zip").unlink(), (folder / "images" / "0.png").unlink()
    with pytest.raises(InputError, match="no nucleus"):
        finetune(folder, tmp_path / "run", adapter, progress=False)


def test_fields_are_seen_at_one_scale_whatever_the_size_of_the_image(monkeypatch):
    model = build_model(ModelConfig(base="random", head="instance", size=128, rank=1, field_px=256))
    from nucseg.model import network as module

    seen = []
    monkeypatch.setattr(type(model), "forward", lambda self, x: seen.append(tuple(x.shape)) or x[:, :2].float())
    for shape in ((256, 256), (128, 64), (512, 300)):
        image = np.zeros((*shape, 3), np.uint8)
        image[0, 0] = 255  # the network does not run on plain images
        module.predict(model, image)
    assert seen == [(1, 3, 128, 128), (1, 3, 64, 64), (1, 3, 256, 192)]
    assert dataclasses.replace(model.config, field_px=0).field_px == 0


def test_the_help_has_the_defaults_that_are_used(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: nuinsseg-all)" in said and "--head" not in said and "NuInsSeg (default" not in said
    assert "the report's (default" not in said
    assert f"learning rate of AdamW (default: {preset('finetune').lr})" in said
    with pytest.raises(SystemExit):  # what the model is comes from the adapter
        main(["finetune", "own", "--out", "run", "--head", "linear"])
