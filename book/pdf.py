"""Print the built book as one PDF: ``python book/pdf.py``, after the book was built. Needs Chromium.

Each page is printed by the browser, then all are joined, with a table of contents in the margin and links
between pages that stay within the file.
"""

import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from playwright.sync_api import Browser, sync_playwright
from pypdf import PdfReader, PdfWriter
from pypdf.generic import (
    ArrayObject,
    DictionaryObject,
    Fit,
    NameObject,
    TextStringObject,
)

BOOK = Path(__file__).resolve().parent
HTML = BOOK / "_build" / "html"
PDF = BOOK / "_build" / "book.pdf"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MARGIN = {"top": "16mm", "bottom": "18mm", "left": "16mm", "right": "16mm"}
DECODED = """Promise.all([...document.images].map(
    image => { image.loading = 'eager'; return image.decode().catch(() => 0) }))"""
NUMBER = '<div style="font-size: 8px; width: 100%; text-align: center"><span class="pageNumber"></span></div>'


def entries(toc: dict, level: int = 0) -> Iterator[tuple[str, int]]:
    """(page, level) of all pages of the table of contents, in order."""
    yield toc.get("root") or toc["file"], level
    for part in [*toc.get("chapters", []), *toc.get("sections", [])]:
        yield from entries(part, level + ("file" in toc))


def print_page(browser: Browser, path: Path) -> tuple[str, bytes]:
    """(title, PDF) of one page."""
    page = browser.new_page(offline=True)
    page.set_default_timeout(120_000)
    page.goto(path.as_uri())
    page.evaluate(DECODED)
    title = page.locator("h1").first.evaluate("h => h.firstChild.textContent")
    pdf = page.pdf(
        format="A4",
        margin=MARGIN,
        print_background=True,
        display_header_footer=True,
        header_template="<span></span>",
        footer_template=NUMBER,
    )
    page.close()
    return title.strip(), pdf


def join(pages: list[tuple[Path, int, str, bytes]], site: str) -> PdfWriter:
    """Join printed pages, given as (HTML file, level, title, PDF), and keep their links within the file.

    Links to files that are not among the pages lead to ``site`` instead.
    """
    writer, starts, parents = PdfWriter(), {}, {}
    for path, level, title, pdf in pages:
        starts[path] = len(writer.pages)
        writer.append(PdfReader(io.BytesIO(pdf)), import_outline=False)
        parents[level] = writer.add_outline_item(
            title=title,
            page_number=starts[path],
            parent=parents.get(level - 1),
        )
    for page in writer.pages:
        for note in page.get("/Annots", []):
            action = note.get_object().get("/A", {})
            uri = str(action.get("/URI", ""))
            if not uri.startswith("file:"):
                continue
            target = Path(unquote(urlsplit(uri).path))
            if target in starts:
                goal = writer.pages[starts[target]].indirect_reference
                there = ArrayObject([goal, NameObject(Fit.fit().fit_type)])
                link = {"/S": NameObject("/GoTo"), "/D": there}
            else:
                inside = target.is_relative_to(HTML)
                rest = target.relative_to(HTML).as_posix() if inside else ""
                link = {
                    "/S": NameObject("/URI"),
                    "/URI": TextStringObject(site + rest),
                }
            note.get_object()[NameObject("/A")] = DictionaryObject(
                {NameObject(key): value for key, value in link.items()}
            )
    writer.page_mode = "/UseOutlines"
    return writer


def chromium() -> str | None:
    """The Chromium of this machine; None for the one that Playwright itself installed."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


def main() -> int:
    if not (HTML / "index.html").exists():
        print("The book is not built: run 'make book' first.", file=sys.stderr)
        return 1
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    config = yaml.safe_load((BOOK / "_config.yml").read_text(encoding="utf-8"))
    pages = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        for name, level in entries(toc):
            path = HTML / f"{name}.html"
            pages.append((path, level, *print_page(browser, path)))
        browser.close()
    writer = join(pages, config["html"]["baseurl"])
    writer.add_metadata({"/Title": config["title"], "/Author": config["author"]})
    writer.compress_identical_objects()
    writer.write(PDF)
    print(f"{len(writer.pages)} pages: {PDF.as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
