"""What makes the built pages travel well: small pictures, notebooks as a zip file, a sitemap, social cards.

Nothing here needs a network.
"""

import html
import io
import re
import zipfile
from pathlib import Path
from typing import Any

from docutils import nodes
from PIL import Image
from sphinx.application import Sphinx

PHOTO = 0.35  # bytes per pixel of a PNG, from which on it holds a photograph
WIDE = 900  # px: a figure drawn as wide as the page, with labels to match
CARD = "_static/tissue.jpg"  # a format that every site can show
ZIP = "notebooks.zip"
PICTURE = re.compile(r'<img\b[^>]*\bsrc="(?:\.\./)*_images/([^"]+)"[^>]*>')
CELL = re.compile(r'<td id="T_.*?</td>', re.DOTALL)  # of a table that pandas styled
INTERVAL = re.compile(r"(?<=\d) to (?=[+−-]?\d)")
READ_ME = """The notebooks of the book, with the recorded results that they read.

    pip install jupyterlab "git+{url}"
    jupyter lab book/chapters

needs Python 3.11 or newer. The pages are at {pages}
"""


def webp(png: bytes) -> bytes:
    """Re-encode a PNG as WebP: drawings without loss, photographs with so little that no eye sees it."""
    image = Image.open(io.BytesIO(png))
    photo = len(png) / (image.width * image.height) > PHOTO
    small = io.BytesIO()
    if photo:  # a full-size chroma would be better still, but WebP has none
        image = image.convert("RGB") if _opaque(image) else image
        image.save(small, "WEBP", quality=95, method=4, use_sharp_yuv=True)
    else:
        image.save(small, "WEBP", lossless=True, quality=80, method=4)
    return small.getvalue()


def _opaque(image: Image.Image) -> bool:
    """Whether an image has no transparent pixel."""
    return image.mode != "RGBA" or image.getchannel("A").getextrema()[0] == 255


def shrink(folder: Path) -> None:
    """Replace the PNGs of a built book by WebPs, where those are smaller, in the pages too."""
    renamed = {}
    for path in sorted((folder / "_images").glob("*.png")):
        png = path.read_bytes()
        small = webp(png)
        if len(small) < len(png):
            path.with_suffix(".webp").write_bytes(small)
            path.unlink()
            renamed[f"_images/{path.name}"] = f"_images/{path.stem}.webp"
    for page in folder.rglob("*.html") if renamed else ():
        text = before = page.read_text(encoding="utf-8")
        for old, new in renamed.items():
            text = text.replace(old, new)
        if text != before:
            page.write_text(text, encoding="utf-8")


def state_sizes(folder: Path) -> None:
    """Give each picture of a built page its size, so that the text does not jump, and wide ones a class.

    Wide are pictures whose labels a phone would make too small: much wider than high, or as wide as a page.
    """
    sizes = {
        path.name: Image.open(path).size
        for path in (folder / "_images").glob("*")
        if path.suffix in (".webp", ".png", ".jpg")
    }

    def with_size(tag: re.Match) -> str:
        if tag[1] not in sizes or " width=" in tag[0]:
            return tag[0]
        width, height = sizes[tag[1]]
        text = f'<img width="{width}" height="{height}"' + tag[0][len("<img") :]
        if width > 1.2 * height or width > WIDE:
            text, found = re.subn(r'\bclass="', 'class="wide ', text)
            text = text if found else text.replace("<img", '<img class="wide"')
        return text

    for page in folder.rglob("*.html"):
        before = page.read_text(encoding="utf-8")
        text = keep_intervals(PICTURE.sub(with_size, before))
        if text != before:
            page.write_text(text, encoding="utf-8")


def keep_intervals(page: str) -> str:
    """Keep "0.1 to 0.2" in a page's styled tables from breaking across lines.

    Tables written in Markdown keep their breaks: on a phone they are better narrow.
    """

    def joined(cell: re.Match) -> str:
        return INTERVAL.sub("\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}", cell[0])

    return CELL.sub(joined, page)


def zip_notebooks(root: Path, path: Path, read_me: str) -> None:
    """Pack what the notebooks need beside the package: themselves, quoted tables and recorded results."""
    chosen = [
        *root.glob("book/chapters/*.ipynb"),
        *root.glob("book/reference/*.csv"),
        *(p for p in root.glob("results/**/*") if p.suffix in (".csv", ".json")),
    ]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("nucseg-notebooks/README.txt", read_me)
        for file in sorted(chosen):
            name = file.relative_to(root).as_posix()
            archive.write(file, f"nucseg-notebooks/{name}")


def sitemap(base: str, pages: list[str]) -> str:
    """The sitemap of a site: the addresses of its pages, for search engines."""
    urls = "".join(
        f"<url><loc>{html.escape(base + page)}.html</loc></url>\n" for page in pages
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{urls}</urlset>\n'
    )


def first_sentences(doctree: nodes.document, most: int = 200) -> str:
    """The beginning of a page's first paragraph, cut after a word."""
    for paragraph in doctree.findall(nodes.paragraph):
        words = paragraph.astext().split()
        if len(words) > 5:
            text = ""
            while words and len(text) + len(words[0]) < most:
                text += f" {words.pop(0)}"
            return text.strip() + ("…" if words else "")
    return ""


def add_card(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: Any
) -> None:
    """Describe a page by Open Graph's tags, from which other sites make a card of a link."""
    if doctree is None:
        return
    base, about = app.config.html_baseurl, first_sentences(doctree)
    card = {
        "og:type": "article",
        "og:site_name": app.config.html_title,
        "og:title": nodes.Text(context["title"]).astext(),
        "og:description": about,
        "og:url": f"{base}{pagename}.html",
        "og:image": f"{base}{CARD}",
        "og:image:alt": "Synthetic tissue with the outlines of its nuclei",
    }
    tags = [
        f'<meta property="{name}" content="{html.escape(html.unescape(text))}" />'
        for name, text in card.items()
    ]
    tags += [
        f'<meta name="description" content="{html.escape(about)}" />',
        '<meta name="twitter:card" content="summary_large_image" />',
    ]
    context["metatags"] = context.get("metatags", "") + "\n".join(tags)


def publish(app: Sphinx, exception: Exception | None) -> None:
    """Finish a build of HTML."""
    if exception is not None or app.builder.name != "html":
        return
    out, base = Path(app.outdir), app.config.html_baseurl
    shrink(out)
    state_sizes(out)
    read_me = READ_ME.format(
        url=app.config.html_theme_options["repository_url"], pages=base
    )
    zip_notebooks(Path(app.srcdir).parent, out / ZIP, read_me)
    pages = sorted(app.env.found_docs)
    (out / "sitemap.xml").write_text(sitemap(base, pages), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("html-page-context", add_card)
    app.connect("build-finished", publish)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
