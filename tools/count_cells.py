"""Count what teaches in the book's chapters: visible code, exercises, glossary terms: ``python tools/count_cells.py``.

A code cell is visible unless its tags fold its input away or remove it. The first cell of a chapter, which only acts on
Colab, is left out. Words in f-strings count where a cell has more than six of them: fewer label a plot, more are prose
that belongs in Markdown.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jupytext

BOOK = Path(__file__).resolve().parents[1] / "book"
FOLDED = {"hide-input", "hide-cell"}
REMOVED = {"remove-input", "remove-cell"}
LABEL_WORDS = 6


@dataclass
class Cell:
    """A cell of a chapter: its kind ('code' or 'markdown'), text, tags, and the captions of its figure."""

    kind: str
    source: str
    tags: frozenset[str]
    captions: tuple[str, ...] = ()


@dataclass
class Counts:
    """What one chapter, or the book, holds."""

    visible: int = 0
    folded: int = 0
    removed: int = 0
    words_in_f_strings: int = 0
    exercises: int = 0
    solutions: int = 0
    terms_linked: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        mine, its = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + its[name] for name in mine})


def twins(book: Path = BOOK) -> list[Path]:
    """The chapters as Python scripts, without the template."""
    return sorted(path for path in (book / "scripts").glob("*.py") if not path.stem.startswith("_"))


def cells(path: Path) -> list[Cell]:
    """The cells of a chapter, in order."""

    def captions(metadata: dict[str, Any]) -> tuple[str, ...]:
        mystnb = metadata.get("mystnb", {})
        found = mystnb.get("image", {}).get("alt", ""), mystnb.get("figure", {}).get("caption", "")
        return tuple(filter(None, found))

    notebook = jupytext.read(path)
    return [
        Cell(cell.cell_type, cell.source, frozenset(cell.metadata.get("tags", ())), captions(cell.metadata))
        for cell in notebook.cells
    ]


def sections(chapter: list[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """(heading, cells) from one second-level heading to the next; what stands before the first has the heading ''."""
    heading, inside = "", []
    for cell in chapter:
        parts = re.split(r"^## (.+)$", cell.source, flags=re.MULTILINE) if cell.kind == "markdown" else [cell.source]
        inside.append(Cell(cell.kind, parts[0], cell.tags, cell.captions))
        for title, text in zip(parts[1::2], parts[2::2], strict=True):
            yield heading, inside
            heading, inside = title, [Cell(cell.kind, text, cell.tags)]
    yield heading, inside


def words_in_f_strings(source: str) -> int:
    """Words in the literal parts of a cell's f-strings; 0 if there are no more than labels need."""
    words = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            for part in node.values:
                if isinstance(part, ast.Constant):
                    words += len(re.findall(r"[^\W\d_]{2,}", str(part.value)))
    return words if words > LABEL_WORDS else 0


def count(path: Path) -> Counts:
    """The counts of one chapter."""
    counts = Counts()
    for number, cell in enumerate(cells(path)):
        if cell.kind == "markdown":
            counts.exercises += len(re.findall(r"^`{3,}\{exercise(?:-start)?\}", cell.source, re.MULTILINE))
            counts.solutions += len(re.findall(r"^`{3,}\{solution(?:-start)?\}", cell.source, re.MULTILINE))
            counts.terms_linked += cell.source.count("{term}`")
        elif number > 0 or "google.colab" not in cell.source:
            counts.removed += bool(cell.tags & REMOVED)
            counts.folded += bool(cell.tags & FOLDED and not cell.tags & REMOVED)
            counts.visible += not cell.tags & (FOLDED | REMOVED)
            counts.words_in_f_strings += words_in_f_strings(cell.source)
    return counts


def glossary_terms(path: Path = BOOK / "glossary.md") -> list[str]:
    """The terms that the glossary defines: the lines that an indented definition follows."""
    return re.findall(r"^([^\s`#].*)\n +\S", path.read_text(encoding="utf-8"), re.MULTILINE)


def main() -> None:
    rows = {path.stem: count(path) for path in twins()}
    rows["all"] = sum(rows.values(), Counts())
    names = list(asdict(rows["all"]))
    print("| chapter | " + " | ".join(name.replace("_", " ") for name in names) + " | share visible |")
    print("|---" + "|---:" * (len(names) + 1) + "|")
    for stem, counts in rows.items():
        shown = counts.visible / max(counts.visible + counts.folded + counts.removed, 1)
        print(f"| {stem} | " + " | ".join(str(value) for value in asdict(counts).values()) + f" | {shown:.0%} |")
    print(f"\n{len(glossary_terms())} glossary terms")


if __name__ == "__main__":
    main()
