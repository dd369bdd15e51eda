import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from nucseg.data import synth
from nucseg.data.datasets import Sample
from nucseg.errors import InputError
from nucseg.instances import decode, encode
from nucseg.metrics import score
from nucseg.model.lora import LoRALinear
from nucseg.viz.explorers import ALPHAS, RIDGES, SMOOTHINGS, Explorer, Slider, lora_explorer, watershed_explorer


@pytest.fixture(scope="module")
def layer() -> LoRALinear:
    generator = torch.Generator().manual_seed(0)
    layer = LoRALinear(nn.Linear(12, 20), r=4, alpha=8)
    for weight in (layer.linear.weight, layer.linear.bias, layer.lora_A, layer.lora_B):
        weight.data = torch.randn(weight.shape, generator=generator)
    return layer


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randn(50, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def patch() -> tuple[Sample, np.ndarray]:
    sample = synth.generate("mouse thymus", 1, size=128)
    maps = ndimage.gaussian_filter(encode(sample.labels), (0, 2, 2))
    noise = np.random.default_rng(0).standard_normal(maps.shape)
    maps += 1.2 * ndimage.gaussian_filter(noise, (0, 3, 3)).astype(np.float32)
    return sample, np.clip(maps, 0, 1)


@pytest.fixture(scope="module")
def lora(layer, tokens) -> Explorer:
    return lora_explorer(layer, tokens)


@pytest.fixture(scope="module")
def watershed(patch) -> Explorer:
    return watershed_explorer(*patch, size=96)


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def number(text: str) -> float:
    return float(re.search(r"[\d.,]+(?=%)|[\d.,]+$|[\d,.]+", text)[0].replace(",", ""))


class TestLora:
    def test_at_its_own_rank_and_alpha_the_change_is_that_of_the_layer(self, lora, layer, tokens):
        with torch.no_grad():
            change = (layer(tokens) - layer.linear(tokens)).norm() / layer.linear(tokens).norm()
        assert lora.states[4.0, 8.0]["change"] == f"the output changes by {change:.1%}"

    @pytest.mark.parametrize("rank", [1, 2, 4])
    def test_a_lower_rank_keeps_the_strongest_directions_and_alpha_scales_them(self, lora, layer, tokens, rank):
        u, s, v = np.linalg.svd((layer.lora_B @ layer.lora_A).detach().numpy())
        update = 16 / rank * (u[:, :rank] * s[:rank]) @ v[:rank]
        with torch.no_grad():
            before = layer.linear(tokens).numpy()
        parts = lora.states[float(rank), 16.0]
        expected = np.linalg.norm(tokens.numpy() @ update.T) / np.linalg.norm(before)
        assert number(parts["change"]) == pytest.approx(100 * expected, abs=0.051)
        assert parts["scaling"] == f"scaling alpha / r = {16 / rank:g}"
        heights = [float(y) for y in re.findall(r" ([\d.]+)h0", parts["dots"])]
        largest = np.linalg.svd(update)[1][:rank]  # 40 units a decade, from 0.01 at the bottom
        assert heights == pytest.approx(172 - 40 * (np.log10(largest).clip(-2.05, 2) + 2), abs=0.06)

    def test_parameters_are_those_of_a_layer_of_that_rank(self, lora):
        for rank in (1, 2, 4):
            made = LoRALinear(nn.Linear(12, 20), r=rank, alpha=1)
            count = made.lora_A.numel() + made.lora_B.numel()
            assert lora.states[float(rank), 1.0]["count"].startswith(f"{count:,} parameters, {count / 240:.1%} of")

    def test_ranks_above_the_trained_one_are_left_out(self, lora):
        assert {rank for rank, _ in lora.states} == {1, 2, 4} and {a for _, a in lora.states} == set(ALPHAS)

    def test_invalid_input_is_named(self, layer, tokens):
        for wrong in (None, tokens[:, :5], tokens[0]):
            with pytest.raises(InputError, match=r"inputs of shape \(N, 12\)"):
                lora_explorer(layer, wrong)
        with pytest.raises(InputError, match="train it first"):
            lora_explorer(LoRALinear(nn.Linear(12, 20), r=2, alpha=1), tokens)

    def test_without_a_layer_it_shows_one_of_the_adapter_that_ships(self):
        explorer = lora_explorer()
        parts = explorer.states[8.0, 8.0]
        assert parts["count"].startswith("6,400 parameters") and parts["scaling"].endswith("= 1")
        assert len(explorer._repr_html_().encode()) < 20_000


class TestWatershed:
    @pytest.mark.parametrize("smoothing", SMOOTHINGS)
    @pytest.mark.parametrize("ridge", RIDGES)
    def test_nuclei_and_scores_are_those_of_the_decoder(self, watershed, patch, ridge, smoothing):
        sample, maps = patch
        found = score(sample.labels, decode(maps, ridge=ridge, smooth=smoothing))
        parts = watershed.states[ridge, smoothing]
        assert parts["nuclei"] == f"{found.nuclei_predicted} nuclei of {found.nuclei_true} true"
        assert parts["pq"] == f"PQ {found.pq:.2f}" and parts["lines"].count("M") >= found.nuclei_predicted
        assert parts["kept"].count("M") == found.nuclei_predicted

    def test_a_lower_ridge_merges_peaks_and_more_smoothing_removes_them(self, watershed):
        dots = {at: [parts[name].count("M") for name in ("kept", "merged")] for at, parts in watershed.states.items()}
        assert dots[0.5, 2.0][0] < dots[1.0, 2.0][0] and dots[0.5, 2.0][1] > dots[1.0, 2.0][1] == 0
        assert sum(dots[0.9, 4.0]) < sum(dots[0.9, 0.0])

    def test_a_peak_is_where_the_smoothed_map_is_highest(self, patch, watershed):
        _, maps = patch
        height, labels = ndimage.gaussian_filter(maps[1], 2.0, truncate=3), decode(maps)
        dots = re.findall(r"M(\d+) (\d+)h0", watershed.states[0.9, 2.0]["kept"])
        for x, y in ((int(x) // 2, int(y) // 2) for x, y in dots):
            assert height[y, x] == pytest.approx(height[labels == labels[y, x]].max(), abs=1 / 255)

    def test_maps_must_match_the_sample(self, patch):
        with pytest.raises(InputError, match="give maps of 2 x 128 x 128"):
            watershed_explorer(patch[0], patch[1][:1])


class TestHtml:
    def test_each_state_can_be_read_back_from_the_data(self, watershed):
        data = watershed.data()
        for (ridge, smoothing), parts in watershed.states.items():
            state = data["states"][RIDGES.index(ridge)][SMOOTHINGS.index(smoothing)]
            assert {name: data["values"][i] for name, i in zip(data["names"], state, strict=True)} == parts
        assert len(set(data["values"])) == len(data["values"])

    @pytest.mark.parametrize("kind", ["lora", "watershed"])
    def test_it_is_labelled_small_and_fetches_nothing(self, request, kind):
        explorer = request.getfixturevalue(kind)
        html = explorer._repr_html_()
        page = Page(html + explorer._repr_html_())
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids)) == 6
        assert sorted(a["id"] for a in page.all("input")) == sorted(a["for"] for a in page.all("label"))
        assert all(a.get("aria-label") for _, a in page.tags if a.get("role") == "img")
        assert all(a["src"].startswith("data:image/webp;base64,") for _, a in page.tags if "src" in a)
        assert not re.search(r"https?:|url\(|@import", html) and len(html.encode()) < 90_000

    def test_texts_are_escaped(self):
        hostile = "</script><script>window.harmed = true</script>\"'"
        explorer = Explorer(
            hostile, [Slider(hostile, (1.0,), 1.0, hostile)], lambda v: {"x": hostile}, lambda _: "", ["x"]
        )
        assert len(Page(explorer._repr_html_()).all("script")) == 1

    def test_without_steps_there_is_nothing_to_explore(self):
        for sliders in ([], [Slider("a", (), 1.0)]):
            with pytest.raises(InputError, match="at least one"):
                Explorer("a", sliders, lambda *_: {}, lambda _: "", [])


class TestLive:
    @pytest.mark.parametrize(("kind", "values"), [("lora", (3.0, 5.0)), ("watershed", (0.64, 2.5))])
    def test_it_starts_as_the_page_and_follows_its_sliders_between_the_steps(self, request, kind, values):
        pytest.importorskip("ipywidgets")
        explorer = request.getfixturevalue(kind)
        _, first, second, shown = explorer.live().children
        assert first.tooltip and first.description == explorer.sliders[0].label
        start = explorer.states[tuple(slider.steps[slider.at] for slider in explorer.sliders)]
        for name in explorer.output:
            assert start[name] in shown.value.replace("&#x27;", "'")
        first.value, second.value = values
        assert values not in explorer.states
        for name in explorer.output:
            assert explorer.compute(*values)[name] in shown.value.replace("&#x27;", "'")

    def test_missing_ipywidgets_is_reported(self, lora, monkeypatch):
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
        with pytest.raises(InputError, match="ipywidgets"):
            lora.live()


@pytest.fixture(scope="module")
def url(lora, watershed, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    path.write_text(f"{head}<title>t</title>{lora._repr_html_()}{watershed._repr_html_()}", encoding="utf-8")
    return path.as_uri()


class TestInChromium:
    def seen(self, page, number: int) -> dict[str, str]:
        """Every part that a reader sees."""
        return page.evaluate(
            """n => Object.fromEntries([...document.querySelectorAll('.nucseg-explorer')[n]
            .querySelectorAll('[data-show]')].map(e => [e.dataset.show, e.localName === 'path' ? e.getAttribute('d') :
            e.localName === 'img' ? e.src : e.getAttribute('role') === 'img' ? e.ariaLabel : e.textContent]))""",
            number,
        )

    @pytest.mark.parametrize("kind", ["lora", "watershed"])
    @pytest.mark.parametrize("how", ["keyboard", "mouse"])
    def test_the_picture_follows_each_slider(self, request, visit, complaints, click_at, url, kind, how):
        explorer, page = request.getfixturevalue(kind), visit(url)
        number = ["lora", "watershed"].index(kind)
        other = self.seen(page, 1 - number)
        at = [slider.at for slider in explorer.sliders]
        for i, control in enumerate(page.locator(".nucseg-explorer").nth(number).locator("input").all()):
            if how == "keyboard":
                control.press("ArrowLeft")
                at[i] -= 1
            else:
                click_at(control, 0.01)
                at[i] = 0
            values = tuple(slider.steps[k] for slider, k in zip(explorer.sliders, at, strict=True))
            assert self.seen(page, number) == explorer.states[values]
            assert control.get_attribute("aria-valuetext") == explorer.sliders[i].text(values[i])
        assert self.seen(page, 1 - number) == other and complaints == []

    def test_it_fits_a_phone(self, visit, url):
        page = visit(url, width=360)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360

    @pytest.mark.parametrize("dark", [False, True])
    def test_axe_finds_nothing_serious(self, visit, url, dark):
        axe = pytest.importorskip("axe_playwright_python.sync_playwright")
        found = axe.Axe().run(visit(url, dark=dark)).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")] == []
