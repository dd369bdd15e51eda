"""The loop of a user: predict, correct in QuPath, train. On synthetic tissue, with the adapter that ships."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from nucseg.cli import main
from nucseg.data.datasets import Sample
from nucseg.data.own import open_own
from nucseg.data.synth import Synthetic
from nucseg.images.polygons import feature, nuclei_rings, read_geojson
from nucseg.inference.evaluate import evaluate
from nucseg.inference.segmenter import load
from nucseg.training import loop
from nucseg.training.finetune import finetune_config

SIDE = 192


class Held:
    """Synthetic tissue that is stained as no laboratory does it, so that there is something to learn."""

    def __init__(self, count):
        self.source = Synthetic(count, size=SIDE, tissues=["human liver"], seed=5)
        self.table, self.name = self.source.table, "synthetic"

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        sample = self.source[index]
        return Sample(np.ascontiguousarray(255 - (255 - sample.image[..., ::-1]) // 3), *_rest(sample))


def _rest(sample):
    return sample.labels, sample.tissue, sample.stem


def corrected(path, truth, half=None):
    """As in QuPath: false nuclei deleted, missed ones drawn; what is right stays. ``half``: a part is not annotated."""
    features = json.loads(path.read_text())["features"]
    found = read_geojson(path, truth.shape)
    kept = []
    for number in range(1, found.max() + 1):
        inside = truth[found == number]
        other = np.bincount(inside, minlength=1).argmax()
        union = ((found == number) | (truth == other)).sum()
        if other and (inside == other).sum() / union > 0.7:
            kept.append(number)
    covered = {int(np.bincount(truth[found == number]).argmax()) for number in kept}
    features = [features[number - 1] for number in kept]
    for number, polygons in nuclei_rings(truth):
        if number not in covered:
            features.append(feature("drawn by hand", number, polygons, {}))
    if half is not None:
        ring = [[0, 0], [half, 0], [half, truth.shape[0]], [0, truth.shape[0]], [0, 0]]
        area = {"type": "Polygon", "coordinates": [ring]}
        about = {"objectType": "annotation", "classification": {"name": "Ignore*"}}
        features = [f for f in features if np.concatenate(_points(f))[:, 0].mean() >= half]
        features.append({"type": "Feature", "geometry": area, "properties": about})
    return {"type": "FeatureCollection", "features": features}


def _points(one):
    parts = one["geometry"]["coordinates"]
    parts = [parts] if one["geometry"]["type"] == "Polygon" else parts
    return [np.array(ring) for polygon in parts for ring in polygon]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Three images, predicted and corrected; of the first, the left half was not annotated."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    samples = list(map(Held(3).__getitem__, range(3)))
    for number, sample in enumerate(samples):
        Image.fromarray(sample.image).save(folder / "images" / f"{number}.png")
    words = ["predict", str(folder / "images"), "--out", str(folder / "out"), "--device", "cpu"]
    assert main([*words, "--outputs", "labels,geojson"]) == 0
    for number, sample in enumerate(samples):
        value = corrected(folder / "out" / f"{number}.geojson", sample.labels, SIDE // 2 if number == 0 else None)
        (folder / "masks" / f"{number}.geojson").write_text(json.dumps(value))
    return folder


def test_corrections_are_what_was_drawn(own):
    dataset = open_own(own)
    truth = [Held(3)[i].labels for i in range(3)]
    for sample, labels in zip(map(dataset.__getitem__, (1, 2)), truth[1:], strict=True):
        both = ((sample.labels > 0) & (labels > 0)).sum() / ((sample.labels > 0) | (labels > 0)).sum()
        assert both > 0.85 and sample.vague is None
    assert dataset[0].vague[:, : SIDE // 2].all() and not dataset[0].vague[:, SIDE // 2 :].any()
    assert not dataset[0].labels[:, : SIDE // 4].any()


def test_what_is_not_annotated_has_no_gradient(own):
    """The training targets of an image and of one whose ignored half is full of other nuclei give the same loss."""
    dataset = open_own(own)
    config = finetune_config(dataset, "nuinsseg-1", augmentation="histology", crop=128)
    images = loop._TrainingImages(dataset, config)
    _, targets = images[0, 0]
    logits = torch.randn(1, 2, 128, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(loop._loss(logits, targets[None], config), logits)
    ignored = (targets[None, 2:] == 0).expand_as(gradient)
    assert 0.2 < ignored.float().mean() < 0.9
    assert (gradient[ignored] == 0).all() and (gradient[~ignored] != 0).float().mean() > 0.99


def test_finetuning_on_corrections_raises_pq_on_other_images(own, tmp_path, capsys):
    words = ["finetune", str(own), "--out", str(tmp_path / "run"), "--device", "cpu", "--epochs", "12"]
    assert main([*words, "--batch-size", "2", "--lr", "0.001", "--precision", "float32"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split() == ["image", "nuclei", "median", "diameter", "ignored"]
    assert lines[1].split()[0] == "0" and lines[1].split()[-1] == "50%" and len(lines[2].split()) == 4
    assert "more for 12 epochs at most; --epochs" in said.out + said.err
    others = Held(6)
    before, after = (
        evaluate(load(adapter, device="cpu"), others, range(3, 6), progress=False)["pq"].mean()
        for adapter in ("nuinsseg-1", tmp_path / "run" / "best.safetensors")
    )
    assert after > before + 0.05
