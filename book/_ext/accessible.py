"""Small repairs of the theme's HTML, so that a screen reader can use it; axe-core finds them otherwise."""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

_REPAIRS = (
    # a button that is an icon alone has no name
    (
        re.compile(r'<summary>(?=<span class="toctree-toggle")'),
        '<summary aria-label="Show or hide the pages below">',
    ),
    # a list role on a box whose children are no list items
    (
        re.compile(r'<div role="list" class="citation-list">'),
        '<div class="citation-list">',
    ),
)
_SIGNATURE = re.compile(r'<dt class="sig.*?</dt>', re.DOTALL)


def _lines(signature: re.Match) -> str:
    """The parameters of a long signature stand in a ``dl`` without terms: plain boxes mean the same."""
    text = signature[0]
    for old, new in (
        ("<dl>", '<div class="sig-lines">'),
        ("</dl>", "</div>"),
        ("<dd>", "<div>"),
        ("</dd>", "</div>"),
    ):
        text = text.replace(old, new)
    return text


def repair(html: str) -> str:
    """The page with its repairs; a page that has them already stays as it is."""
    for pattern, replacement in _REPAIRS:
        html = pattern.sub(replacement, html)
    return _SIGNATURE.sub(_lines, html)


def repair_all(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.name == "html":
        for path in Path(app.outdir).rglob("*.html"):
            html = path.read_text(encoding="utf-8")
            if (repaired := repair(html)) != html:
                path.write_text(repaired, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("build-finished", repair_all)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
