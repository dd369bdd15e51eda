"""Small widgets with sliders: what LoRA's rank and alpha do to a layer, and what ridge and smoothing do to nuclei.

`lora_explorer` and `watershed_explorer` return an `Explorer`. As the last value of a cell it is HTML with all states
computed in advance, which works in a static page without a kernel. Its method `Explorer.live` returns the same as
ipywidgets with finer steps, computed at each move.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import product
from string import Template
from typing import Any
from uuid import uuid4

import matplotlib
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from nucseg.data.datasets import Sample
from nucseg.data.synth import generate
from nucseg.errors import InputError
from nucseg.inference.segmenter import load
from nucseg.instances import CHANNELS, MIN_AREA, RIDGE, SMOOTH_PX, renumber, split
from nucseg.metrics import errors, score
from nucseg.model.lora import LoRALinear
from nucseg.model.network import NucleiModel, place, predict
from nucseg.viz import figures
from nucseg.viz.svg import Known, data_uri, outline_paths

Parts = dict[str, str]  # what the picture and the text below it show, by name
RANKS, ALPHAS = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32)
RIDGES, SMOOTHINGS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0), (0.0, 1.0, 2.0, 3.0, 4.0)  # ratios; px
B_AT, A_AT = 126, 160  # where the drawing has B and A
LAYER = "encoder.layers.2.blocks.2.mlp.fc1"  # shown by default: of medium depth, with a medium change


@dataclass(frozen=True)
class Slider:
    """A slider of an `Explorer`: its label, its steps in the static page, and ``fine`` ones for a running notebook."""

    label: str
    steps: tuple[float, ...]
    start: float
    unit: str = ""
    fine: tuple[float, ...] = ()

    @property
    def at(self) -> int:
        """Index of the step nearest to ``start``."""
        return min(range(len(self.steps)), key=lambda i: abs(self.steps[i] - self.start))

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:g} {self.unit}".strip()


class Explorer:
    """Sliders and a picture that follows them, as HTML that needs no kernel.

    ``label``: name of the whole, for screen readers. ``compute``: from one value per slider to the parts shown.
    ``picture``: from parts to HTML in which `show` marks the elements to change. ``output``: names of the parts in the
    line of text below the sliders. All states are computed here. Raises ``InputError`` without sliders or steps.
    """

    def __init__(
        self,
        label: str,
        sliders: Sequence[Slider],
        compute: Callable[..., Parts],
        picture: Callable[[Parts], str],
        output: Sequence[str],
    ) -> None:
        if not sliders or not all(slider.steps for slider in sliders):
            raise InputError("An explorer needs at least one slider, each with at least one step.")
        self.label, self.sliders, self.compute, self.picture, self.output = label, sliders, compute, picture, output
        self.states = {values: compute(*values) for values in product(*(slider.steps for slider in sliders))}

    def data(self) -> dict[str, Any]:
        """Data for the script: each state as indices of ``values``, in which each text is stored once."""
        texts: dict[str, int] = {}
        names = list(next(iter(self.states.values())))
        packed = [[texts.setdefault(parts[name], len(texts)) for name in names] for parts in self.states.values()]
        shape = [len(slider.steps) for slider in self.sliders]
        return {
            "names": names,
            "steps": [[slider.text(step) for step in slider.steps] for slider in self.sliders],
            "states": np.reshape(packed, (*shape, len(names))).tolist(),
            "values": list(texts),
        }

    def _repr_html_(self) -> str:
        key = f"nucseg-{uuid4().hex[:12]}"  # unique, because a page may hold several
        parts = self.states[tuple(slider.steps[slider.at] for slider in self.sliders)]
        data = json.dumps(self.data(), ensure_ascii=False, separators=(",", ":"))
        return Template(_asset("explorer.html")).substitute(
            id=key,
            label=escape(self.label),
            css=_asset("explorer.css"),
            picture=self.picture(parts),
            sliders="\n".join(_range(f"{key}-{i}", slider) for i, slider in enumerate(self.sliders)),
            output=self._output(parts),
            script=_asset("explorer.js").strip(),
            data=data.replace("<", "\\u003c"),  # else a text could close the script element
        )

    def _output(self, parts: Parts) -> str:
        return " ".join(f"<span{show(name)}>{escape(parts[name])}</span>" for name in self.output)

    def live(self) -> Any:
        """The same for a running notebook, with finer steps: an ``ipywidgets.VBox``.

        Make it the last value of a cell to show it. Raises ``InputError`` if ipywidgets is not installed.
        """
        try:
            import ipywidgets
        except ImportError as error:
            raise InputError("live needs ipywidgets: install 'nucseg[book]', or show the explorer itself.") from error
        style = ipywidgets.HTML(f"<style>{_asset('explorer.css')}</style>")
        look = {"style": {"description_width": "11em"}, "layout": {"width": "36em", "max_width": "100%"}}
        controls = [
            ipywidgets.SelectionSlider(
                options=[(slider.text(step), step) for step in slider.fine or slider.steps],
                value=min(slider.fine or slider.steps, key=lambda step: abs(step - slider.start)),
                description=slider.label,
                tooltip=slider.label,
                **look,
            )
            for slider in self.sliders
        ]
        shown = ipywidgets.HTML()

        def draw(_: Any = None) -> None:
            parts = self.compute(*(control.value for control in controls))
            body = f"{self.picture(parts)}<output>{self._output(parts)}</output>"
            shown.value = f'<div class="nucseg-explorer">{body}</div>'

        for control in controls:
            control.observe(draw, "value")
        draw()
        return ipywidgets.VBox([style, *controls, shown])


def show(name: str) -> str:
    """Attribute that makes an element show the part ``name``: a path's data, an image's source, a label or a text."""
    return f' data-show="{name}"'


def _asset(name: str) -> str:
    return (resources.files("nucseg") / "assets" / name).read_text(encoding="utf-8")


def _range(key: str, slider: Slider) -> str:
    text = escape(slider.text(slider.steps[slider.at]))
    return (
        f'<div class="range"><label for="{key}">{escape(slider.label)}</label><span aria-hidden="true">{text}</span>'
        f'<input type="range" id="{key}" min="0" max="{len(slider.steps) - 1}" value="{slider.at}" '
        f'aria-valuetext="{text}" autocomplete="off"></div>'
    )


# ---------------------------------------------------------------- LoRA


def lora_explorer(layer: LoRALinear | None = None, inputs: Tensor | None = None) -> Explorer:
    """Sliders for rank and alpha of a trained LoRA layer: shapes, singular values, and the change of its output.

    ``layer``: a trained `nucseg.model.lora.LoRALinear`, unmerged. ``inputs``: (N, in_features) tokens to measure the
    change of the output with. Without ``layer``, a layer of the adapter nuinsseg-1 and its inputs for one image of
    synthetic tissue. A rank r below the trained one keeps the r strongest directions of B A (its truncated singular
    value decomposition); the update is then scaled by alpha / r, as LoRA does. Ranks above the trained one are left
    out. Raises ``InputError`` for a layer without inputs, inputs of another width, or an untrained layer (B = 0).

    The change is ‖(alpha / r) B A x‖ / ‖W0 x + b‖ (Frobenius norms over the tokens).
    """
    if layer is None:
        layer, inputs = _default_layer()
    weight = layer.linear.weight.detach().float()
    if inputs is None or inputs.ndim != 2 or inputs.shape[1] != weight.shape[1]:
        raise InputError(f"Give inputs of shape (N, {weight.shape[1]}) with the layer: the tokens that it receives.")
    _, own, right = torch.linalg.svd((layer.lora_B @ layer.lora_A).detach().float(), full_matrices=False)
    if not own[0] > 0:
        raise InputError("This layer's B is zero, so it has no update to show: train it first, or leave layer out.")
    frozen = torch.linalg.svdvals(weight).numpy()
    with torch.no_grad():
        before = layer.linear(inputs.to(layer.linear.weight.dtype)).float().norm().item()
        along = (inputs.float() @ right.T).norm(dim=0).numpy()  # of each direction, over the tokens
    values = own.numpy()[: layer.r]
    rows, columns = weight.shape

    def compute(rank: float, alpha: float) -> Parts:
        kept, scaling = values[: int(rank)], alpha / rank
        change = scaling * float(np.linalg.norm(kept * along[: len(kept)])) / before
        count = int(rank) * (rows + columns)
        words = [f"{v:.2g}" for v in scaling * kept[:4]]
        return {
            "b": _box(B_AT, 12, rank * _scale(rows, columns), rows * _scale(rows, columns)),
            "a": _box(A_AT, 12, columns * _scale(rows, columns), rank * _scale(rows, columns)),
            "dots": "".join(f"M{_across(i):.1f} {_level(v):.1f}h0" for i, v in enumerate(scaling * kept)),
            "shapes": f"The frozen weight W0, {rows} by {columns}, beside B, {rows} by {rank:g}, and A, {rank:g} by "
            f"{columns}, drawn to scale.",
            "spectrum": f"The first singular values of the update on a logarithmic axis, {', '.join(words)}"
            f"{' and so on' if len(kept) > 4 else ''}; beyond rank {rank:g} there are none.",
            "scaling": f"scaling alpha / r = {scaling:g}",
            "count": f"{count:,} parameters, {count / (rows * columns):.1%} of W₀’s",
            "kept": f"{(kept**2).sum() / (values**2).sum():.0%} of the trained B A kept (squared norm)",
            "change": f"the output changes by {change:.1%}",
        }

    title = "LoRA explorer: rank and alpha of one layer"
    fine = tuple(float(r) for r in range(1, layer.r + 1))
    ranks = Slider("Rank r", tuple(float(r) for r in RANKS if r <= layer.r), float(layer.r), fine=fine)
    start = layer.scaling * layer.r
    alphas = Slider("Alpha", tuple(map(float, ALPHAS)), start, fine=tuple(float(a) for a in range(1, 33)))
    return Explorer(
        title,
        (ranks, alphas),
        compute,
        lambda parts: _lora_picture(parts, rows, columns, frozen),
        ("scaling", "count", "kept", "change"),
    )


def _default_layer() -> tuple[LoRALinear, Tensor]:
    """A layer of the adapter nuinsseg-1 and the tokens that it receives for an image of synthetic tissue."""
    model: NucleiModel = place(load("nuinsseg-1", device="cpu"), torch.device("cpu"), "float32")
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, LoRALinear)
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, received: seen.append(received[0].detach()))
    predict(model, generate("human liver", 1, 256).image)
    handle.remove()
    return layer, seen[0].flatten(0, -2)


def _scale(rows: int, columns: int) -> float:
    """Units of the drawing per row or column of a weight."""
    return min(150 / rows, 100 / columns)


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f}h{max(width, 0.7):.1f}v{max(height, 0.7):.1f}h{-max(width, 0.7):.1f}z"


def _across(i: int) -> float:
    return 46 + 26 * i


def _level(value: float) -> float:
    """Height of a singular value in the drawing: a logarithmic axis from 0.01 to 100, 40 units a decade."""
    return 172 - 40 * float(np.clip(np.log10(max(value, 1e-9)) + 2, -0.05, 4))


def _lora_picture(parts: Parts, rows: int, columns: int, frozen: np.ndarray) -> str:
    scale = _scale(rows, columns)
    w0 = _box(4, 12, columns * scale, rows * scale)
    grid = "".join(
        f'<path d="M30 {_level(v)}H250" stroke="currentColor" stroke-opacity="0.25"/>'
        f'<text x="26" y="{_level(v) + 4}" text-anchor="end">{v:g}</text>'
        for v in (0.01, 0.1, 1.0, 10.0, 100.0)
    )
    line = "M" + "L".join(f"{_across(i)} {_level(v):.1f}" for i, v in enumerate(frozen[:8]))
    names = "".join(f'<text x="{_across(i)}" y="190" text-anchor="middle">{i + 1}</text>' for i in range(8))
    blue, red = figures.SERIES[0], figures.SERIES[1]
    return (
        '<div class="panels"><div class="panel"><p>The weight and its update, to scale</p>'
        f'<svg viewBox="0 0 270 180" role="img"{show("shapes")} aria-label="{escape(parts["shapes"])}">'
        f'<path d="{w0}" fill="currentColor" fill-opacity="0.35" stroke="none"/>'
        f'<path{show("b")} d="{parts["b"]}" fill="{red}"/><path{show("a")} d="{parts["a"]}" fill="{red}"/>'
        f'<text x="4" y="176">W₀</text><text x="{B_AT}" y="176">B</text>'
        f'<text x="{(B_AT + A_AT) / 2 - 3}" y="30">×</text>'
        f'<text x="{A_AT}" y="30">A</text><text x="{B_AT - 14}" y="30">+</text>'
        '</svg></div><div class="panel"><p>Singular values</p>'
        f'<svg viewBox="0 0 270 196" role="img"{show("spectrum")} aria-label="{escape(parts["spectrum"])}">'
        f"{grid}{names}"
        f'<path d="{line}" fill="none" stroke="{blue}" stroke-width="2"/>'
        f'<path{show("dots")} d="{parts["dots"]}" stroke="{red}" stroke-width="9" stroke-linecap="round"/></svg>'
        '<div class="key"><span><svg viewBox="0 0 26 12" aria-hidden="true">'
        f'<path d="M3 6H23" stroke="{blue}" stroke-width="2"/></svg>W₀</span>'
        f'<span><svg viewBox="0 0 26 12" aria-hidden="true"><path d="M13 6h0" stroke="{red}" stroke-width="9" '
        'stroke-linecap="round"/></svg>the update</span></div></div></div>'
    )


# ---------------------------------------------------------------- watershed


def watershed_explorer(
    sample: Sample, maps: np.ndarray, *, threshold: float = 0.5, min_area: int = MIN_AREA, size: int = 320
) -> Explorer:
    """Sliders for the decoder's ridge and smoothing on one image, best a crowded patch of it.

    ``sample``: with an image of (H, W); 100 to 200 px a side show single cuts. ``maps``: (2, H, W) target maps, 0..1,
    as `nucseg.model.network.predict` returns them. ``threshold``, ``min_area``: those of `nucseg.instances.decode`.
    ``size``: longest side of the embedded images, px. Raises ``InputError`` if the maps do not match the sample.
    """
    if maps.shape != (len(CHANNELS), *sample.labels.shape):
        want = " x ".join(map(str, (len(CHANNELS), *sample.labels.shape)))
        raise InputError(f"The maps of '{sample.stem}' have shape {maps.shape}: give maps of {want}.")
    mask, truth = maps[0] > threshold, sample.labels
    picture = data_uri(sample.image, size)
    true_lines = "".join(outline_paths(truth).values())
    count = len(np.unique(truth[truth > 0]))
    smoothed: dict[float, tuple[np.ndarray, str]] = {}
    known: Known = {}

    def compute(ridge: float, smoothing: float) -> Parts:
        if smoothing not in smoothed:
            height = ndimage.gaussian_filter(maps[1], smoothing, truncate=3) if smoothing else maps[1]
            smoothed[smoothing] = height, data_uri(_coloured(height), size, 60)[0]
        height, shown = smoothed[smoothing]
        labels = renumber(split(height, mask, ridge), min_area)
        kept, merged = _peaks(height, split(height, mask, 1.0), labels)
        found, faults = score(truth, labels), errors(truth, labels)
        lines = "".join(outline_paths(labels, known).values())
        text = f"ridge {ridge:g}, smoothing {smoothing:g} px"
        return {
            "lines": lines,
            "cuts": lines,
            "map": shown,
            "kept": _dots(kept),
            "merged": _dots(merged),
            "tissue": f"Tissue with the outlines of {found.nuclei_predicted} predicted and {count} true nuclei, "
            f"{text}.",
            "height": f"Smoothed distance map with {len(kept) + len(merged)} peaks, {len(kept)} of them nuclei, "
            f"{text}.",
            "peaks": f"{len(kept) + len(merged)} peaks",
            "nuclei": f"{found.nuclei_predicted} nuclei of {count} true",
            "pq": f"PQ {found.pq:.2f}",
            "faults": f"mergers: {len(faults.mergers)}, splits: {len(faults.splits)}",
        }

    fine = tuple(round(0.3 + 0.02 * i, 2) for i in range(36)), tuple(0.5 * i for i in range(13))
    return Explorer(
        "Watershed explorer: ridge and smoothing",
        (
            Slider("Ridge", RIDGES, RIDGE, fine=fine[0]),
            Slider("Smoothing", SMOOTHINGS, SMOOTH_PX, "px", fine=fine[1]),
        ),
        compute,
        lambda parts: _watershed_picture(parts, truth.shape, picture, true_lines),
        ("peaks", "nuclei", "pq", "faults"),
    )


def _coloured(height: np.ndarray) -> np.ndarray:
    """(H, W) values 0..1 -> (H, W, 3) uint8 in cividis, which readers with any colour vision see in order."""
    rgba = matplotlib.colormaps["cividis"](np.clip(height, 0, 1), bytes=True)
    return np.ascontiguousarray(rgba[..., :3])


def _peaks(height: np.ndarray, basins: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 2) y, x of the peaks that stand for a nucleus of ``labels``, and of those merged into a higher one."""
    ids = np.unique(basins[basins > 0])
    where = np.array(ndimage.maximum_position(height, basins, ids), int).reshape(-1, 2)
    owner = labels[where[:, 0], where[:, 1]]
    where, owner = where[owner > 0], owner[owner > 0]  # without those in objects that are too small
    order = np.argsort(-height[where[:, 0], where[:, 1]], kind="stable")
    _, first = np.unique(owner[order], return_index=True)
    top = np.zeros(len(where), bool)
    top[order[first]] = True
    return where[top], where[~top]


def _dots(where: np.ndarray) -> str:
    """SVG path data of a dot at each of the (n, 2) y, x, in half pixels: lines of no length with round ends."""
    return "".join(f"M{2 * x + 1} {2 * y + 1}h0" for y, x in where.tolist())


def _watershed_picture(parts: Parts, shape: tuple[int, ...], picture: tuple[str, int, int], truth: str) -> str:
    uri, width, height = picture
    view = f'viewBox="0 0 {2 * shape[1]} {2 * shape[0]}" preserveAspectRatio="none" aria-hidden="true"'

    def stroke(name: str, colour: str, px: float, data: str) -> str:
        mark = show(name) if name else ""
        return (
            f'<path{mark} d="{data}" stroke="black" stroke-opacity="0.6" stroke-width="{px + 1.6}"/>'
            f'<path{mark} d="{data}" stroke="{colour}" stroke-width="{px}"/>'
        )

    def key(colour: str, px: float, words: str, dot: bool = False) -> str:
        line = stroke("", colour, px, "M13 6h0" if dot else "M3 6H23")
        return f'<span><svg viewBox="0 0 26 12" aria-hidden="true">{line}</svg>{words}</span>'

    def stage(label: str, image: str, lines: str) -> str:
        return (
            f'<div class="stage" role="img"{show(label)} aria-label="{escape(parts[label])}">{image}'
            f"<svg {view}>{lines}</svg></div>"
        )

    orange, blue = figures.TRUTH, figures.PREDICTION
    tissue = f'<img src="{uri}" width="{width}" height="{height}" alt="">'
    heights = f'<img{show("map")} src="{parts["map"]}" width="{width}" height="{height}" alt="">'
    left = stroke("", orange, 1.5, truth) + stroke("lines", blue, 2, parts["lines"])
    right = stroke("cuts", blue, 1.5, parts["cuts"])
    right += stroke("merged", orange, 5, parts["merged"]) + stroke("kept", "white", 8, parts["kept"])
    return (
        f'<div class="panels two"><div class="panel"><p>Nuclei</p>{stage("tissue", tissue, left)}'
        f'<div class="key">{key(orange, 2, "true")}{key(blue, 2, "predicted")}</div></div>'
        f'<div class="panel"><p>Smoothed distance map</p>{stage("height", heights, right)}'
        f'<div class="key">{key("white", 8, "peak of a nucleus", True)}'
        f"{key(orange, 5, 'merged peak', True)}</div></div>"
        "</div>"
    )
