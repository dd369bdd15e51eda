from types import SimpleNamespace

import numpy as np
import pytest
from blobs import Blobs
from torch import nn

from nucseg.data.datasets import Sample
from nucseg.errors import InputError
from nucseg.inference import evaluate as evaluation
from nucseg.inference.decoding import Decoding
from nucseg.inference.evaluate import decoding_of, evaluate, score_sample, segment_whole


class Model(nn.Module):
    """Replaces a network: the test decides what `predict` returns."""

    config = SimpleNamespace(size=32, head="linear", nucleus_scale=1)


@pytest.fixture
def sample(monkeypatch) -> Sample:
    """One nucleus of 10 x 10 px, predicted exactly, and beside it a spurious speck of 3 x 3 px."""
    labels = np.zeros((64, 64), np.int32)
    labels[10:20, 10:20] = 1
    seen = labels.astype(np.float32)
    seen[40:43, 40:43] = 0.9

    def predict(model, image):
        step = 64 // image.shape[0]
        return seen[None, ::step, ::step]

    monkeypatch.setattr(evaluation, "predict", predict)
    return Sample(np.zeros((64, 64, 3), np.uint8), labels, "liver", "one")


def test_the_benchmark_drops_specks_and_the_report_keeps_them(sample):
    benchmark = score_sample(Model(), sample, "benchmark")
    assert benchmark["nuclei_predicted"] == 1 and benchmark["pq"] == benchmark["aji"] == 1
    report = score_sample(Model(), sample, "report")  # at the encoder's 32 px: 25 px and 1 or 4 px
    assert report["nuclei_predicted"] == 2
    assert report["pq"] == pytest.approx(1 / 1.5)
    # spurious objects count in the report's AJI, missed nuclei do not: that is tested with the metric
    assert report["aji_matched_only"] < 1


def test_the_threshold_is_a_probability(sample):
    assert segment_whole(Model(), sample.image, threshold=0.95, min_area=0).max() == 1
    assert segment_whole(Model(), sample.image, threshold=0.5, min_area=0).max() == 2


def test_rows_are_images_and_the_model_is_left_in_its_mode(sample):
    model = Model().train()
    table = evaluate(model, Blobs(4), [3, 1], fold="fold 2", progress=False)
    assert list(table["stem"]) == [Blobs(4)[3].stem, Blobs(4)[1].stem]
    assert set(table["fold"]) == {"fold 2"}
    assert model.training
    assert evaluate(model.eval(), Blobs(4), [0], progress=False) is not None and not model.training


def test_an_unknown_scoring_is_named(sample):
    with pytest.raises(InputError, match="kind"):
        score_sample(Model(), sample, "kind")


def test_small_objects_are_those_small_beside_the_nuclei(sample):
    model = Model()
    assert segment_whole(model, sample.image).max() == 1  # 100 px stay, 9 go
    model.config = SimpleNamespace(size=32, head="linear", nucleus_scale=0.4)  # 8 px are a twelfth of a nucleus
    assert segment_whole(model, sample.image).max() == 2


def test_another_way_to_segment_is_scored_as_it_is(sample):
    data = Blobs(3)
    table = evaluate(Model(), data, [2, 0], segment=lambda i: data[i].labels, progress=False)
    assert table["pq"].tolist() == [1, 1]


def test_a_tuned_adapter_is_decoded_as_it_was_tuned_unless_a_threshold_is_given(sample):
    model = Model()
    model.decoding = Decoding(threshold=0.95, min_area=4.0).to_dict()
    assert segment_whole(model, sample.image).max() == 1
    assert segment_whole(model, sample.image, threshold=0.5).max() == 2  # 9 px are enough for its least area
    assert segment_whole(model, sample.image, threshold=0.5, min_area=10).max() == 1
    assert score_sample(model, sample, "benchmark", threshold=None)["nuclei_predicted"] == 1
    assert score_sample(model, sample, "benchmark", threshold=0.5)["nuclei_predicted"] == 1  # the benchmark's 50 px
    model.decoding = Decoding(min_area=200.0).to_dict()
    assert score_sample(model, sample, "benchmark", threshold=None)["nuclei_predicted"] == 0
    assert score_sample(model, sample, "report", threshold=None)["nuclei_predicted"] == 2  # every component counts
    assert decoding_of(Model()) == Decoding()
