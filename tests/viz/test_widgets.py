import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import ndimage
from skimage.draw import polygon2mask

from nucseg.data import synth
from nucseg.data.datasets import Sample
from nucseg.errors import InputError
from nucseg.instances import components, decode, encode
from nucseg.metrics import score
from nucseg.viz import figures, widgets
from nucseg.viz.svg import outline_paths
from nucseg.viz.widgets import KINDS, MIN_AREAS, RIDGES, THRESHOLDS, VIEWS, PredictionBrowser, Scene, browse

HOSTILE = Sample(
    np.full((64, 64, 3), 200, np.uint8),
    np.kron(np.arange(4).reshape(2, 2), np.ones((32, 32))).astype(np.int32),
    "skin <b>& 'hair'",
    '</script><script>window.harmed = true</script>"',
)


def guess(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Target maps as a mediocre model predicts them: some nuclei missing, the rest blurred, and specks of noise."""
    rng = np.random.default_rng(seed)
    keep = rng.random(labels.max() + 1) > 0.1
    maps = ndimage.gaussian_filter(encode(np.where(keep[labels], labels, 0)), (0, 2.5, 2.5))
    maps += 1.6 * ndimage.gaussian_filter(rng.standard_normal(maps.shape), (0, 4, 4))
    return np.clip(maps, 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def items() -> list[widgets.Item]:
    names = (("mouse kidney", 1), ("human spleen", 1), ("human spleen", 2))
    samples = [*(synth.generate(*name, size=192) for name in names), HOSTILE]
    return [(sample, guess(sample.labels, seed)) for seed, sample in enumerate(samples)]


@pytest.fixture(scope="module")
def browser(items) -> PredictionBrowser:
    return PredictionBrowser(items, min_areas=(0, 50, 400, 1200), size=96)


@pytest.fixture(scope="module")
def data(browser) -> dict:
    return browser.data()


class Page(HTMLParser):
    """Start tags of an HTML page, and the text of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        if self.lasttag == "script" and text.strip():
            self.scripts.append(text)

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def polygon(line: str) -> np.ndarray:
    """(n, 2) array of x, y in px of the single closed line in SVG path data."""
    start, steps = line.removeprefix("M").removesuffix("z").split("l")
    numbers = [np.array(re.findall(r"-?\d+", part), int).reshape(-1, 2) for part in (start, steps)]
    return (np.concatenate(numbers).cumsum(axis=0) - 1) / 2


class TestFrames:
    @pytest.mark.parametrize("min_area", MIN_AREAS)
    @pytest.mark.parametrize(("threshold", "ridge"), [*((t, 0.9) for t in THRESHOLDS), *((0.5, r) for r in RIDGES)])
    def test_scores_and_counts_are_those_of_the_decoded_label_map(self, items, threshold, ridge, min_area):
        for sample, maps in items:
            predicted = decode(maps, threshold, ridge, min_area=min_area)
            frame = Scene(sample, maps).frame(threshold, ridge, min_area)
            assert frame.scores == score(sample.labels, predicted)
            n = {kind: len(lines) for kind, lines in frame.lines.items()}
            assert (n["truth"], n["prediction"]) == (frame.scores.nuclei_true, frame.scores.nuclei_predicted)
            found, missed, spurious = figures.errors(sample.labels, predicted)
            assert n["found"] == len(found)
            assert (n["missed"] + n["split"], n["spurious"] + n["merged"]) == (len(missed), len(spurious))

    def test_a_frame_does_not_depend_on_those_computed_before(self, items):
        scene = Scene(*items[0])
        for step in ((0.5, 0.9, 0), (0.2, 0.9, 100), (0.5, 0.9, 100), (0.5, 0.7, 0), (0.5, 0.9, 0), (0.2, 0.9, 0)):
            assert scene.frame(*step) == Scene(*items[0]).frame(*step)

    def test_a_single_map_is_decoded_as_foreground(self, items):
        sample, maps = items[1]
        for ridge in (0.5, 0.9):
            frame = Scene(sample, maps[:1]).frame(0.4, ridge, 50)
            assert frame.scores == score(sample.labels, components(maps[0], 0.4, 50))

    def test_mergers_and_splits(self):
        truth, predicted = np.zeros((2, 40, 60), np.int32)
        truth[5:15, 5:15], truth[5:15, 15:25] = 1, 2  # one prediction covers both
        predicted[5:15, 5:25] = 1
        truth[5:35, 30:40] = 3  # holds two predictions
        predicted[5:19, 30:40], predicted[21:35, 30:40] = 2, 3
        truth[25:35, 45:55] = 4  # missed: two specks inside do not make it split
        predicted[28:30, 48:50], predicted[32:34, 52:54] = 4, 5
        predicted[1:4, 45:55] = 6  # no nucleus here
        frame = Scene(Sample(np.zeros((40, 60, 3), np.uint8), truth, "t", "s"), encode(predicted)).frame(0.5, 0.9, 0)
        counts = {kind: len(frame.lines[kind]) for kind in VIEWS["errors"]}
        assert counts == {"found": 0, "missed": 3, "split": 1, "spurious": 5, "merged": 1}

    def test_lines_follow_the_outlines_of_nuclei(self, items):
        labels = items[1][0].labels
        lines = outline_paths(labels)
        assert sorted(lines) == [i for i in np.unique(labels) if i]
        for i, line in lines.items():
            if line.count("M") == 1:
                y_x = polygon(line)[:, ::-1]
                drawn, mask = polygon2mask(labels.shape, y_x), labels == i
                rim = ndimage.binary_dilation(mask) & ~ndimage.binary_erosion(mask)
                assert not (drawn ^ mask)[~rim].any()

    def test_a_nucleus_that_two_maps_share_is_traced_once_and_the_same(self, items):
        labels = items[1][0].labels
        known: dict = {}
        first = outline_paths(labels, known)
        count = len(known)
        moved = np.where(labels == 1, 0, labels)
        moved[:, -1] = 0  # cuts the nuclei at the right edge
        assert outline_paths(moved, known) == outline_paths(moved)
        same = [i for i in first if i != 1 and not (labels[:, -1] == i).any()]
        assert same and len(known) <= count + len(first) - len(same)

    def test_a_nucleus_of_one_pixel_has_a_line(self):
        labels = np.zeros((9, 9), np.int32)
        labels[4, 6] = 1
        assert np.ptp(polygon(outline_paths(labels)[1]), axis=0).tolist() == [1, 1]

    @pytest.mark.parametrize("shape", [(2, 64, 32), (3, 64, 64), (64, 64)])
    def test_maps_must_match_the_sample(self, shape):
        with pytest.raises(InputError, match=r"maps of .* have shape"):
            Scene(HOSTILE, np.zeros(shape, np.float32))


class TestData:
    def test_every_sample_has_all_steps(self, data):
        assert [len(data[name]) for name in ("samples", "thresholds", "ridges", "areas")] == [4, 5, 4, 4]
        for sample in data["samples"]:
            assert np.shape(sample["steps"]) == (5, 4, 4)
            assert set(np.ravel(sample["steps"])) == set(range(len(sample["frames"])))

    def test_each_step_refers_to_the_lines_and_scores_of_its_frame(self, browser, data, items):
        scenes = {scene.name: scene for scene in (Scene(*item) for item in items)}
        for sample in data["samples"]:
            scene = scenes[sample["name"]]
            for t, r, a in ((0, 0, 0), (2, 2, 1), (2, 0, 1), (4, 3, 3)):
                packed = sample["frames"][sample["steps"][t][r][a]]
                frame = scene.frame(browser.thresholds[t], browser.ridges[r], browser.min_areas[a])
                for kind in VIEWS["errors"]:
                    assert [sample["lines"][i] for i in packed[kind]] == frame.lines[kind]
                assert [sample["lines"][i] for i in sample["truth"]] == frame.lines["truth"]
                assert packed["pq"] == pytest.approx(frame.scores.pq, abs=1e-4)
                predicted = sorted(line for kind in ("found", "spurious", "merged") for line in frame.lines[kind])
                assert predicted == sorted(frame.lines["prediction"])

    def test_nothing_is_stored_twice(self, data):
        for sample in data["samples"]:
            assert len(set(sample["lines"])) == len(sample["lines"])
            frames = [json.dumps(frame) for frame in sample["frames"]]
            assert len(set(frames)) == len(frames)
        assert any(len(sample["frames"]) < 80 for sample in data["samples"])

    def test_samples_are_sorted_by_name(self, data):
        names = [sample["name"] for sample in data["samples"]]
        assert names == sorted(names) and "human spleen synthetic_0001" in names

    def test_a_sample_of_the_usual_size_needs_less_than_130_kB(self):
        sample = synth.generate("human liver", 1)
        noise = np.random.default_rng(0).normal(
            0, 6, sample.image.shape
        )  # real images compress worse than synthetic ones
        noisy = Sample(np.clip(sample.image + noise, 0, 255).astype(np.uint8), sample.labels, "a", "b")
        html = PredictionBrowser([(noisy, guess(sample.labels))])._repr_html_()
        assert len(html.encode()) < 130_000

    def test_invalid_arguments_are_named(self, items):
        for arguments in ({"thresholds": ()}, {"ridges": ()}, {"min_areas": ()}, {"min_areas": (-1,)}, {"size": 0}):
            with pytest.raises(InputError, match="at least one threshold"):
                PredictionBrowser(items[:1], **arguments)
        with pytest.raises(InputError, match="between 0 and 1"):
            PredictionBrowser(items[:1], thresholds=(0.5, 1.5))
        with pytest.raises(InputError, match="between 0 and 1"):
            PredictionBrowser(items[:1], ridges=(0.9, 1.1))
        with pytest.raises(InputError, match="no images to browse"):
            PredictionBrowser([])


class TestHtml:
    @pytest.fixture
    def html(self, browser) -> str:
        return browser._repr_html_()

    @pytest.fixture
    def page(self, html) -> Page:
        return Page(html)

    def test_two_browsers_on_a_page_share_no_id(self, html, browser):
        ids = [a["id"] for _, a in Page(html + browser._repr_html_()).tags if "id" in a]
        assert len(ids) > 20 and len(set(ids)) == len(ids)

    def test_every_input_has_a_label_and_every_label_an_input(self, page):
        inputs = [a["id"] for a in page.all("input", "select")]
        assert len(inputs) == 13 and sorted(inputs) == sorted(a["for"] for a in page.all("label"))
        ids = {a["id"] for _, a in page.tags if "id" in a}
        (output,) = page.all("output")
        assert output["aria-live"] == "polite" and set(output["for"].split()) <= ids

    def test_sliders_have_all_steps_and_start_at_the_benchmark_s_values(self, page):
        ranges = {a["data-part"]: a for a in page.all("input") if a["type"] == "range"}
        found = {part: (a["min"], a["max"], a["value"], a["aria-valuetext"]) for part, a in ranges.items()}
        assert found["threshold"] == ("0", "4", "2", "0.5") and found["area"] == ("0", "3", "1", "50 px")
        assert found["ridge"] == ("0", "3", "2", "0.9") and found["zoom"] == ("1", "4", "1", "1 ×")
        assert found["opacity"] == ("0", "100", "90", "90%")

    def test_the_ridge_s_slider_is_hidden_where_nothing_is_split(self, items):
        sample, maps = items[1]
        for some, hidden in ((maps, False), (maps[:1], True)):
            browser = PredictionBrowser([(sample, some)], thresholds=(0.5,), min_areas=(50,), size=64)
            ranges = [a for a in Page(browser._repr_html_()).all("div") if a.get("class") == "range"]
            assert ["hidden" in a for a in ranges] == [False, hidden, False, False, False]

    def test_sliders_with_other_steps_start_nearest_to_the_benchmark_s_values(self, items):
        page = Page(PredictionBrowser(items[:1], thresholds=(0.9, 0.45, 0.3), min_areas=(10,))._repr_html_())
        ranges = {a["data-part"]: (a["max"], a["value"]) for a in page.all("input") if a["type"] == "range"}
        assert ranges["threshold"] == ("2", "1") and ranges["area"] == ("0", "0")

    def test_names_are_escaped_and_reach_the_script_unchanged(self, page, browser, data):
        assert len(page.scripts) == 1 and not page.all("b")[len(KINDS) :]
        assert HOSTILE.tissue in [a.get("value") for a in page.all("option")]
        text = page.scripts[0]
        sent = json.loads(text[text.rindex('", {') + 3 : text.rindex(");")])
        assert sent == json.loads(json.dumps(data))
        assert f"{HOSTILE.tissue} {HOSTILE.stem}" in [sample["name"] for sample in sent["samples"]]

    def test_page_fetches_nothing(self, html, page):
        assert all(a["src"].startswith("data:image/webp;base64,") for _, a in page.tags if "src" in a)
        assert not page.all("link", "iframe", "form") and not re.search(r"https?:|url\(|@import", html)

    def test_first_image_is_shown_without_the_script(self, html, page, browser, data, items):
        sample = data["samples"][0]
        (image,) = page.all("img")
        assert image["src"] == sample["image"] and sample["name"] in image["alt"] and "0.5" in image["alt"]
        frame = next(scene for scene in map(Scene, *zip(*items, strict=True)) if scene.name == sample["name"]).frame(
            0.5, 0.9, 50
        )
        assert f'd="{"".join(frame.lines["prediction"])}"' in html
        assert f"<span>PQ {frame.scores.pq:.2f}</span>" in html

    def test_colours_are_those_of_the_figures(self, html):
        for colour in (figures.TRUTH, figures.PREDICTION, figures.FOUND, figures.MISSED, figures.SPURIOUS):
            assert f"stroke:{colour};" in html


class TestBrowse:
    @pytest.fixture
    def box(self, items):
        pytest.importorskip("ipywidgets")
        return browse(items)

    @pytest.fixture
    def controls(self, box) -> dict:
        inner = [child for outer in box.children for child in getattr(outer, "children", [outer])]
        return {child.description: child for child in inner if child.description}

    def test_every_control_has_a_description_and_a_tooltip(self, controls):
        assert len(controls) == 12 and all(control.tooltip for control in controls.values())

    def test_each_change_updates_the_picture(self, box, controls):
        picture, seen = box.children[-1], set()
        seen.add(picture.value)
        for name, value in (
            ("Probability threshold", 0.3),
            ("Ridge between peaks", 0.5),
            ("Minimum area, px", 150),
            ("Opacity, %", 40),
            ("Zoom", 3),
            ("Outlines", "errors"),
            ("Image", 1),
        ):
            controls[name].value = value
            assert picture.value not in seen
            seen.add(picture.value)
        assert "threshold 0.3, ridge 0.5, minimum area 150 px" in picture.value
        assert "--overlay:0.4;--zoom:3" in picture.value and " data-zoomed " in picture.value
        controls["Outlines"].value = "side by side"
        alts = [a["alt"] for a in Page(picture.value).all("img")]
        assert len(alts) == 2 and "true nuclei" in alts[0] and "predicted nuclei" in alts[1]

    def test_buttons_step_through_the_list_and_around_its_end(self, controls):
        image = controls["Image"]
        for name, wanted in (("Next", 1), ("Next", 2), ("Previous", 1), ("Previous", 0), ("Previous", 3), ("Next", 0)):
            controls[f"{name} image"].click()
            assert image.value == wanted
        controls["Tissue"].value = "human spleen"
        shown = [i for _, i in image.options]
        controls["Next image"].click()
        assert image.value == shown[1]

    def test_a_single_map_has_no_ridge(self, items):
        sample, maps = items[1]
        box = browse([(sample, maps[:1])])
        assert next(c for c in box.children if "Ridge" in getattr(c, "description", "")).layout.display == "none"

    def test_scores_are_those_at_the_current_threshold_and_area(self, box, controls, items):
        controls["Probability threshold"].value, controls["Minimum area, px"].value = 0.64, 35
        controls["Ridge between peaks"].value = 0.72
        sample, maps = min(items, key=lambda item: Scene(*item).name)
        scores = score(sample.labels, decode(maps, 0.64, 0.72, min_area=35))
        assert f"<span>PQ {scores.pq:.2f}</span> <span>AJI {scores.aji:.2f}</span>" in box.children[-1].value

    def test_list_is_filtered_and_sorted_and_keeps_the_selection(self, box, controls):
        image = controls["Image"]
        assert len(image.options) == 4 and all(" — PQ 0." in words for words, _ in image.options)
        image.value = 1
        controls["Tissue"].value = "human spleen"
        assert len(image.options) == 2 and image.value == 1
        controls["Sort by"].value = "dice"
        controls["Order"].value = "descending"
        values = [float(words.split()[-1]) for words, _ in image.options]
        assert values == sorted(values, reverse=True) and image.value == 1
        controls["Tissue"].value = "mouse kidney"
        assert [i for _, i in image.options] == [image.value] and "mouse kidney" in box.children[-1].value

    def test_names_are_escaped(self, box, controls):
        controls["Tissue"].value = HOSTILE.tissue
        assert not Page(box.children[-1].value).scripts and "&lt;/script&gt;" in box.children[-1].value

    def test_missing_ipywidgets_is_reported(self, items, monkeypatch):
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
        with pytest.raises(InputError, match="ipywidgets"):
            browse(items)


ROOT = "document.querySelectorAll('.nucseg-browser')"


@pytest.fixture(scope="module")
def url(browser, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    fragments = browser._repr_html_() + browser._repr_html_()
    head = '<!doctype html><html lang="en"><meta name="viewport" content="width=device-width"><title>t</title>'
    path.write_text(head + fragments, encoding="utf-8")
    return path.as_uri()


class TestInChromium:
    @pytest.fixture
    def page(self, visit, complaints, url):
        page = visit(url)
        yield page
        assert complaints == []
        assert not page.evaluate("window.harmed")

    def seen(self, page, number: int = 0) -> list:
        """What a reader sees: image, alternative text, lines and their opacity, scores, and the list of images."""
        return page.evaluate(
            f"""(root => [root.querySelector('img').src, root.querySelector('img').alt,
            [...root.querySelectorAll('.stage path')].map(path => path.getAttribute('d')).join(),
            getComputedStyle(root.querySelector('.stage svg')).opacity, root.querySelector('output').textContent,
            [...root.querySelector('select').options].map(option => option.text)])({ROOT}[{number}])"""
        )

    def changed(self, page, before: list) -> set[str]:
        names = ("image", "alt", "lines", "opacity", "scores", "list")
        return {name for name, a, b in zip(names, before, self.seen(page), strict=True) if a != b}

    def test_script_draws_the_same_as_the_static_page(self, page, browser):
        static = Page(browser._repr_html_())
        image, alt, lines, opacity, scores, _ = self.seen(page)
        assert [image, alt] == [static.all("img")[0][key] for key in ("src", "alt")]
        paths = [a["d"] for a in static.all("path")]
        assert lines == ",".join(paths[: 2 * len(KINDS)]) and opacity == "0.9" and scores.startswith("PQ 0.")

    @pytest.mark.parametrize("how", ["keyboard", "mouse"])
    @pytest.mark.parametrize(
        ("part", "changes"),
        [
            ("threshold", {"alt", "lines", "scores", "list"}),
            ("ridge", {"alt", "lines", "scores", "list"}),
            ("area", {"alt", "lines", "scores", "list"}),
            ("opacity", {"opacity"}),
        ],
    )
    def test_each_slider_changes_the_picture(self, page, click_at, part, changes, how):
        before, other = self.seen(page), self.seen(page, 1)
        slider = page.locator(f"[data-part={part}]").first
        value = slider.input_value()
        if how == "keyboard":
            slider.press("ArrowRight")
        else:
            click_at(slider, 0.25 if part == "opacity" else 0.99)
        assert slider.input_value() != value
        assert self.changed(page, before) == changes
        assert self.seen(page, 1) == other
        text = page.locator(f"[data-part={part}-value]").first.text_content()
        assert text and slider.get_attribute("aria-valuetext") == text

    def test_views_can_be_selected_by_keyboard_and_mouse(self, page):
        before = self.seen(page)
        page.locator("input[value=prediction]").first.press("ArrowRight")
        assert self.changed(page, before) == {"alt", "lines"}
        assert "missed" in self.seen(page)[1]
        shown = "[...document.querySelectorAll('.legend span')].filter(e => e.offsetParent).map(e => e.className)"
        assert page.evaluate(f"{ROOT}[0].querySelectorAll('.legend > :not([hidden])').length") == 5
        page.locator("input[value=truth]").first.click()
        assert page.evaluate(shown)[0] == "truth" and "true nuclei" in self.seen(page)[1]

    def test_arrow_key_selects_the_next_image(self, page):
        before = self.seen(page)
        page.locator("[data-part=image]").first.press("ArrowDown")
        assert self.changed(page, before) == {"image", "alt", "lines", "scores"}

    @pytest.mark.parametrize("how", ["keyboard", "mouse"])
    def test_buttons_step_through_the_list_and_around_its_end(self, page, how):
        shown = [text.split(" — ")[0] for text in self.seen(page)[-1]]

        def press(name: str) -> str:
            button = page.get_by_role("button", name=name).first
            button.press("Enter") if how == "keyboard" else button.click()
            return self.seen(page)[1].split(":")[0]

        assert [press("Next image") for _ in shown] == [*shown[1:], shown[0]]
        assert press("Previous image") == shown[-1]

    def test_side_by_side_shows_truth_and_prediction_of_one_image(self, page):
        prediction = self.seen(page)[2]
        page.locator("input[value=truth]").first.check()
        truth = self.seen(page)[2]
        page.locator("input[value='side by side']").first.check()
        stages = page.evaluate(
            f"""[...{ROOT}[0].querySelectorAll('.stage')].map(stage => [stage.querySelector('img').src,
            [...stage.querySelectorAll('path')].map(path => path.getAttribute('d')).join(),
            stage.getBoundingClientRect().width])"""
        )
        assert [lines for _, lines, _ in stages] == [truth, prediction]
        assert stages[0][0] == stages[1][0] and abs(stages[0][2] - stages[1][2]) < 1
        page.locator("input[value=prediction]").first.check()
        assert page.evaluate(f"{ROOT}[0].querySelectorAll('.stage').length") == 1 and self.seen(page)[2] == prediction

    def test_zoom_keeps_the_centre_and_both_sides_scroll_together(self, page):
        page.locator("input[value='side by side']").first.check()
        page.locator("[data-part=zoom]").first.press("ArrowRight")
        stage = page.locator(".stage").first
        where = "s => [s.scrollLeft, s.scrollTop, s.scrollWidth, s.clientWidth, s.tabIndex]"
        left, top, whole, shown, tab = stage.evaluate(where)
        assert abs(whole - 2 * shown) <= 2 and abs(left + shown / 2 - whole / 2) <= 2 and top > 0 and tab == 0
        stage.press("ArrowRight")
        page.wait_for_timeout(300)
        assert stage.evaluate(where)[0] > left
        assert page.locator(".stage").nth(1).evaluate(where)[:2] == stage.evaluate(where)[:2]
        page.locator("[data-part=zoom]").first.press("Home")
        left, _, whole, shown, tab = stage.evaluate(where)
        assert (left, tab) == (0, -1) and abs(whole - shown) <= 1

    @pytest.mark.parametrize("dark", [False, True])
    def test_axe_finds_nothing_serious(self, visit, url, dark):
        axe = pytest.importorskip("axe_playwright_python.sync_playwright")
        page = visit(url, dark=dark)
        page.locator("[data-part=zoom]").first.press("ArrowRight")
        found = axe.Axe().run(page).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")] == []

    def choose(self, page, part: str, value: str) -> None:
        page.locator(f"[data-part={part}]").first.select_option(value)

    def test_list_is_filtered_and_sorted_by_the_scores_it_shows(self, page):
        self.choose(page, "tissue", "human spleen")
        assert all(words.startswith("human spleen") for words in self.seen(page)[-1])
        assert "human spleen" in self.seen(page)[1]  # the image shown is on the list
        self.choose(page, "tissue", "")
        names = self.seen(page)[-1]
        assert len(names) == 4 and names == sorted(names)
        for key, words in (("pq", "PQ"), ("aji", "AJI"), ("dice", "Dice")):
            self.choose(page, "sort", key)
            for order, sign in (("ascending", 1), ("descending", -1)):
                self.choose(page, "order", order)
                assert all(f"— {words} " in text for text in self.seen(page)[-1])
                values = [sign * float(text.split()[-1]) for text in self.seen(page)[-1]]
                assert values == sorted(values)

    def test_every_control_has_a_name_for_assistive_technology(self, page):
        nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
        named = [(n["role"]["value"], n["name"]["value"]) for n in nodes if not n["ignored"] and "name" in n]

        def names_of(role: str) -> list[str]:
            return [name for other, name in named if other == role]

        assert names_of("slider") == 2 * [
            *("Probability threshold", "Ridge between peaks", "Minimum area"),
            *("Opacity of the outlines", "Zoom"),
        ]
        assert names_of("combobox") == 2 * ["Image", "Tissue", "Sort by", "Order"]
        assert names_of("radio") == 2 * ["truth", "prediction", "errors", "side by side"]
        assert names_of("button") == 2 * ["Previous image", "Next image"]
        assert names_of("image") == [self.seen(page, n)[1] for n in (0, 1)]

    def test_it_fits_the_width_of_a_phone(self, visit, complaints, url):
        page = visit(url, width=360)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("document.querySelector('input[type=range]').offsetWidth") > 280
        assert complaints == []
