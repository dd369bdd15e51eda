"""Studies in several processes, on this machine and on a real Slurm: the same scores, and nothing lost by a kill."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from nucseg.cli import main
from nucseg.errors import InputError
from nucseg.studies import launch
from nucseg.studies.launch import Item, runs, slurm_options, without_launching

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


def scores(out: Path) -> list[pd.DataFrame]:
    return [pd.read_csv(out / name / "scores.csv") for name in NAMES]


def assert_same(out: Path, expected: list[pd.DataFrame]) -> None:
    for ours, theirs in zip(scores(out), expected, strict=True):
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


def test_options_of_the_jobs():
    assert slurm_options(["partition=gpu", "mem_gb=8"]) == {"slurm_partition": "gpu", "mem_gb": 8}
    for wrong in ("partition", "=gpu", "partition="):
        with pytest.raises(InputError, match="KEY=VALUE"):
            slurm_options([wrong])


def test_the_state_of_a_run(tmp_path):
    item = Item("a", tmp_path / "run.json", tmp_path)
    assert item.state() == "waiting"
    (tmp_path / "history.csv").write_text("epoch,lr\n1,0.1\n2,0.1\n")
    assert item.state() == "epoch 2"
    (tmp_path / "error.log").write_text("ValueError: no")
    assert item.state() == "failed"
    assert item.state(since=time.time() + 60) == "epoch 2"  # of an earlier try
    (tmp_path / "run.json").write_text("{}")
    assert item.state() == "finished"


def test_wrong_places_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--jobs"):
        launch.launch(["x"], [], tmp_path, "local", 0)
    with pytest.raises(InputError, match="--on"):
        launch.launch(["x"], [], tmp_path, "moon", 1)
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="submitit"):
        launch.launch(["x"], runs([tmp_path / "a"]), tmp_path, "slurm", 1)


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
