import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from blobs import SMALL, Blobs
from PIL import Image

from nucseg.config import PRESETS, Config, preset
from nucseg.data.datasets import ImageFolder, InMemory
from nucseg.data.from_config import select_split
from nucseg.errors import InputError, TrainingError
from nucseg.inference.evaluate import evaluate
from nucseg.model.adapters import read_adapter
from nucseg.model.bases import random_base
from nucseg.model.network import build_model, load_model, place
from nucseg.records.provenance import command_line
from nucseg.training import checkpoint, loop
from nucseg.training.loop import batch_keys, learning_rate, train


def small(**changes) -> Config:
    return dataclasses.replace(SMALL, **changes)


def run(config: Config, folder: Path) -> pd.DataFrame:
    return train(config, Blobs(), folder, progress=False)


def history(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv").drop(columns="seconds")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An unbroken run of three epochs."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(SMALL, folder)
    return folder


def test_a_run_leaves_what_the_design_says(whole):
    about = json.loads((whole / "run.json").read_text())
    assert about["config"]["rank"] == 2
    assert about["base"]["name"] == "random"
    assert len(about["base"]["sha256"]) == len(about["split"]["sha256"]) == len(about["adapter_sha256"]) == 64
    assert about["split"]["train"] + about["split"]["val"] + about["split"]["test"] == 12
    assert about["versions"]["torch"] == torch.__version__
    assert about["seconds"] > 0 and about["peak_memory_mib"] > 0
    scores = pd.read_csv(whole / "scores.csv")
    assert len(scores) == about["split"]["test"]
    columns = "fold tissue stem dice iou aji aji_plus pq sq rq nuclei_true nuclei_predicted"
    assert set(columns.split()) <= set(scores)
    assert list(history(whole)["epoch"]) == [1, 2, 3]
    assert str(whole.parent) not in (whole / "run.json").read_text()  # no path of this machine


def test_training_learns(tmp_path):
    config = small(size=128, epochs=15, lr=5e-3, lora_target="all", rank=8, alpha=8, dropout=0.0, augmentation="none")
    scores = train(config, Blobs(16, 128), tmp_path, progress=False)
    losses = pd.read_csv(tmp_path / "history.csv")["train_loss"]
    assert losses.iloc[-1] < 0.5 * losses.iloc[0]
    assert scores["dice"].mean() > 0.6


def test_the_same_seed_gives_the_same_run_and_another_does_not(whole, tmp_path):
    again = run(SMALL, tmp_path / "again")
    pd.testing.assert_frame_equal(history(tmp_path / "again"), history(whole))
    stored = pd.read_csv(whole / "scores.csv")
    np.testing.assert_allclose(again["dice"], stored["dice"], atol=1e-6)
    run(small(seed=1, epochs=1), tmp_path / "other")
    assert history(tmp_path / "other")["train_loss"][0] != history(whole)["train_loss"][0]


def test_a_finished_run_is_not_repeated(whole):
    before = (whole / "run.json").stat().st_mtime_ns
    scores = run(SMALL, whole)
    assert len(scores) == 2 or len(scores) == 3
    assert (whole / "run.json").stat().st_mtime_ns == before


def test_another_config_in_the_same_folder_is_refused(whole):
    with pytest.raises(InputError, match="holds a run with lr"):
        run(small(lr=1e-4), whole)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_run_killed_in_mid_epoch_resumes_to_the_same_numbers(whole, tmp_path):
    folder = tmp_path / "killed"
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "import conftest  # as many threads as here: sums in another order differ in the last digit\n"
        "from blobs import SMALL, Blobs\n"
        "from nucseg.training.loop import train\n"
        "class Slow(Blobs):\n"
        "    def __getitem__(self, index):\n"
        "        time.sleep(0.05); return super().__getitem__(index)\n"
        "train(SMALL, Slow(), sys.argv[1], progress=False)\n"
    )
    command = [sys.executable, "-c", script, str(folder), str(Path(__file__).parents[1])]
    child = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not (folder / "history.csv").exists():  # the first epoch is whole
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)  # the second loads 8 images, 0.05 s each, and has begun
    assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (folder / "run.json").exists()
    epochs = len(history(folder))
    assert 1 <= epochs < 3

    run(SMALL, folder)
    pd.testing.assert_frame_equal(history(folder), history(whole), check_exact=True)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "scores.csv"), pd.read_csv(whole / "scores.csv"))
    (mine, *_), (theirs, *_) = (read_adapter(path / "best.safetensors") for path in (folder, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_another_base_or_other_images_do_not_resume_a_run(tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_write_history", stop)  # last.pt is written, the first epoch over
        with pytest.raises(KeyboardInterrupt):
            run(SMALL, tmp_path)
    with pytest.raises(InputError, match="another split"):
        train(SMALL, Blobs(13), tmp_path, progress=False)
    with monkeypatch.context() as patch:
        other = dataclasses.replace(random_base(0), sha256="1" * 64)
        patch.setattr("nucseg.model.network.load_base", lambda *arguments: other)
        with pytest.raises(InputError, match="another base"):
            run(SMALL, tmp_path)
    run(SMALL, tmp_path)
    assert len(history(tmp_path)) == 3


def test_a_run_killed_between_checkpoint_and_history_has_a_whole_history(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "history.csv").unlink()
    run(SMALL, tmp_path / "run")
    pd.testing.assert_frame_equal(history(tmp_path / "run"), history(whole), check_exact=True)


def test_a_run_from_before_an_option_existed_is_still_the_same_run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    del about["config"]["distance_weight"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    assert checkpoint.finished(SMALL, tmp_path / "run")
    with pytest.raises(InputError, match="distance_weight"):
        checkpoint.finished(small(distance_weight=2.0), tmp_path / "run")


def test_a_non_finite_gradient_never_reaches_the_weights(monkeypatch):
    model = build_model(SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *arguments: torch.tensor(float("inf")))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.raises(TrainingError, match="gradient is inf"):
        loop.train_epoch(model, optimiser, Blobs(), (0, 1), SMALL, 0, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"last\.pt.*damaged"):
        run(SMALL, tmp_path)


def test_a_non_finite_loss_stops_with_a_clear_message(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "dice_focal_loss", lambda *a: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(TrainingError, match=r"nan in epoch 1, step 1.*lower lr"):
        run(SMALL, tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_early_stopping_keeps_the_best_epoch(tmp_path, monkeypatch):
    values = iter([0.2, 0.5, 0.4, 0.3, 0.1, 0.9, 0.9, 0.9])

    def fake(model, dataset, indices, **options):
        return pd.DataFrame({name: [next(values)] for name in ("dice",)} | {"iou": [0], "aji": [0], "pq": [0]})

    monkeypatch.setattr(loop, "evaluate", fake)
    run(small(epochs=8, patience=3), tmp_path)
    assert list(history(tmp_path)["val_dice"]) == [0.2, 0.5, 0.4, 0.3, 0.1]  # three without a better one, then stop


def test_learning_rate_restarts_warmly():
    config = small(lr=1.0, min_lr=0.1, cycles=2)
    assert learning_rate(config, 0.0) == 1.0
    assert math.isclose(learning_rate(config, 0.25), 0.55)
    assert learning_rate(config, 0.4999) < 0.101
    assert learning_rate(config, 0.5) == 1.0
    one = small(lr=1.0, min_lr=0.0)
    assert [learning_rate(one, t / 10) for t in range(11)][:10] == sorted(
        (learning_rate(one, t / 10) for t in range(10)), reverse=True
    )


def test_every_image_once_an_epoch_in_another_order():
    indices = tuple(range(10, 21))
    first, second = (batch_keys(SMALL, indices, epoch) for epoch in (0, 1))
    assert sorted(i for batch in first for _, i in batch) == list(indices)
    assert [len(batch) for batch in first] == [4, 4, 3]
    assert [i for b in first for _, i in b] != [i for b in second for _, i in b]


def test_budget_cuts_training_and_validation_but_never_the_test_part():
    full = select_split(SMALL, Blobs(40))
    cut = select_split(small(train_images=5, val_images=2), Blobs(40))
    assert (len(cut.train), len(cut.val), cut.test) == (5, 2, full.test)
    assert set(cut.train) < set(full.train) and set(cut.val) < set(full.val)
    with pytest.raises(InputError, match="Fold 7"):
        select_split(small(fold=7), Blobs(40))


def test_base_and_running_statistics_stay_bit_identical_through_a_whole_run(whole):
    """The best adapter only holds LoRA and head, so check the live model for changes of the base too."""
    tensors, _, _ = read_adapter(whole / "best.safetensors")
    assert all("lora_" in name or name.startswith("head.") for name in tensors)
    torch.manual_seed(0)
    model = build_model(SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loop.train_epoch(model, optimiser, Blobs(), tuple(range(8)), SMALL, 0, progress=False)
    for name, tensor in model.state_dict().items():
        if "lora_" not in name and not name.startswith("head."):
            assert torch.equal(tensor, before[name]), name


def test_loading_in_other_processes_changes_nothing():
    losses = []
    for workers in (0, 2):
        config = small(num_workers=workers)
        torch.manual_seed(0)
        model = build_model(config)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append(loop.train_epoch(model, optimiser, Blobs(), tuple(range(8)), config, 0, progress=False))
    assert losses[0] == losses[1]


class Watched(Blobs):
    """Blobs that note which threads read them, and may fail at one image."""

    def __init__(self, broken: int = -1):
        super().__init__()
        self.broken, self.threads = broken, []

    def __getitem__(self, index):
        self.threads.append(threading.current_thread())
        if index == self.broken:
            raise InputError("damaged")
        return super().__getitem__(index)


def one_epoch(dataset, **changes) -> tuple[float, torch.nn.Module]:
    config = small(dropout=0.5, **changes)
    torch.manual_seed(0)
    model = build_model(config)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return loop.train_epoch(model, optimiser, dataset, tuple(range(12)), config, 0, progress=False), model


def test_loading_ahead_in_a_thread_changes_no_number(monkeypatch):
    dataset, before = Watched(), threading.active_count()
    loss, model = one_epoch(dataset)
    assert len(dataset.threads) == 12 and threading.main_thread() not in dataset.threads
    assert threading.active_count() == before
    monkeypatch.setattr(loop, "ahead", lambda loader: (batch for batch in loader))
    plain = Watched()
    expected, other = one_epoch(plain)
    assert set(plain.threads) == {threading.main_thread()}
    assert loss == expected  # dropout drew the same numbers, too
    for (name, tensor), (_, same) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(tensor, same), name


def test_batches_loaded_ahead_come_whole_and_in_order():
    images = [(torch.tensor([i]), torch.tensor([-i])) for i in range(7)]
    loaded = list(loop._load(images, [[3, 1], [0, 6], [5]], 0, False))
    assert [batch[0].ravel().tolist() for batch in loaded] == [[3, 1], [0, 6], [5]]
    assert [batch[1].ravel().tolist() for batch in loaded] == [[-3, -1], [0, -6], [-5]]


def test_an_error_ends_the_epoch_and_its_thread(monkeypatch):
    before = threading.active_count()
    with pytest.raises(InputError, match="damaged"):
        one_epoch(Watched(broken=7))
    assert threading.active_count() == before
    monkeypatch.setattr(loop, "_loss", lambda logits, *others: logits.mean() * torch.nan)
    with pytest.raises(TrainingError, match="nan"):  # with batches still waiting
        one_epoch(Watched(), batch_size=1)
    assert threading.active_count() == before


def test_the_report_preset_is_the_reports_configuration():
    config = preset("report")
    assert (config.size, config.rank, config.alpha, config.dropout) == (1024, 8, 8.0, 0.1)
    assert (config.lr, config.batch_size, config.epochs, config.patience) == (3e-4, 4, 50, 15)
    assert (config.head, config.lora_target, config.unused_head) == ("linear", "all", True)
    assert (config.dice_weight, config.focal_alpha, config.focal_gamma) == (0.5, 0.25, 2.0)
    assert (config.protocol, config.scoring) == ("benchmark", "benchmark")
    protocol = preset("report-protocol")
    assert dataclasses.replace(protocol, protocol="benchmark", scoring="benchmark") == config
    for name in PRESETS:
        preset(name).check()


def test_the_command_of_a_run_repeats_its_config(tmp_path):
    from nucseg.cli import _parser

    config = small(unused_head=True, data_note="a note of two words")
    words = shlex.split(command_line(config, tmp_path / "results" / "study" / "run"))
    assert words[:4] == ["nucseg", "train", "--out", "results/study/run"]
    arguments = _parser().parse_args(words[1:])
    given = {n: getattr(arguments, n) for n in dataclasses.asdict(config) if getattr(arguments, n) is not None}
    assert dataclasses.replace(Config(), **given) == config


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"epochs": 0}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"fold": -1}, "fold"),
        ({"seed": -1}, "seed"),
        ({"head": "mask_decoder", "lora_target": "none"}, "nothing to train"),
        ({"threshold": 2.0}, "threshold"),
        ({"data": "camelyon"}, "camelyon"),
        ({"protocol": "mine"}, "mine"),
        ({"monitor": "loss"}, "loss"),
        ({"rank": 0}, "rank 0"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_bad_options_are_one_sentence(changes, word, tmp_path):
    with pytest.raises(InputError, match=word) as error:
        run(small(**changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_budget_of_test_images_is_a_seeded_part_of_the_fold():
    blobs = Blobs(40)
    whole, some = select_split(small(), blobs), select_split(small(test_images=3), blobs)
    assert len(some.test) == 3 < len(whole.test)
    assert set(some.test) < set(whole.test) and some.train == whole.train and some.val == whole.val
    assert some == select_split(small(test_images=3), blobs)


def test_a_finished_run_is_not_given_back_for_other_images_or_masks(tmp_path):
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for i, sample in enumerate(Blobs(10, 64)[k] for k in range(10)):
        Image.fromarray(sample.image).save(tmp_path / f"images/{i}.png")
        tifffile.imwrite(tmp_path / f"masks/{i}.tif", sample.labels.astype(np.uint16))
    config = small(epochs=1, protocol="own")

    def own() -> InMemory:
        return InMemory(ImageFolder(tmp_path / "images", tmp_path / "masks"))

    scores = train(config, own(), tmp_path / "run", progress=False)
    pd.testing.assert_frame_equal(train(config, own(), tmp_path / "run", progress=False), scores, rtol=1e-4)
    last = (tmp_path / "masks/9.tif").read_bytes()
    tifffile.imwrite(tmp_path / "masks/9.tif", np.eye(64, dtype=np.uint16))
    with pytest.raises(InputError, match="another content of images or masks"):
        train(config, own(), tmp_path / "run", progress=False)
    (tmp_path / "masks/9.tif").write_bytes(last)
    train(config, own(), tmp_path / "run", progress=False)
    for part, end in (("images", "png"), ("masks", "tif")):
        (tmp_path / part / f"9.{end}").unlink()
    with pytest.raises(InputError, match="another list of images"):
        train(config, own(), tmp_path / "run", progress=False)


def test_float16_trains_as_float32_does_and_leaves_out_overflowing_steps(monkeypatch):
    losses = {}
    for precision in ("float32", "float16"):
        torch.manual_seed(0)
        model = place(build_model(small(head="instance")), torch.device("cpu"), precision)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=precision == "float16")
        losses[precision] = [
            loop.train_epoch(model, optimiser, Blobs(), tuple(range(8)), small(head="instance"), e, False, None, scaler)
            for e in range(3)
        ]
    assert losses["float16"][-1] < losses["float16"][0]
    np.testing.assert_allclose(losses["float16"], losses["float32"], rtol=0.02)

    model = place(build_model(SMALL), torch.device("cpu"), "float16")
    before = {name: t.clone() for name, t in model.adapter_state().items()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # the first gradient overflows
    loop.train_epoch(model, optimiser, Blobs(), (0, 1), SMALL, 0, False, None, scaler)
    assert scaler.get_scale() == 2.0**59
    assert all(torch.equal(t, before[name]) for name, t in model.adapter_state().items())
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *arguments: torch.tensor(float("inf")))
    with pytest.raises(TrainingError, match="gradient is inf"):
        loop.train_epoch(model, optimiser, Blobs(), (0, 1), SMALL, 0, False, None, scaler)


def test_a_study_can_be_scored_on_the_validation_part_alone():
    blobs = Blobs(40)
    full, val = select_split(small(), blobs), select_split(small(score_part="val", val_images=2), blobs)
    assert val.test == full.val and len(val.val) == 2 and set(val.val) < set(val.test)
    assert val.train == full.train and not set(val.test) & set(full.test)


def test_weighted_pixels_reach_the_loss():
    config = small(head="instance", border_weight=1.0, valley_weight=2.0, augmentation="strong")
    image, targets = loop._TrainingImages(Blobs(), config)[0, 0]
    assert image.shape == (3, 64, 64) and targets.shape == (3, 64, 64)
    assert targets[2].min() == 1 and targets[2].max() > 1
    logits = torch.zeros(1, 2, 64, 64)
    plain = loop._loss(logits, targets[None, :2], config)
    assert loop._loss(logits, targets[None], config) != plain
    assert torch.isclose(loop._loss(logits, torch.cat([targets[None, :2], torch.ones(1, 1, 64, 64)], 1), config), plain)


def test_the_decoding_is_tuned_on_validation_images_and_kept_in_the_adapter(tmp_path, monkeypatch):
    from nucseg.inference.decoding import Decoding

    seen = []

    def fake(maps, truths, scale):
        seen.append((len(maps), [truth.sum() for truth in truths], scale))
        return Decoding(threshold=0.9, min_area=75.0), {"score_start": 0.25}

    monkeypatch.setattr(loop, "tune", fake)
    config = small(head="instance", epochs=1, tune_decoding=True, val_images=1)
    scores = train(config, Blobs(20), tmp_path / "run", progress=False)
    split = select_split(small(), Blobs(20))  # with all validation images
    assert len(split.val) > 1
    assert seen == [(len(split.val), [Blobs(20)[i].labels.sum() for i in split.val], 1.0)]
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["decoding"]["threshold"] == 0.9 and about["decoding"]["score_start"] == 0.25
    model = load_model(tmp_path / "run" / "best.safetensors")
    assert model.decoding["min_area"] == 75
    again = evaluate(model, Blobs(20), split.test, fold=split.name, threshold=None, progress=False)
    pd.testing.assert_frame_equal(again, scores, atol=1e-3)
    with pytest.raises(InputError, match="tune_decoding"):
        small(tune_decoding=True).check()
