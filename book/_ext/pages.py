"""Shared by the extensions that repair finished pages."""

from collections.abc import Callable
from pathlib import Path

from sphinx.application import Sphinx


def repairing(
    repair: Callable[[str], str],
) -> Callable[[Sphinx, Exception | None], None]:
    """A handler of ``build-finished`` that puts each HTML page through ``repair``."""

    def repair_all(app: Sphinx, exception: Exception | None) -> None:
        if exception is None and app.builder.name == "html":
            for path in Path(app.outdir).rglob("*.html"):
                html = path.read_text(encoding="utf-8")
                if (repaired := repair(html)) != html:
                    path.write_text(repaired, encoding="utf-8")

    return repair_all
