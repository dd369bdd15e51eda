"""Small repairs of the tables that cells print: minus signs, apostrophes, header rows, columns of numbers."""

import re
from typing import Any

from sphinx.application import Sphinx

_CELL = re.compile(r"(<td\b[^>]*>)([^<]*)(?=</td>)")
_HYPHEN = re.compile(r"(?<![\w.-])-(?=\.?\d)")  # not in 1e-4, 2024-05-17 or fold-1
# text of cells, headers and captions; code would have tags of its own
_TEXT = re.compile(r"(<(td|th|caption)\b[^>]*>)([^<]*'[^<]*)(?=</\2>)")
_APOSTROPHE = re.compile(
    r"(?<=[^\W\d_])'(?=[^\W\d_])|(?<=\ws)'(?= )"
)  # not in ['a', 'b']
_HEAD = re.compile(r"(<thead\b[^>]*>)(.*?)(</thead>)", re.DOTALL)
_ROW = re.compile(r"<tr\b.*?</tr>", re.DOTALL)
_HEADING = re.compile(r"<th\b[^>]*>(.*?)</th>", re.DOTALL)
_STYLED = re.compile(r'<table id="T_.*?</table>', re.DOTALL)
_COLUMN = re.compile(
    r'<td\b[^>]*class="[^"]*\bcol(\d+)\b[^>]*>(.*?)</td>', re.DOTALL
)
# 0.5, 1,234, 3e-4, 12%, "0.1 to 0.2" and "+0.1 (0.0 to 0.2)"
_NUMBERS = re.compile(r"(?:(?<![\w.,])[-+−]?\d[\d,.]*(?:e-?\d+)?%?|\bto\b|[()\s])*")


def _minus(cell: re.Match) -> str:
    return cell[1] + _HYPHEN.sub("−", cell[2])


def _apostrophes(cell: re.Match) -> str:
    return cell[1] + _APOSTROPHE.sub("’", cell[3])


def _blank(heading: re.Match) -> bool:
    return heading[1].replace("&nbsp;", "").strip() == ""


def _merge(head: re.Match) -> str:
    """Move the names of the index, which pandas puts into a row of their own, beside those of the columns."""
    rows = _ROW.findall(head[2])
    if len(rows) != 2 or "colspan" in head[2]:
        return head[0]
    columns, names = (list(_HEADING.finditer(row)) for row in rows)
    named = sum(not _blank(cell) for cell in names)
    empty = all(map(_blank, names[named:])) and all(map(_blank, columns[:named]))
    if len(columns) != len(names) or not empty:
        return head[0]
    for column, name in zip(
        columns[:named][::-1], names[:named][::-1], strict=True
    ):
        start, end = column.span()
        rows[0] = rows[0][:start] + name[0] + rows[0][end:]
    return head[1] + rows[0] + head[3]


def _align(table: re.Match) -> str:
    """Mark the columns of numbers of a table that shows no index; the style sheet aligns all others."""
    _, _, body = table[0].partition("<tbody")
    if re.search(r"<th\b|(col|row)span", body):
        return table[0]
    columns: dict[str, list[str]] = {}
    for column, cell in _COLUMN.findall(body):
        text = re.sub(r"<[^>]*>|&nbsp;", " ", cell).strip()
        columns.setdefault(column, []).append(text)
    html = table[0]
    for column, cells in columns.items():
        if any(cells) and all(map(_NUMBERS.fullmatch, cells)):
            html = re.sub(
                rf'class="(?!number )(?=[^"]*\bcol{column}\b)',
                'class="number ',
                html,
            )
    return html


def repair(html: str) -> str:
    """Return the repaired page; a page that is already repaired is unchanged."""
    html = _TEXT.sub(_apostrophes, _CELL.sub(_minus, html))
    return _STYLED.sub(_align, _HEAD.sub(_merge, html))


def setup(app: Sphinx) -> dict[str, Any]:
    from pages import repairing  # beside this file, which is on the path in a build

    app.connect("build-finished", repairing(repair))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
