"""Studies in several processes, on this machine and on a real Slurm: the same scores, and nothing lost by a kill."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nucseg.cli import main
from nucseg.data.synth import generate
from nucseg.errors import InputError
from nucseg.inference.folder import Job, Plan, share_of
from nucseg.studies import launch
from nucseg.studies.launch import Item, minutes, runs, slurm_options, without_launching

STUDY = """
[fixed]
base = "random"
head = "instance"
size = 64
crop = 64
rank = 1
augmentation = "none"
synthetic_per_tissue = 1
train_images = 2
val_images = 1
test_images = 1
epochs = 2
batch_size = 2
device = "cpu"
precision = "float32"

[grid]
lr = [1e-3, 1e-2]
"""
NAMES = ("lr_0.001", "lr_0.01")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study's file, and its scores from one process."""
    folder = tmp_path_factory.mktemp("study")
    path = folder / "tiny.toml"
    path.write_text(STUDY)
    assert main(["search", str(path), "--out", str(folder / "here")]) == 0
    return path, scores(folder / "here")


FOLDS = ("fold_1", "fold_2")


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """A cross-validation's options in a file, with a [slurm] table, and its scores from one process."""
    folder = tmp_path_factory.mktemp("folds")
    text = STUDY.replace("[fixed]", "").split("[grid]")[0]
    path = folder / "tiny.toml"
    path.write_text(text + "\n[slurm]\ntime = '0:30:00'\ncpus = 1\n")
    words = ["cross-validate", "--config", str(path), "--folds", "1,2", "--out"]
    assert main([*words, str(folder / "here")]) == 0
    return words, scores(folder / "here", FOLDS)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three small images in folders, and a damaged one; and the files that one process makes of the good ones."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "images" / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "deep/c.png")):
        Image.fromarray(generate("human liver", number, size=96).image).save(folder / "images" / name)
    words = ["predict", str(folder / "images"), "--recursive", "--outputs", "labels,csv", "--device", "cpu", "--out"]
    assert main([*words, str(folder / "here")]) == 0
    (folder / "images" / "d.png").write_bytes(b"no image")
    return words, results(folder / "here")


def results(out: Path) -> dict[str, bytes]:
    found = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.suffix in (".tif", ".csv")}
    return {name: path.read_bytes() for name, path in found.items() if name != "summary.csv"}


def scores(out: Path, names=NAMES) -> list[pd.DataFrame]:
    return [pd.read_csv(out / name / "scores.csv") for name in names]


def assert_same(out: Path, expected: list[pd.DataFrame], names=NAMES) -> None:
    for ours, theirs in zip(scores(out, names), expected, strict=True):
        pd.testing.assert_frame_equal(ours, theirs, atol=1e-4)  # sums depend on the number of threads


# ---------------------------------------------------------------- words, states


def test_the_workers_get_the_command_without_where_it_runs():
    words = [
        "search",
        "s.toml",
        "--jobs",
        "3",
        "--on=slurm",
        "--slurm",
        "partition=a",
        "--out",
        "o",
        "--slurm=mem_gb=4",
    ]
    assert without_launching(words) == ["search", "s.toml", "--out", "o"]


def test_options_of_the_jobs(tmp_path):
    assert slurm_options(["partition=gpu", "mem_gb=8"]) == {"slurm_partition": "gpu", "mem_gb": 8}
    path = tmp_path / "cluster.toml"
    path.write_text("[slurm]\npartition = 'a100'\ngpus = 2\ntime = '1-0'\nsetup = ['module load cuda']\n")
    found = slurm_options([str(path), "partition=h100"], {"gpus": 1, "memory": "8G"})  # the later word wins
    assert found == {
        "gpus_per_node": 2,
        "slurm_mem": "8G",
        "slurm_partition": "h100",
        "timeout_min": 1440,
        "slurm_setup": ["module load cuda"],
    }
    for wrong in ("partition", "=gpu", "partition="):
        with pytest.raises(InputError, match="KEY=VALUE"):
            slurm_options([wrong])
    path.write_text("partition = 'gpu'")
    with pytest.raises(InputError, match=r"\[slurm\]"):
        slurm_options([str(path)])


def test_time_limits_are_read_as_slurm_writes_them():
    expected = {"90": 90, "1:30:00": 90, "1-12": 2160, "1-12:30": 2190, "0:00:01": 1, "10:30": 11}
    assert {word: minutes(word) for word in expected} == expected
    with pytest.raises(InputError, match="time limit"):
        minutes("4h")


def test_the_state_of_a_run(tmp_path):
    [item] = runs([tmp_path], "tissues")
    assert item.name == f"tissues/{tmp_path.name}"
    assert item.state() == "waiting"
    (tmp_path / "history.csv").write_text("epoch,lr\n1,0.1\n2,0.1\n")
    assert item.state() == "epoch 2"
    item.log.write_text("Traceback\nValueError: no\n")
    assert (item.state(), item.reason()) == ("failed", "ValueError: no")
    assert item.state(since=time.time() + 60) == "epoch 2"  # of an earlier try
    item.log.unlink()
    (tmp_path / "run.json").write_text("{}")
    assert item.state() == "finished"


def test_the_state_of_an_image(tmp_path):
    files = (tmp_path / "a.json", tmp_path / "a.labels.tif")
    item = Item("a.png", files, tmp_path / ".a.part", tmp_path / "a.png.log")
    item.folder.mkdir()
    assert item.state() == "waiting"
    (item.folder / "state.json").write_text(json.dumps({"rows": 3}))
    assert item.state() == "row 3"
    files[0].write_text("{}")
    assert item.state() == "row 3"  # an output is missing
    files[1].write_bytes(b"")
    assert item.state() == "finished"


def test_a_share_is_worked_on_first_and_then_what_the_others_left(tmp_path):
    plans = [Plan(Job(Path(f"{name}.png")), None, ("csv",), ()) for name in "abcdefg"]
    (tmp_path / "e.json").write_text("{}")  # finished by the first process
    (tmp_path / "c.png.log").write_text("damaged")  # the first process failed at it

    def names(k, n):
        return "".join(plan.job.path.stem for plan in share_of(plans, tmp_path, (k, n), tmp_path))

    assert names(2, 2) == "bdf" + "ga"
    assert names(1, 1) == "abcdefg"
    assert "".join(sorted(names(1, 3))) == "abdfg"
    assert names(1, 3)[:3] == "adg"


def test_the_live_table_shows_what_happens_and_fits_a_terminal(tmp_path, monkeypatch, capsys):
    items = [
        dataclasses.replace(item, name=f"run {n}")
        for n, item in enumerate(runs([tmp_path / str(n) for n in range(100)]))
    ]
    for number in (3, 50):
        items[number].folder.mkdir()
        (items[number].folder / "history.csv").write_text("epoch\n1\n")
    items[7].folder.mkdir()
    items[7].log.write_text("ValueError: no")
    watch = launch._Watch(items, 0.0)
    watch.show("; jobs: 2 running")
    lines = capsys.readouterr().out.splitlines()  # not a terminal: what began or ended
    assert lines == ["run 3   epoch 1", "run 7   failed", "run 50  epoch 1"]
    monkeypatch.setattr(sys, "stdout", terminal := io.StringIO())
    terminal.isatty = lambda: True
    watch.show("; jobs: 2 running")
    (items[50].folder / "run.json").write_text("{}")
    watch.show(last=True)
    first, second = terminal.getvalue().split("\x1b[4F\x1b[J")  # four lines back, and redrawn
    assert first.splitlines() == [
        "run 3   epoch 1",
        "run 50  epoch 1",
        "run 7   failed",
        "0 of 100 finished, 1 failed; jobs: 2 running",
    ]
    assert second.splitlines() == ["run 3   epoch 1", "run 7   failed", "1 of 100 finished, 1 failed"]


def test_wrong_places_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--jobs"):
        launch.launch(["x"], [], tmp_path, "local", 0)
    with pytest.raises(InputError, match="--on"):
        launch.launch(["x"], [], tmp_path, "moon", 1)
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="submitit"):
        launch.launch(["x"], runs([tmp_path / "a"]), tmp_path, "slurm", 1)


def test_finished_work_starts_no_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *words, **options: pytest.fail("started"))
    (tmp_path / "run.json").write_text("{}")
    assert launch.launch(["x"], runs([tmp_path]), tmp_path / ".jobs", "local", 2) == 0
    assert "1 of 1 finished" in capsys.readouterr().out


def test_jobs_that_ended_by_themselves_are_told_from_those_that_were_killed(tmp_path):
    outcomes = {"7_0": ("success", 0), "7_1": ("success", 1), "7_2": ("success", -9), "7_3": ("error", "Traceback")}
    outcomes |= {"71_0": ("success", 0)}  # of another array
    for name, outcome in outcomes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_0_result.pkl").write_bytes(pickle.dumps(outcome))
        (tmp_path / name / f"{name}_0_log.err").write_text(f"progress\n{name}\n" * (outcome[1] != 0))
    assert launch._ended(tmp_path, "7") == 2
    assert [line.split(";")[0] for line in launch._errors(tmp_path, "7")] == ["7_1", "7_2", "7_3"]


# ---------------------------------------------------------------- this machine


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_two_processes_give_the_scores_of_one_and_a_killed_one_is_replaced(study, tmp_path, monkeypatch, capsys):
    path, expected = study
    started, popen = [], subprocess.Popen

    def start(*arguments, **options):
        started.append((popen(*arguments, **options), options["env"]["OMP_NUM_THREADS"]))
        return started[-1][0]

    real_sleep = time.sleep

    def sleep(seconds):  # the first worker is killed as soon as its run has begun
        if len(started) == 2 and any((tmp_path / "out" / name).exists() for name in NAMES):
            started[0][0].send_signal(signal.SIGKILL)
        real_sleep(min(seconds, 0.2))

    monkeypatch.setattr(launch.subprocess, "Popen", start)
    monkeypatch.setattr(launch.time, "sleep", sleep)
    assert main(["search", str(path), "--out", str(tmp_path / "out"), "--on", "local", "--jobs", "2"]) == 0
    assert_same(tmp_path / "out", expected)
    assert len(started) == 3 and started[0][0].returncode == -signal.SIGKILL
    assert {threads for _, threads in started} == {str(max(1, (os.cpu_count() or 1) // 2))}
    assert "2 of 2 finished" in capsys.readouterr().out


def test_cross_validation_in_two_processes(folds, tmp_path, capsys):
    words, expected = folds
    assert main([*words, str(tmp_path), "--on", "local"]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 finished" in said and "2 images in 2 folds" in said
    assert_same(tmp_path, expected, FOLDS)


def test_reproduce_in_two_processes(study, tmp_path, monkeypatch, capsys):
    path, expected = study
    for name in ("results", "nucseg", "studies"):
        (tmp_path / name).mkdir()
    (tmp_path / "studies" / "folds.toml").write_text(path.read_text())
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "--studies", "folds", "--on", "local", "--base", "random"]) == 0
    assert "folds/lr_0.001" in capsys.readouterr().out
    assert_same(tmp_path / "results" / "folds" / "random-full", expected)
    assert len(pd.read_csv(tmp_path / "results" / "folds" / "random-full" / "runs.csv")) == 2


def assert_images(words, out, expected, where, capsys):
    """Three images are segmented as by one process, the damaged one is named; the next call only tries that one."""
    assert main([*words, str(out), *where]) == 1
    said = capsys.readouterr()
    assert "3 of 4 finished, 1 failed" in said.out
    log = out / ".jobs" / "failed" / "d.png.log"
    assert f"d.png failed ('{Path(words[1]) / 'd.png'}'" in said.err and str(log) in said.err
    assert results(out) == expected
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.json") if ".jobs" not in path.parts}
    assert len(stamps) == 3
    (Path(words[1]) / "d.png").unlink()
    Image.fromarray(np.full((64, 64, 3), 240, np.uint8)).save(Path(words[1]) / "d.png")
    try:
        assert main([*words, str(out), *where]) == 0
    finally:
        (Path(words[1]) / "d.png").write_bytes(b"no image")
    assert "4 of 4 finished" in (said := capsys.readouterr()).out and not said.err
    assert not log.exists()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert list(pd.read_csv(out / "summary.csv")["image"]) == ["a.png", "b.png", "d.png", "deep/c.png"]


def test_images_in_two_processes(images, tmp_path, capsys):
    words, expected = images
    assert_images(words, tmp_path / "out", expected, ["--on", "local", "--jobs", "2"], capsys)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_the_process_that_launched_may_be_killed(study, tmp_path):
    path, expected = study
    words = ["search", str(path), "--out", str(tmp_path / "out"), "--on", "local", "--jobs", "1"]
    launcher = subprocess.Popen([sys.executable, "-m", "nucseg", *words], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while not (tmp_path / "out" / NAMES[0]).exists() and time.monotonic() < until:
        time.sleep(0.1)
    launcher.kill()
    launcher.wait()
    while not (tmp_path / "out" / NAMES[1] / "run.json").exists() and time.monotonic() < until:
        time.sleep(0.2)  # its worker goes on alone
    assert_same(tmp_path / "out", expected)
    assert main(words) == 0  # nothing is left to do


def test_a_run_that_fails_is_named_with_its_log(tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text(STUDY.replace('base = "random"', 'base = "missing.pt"').replace("[1e-3, 1e-2]", "[1e-3]"))
    code = main(["search", str(path), "--out", str(tmp_path / "out"), "--on", "local", "--jobs", "1"])
    said = capsys.readouterr()
    assert code == 1
    assert "failed" in said.err or "not finished" in said.err


# ---------------------------------------------------------------- a real Slurm


CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A Slurm cluster of this machine alone, for as long as the tests run."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid() != 0 or not Path("/etc/munge/munge.key").exists():
        pytest.skip(
            f"needs Slurm and munge (Debian: slurm-wlm, munge), as root; missing: {', '.join(missing) or 'root'}"
        )
    pytest.importorskip("submitit")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=host))
    before, daemons = os.environ.get("SLURM_CONF"), []
    os.environ["SLURM_CONF"] = str(conf)
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    words = (
        ["runuser", "-u", "munge", "--", "munged", "-F"],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf)],
    )
    try:
        if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
            words = words[1:]  # munge runs already
        for one in words:
            daemons.append(subprocess.Popen(one, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(1)
        until = time.monotonic() + 90
        while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout:
            if time.monotonic() > until:
                logs = "".join(path.read_text()[-1500:] for path in folder.glob("*.log"))
                pytest.skip(f"Slurm is installed but does not start here: {logs}")
            time.sleep(0.5)
        yield
    finally:
        if job_ids():  # a job may still be ending; without its daemons it would stay for ever
            subprocess.run(["scancel", "--user", "root"], capture_output=True)
        until = time.monotonic() + 60
        while job_ids() and time.monotonic() < until:
            time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def job_ids() -> list[str]:
    return subprocess.run(["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True).stdout.split()


def test_slurm_gives_the_scores_of_one_process_whatever_is_killed(slurm, study, tmp_path, capsys):
    path, expected = study
    words = ["search", str(path), "--out", str(tmp_path / "out"), "--on", "slurm", "--jobs", "2"]
    words += ["--slurm", "timeout_min=30", "--slurm", "cpus_per_task=1"]
    launcher = subprocess.Popen([sys.executable, "-m", "nucseg", *words], stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 400
    while not any((tmp_path / "out" / name).exists() for name in NAMES) and time.monotonic() < until:
        time.sleep(0.2)
    launcher.kill()  # the one that submitted, without a chance to tidy up
    said = launcher.communicate()[0]
    assert "Slurm job" in said
    jobs = job_ids()
    assert jobs
    subprocess.run(["scancel", "--signal=KILL", "--full", jobs[0]], check=True)  # and a job, in the middle of its run
    assert main(words) == 0
    assert_same(tmp_path / "out", expected)
    assert "2 of 2 finished" in capsys.readouterr().out
    while job_ids() and time.monotonic() < until:
        time.sleep(0.5)


def test_slurm_cross_validates_as_its_table_says(slurm, folds, tmp_path):
    words, expected = folds
    assert main([*words, str(tmp_path), "--on", "slurm"]) == 0
    assert_same(tmp_path, expected, FOLDS)
    [script] = (tmp_path / ".jobs").glob("*/*_submission.sh")
    assert {"#SBATCH --time=30", "#SBATCH --cpus-per-task=1"} <= set(script.read_text().splitlines())


def test_slurm_segments_images(slurm, images, tmp_path, capsys):
    words, expected = images
    assert_images(words, tmp_path / "out", expected, ["--on", "slurm", "--slurm", "time=30", "--jobs", "2"], capsys)
    assert len(json.loads((tmp_path / "out" / ".jobs" / "slurm.json").read_text())["arrays"]) == 2  # one a call


def test_a_preempted_job_is_queued_again_and_goes_on(slurm, study, tmp_path):
    path, expected = study
    words = ["search", str(path), "--out", str(tmp_path / "out"), "--on", "slurm", "--jobs", "1"]
    launcher = subprocess.Popen([sys.executable, "-m", "nucseg", *words], stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 400
    while not any((tmp_path / "out" / name).exists() for name in NAMES) and time.monotonic() < until:
        time.sleep(0.2)
    [job] = job_ids()
    subprocess.run(["scancel", "--signal=USR2", job], check=True)  # as Slurm does before it takes a node away
    said = launcher.communicate()[0]
    assert launcher.returncode == 0 and "2 of 2 finished" in said
    assert said.count("Slurm job") == 1  # the same job, queued again
    assert_same(tmp_path / "out", expected)
