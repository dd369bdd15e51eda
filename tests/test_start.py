"""The command line answers at once."""

import subprocess
import sys

import pytest

resource = pytest.importorskip("resource")  # not on Windows


def cpu_seconds(*words: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "nucseg", *words], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("words", [["--help"], ["predict", "--help"], ["--version"]])
def test_help_takes_less_than_a_third_of_a_second_of_cpu(words):
    assert min(cpu_seconds(*words) for _ in range(3)) < 0.3
