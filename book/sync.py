"""Synchronise each notebook in ``chapters/`` with its plain Python twin in ``scripts/``.

``python book/sync.py`` updates the unchanged side of each pair; ``--check`` changes nothing, and exits with 1
if a pair differs. A notebook stores a hash of the cells on which both last agreed, which reveals the changed
side whatever the files' dates. A notebook is generated from its twin: it has no outputs, and its cell ids are
derived from the cells' text.

Jupyter shows no caption from a cell's metadata and folds nothing by tags. So a notebook has two things that
its twin lacks: a cell with each figure's caption below the figure, which the pages leave out, and a mark on
checks and solutions, which makes their code begin folded. Edit captions in the metadata of the figure's cell.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import jupytext
import nbformat
from jupytext.config import load_jupytext_config
from nbformat import NotebookNode

BOOK = Path(__file__).resolve().parent
KERNEL = {
    "display_name": "Python 3 (ipykernel)",
    "language": "python",
    "name": "python3",
}
CELL_METADATA = (
    "mystnb",
    "tags",
)  # other metadata belongs to editors: fold states, run times
AGREED = "twin_sha256"
CAPTION = "caption"  # tag of the cells that only notebooks have
FOLDED = {"hide-input", "remove-cell"}  # tags of cells whose code begins folded
TISSUE = "{{ tissue }}"  # in captions; the pages put the images' origin here


def pairs(book: Path = BOOK) -> list[tuple[Path, Path]]:
    """(notebook, twin) of every chapter; one of the two may be missing. ``scripts/_x.py`` has no notebook."""
    stems = {path.stem for path in (book / "chapters").glob("*.ipynb")}
    twins = {path.stem for path in (book / "scripts").glob("*.py")}
    stems |= {stem for stem in twins if not stem.startswith("_")}
    return [
        (book / "chapters" / f"{stem}.ipynb", book / "scripts" / f"{stem}.py")
        for stem in sorted(stems)
    ]


def read(path: Path) -> NotebookNode:
    """A notebook or a twin as a notebook of its bare cells: text, kind, tags, captions."""
    fmt = "py:percent" if path.suffix == ".py" else "ipynb"
    notebook = jupytext.reads(path.read_text(encoding="utf-8"), fmt=fmt)
    notebook.cells = [cell for cell in notebook.cells if not is_caption(cell)]
    used: set[str] = set()
    for cell in notebook.cells:
        cell.metadata = {
            name: cell.metadata[name]
            for name in CELL_METADATA
            if name in cell.metadata
        }
        cell.pop("attachments", None)
        number, text = 0, f"{cell.cell_type}\0{cell.source}"
        while (identity := sha256(f"{text}\0{number}")[:8]) in used:
            number += 1
        used.add(identity)
        cell.id = identity
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = {"kernelspec": KERNEL}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return nbformat.from_dict(notebook)


def is_caption(cell: NotebookNode) -> bool:
    """Whether a cell repeats a caption for readers of the notebook."""
    return CAPTION in cell.metadata.get("tags", [])


def for_jupyter(cells: list[NotebookNode]) -> list[NotebookNode]:
    """Cells as Jupyter should show them: checks and solutions folded, captions below their figures."""
    shown, solution = [], False
    for cell in cells:
        shown.append(cell)
        if cell.cell_type == "markdown":
            start, end = (
                cell.source.rfind(f"{{solution-{w}}}") for w in ("start", "end")
            )
            solution = start > end or (solution and start == end)
            continue
        if solution or FOLDED & set(cell.metadata.get("tags", [])):
            cell.metadata["jupyter"] = {"source_hidden": True}
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        if caption := figure.get("caption"):
            text = (
                f"> **Figure.** {caption.replace(TISSUE, 'see *Behind this page*')}"
            )
            below = nbformat.v4.new_markdown_cell(
                text, id=sha256(cell.id + text)[:8]
            )
            below.metadata["tags"] = [CAPTION, "remove-cell"]
            shown.append(below)
    return shown


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def content_hash(notebook: NotebookNode) -> str:
    """SHA-256 of a notebook's bare cells."""
    return sha256(json.dumps(notebook.cells, sort_keys=True))


def notebook_text(bare: NotebookNode) -> str:
    """The notebook file of bare cells: the same bytes on every machine."""
    notebook = nbformat.from_dict(bare)
    notebook.metadata[AGREED] = content_hash(bare)
    notebook.cells = for_jupyter(notebook.cells)
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def twin_text(bare: NotebookNode, twin: Path) -> str:
    """The twin file of bare cells, in the form that jupytext.toml asks for."""
    config = load_jupytext_config(str(twin))
    return jupytext.writes(bare, fmt="py:percent", config=config)


def has_captions(twin: Path) -> bool:
    """Whether an editor that pairs the two files wrote the notebook's captions into the twin."""
    text = twin.read_text(encoding="utf-8")
    return f'"{CAPTION}"' in text and any(
        map(is_caption, jupytext.reads(text, fmt="py:percent").cells)
    )


def difference(notebook: Path, twin: Path) -> str:
    """The fault of a pair, in one sentence; empty if the two agree."""
    for path, other in ((notebook, twin), (twin, notebook)):
        if not path.exists():
            return f"{path.name} is missing beside {other.name}: run 'make sync'."
    if has_captions(twin):
        return f"{twin.name} has captions as cells: run 'make sync'."
    if notebook.read_text(encoding="utf-8") != notebook_text(read(twin)):
        return f"{notebook.name} and {twin.name} differ (or the notebook has outputs): run 'make sync'."
    return ""


def sync(notebook: Path, twin: Path) -> str:
    """Synchronise a pair; return what was done, or "" if they already agreed.

    Raises ``SystemExit`` with one sentence if both were changed.
    """
    if not difference(notebook, twin):
        return ""
    source = twin
    if not twin.exists():
        source = notebook
    elif notebook.exists():
        agreed = json.loads(notebook.read_text(encoding="utf-8"))["metadata"]
        there, here = content_hash(read(notebook)), content_hash(read(twin))
        if there not in (agreed.get(AGREED), here):
            source = notebook
            if here != agreed.get(AGREED):
                raise SystemExit(
                    f"{notebook.name} and {twin.name} were both changed: delete one, then sync."
                )
    bare = read(source)
    if source == notebook or has_captions(twin):
        twin.write_text(twin_text(bare, twin), encoding="utf-8", newline="\n")
        bare = read(twin)
    notebook.write_text(notebook_text(bare), encoding="utf-8", newline="\n")
    other = twin if source == notebook else notebook
    return f"{other.name} from {source.name}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Keep notebooks and their plain Python twins equal."
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; exit 1 when a pair differs",
    )
    check = parser.parse_args(arguments).check
    results = (difference(*pair) if check else sync(*pair) for pair in pairs())
    said = [text for text in results if text]
    for text in said:
        print(text, file=sys.stderr if check else sys.stdout)
    return int(check and bool(said))


if __name__ == "__main__":
    sys.exit(main())
