"""No measured number is typed by hand: numbers in the text are from a recorded table or computed by a cell.

Tables and most numbers of the book are made by cells from results/, so they cannot differ from it. What is left are
the digits in plain text, in the notebooks' Markdown and in strings that cells print.
"""

import ast
import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "book" / "scripts").glob("*.py"))
NUMBER = re.compile(r"(?<![\w.,/=-])\d+\.\d+(?![\w.])|(?<![\w.,/=-])\d{1,3}(?:,\d{3})+(?![\w,])")
# numbers that are no measurement, each with its reason
KNOWN = {
    "0.25": "µm a pixel: an assumption, said to be one",
    "0.5": "a threshold, an axis, or half",
    "1.6": "GB of NuInsSeg.zip, at Zenodo",
    "3.11": "the Python version",
    "1.0": "the other end of a scale",
    "5516": "a course",
}


def reference_numbers():
    """Every number of the report and of published tables that the book quotes, as it may be written."""
    found = set()
    for path in (ROOT / "book" / "reference").glob("*.csv"):
        for text in pd.read_csv(path, dtype=str).fillna("").to_numpy().ravel():
            found |= set(re.findall(r"\d+(?:[.,]\d+)*", text))
    return found


def texts(path):
    """(where, text) of all prose in a script: its Markdown cells, and strings with words in its code cells."""
    for cell in re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        head, _, body = cell.partition("\n")
        if "[markdown]" in head:
            yield "markdown", re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", "", body, flags=re.DOTALL)
            continue
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > 3:
                yield "a string", re.sub(r"`[^`]*`", "", node.value)


@pytest.mark.skipif(not SCRIPTS, reason="the book is not part of an installed package")
@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "book" / "intro.md"], ids=lambda p: p.stem)
def test_numbers_in_the_text_are_known(path):
    allowed = reference_numbers() | KNOWN.keys()
    allowed |= {number.replace(",", "") for number in allowed}
    prose = (
        texts(path) if path.suffix == ".py" else [("text", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))]
    )
    typed = [(where, n) for where, text in prose for n in NUMBER.findall(text) if n.replace(",", "") not in allowed]
    assert typed == []


def test_a_typed_number_would_be_found():
    assert NUMBER.findall("a Dice of 0.738 and 124,321 weights, alpha=0.25, v1.2.3, 512 px") == ["0.738", "124,321"]
