"""The command line as a user meets it: exit codes, one sentence, nothing half-written."""

import ctypes
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import tifffile
from blobs import Blobs
from PIL import Image

from nucseg.cli import main
from nucseg.config import Config, apply, options, read_toml
from nucseg.errors import InputError

QUICK = ["--base", "random", "--size", "64", "--rank", "1", "--alpha", "1", "--lora-target", "qkv", "--epochs", "1"]
QUICK += ["--batch-size", "8", "--device", "cpu"]


@pytest.fixture
def folders(tmp_path):
    """Two images with label masks, as a user has them."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for i in range(2):
        sample = Blobs()[i]
        Image.fromarray(sample.image).save(images / f"{i}.png")
        Image.fromarray(sample.labels.astype(np.uint16)).save(masks / f"{i}.png")
    return images, masks


def sentence(capsys) -> str:
    """What went to stderr: one line, no traceback."""
    text = capsys.readouterr().err.strip()
    assert text.startswith("nucseg: ") and "\n" not in text and "Traceback" not in text
    return text


def test_train_then_evaluate(tmp_path, monkeypatch, capsys, folders):
    monkeypatch.setattr("nucseg.data.from_config.open_dataset", lambda config, root: Blobs())
    run = tmp_path / "study" / "run"
    (tmp_path / "options.toml").write_text('rank = 2\nseed = 5\nbase = "random"\n')
    words = ["train", "--out", str(run), "--config", str(tmp_path / "options.toml"), *QUICK]
    assert main(words) == 0
    assert "dice" in capsys.readouterr().out
    config = json.loads((run / "run.json").read_text())["config"]
    assert (config["rank"], config["seed"]) == (1, 5)  # an option beats the file, the file the defaults
    images, masks = folders
    out = tmp_path / "scores.csv"
    words = ["evaluate", str(run / "best.safetensors"), "--images", str(images), "--masks", str(masks)]
    assert main([*words, "--out", str(out), "--device", "cpu"]) == 0
    assert len(out.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--data", "nuinsseg", "--root", "nowhere"], "nowhere"),
        (["train", "--rank", "0"], "rank 0"),
        (["train", "--rank", "100000", "--lora-target", "all"], "rank 100000"),
        (["train", "--base", "missing.pt"], "missing.pt"),
        (["train", "--config", "missing.toml"], "missing.toml"),
        (["train", "--fold", "9", "--base", "random"], "Fold 9"),
        (["train", "--size", "100"], "100"),
        (["evaluate", "missing.safetensors", "--images", "IMAGES", "--masks", "MASKS"], "missing.safetensors"),
        (["evaluate", "x.safetensors", "--images", "nowhere", "--masks", "MASKS"], "nowhere"),
        (["fetch", "nuinsseg", "--archive", "missing.zip"], "missing.zip"),
        (["fetch", "mobile_sam", "--archive", "missing.zip"], "--archive"),
        (["cross-validate", "--fold", "1"], "--folds"),
        (["evaluate", "nuinsseg-1", "--images", "IMAGES", "--masks", "MASKS", "--out", "."], "is a folder"),
        (["evaluate", "nuinsseg-1", "--images", "IMAGES", "--masks", "MASKS", "--um-per-px", "40"], "um_per_px"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words, expected, tmp_path, monkeypatch, capsys, folders):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NUCSEG_DATA", raising=False)
    if words[0] == "train" and "nuinsseg" not in words:
        monkeypatch.setattr("nucseg.data.from_config.open_dataset", lambda config, root: Blobs())
        if "--base" not in words:
            words = [*words, "--base", "random"]
    places = {"IMAGES": str(folders[0]), "MASKS": str(folders[1])}
    words = [places.get(word, word) for word in words]
    before = sorted(tmp_path.rglob("*"))
    assert main([*words, *(["--out", "run"] if words[0] != "evaluate" else [])]) == 2
    assert expected in sentence(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_image_without_a_mask_is_named(folders, capsys, tmp_path):
    images, masks = folders
    (masks / "1.png").unlink()
    assert main(["evaluate", "x.safetensors", "--images", str(images), "--masks", str(masks)]) == 2
    assert "1.png" in sentence(capsys)


def test_a_file_where_a_folder_is_meant_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nucseg.data.from_config.open_dataset", lambda config, root: Blobs())
    (tmp_path / "taken").write_text("a file")
    assert main(["train", "--out", str(tmp_path / "taken"), *QUICK]) == 2
    assert "taken" in sentence(capsys)


def test_nuinsseg_without_its_folder_says_how_to_give_it(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NUCSEG_DATA", raising=False)
    assert main(["train", "--out", str(tmp_path / "run"), "--preset", "report"]) == 2
    assert "NUCSEG_DATA" in sentence(capsys)


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["fetch"]])
def test_help_exits_0_and_says_what_for(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert "nucseg" in capsys.readouterr().out


def test_every_option_of_a_run_has_a_flag_with_its_reason(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for name, field in options(Config).items():
        assert f"--{name.replace('_', '-')}" in text
        assert len(field.metadata["why"]) > 10


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "nucseg.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "fetch" in done.stdout
    assert done.stderr == ""  # mobile_sam's import warnings are silenced


def test_toml_errors_name_file_and_option(tmp_path):
    path = tmp_path / "run.toml"
    for text, word in [("rnak = 4", "'rank'"), ('rank = "four"', "int"), ("rank = 4.5", "int"), ("rank = [", "TOML")]:
        path.write_text(text)
        with pytest.raises(InputError, match=word) as error:
            apply(Config(), read_toml(path), str(path))
        assert "run.toml" in str(error.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="TOML"):
        read_toml(path)
    path.write_text("lr = 1\nunused_head = true")  # a whole number where a float is meant
    config = apply(Config(), read_toml(path), str(path))
    assert config.lr == 1.0 and isinstance(config.lr, float) and config.unused_head
    path.write_text("unused_head = 1")
    with pytest.raises(InputError, match="bool"):
        apply(Config(), read_toml(path), str(path))


def test_evaluate_scores_what_predict_writes(tmp_path, capsys):
    from nucseg.data.synth import generate
    from nucseg.metrics import score

    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for i in range(2):  # at half the resolution of the adapter's images
        sample = generate("human liver", i, size=256)
        Image.fromarray(sample.image[::2, ::2]).save(tmp_path / f"images/{i}.png")
        tifffile.imwrite(tmp_path / f"masks/{i}.tif", sample.labels[::2, ::2].astype(np.uint16))
    options = ["--um-per-px", "0.5", "--ridge", "0.8", "--device", "cpu"]
    where = ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    assert main(["evaluate", "nuinsseg-all", *where, *options, "--out", str(tmp_path / "scores.csv")]) == 0
    words = ["predict", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--outputs", "labels", *options]
    assert main(words) == 0
    scores = pd.read_csv(tmp_path / "scores.csv").set_index("stem")
    for i in range(2):
        truth, found = (
            tifffile.imread(path).astype(int)
            for path in (tmp_path / f"masks/{i}.tif", tmp_path / f"out/{i}.labels.tif")
        )
        assert scores.loc[i, "pq"] == pytest.approx(score(truth, found).pq, abs=1e-6)
    assert scores["pq"].mean() > 0.3


@pytest.mark.skipif(sys.platform == "win32", reason="pipes are POSIX's here")
def test_a_reader_that_has_seen_enough_is_no_fault():
    read, write = os.pipe()
    os.close(read)  # as `head` does once it has its lines
    script = (
        "import argparse, nucseg.cli as cli\n"
        "class Parser:\n"
        "    def parse_args(self, words): return argparse.Namespace(run=lambda parsed: print('a line') or 0)\n"
        "cli._parser = Parser\n"
        "raise SystemExit(cli.main([]))\n"
    )
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}  # the closed pipe is then noticed only at the last flush
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True, env=buffered, check=False
    )
    os.close(write)
    assert done.returncode == 1 and not done.stderr


# ---------------------------------------------------------------- files as people have them


def test_the_version_is_told_without_a_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.split()[0] == "nucseg"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["predict", "nothing.png", "--out", "o"], "nothing.png"),
        (["predict", "IMAGES", "--out", "o", "--outputs", "pdf"], "pdf"),
        (["predict", "IMAGES", "--out", "o", "--threshold", "2"], "threshold"),
        (["predict", "IMAGES", "--out", "o", "--um-per-px", "50"], "um_per_px"),
        (["predict", "IMAGES", "--out", "o", "--series", "-1"], "series"),
        (["predict", "IMAGES", "--out", "o", "--adapter", "nothing.safetensors"], "nothing.safetensors"),
        (["predict", "IMAGES", "--out", "IMAGES/0.png"], "is a file"),
        (["evaluate", "nothing", "--images", "IMAGES", "--masks", "nowhere"], "nowhere"),
        (["finetune", "nowhere", "--out", "o"], "nowhere"),
        (["finetune", "nowhere", "--out", "o", "--start", "nothing.safetensors"], "nothing.safetensors"),
    ],
)
def test_bad_paths_and_options_are_found_before_pytorch_is_loaded(words, expected, folders, tmp_path):
    words = [word.replace("IMAGES", str(folders[0])) for word in words]
    script = (
        "import sys\nfrom nucseg.cli import main\n"
        f"code = main({words!r})\n"
        "assert code == 2, code\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert expected in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_finished_image_costs_no_model(folders, tmp_path, capsys):
    words = ["predict", str(folders[0]), "--out", str(tmp_path / "out"), "--outputs", "csv", "--device", "cpu"]
    assert main(words) == 0
    first = capsys.readouterr().out
    script = f"import sys\nfrom nucseg.cli import main\nassert main({words!r}) == 0 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == first.split()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")])
def test_full_memory_is_one_sentence(error, folders, tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr("nucseg.training.finetune.finetune", full)
    (folders[0] / "2.png").write_bytes((folders[0] / "0.png").read_bytes())
    (folders[1] / "2.png").write_bytes((folders[1] / "0.png").read_bytes())
    assert main(["finetune", str(tmp_path), "--out", str(tmp_path / "run")]) == 1
    assert "memory is full" in sentence(capsys)


def test_evaluate_offers_a_pixel_size_where_files_say_none(folders, capsys):
    words = ["evaluate", "nuinsseg-1", "--images", str(folders[0]), "--masks", str(folders[1]), "--device", "cpu"]
    assert main(words) == 0
    assert capsys.readouterr().err.count("pixel size of some images is not known") == 1
    assert main([*words, "--um-per-px", "0.25"]) == 0
    assert "nucseg:" not in capsys.readouterr().err


def test_binary_masks_are_refused_unless_their_components_are_asked_for(folders, capsys):
    for path in folders[1].iterdir():
        labels = np.zeros((64, 64), np.uint8)
        labels[5:15, 5:15] = labels[30:42, 30:44] = 255
        Image.fromarray(labels).save(path)
    words = ["evaluate", "nuinsseg-1", "--images", str(folders[0]), "--masks", str(folders[1]), "--device", "cpu"]
    assert main([*words, "--um-per-px", "0.25"]) == 2
    assert "binary" in capsys.readouterr().err
    assert main([*words, "--um-per-px", "0.25", "--instances", "components"]) == 0


def test_an_ignored_area_counts_neither_for_nor_against(monkeypatch):
    """What is found in it changes no score."""
    from nucseg.inference import evaluate

    sample = Blobs()[0]
    vague = np.zeros(sample.labels.shape, bool)
    vague[:, :32] = True
    drawn = dataclasses.replace(sample, labels=np.where(vague, 0, sample.labels), vague=vague)
    monkeypatch.setattr(evaluate, "segment_whole", lambda *arguments, **options: sample.labels)
    with_it, without = (evaluate.score_sample(None, drawn, leave_out_vague=left_out) for left_out in (False, True))
    assert with_it["dice"] < 0.9 and with_it["nuclei_predicted"] == sample.labels.max()
    assert without["pq"] == without["dice"] == 1


def test_a_toml_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbflr = 1e-3\n")
    assert read_toml(tmp_path / "a.toml") == {"lr": 1e-3}


AGAIN = """
import resource, sys, threading
from nucseg.cli import main

def allocate():
    for _ in range(10):
        bytearray(b"x") * 50_000_000  # 12,000 pages of 4 KiB, written and freed

if sys.argv[1] == "kept":
    main(["rescore", "--out", "no/run"])  # ends at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=allocate)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc can be told to keep memory"
)
def test_commands_reuse_freed_memory_in_threads_too():
    def faults(way: str) -> int:
        ended = subprocess.run([sys.executable, "-c", AGAIN, way], capture_output=True, text=True, check=True)
        return int(ended.stdout.split()[-1])

    assert faults("kept") < 20_000 < 100_000 < faults("returned")
