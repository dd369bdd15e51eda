"""Check that the built book has no broken internal links and works offline: ``python book/links.py``.

Checks every page that can be reached from the front page: the targets of links, pictures, scripts and styles
must exist, and so must the anchors. No script, style, font or picture may come from another site; ordinary
links to other sites are not followed.
"""

import re
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from posixpath import dirname, join, normpath
from urllib.parse import unquote, urlsplit

# fetched by the browser itself; other <link> elements only describe relations between pages
LOADED = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "manifest"}
IN_STYLE = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")


class Sheet:
    """The references of a style sheet."""

    def __init__(self, text: str) -> None:
        self.anchors: set[str] = set()
        self.links: list[str] = []  # links that a reader may follow
        self.loads = in_style(text)  # files that the browser fetches


class Page(HTMLParser, Sheet):
    """The references and anchors of a page."""

    def __init__(self, html: str) -> None:
        HTMLParser.__init__(self)
        Sheet.__init__(self, "")
        self.styling = False
        self.feed(html)

    def handle_starttag(
        self, tag: str, attrs: list[tuple[str, str | None]]
    ) -> None:
        has = {name: value or "" for name, value in attrs}
        self.styling = tag == "style"
        self.anchors |= {
            has.get("id", ""),
            has.get("name", "") if tag == "a" else "",
        }
        self.loads += [has[name] for name in ("src", "poster") if name in has]
        self.loads += [
            s.split()[0] for s in has.get("srcset", "").split(",") if s.strip()
        ]
        self.loads += in_style(has.get("style", ""))
        self.links += [has["action"]] if "action" in has else []
        if tag == "meta" and has.get("http-equiv", "").lower() == "refresh":
            self.links.append(has["content"].partition("url=")[2])
        if "href" in has:
            fetched = tag == "link" and LOADED & set(has.get("rel", "").split())
            (self.loads if fetched else self.links).append(has["href"])

    def handle_data(self, data: str) -> None:
        if self.styling:
            self.loads += in_style(data)

    def handle_endtag(self, tag: str) -> None:
        self.styling = False


def in_style(text: str) -> list[str]:
    """The files that a style sheet, or an element's style, loads."""
    return [a or b for a, b in IN_STYLE.findall(text)]


def problems(html: Path) -> list[str]:
    """One line for each broken link and each external file loaded by the book built in ``html``."""
    files = {path.relative_to(html).as_posix() for path in html.rglob("*")}
    if "index.html" not in files:
        return [f"{html} holds no book: it has no index.html"]

    @cache
    def read(name: str) -> Page:
        text = (html / name).read_text(encoding="utf-8")
        return Page(text) if name.endswith(".html") else Sheet(text)

    found, seen, waiting = [], {"index.html"}, ["index.html"]
    while waiting:
        name = waiting.pop()
        page = read(name)
        for url in page.links + page.loads:
            parts = urlsplit(url)
            if parts.scheme in ("http", "https") or parts.netloc:
                if url in page.loads:
                    found.append(f"{name} loads {url}, which is not of the book")
                continue
            if parts.scheme:  # mailto:, data:
                continue
            target = name
            if parts.path:
                target = normpath(join(dirname(name), unquote(parts.path)))
            if target not in files:
                found.append(f"{name} refers to {url}, which does not exist")
                continue
            if target.endswith((".html", ".css")):
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
                anchor = unquote(parts.fragment)
                if anchor and anchor not in read(target).anchors:
                    found.append(
                        f"{name} refers to {url}, an anchor that is not there"
                    )
    return sorted(set(found))


def main() -> int:
    found = problems(Path(__file__).parent / "_build" / "html")
    for line in found:
        print(line, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
