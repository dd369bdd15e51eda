import numpy as np
import pandas as pd
import pytest
from blobs import Blobs

from experiments import gains
from nucseg.config import Config
from nucseg.training.loop import train

CONFIG = Config(
    base="random",
    size=64,
    head="instance",
    lora_target="none",
    batch_size=4,
    epochs=1,
    lr=3e-3,
    device="cpu",
    tune_decoding=True,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "fold_1"
    return folder, train(CONFIG, Blobs(), folder, progress=False)


def test_the_adapters_own_decoding_gives_the_runs_scores(run, monkeypatch):
    monkeypatch.setattr(gains, "Segmenter", WholeViews)
    folder, scores = run
    found, _ = gains.measure(folder, Blobs(), 0)
    ways = dict(list(found.groupby("way")))
    assert set(ways) == {"default", "tuned", "tuned with confidence", gains.MIRRORED, gains.TUNED_AGAIN}
    for key in ("dice", "aji", "pq"):
        np.testing.assert_allclose(ways["tuned with confidence"][key], scores[key], atol=1e-6)
    assert all(len(part) == len(scores) for part in ways.values())


def test_a_measured_run_is_read_again_and_another_adapter_is_not(run, monkeypatch, tmp_path):
    calls = []
    table = pd.DataFrame({"run": ["fold_1"], "way": ["default"], "pq": [0.5]})
    objects = pd.DataFrame({"run": ["fold_1"] * 2, "probability": [0.1, 0.9], "true": [False, True]})
    monkeypatch.setattr(gains, "measure", lambda *args: calls.append(args) or (table, objects))
    folder, _ = run
    first = gains.measured(folder, Blobs(), 0, tmp_path)
    again = gains.measured(folder, Blobs(), 0, tmp_path)
    assert len(calls) == 1
    for a, b in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(a.reset_index(drop=True), b, check_dtype=False)
    monkeypatch.setattr(gains, "sha256", lambda path: "another")
    gains.measured(folder, Blobs(), 0, tmp_path)
    assert len(calls) == 2


class WholeViews:
    """As `Segmenter` with ``tta``, for images smaller than its fields."""

    def __init__(self, models, tta):
        assert tta

    def maps(self, images, model):
        from nucseg.model.network import predict

        return [np.mean([predict(model, i), predict(model, i[:, ::-1].copy())[:, :, ::-1]], axis=0) for i in images]
