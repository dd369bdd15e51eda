"""Every page of the built book, in a browser without a network: nothing missing, and usable by everyone.

Skipped where the book is not built or there is no Chromium; ``make pages`` runs it after ``make book``.
"""

import re
from pathlib import Path

import pytest

HTML = Path(__file__).parents[2] / "book" / "_build" / "html"
PAGES = sorted(p.relative_to(HTML).as_posix() for p in HTML.rglob("*.html") if "_static" not in p.parts)
PAGES = [page for page in PAGES if page != "index.html"]  # which only leads to the first page
TALK = ("console log: [PST]: ", "console log: [togglebutton]: ")  # the theme and an extension say what they do

the_book = pytest.mark.skipif(not PAGES, reason="the book is not built: make book")

# Tables and pictures that stick out of an element around them, or are cut off by one. Those in a box that scrolls
# sideways are fine, as long as the box does not stick out itself. What is folded away is opened first.
OVERFLOWING = """() => {
  document.querySelectorAll('details').forEach(details => details.open = true);
  const name = e => e.localName + [...e.classList].map(c => '.' + c).join('');
  const overflow = e => e.matches('article, :has(article)') ? 'visible' : getComputedStyle(e).overflowX;
  const beyond = (inner, outer) => {
    const item = inner.getBoundingClientRect(), box = outer.getBoundingClientRect();
    if (item.left >= box.left - 1 && item.right <= box.right + 1) return null;
    return `${name(inner)}, ${Math.round(item.width)} px, in ${name(outer)}, ${Math.round(box.width)} px`;
  };
  const fault = item => {
    let inner = item, found = null;
    for (let outer = item.parentElement; outer; outer = outer.parentElement) {
      if (getComputedStyle(outer).display === 'contents') continue;
      if (['auto', 'scroll'].includes(overflow(outer))) {
        [inner, found] = [outer, null];
      } else {
        found ??= beyond(inner, outer);
        if (found && overflow(outer) !== 'visible') return found;
      }
    }
    return found;
  };
  const kinds = 'article :is(table, figure, img, svg, .nucseg-browser, .nucseg-explorer)';
  const items = [...document.querySelectorAll(kinds)];
  return [...new Set(items.filter(item => item.checkVisibility()).map(fault).filter(Boolean))];
}"""

# What paper would cut: things that stick out of the page, or that a box hides in part, as nothing scrolls there.
CUT = """() => {
  const cut = e => {
    if (e.getBoundingClientRect().right > innerWidth + 1) return true;
    for (let box = e; box && !box.matches('article'); box = box.parentElement)
      if (getComputedStyle(box).overflowX !== 'visible' && box.scrollWidth > box.clientWidth + 1) return true;
    return false;
  };
  const items = [...document.querySelectorAll('article :is(table, figure, img, svg, pre, math)')];
  return items.filter(e => e.checkVisibility() && cut(e)).map(e => e.outerHTML.slice(0, 120));
}"""
A4 = 673  # px between the margins


def violations(page) -> list[str]:
    """axe-core's serious and critical ones, as readable lines."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page.wait_for_timeout(400)  # the theme fades its colours in
    return [
        f"{one['id']}: {node['target']} {node['html'][:160]}"
        for one in axe.Axe().run(page).response["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"][:4]
    ]


def faults(page, complaints: list[str]) -> list[str]:
    """Errors reported by the fully loaded page, and pictures without any content."""
    page.wait_for_function("[...document.images].every(image => image.complete)")
    page.wait_for_timeout(500)  # scripts may ask late; Playwright's "networkidle" sometimes never comes
    empty = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.outerHTML)")
    return [*(one for one in complaints if not one.startswith(TALK)), *empty]


@the_book
@pytest.mark.parametrize("path", PAGES)
def test_a_page_loads_without_a_network_and_without_a_complaint(visit, complaints, path):
    page = visit((HTML / path).as_uri())
    assert faults(page, complaints) == []
    assert page.evaluate("document.querySelector('h1') !== null || document.title !== ''")
    assert not page.evaluate("[...document.querySelectorAll('main')].some(m => m.innerText.includes('\\\\frac'))")


@the_book
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_axe_finds_nothing_serious(visit, path, dark):
    assert violations(visit((HTML / path).as_uri(), dark=dark)) == []


@the_book
@pytest.mark.parametrize("path", PAGES)
def test_a_page_fits_a_phone(visit, path):
    assert visit((HTML / path).as_uri(), width=360).evaluate("document.documentElement.scrollWidth") <= 360


@the_book
@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("path", PAGES)
def test_tables_and_figures_stay_within_their_containers(visit, path, width):
    assert visit((HTML / path).as_uri(), width=width).evaluate(OVERFLOWING) == []


@the_book
@pytest.mark.parametrize("path", PAGES)
def test_on_paper_nothing_is_cut_and_no_sidebar_is_in_the_way(visit, path):
    page = visit((HTML / path).as_uri(), width=A4)
    page.emulate_media(media="print")
    assert page.evaluate(CUT) == []
    assert page.evaluate("[...document.querySelectorAll('.bd-sidebar')].some(e => e.checkVisibility())") is False


@the_book
@pytest.mark.parametrize("path", PAGES)
def test_header_cells_have_a_scope_and_pictures_are_small(path):
    html = (HTML / path).read_text(encoding="utf-8")
    assert not re.findall(r"<th\b(?![^>]*\bscope=)[^>]*>", html)
    pictures = {HTML / "_images" / name for name in re.findall(r'src="[^"]*_images/([^"]+)"', html)}
    assert sum(picture.stat().st_size for picture in pictures) < 1.5e6


@the_book
def test_search_engines_and_other_sites_find_what_they_look_for():
    sitemap = (HTML / "sitemap.xml").read_text(encoding="utf-8")
    base = re.findall("<loc>(https://.*/)intro.html</loc>", sitemap)[0]
    made = ("genindex.html", "py-modindex.html", "search.html")
    assert {p.removeprefix(base) for p in re.findall("<loc>(.*)</loc>", sitemap)} == set(PAGES) - set(made)
    for path in set(PAGES) - set(made):
        html = (HTML / path).read_text(encoding="utf-8")
        card = dict(re.findall(r'<meta property="og:(\w+)" content="([^"]*)"', html))
        assert card["url"] == base + path and card["title"] and len(card["description"]) > 20, path
        assert (HTML / card["image"].removeprefix(base)).exists()


@the_book
class TestSliders:
    """The prediction browser in the built page, by keyboard and by mouse."""

    @pytest.fixture
    def page(self, visit):
        return visit((HTML / "chapters" / "predictions.html").as_uri())

    def picture(self, page):
        """What is drawn over the image: the lines, and how opaque they are."""
        return page.evaluate(
            """(root => [[...root.querySelectorAll('.stage path')].map(path => path.getAttribute('d')).join(),
            getComputedStyle(root.querySelector('.stage svg')).opacity])(document.querySelector('.nucseg-browser'))"""
        )

    @pytest.mark.parametrize("part", ["threshold", "ridge", "area", "opacity"])
    @pytest.mark.parametrize("how", ["keyboard", "mouse"])
    def test_each_moves_and_the_picture_changes(self, page, click_at, part, how):
        slider = page.locator(f".nucseg-browser [data-part={part}]").first
        value, before = slider.input_value(), self.picture(page)
        if how == "keyboard":
            slider.press("Home" if part == "opacity" else "End")
        else:
            click_at(slider, 0.2 if part == "opacity" else 0.98)
        assert slider.input_value() != value
        assert self.picture(page) != before

    def test_each_has_a_name_for_a_screen_reader(self, page):
        nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
        sliders = [n for n in nodes if n.get("role", {}).get("value") == "slider"]
        assert len(sliders) >= 7 and all(n["name"]["value"].strip() for n in sliders)


WIDE = '<svg width="2000" height="9"></svg>'


class TestTheChecks:
    """A page with one fault, which the checks above must find."""

    @pytest.fixture
    def write(self, tmp_path):
        def write(body: str) -> str:
            head = '<!doctype html><html lang="en"><meta name="viewport" content="width=device-width"><title>t</title>'
            (tmp_path / "page.html").write_text(
                f"{head}<main><article><h1>t</h1>{body}</article></main></html>", "utf-8"
            )
            return (tmp_path / "page.html").as_uri()

        return write

    @pytest.mark.parametrize(
        ("body", "found"),
        [
            ('<img src="missing.png" alt="">', "failed: file:"),
            ('<link rel="stylesheet" href="missing.css">', "failed: file:"),
            ('<script src="https://example.org/x.js"></script>', "request: https://example.org/x.js"),
            ("<script>fetch('https://example.org/').catch(() => 0)</script>", "request: https://example.org/"),
            ("<script>console.log('x')</script>", "console log: x"),
            ("<script>console.warn('x')</script>", "console warning: x"),
            ("<script>throw Error('x')</script>", "exception: x"),
            ("<script>Promise.reject(Error('x'))</script>", "exception: x"),
            ("<script>setTimeout(() => { throw Error('x') }, 200)</script>", "exception: x"),
            ('<img src="data:image/png;base64,AAAA" alt="">', "<img "),
        ],
    )
    def test_a_complaint_is_heard(self, visit, complaints, write, body, found):
        assert any(found in fault for fault in faults(visit(write(body)), complaints))

    def test_a_page_without_a_fault_passes(self, visit, complaints, write):
        page = visit(write("<p>x</p><table><tr><td>x</td></tr></table><script>console.log('[PST]: x')</script>"))
        assert faults(page, complaints) == violations(page) == page.evaluate(OVERFLOWING) == []

    def test_axe_finds_a_slider_without_a_name(self, visit, write):
        assert any(line.startswith("label: ") for line in violations(visit(write('<input type="range">'))))

    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    def test_axe_finds_pale_text_in_the_colours_asked_for(self, visit, write, dark):
        back, pale, scheme = ("#000", "#555", "dark") if dark else ("#fff", "#bbb", "light")
        style = f"@media (prefers-color-scheme: {scheme}) {{ body {{ background: {back} }} p {{ color: {pale} }} }}"
        page = visit(write(f"<style>{style}</style><p>some words</p>"), dark=dark)
        assert any("color-contrast: ['p']" in line for line in violations(page))

    @pytest.mark.parametrize(
        ("body", "n"),
        [
            (WIDE, 1),
            (f'<div style="overflow-x: auto">{WIDE}</div>', 1),
            ('<pre style="overflow: hidden; width: 50px">incomprehensibilities</pre>', 1),
            (f"<style>@media print {{ svg {{ max-width: 100% }} }}</style>{WIDE}", 0),
            (f"<style>@media print {{ svg {{ display: none }} }}</style>{WIDE}", 0),
            ("<table><tr><td>x</td></tr></table><pre>x</pre>", 0),
        ],
    )
    def test_what_paper_cuts_is_found(self, visit, write, body, n):
        page = visit(write(body), width=A4)
        page.emulate_media(media="print")
        assert len(page.evaluate(CUT)) == n

    @pytest.mark.parametrize("width", [390, 768, 1280])
    @pytest.mark.parametrize(
        ("body", "n"),
        [
            (f"<div>{WIDE}</div>", 1),
            ('<div style="width: 50px"><table><tr><td>incomprehensibilities</td></tr></table></div>', 1),
            ('<div style="width: 50px; overflow: hidden"><svg width="60" height="9"></svg></div>', 1),
            ('<div style="width: 50px"><span><svg width="60" height="9"></svg></span></div>', 1),
            (f'<div style="overflow-x: auto"><div style="overflow: hidden">{WIDE}</div></div>', 1),
            (f"<details><summary>x</summary>{WIDE}</details>", 1),
            ('<div style="overflow-x: auto; width: 2000px"><svg width="3000" height="9"></svg></div>', 1),
            (f'<div style="overflow-x: auto"><div>{WIDE}</div></div>', 0),
            (f"<div hidden>{WIDE}</div>", 0),
        ],
    )
    def test_what_sticks_out_is_found(self, visit, write, body, n, width):
        assert len(visit(write(body), width=width).evaluate(OVERFLOWING)) == n
