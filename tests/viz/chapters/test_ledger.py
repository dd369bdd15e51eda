"""The ledger of the report's claims: its wording is held against what chapters compute."""

from pathlib import Path

import pytest

pytest.importorskip("IPython")

from nucseg.errors import InputError
from nucseg.viz.chapters.ledger import PLACES, VERDICTS, Ledger, places, quoted, sentence

ROOT = Path(__file__).parents[3]
HEAD = "number,claim,verdict,evidence,section,part,cause\n"
ROWS = (
    '1,It has 20 parts,holds,"exact: 20 parts, 0.5 of them blue; Table 1",weights,Model,\n'
    '2,It is blue,does not hold,"1.5% of it, or 3 of 200",code; data,Model,described\n'
)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    path = tmp_path / "claims.csv"
    path.write_text(HEAD + ROWS, encoding="utf-8")
    return Ledger.read(path)


@pytest.mark.parametrize(
    "computed", [{"20": 20}, {"20": 20.3, "0.5": 0.46}, {"blue": "blue"}, {}], ids=["one", "rounded", "words", "none"]
)
def test_evidence_that_is_computed_agrees(ledger, computed):
    ledger.agree(1, computed)


@pytest.mark.parametrize(
    ("number", "computed"),
    [(1, {"20": 21}), (1, {"21": 21}), (1, {"2": 2}), (2, {"1.5": 1.5}), (1, {"blue": "red"}), (2, {"0": 0})],
    ids=["another value", "not quoted", "inside a number", "without its percent sign", "other words", "last digits"],
)
def test_evidence_that_is_not_stops(ledger, number, computed):
    with pytest.raises(AssertionError, match=r"claims\.csv|correct the sentence"):
        ledger.agree(number, computed)


def test_what_no_chapter_computes_is_found(ledger, tmp_path):
    script = tmp_path / "one.py"
    script.write_text('x = 20\nledger.agree(1, {"20": x})\nother(2, {"3": 3})\n', encoding="utf-8")
    (tmp_path / "_two.py").write_text('ledger.agree(1, {"0.5": 0.5})\n', encoding="utf-8")  # a template
    assert quoted(tmp_path) == {1: {"20"}}
    left = ledger.unexplained(tmp_path)
    assert list(left) == [1] and "0.5" in left[1] and "20" not in left[1]  # claim 2 was read in the code
    script.write_text('ledger.agree(1, {"20": 20, "0.5": 0.5})\n', encoding="utf-8")
    assert ledger.unexplained(tmp_path) == {}


@pytest.mark.parametrize(
    "row",
    [ROWS.splitlines()[0] + "\n", "3,a,perhaps,b,weights,Model,\n", "3,a,holds,b,nowhere,Model,\n"],
    ids=["a number twice", "an unknown verdict", "an unknown section"],
)
def test_a_bad_ledger_is_refused(tmp_path, row):
    path = tmp_path / "claims.csv"
    path.write_text(HEAD + ROWS + row, encoding="utf-8")
    with pytest.raises(InputError, match="each number may occur once"):
        Ledger.read(path)


def test_tables_hold_the_rows_that_are_asked_for(ledger):
    assert "| 2 | It is blue | does\u00a0not\u00a0hold |" in ledger.part("Model").data
    assert (
        "| 2 | **It is blue.** 1.5% of it, or 3 of 200. | does\u00a0not\u00a0hold |" in ledger.cause("described").data
    )
    assert ledger.verdict("holds").data.splitlines()[2:] == [
        "| 1 | **It has 20 parts.** Exact: 20 parts, 0.5 of them blue; Table 1. | [model](#report-model) |"
    ]
    assert len(ledger.entries("Model").data.splitlines()) == 2 + 2
    assert sentence("a b") == "A b." and places("code; data") == "the report's code, [the data](data.ipynb)"


def test_each_place_is_a_section_of_the_book():
    if not (ROOT / "book").is_dir():
        pytest.skip("the book is not part of an installed package")
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "book" / "scripts").glob("*.py")]
    for _, target in PLACES.values():
        if target.startswith("#"):
            assert sum(f"\n# ({target[1:]})=\n" in text for text in scripts) == 1, target
        elif target:
            assert (ROOT / "book" / "chapters" / target).exists()


def test_the_books_ledger_is_whole():
    path = ROOT / "book" / "reference" / "claims.csv"
    if not path.exists():
        pytest.skip("the book is not part of an installed package")
    ledger = Ledger.read(path)
    assert list(ledger.table.index) == list(range(1, 44))  # pages quote these numbers
    assert set(ledger.table["verdict"]) == set(VERDICTS)
    assert ledger.unexplained(ROOT / "book" / "scripts") == {}
