"""Every page of the built book, in a browser without a network: nothing missing, and usable by everyone.

Skipped where the book is not built or there is no Chromium; ``make pages`` runs it after ``make book``.
"""

import importlib.util
from pathlib import Path

import pytest
from browser import PROGRAM, Browser

HTML = Path(__file__).parents[2] / "book" / "_build" / "html"
AXE = importlib.util.find_spec("axe_playwright_python")  # for the axe-core that comes with it
OTHERS = ("genindex.html", "search.html", "py-modindex.html")  # the theme's own
PAGES = sorted(p.relative_to(HTML).as_posix() for p in HTML.rglob("*.html") if "_static" not in p.parts)
PAGES = [page for page in PAGES if page != "index.html"]  # which only leads to the first page

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium"),
    pytest.mark.skipif(not PAGES, reason="the book is not built: make book"),
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    chromium = Browser(tmp_path_factory.mktemp("profile"))
    conditions = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    chromium.call("Network.emulateNetworkConditions", **conditions)
    yield chromium
    chromium.close()


def violations(chromium):
    """axe-core's serious and critical ones, as readable lines."""
    chromium.eval("new Promise(done => setTimeout(done, 400))")  # the theme fades its colours in
    chromium.eval((Path(AXE.origin).parent / "axe.min.js").read_text(encoding="utf-8") + "; 0")
    found = chromium.eval("axe.run(document, {resultTypes: ['violations']}).then(r => r.violations)")
    return [
        f"{one['id']}: {node['target']} {node['html'][:160]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"][:4]
    ]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_without_a_network_and_without_a_complaint(chromium, page):
    chromium.open((HTML / page).as_uri())
    assert chromium.eval("document.querySelector('h1') !== null || document.title !== ''")
    assert [one for one in chromium.complaints() if '"type": "log"' not in one] == []
    failed = [e["params"] for e in chromium.events if e.get("method") == "Network.loadingFailed"]
    assert failed == []
    assert chromium.eval("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert not chromium.eval("[...document.querySelectorAll('main')].some(m => m.innerText.includes('\\\\frac'))")


@pytest.mark.skipif(AXE is None, reason="axe-playwright-python is not installed")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_axe_finds_nothing_serious(chromium, page, dark):
    chromium.open((HTML / page).as_uri(), dark=dark)
    assert violations(chromium) == []


@pytest.mark.parametrize("page", [p for p in PAGES if p not in OTHERS])
def test_a_page_fits_a_phone(chromium, page):
    chromium.open((HTML / page).as_uri(), width=360)
    assert chromium.eval("document.documentElement.scrollWidth") <= 360


class TestSliders:
    """The prediction browser in the built page, by keyboard and by mouse."""

    @pytest.fixture
    def page(self, chromium):
        chromium.open((HTML / "chapters" / "predictions.html").as_uri())
        return chromium

    def picture(self, page):
        """What is drawn over the image: the lines, and how opaque they are."""
        return page.eval(
            """(root => [[...root.querySelectorAll('.stage path')].map(path => path.getAttribute('d')).join(),
            getComputedStyle(root.querySelector('.stage svg')).opacity])(document.querySelector('.nucseg-browser'))"""
        )

    @pytest.mark.parametrize("part", ["threshold", "area", "opacity"])
    @pytest.mark.parametrize("how", ["keyboard", "mouse"])
    def test_each_moves_and_the_picture_changes(self, page, part, how):
        slider = f".nucseg-browser [data-part={part}]"
        value, before = page.eval(f"document.querySelector('{slider}').value"), self.picture(page)
        if how == "keyboard":
            page.eval(f"document.querySelector('{slider}').focus()")
            page.press("Home" if part == "opacity" else "End")
        else:
            page.click(slider, 0.2 if part == "opacity" else 0.98)
        assert page.eval(f"document.querySelector('{slider}').value") != value
        assert self.picture(page) != before

    def test_each_has_a_name_for_a_screen_reader(self, page):
        page.call("Accessibility.enable")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        sliders = [n for n in nodes if n.get("role", {}).get("value") == "slider"]
        assert len(sliders) >= 3 and all(n["name"]["value"].strip() for n in sliders)
