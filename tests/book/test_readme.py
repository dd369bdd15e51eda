import re
from pathlib import Path

import pandas as pd

from nucseg.records.runs import read_run
from nucseg.records.statistics import summarise

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_scores_in_the_readme_are_the_recorded_ones():
    rows = re.findall(r"^\| preset `(\w+)` \|((?: [\d.]+ \|){3}) .*`results/([\w/-]+)`: (.*) \|$", README, re.MULTILINE)
    assert [row[0] for row in rows] == ["report", "instance", "best", "best"]
    for _, numbers, folder, budget in rows:
        place = ROOT / "results" / folder
        runs = [read_run(place)] if (place / "run.json").exists() else [read_run(p) for p in sorted(place.iterdir())]
        means = summarise(pd.concat([run.scores for run in runs]))["fold_mean"]
        assert [f"{means[name]:.3f}" for name in ("dice", "aji", "pq")] == re.findall(r"[\d.]+", numbers)
        assert {f"{run.about['config']['epochs']} epochs" in budget for run in runs} == {True}
        assert ("five folds" in budget) == (len(runs) == 5)


def test_the_published_score_in_the_readme_is_the_one_in_the_book():
    published = pd.read_csv(ROOT / "book" / "reference" / "published_nuinsseg.csv").set_index("method")
    row = published.loc["Dual decoder U-Net", ["dice", "aji", "pq"]]
    assert "| " + " | ".join(f"{value:.3f}" for value in row) + " |" in README


def test_every_path_in_the_readme_exists():
    for path in re.findall(r"\]\((?!http)([^)]+)\)|`([\w/]+/)`", README):
        assert (ROOT / "".join(path)).exists(), path


def test_every_command_of_the_readme_is_one_of_ours():
    from nucseg.cli import _parser

    text = _parser().format_help()
    for command in re.findall(r"^nucseg (\w+)", README, re.MULTILINE):
        assert command in text
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"make (install|book|pdf|test|pages|lint|sync|clean)", README):
        assert target in targets
