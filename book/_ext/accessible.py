"""Small repairs of the theme's HTML: of faults that axe-core reports, and of a misplaced space."""

import re
from typing import Any

from sphinx.application import Sphinx

_REPAIRS = (
    # a button with only an icon has no accessible name
    (
        re.compile(r'<summary>(?=<span class="toctree-toggle")'),
        '<summary aria-label="Show or hide the pages below">',
    ),
    # the space between "Solution to" and its link is a part of the link, and underlined
    (
        re.compile(r'(<p class="admonition-title">[^<]*\w)(<a\b[^>]*>) (?=\S)'),
        r"\1 \2",
    ),
    # a list role on a box whose children are not list items
    (
        re.compile(r'<div role="list" class="citation-list">'),
        '<div class="citation-list">',
    ),
)
# header cells say what they head: their column, or in the body of a table their row
_PARTS = re.compile(r"<(thead|tbody)\b.*?</\1>", re.DOTALL)
_HEADER = re.compile(r"<th\b(?![^>]*\bscope=)")
_SIGNATURE = re.compile(r'<dt class="sig.*?</dt>', re.DOTALL)


def _lines(signature: re.Match) -> str:
    """Replace the ``dl`` without terms around the parameters of a long signature by plain boxes."""
    text = signature[0]
    for old, new in (
        ("<dl>", '<div class="sig-lines">'),
        ("</dl>", "</div>"),
        ("<dd>", "<div>"),
        ("</dd>", "</div>"),
    ):
        text = text.replace(old, new)
    return text


def _scopes(part: re.Match) -> str:
    """Give each header cell of a table's head or body its scope."""
    scope = "col" if part[1] == "thead" else "row"
    return _HEADER.sub(f'<th scope="{scope}"', part[0])


def repair(html: str) -> str:
    """Return the repaired page; a page that is already repaired is unchanged."""
    for pattern, replacement in _REPAIRS:
        html = pattern.sub(replacement, html)
    return _PARTS.sub(_scopes, _SIGNATURE.sub(_lines, html))


def setup(app: Sphinx) -> dict[str, Any]:
    from pages import repairing  # beside this file, which is on the path in a build

    app.connect("build-finished", repairing(repair))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
