import re
from pathlib import Path

from nucseg.tables import read_run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_scores_in_the_readme_are_the_recorded_ones():
    rows = re.findall(r"^\| preset `(\w+)` .*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert rows
    run = read_run(ROOT / "results" / "report" / "fold0-random-cpu")
    means = run.scores[["dice", "aji", "pq"]].mean()
    assert [f"{value:.3f}" for value in means] == list(rows[0][1:])
    config = run.about["config"]
    assert f"{config['epochs']} epochs of {config['crop']} px windows" in README
    assert f"{len(run.scores)} test images" in README


def test_every_path_in_the_readme_exists():
    for path in re.findall(r"\]\((?!http)([^)]+)\)|`([\w/]+/)`", README):
        assert (ROOT / "".join(path)).exists(), path


def test_every_command_of_the_readme_is_one_of_ours():
    from nucseg.cli import _parser

    text = _parser().format_help()
    for command in re.findall(r"^nucseg (\w+)", README, re.MULTILINE):
        assert command in text
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"make (book|test|lint|sync|clean)", README):
        assert target in targets
