"""The prediction browser: images with true and predicted nuclei, and sliders for the decoder's values.

There are two versions. `PredictionBrowser` computes all steps of its sliders in advance and works in a static page,
without a kernel. `browse` decodes whenever a slider moves and needs a running notebook with ipywidgets. Both draw
outlines as lines (SVG), which are sharp at any size, in the colours of `nucseg.viz.figures`. In the view of errors,
dashed outlines mark split nuclei and mergers. `nucseg.viz.explorers` has smaller widgets for single ideas.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template
from typing import Any
from uuid import uuid4

import numpy as np

from nucseg.data.datasets import Sample
from nucseg.errors import InputError
from nucseg.instances import CHANNELS, RIDGE, components, decode
from nucseg.metrics import Scores, errors, score
from nucseg.viz import figures
from nucseg.viz.explorers import lora_explorer as lora_explorer
from nucseg.viz.explorers import watershed_explorer as watershed_explorer
from nucseg.viz.svg import Known, data_uri, outline_paths

Item = tuple[Sample, np.ndarray]  # a sample and the target maps predicted for it
THRESHOLDS = (0.2, 0.4, 0.5, 0.6, 0.8)
RIDGES = (0.7, 0.8, 0.9, 1.0)
MIN_AREAS = (0, 50, 200)  # px
START = 0.5, RIDGE, 50  # initial threshold, ridge and minimum area: the decoder's
OPACITY = 90  # %
KINDS = {  # kinds of outlines: text in the legend, colour, colour of the casing around the line, dashes
    "truth": ("true nuclei", figures.TRUTH, "black", ""),
    "prediction": ("predicted nuclei", figures.PREDICTION, "black", ""),
    "found": ("found", figures.FOUND, "black", ""),
    "missed": ("missed", figures.MISSED, "white", ""),
    "split": ("missed: split", figures.MISSED, "white", "5 4"),
    "spurious": ("spurious", figures.SPURIOUS, "white", ""),
    "merged": ("spurious: merger", figures.SPURIOUS, "white", "5 4"),
}
VIEWS = {
    "truth": ("truth",),
    "prediction": ("prediction",),
    "errors": ("found", "missed", "split", "spurious", "merged"),
}
BOTH, SIDES = "side by side", ("truth", "prediction")  # one more view: two of the others beside each other
SCORES = {"pq": "PQ", "aji": "AJI", "dice": "Dice"}
SORTS, ORDERS = {"name": "name"} | SCORES, ("ascending", "descending")
ALT = {
    "truth": "{name}: tissue with the outlines of {truth} true nuclei.",
    "prediction": "{name}: tissue with the outlines of {prediction} predicted nuclei, threshold {threshold}, "
    "ridge {ridge}, minimum area {area} px.",
    "errors": "{name}: tissue with the outlines of nuclei, found {found}, missed {missed}, split {split}, "
    "spurious {spurious}, mergers {merged}, threshold {threshold}, ridge {ridge}, minimum area {area} px.",
}
OUTPUT = ("PQ {pq}", "AJI {aji}", "Dice {dice}", "{prediction} nuclei predicted", "{truth} true")


@dataclass(frozen=True)
class Frame:
    """Scores, and outlines (SVG path data) by kind, at one threshold, ridge and minimum area."""

    scores: Scores
    lines: dict[str, list[str]]


class Scene:
    """A sample with its predicted target maps, (C, H, W) float32 in 0..1.

    Two maps (C = 2) are decoded with `decode`, one (C = 1) with `components`.
    Raises ``InputError`` if the shape of the maps does not match the sample.
    """

    def __init__(self, sample: Sample, maps: np.ndarray) -> None:
        if maps.ndim != 3 or len(maps) not in (1, len(CHANNELS)) or maps.shape[1:] != sample.labels.shape:
            want = " x ".join(map(str, sample.labels.shape))
            raise InputError(f"The maps of '{sample.stem}' have shape {maps.shape}: give 1 or 2 maps of {want} px.")
        self.sample, self.maps = sample, maps
        # most stems begin with the name of the tissue
        rest = sample.stem.removeprefix(sample.tissue.replace(" ", "_")).strip("_ ")
        self.name = f"{sample.tissue} {rest or sample.stem}"
        self.box = f"0 0 {2 * maps.shape[2]} {2 * maps.shape[1]}"  # lines have coordinates in half pixels
        self._known: Known = {}
        self._truth = outline_paths(sample.labels)
        self._cut: tuple[tuple[float, float], np.ndarray, dict[int, str]] | None = None
        self._frames: dict[tuple[float, float, int], Frame] = {}

    def frame(self, threshold: float, ridge: float, min_area: int) -> Frame:
        """Compare the nuclei at ``threshold`` and ``ridge`` (0..1) of at least ``min_area`` px with the true ones."""
        labels, lines = self._cut_at(threshold, ridge)
        keep = np.bincount(labels.ravel()) >= min_area
        same = threshold, ridge, int(keep[1:].sum())  # the number of remaining nuclei identifies them
        if same not in self._frames:
            self._frames[same] = self._judge(np.where(keep, np.arange(len(keep)), 0)[labels], lines)
        return self._frames[same]

    def _judge(self, labels: np.ndarray, lines: dict[int, str]) -> Frame:
        truth = self.sample.labels
        faults = errors(truth, labels)
        predicted = [int(i) for i in np.unique(labels) if i]
        ids = {
            "prediction": predicted,
            "found": sorted(set(predicted) - set(faults.spurious)),
            "spurious": [i for i in faults.spurious if i not in faults.mergers],
            "merged": sorted(faults.mergers),
        }
        shown = {kind: [lines[i] for i in some] for kind, some in ids.items()}
        shown["truth"] = list(self._truth.values())
        shown["missed"] = [self._truth[i] for i in faults.missed if i not in faults.splits]
        shown["split"] = [self._truth[i] for i in sorted(faults.splits)]
        return Frame(score(truth, labels), shown)

    @property
    def splits(self) -> bool:
        """Whether touching nuclei are split, so that the ridge matters."""
        return len(self.maps) == len(CHANNELS)

    def _cut_at(self, threshold: float, ridge: float) -> tuple[np.ndarray, dict[int, str]]:
        """The label map before small nuclei are dropped, with its lines; the last one is cached."""
        if self._cut is None or self._cut[0] != (threshold, ridge):
            if self.splits:
                labels = decode(self.maps, threshold, ridge, min_area=0)
            else:
                labels = components(self.maps[0], threshold)
            self._cut = (threshold, ridge), labels, outline_paths(labels, self._known)
        return self._cut[1:]

    def picture(self, size: int) -> tuple[str, int, int]:
        """The image as a data URI, with its width and height; scaled to at most ``size`` px."""
        return data_uri(self.sample.image, size)


def _scenes(items: Iterable[Item]) -> list[Scene]:
    scenes = sorted((Scene(sample, maps) for sample, maps in items), key=lambda scene: scene.name)
    if not scenes:
        raise InputError("There are no images to browse: give at least one sample with its maps.")
    return scenes


def _asset(name: str) -> str:
    return (resources.files("nucseg") / "assets" / name).read_text(encoding="utf-8")


def _values(scene: Scene, frame: Frame, threshold: float, ridge: float, min_area: int) -> dict[str, Any]:
    """Values for the placeholders of ``ALT`` and ``OUTPUT``."""
    scores = {key: f"{getattr(frame.scores, key):.2f}" for key in SCORES}
    counts = {kind: len(lines) for kind, lines in frame.lines.items()}
    steps = {"threshold": f"{threshold:g}", "ridge": f"{ridge:g}", "area": min_area}
    return {"name": scene.name} | steps | scores | counts


def _stroke(kind: str, data: str) -> str:
    _, colour, casing, dashes = KINDS[kind]
    return (
        f'<g class="{kind}"><path class="casing" style="stroke:{casing}" d="{data}"/>'
        f'<path style="stroke:{colour};stroke-dasharray:{dashes or "none"}" d="{data}"/></g>'
    )


def _picture(scene: Scene, frame: Frame, view: str, values: dict[str, Any], image: tuple[str, int, int]) -> str:
    """HTML of the image under the outlines of one of ``VIEWS``, or of two beside each other, with their legend."""
    uri, width, height = image
    views = SIDES if view == BOTH else (view,)
    shown = {kind for one in views for kind in VIEWS[one]}

    def stage(one: str) -> str:
        strokes = "".join(_stroke(kind, "".join(frame.lines[kind]) if kind in VIEWS[one] else "") for kind in KINDS)
        return (
            f'<div class="stage" role="group" aria-label="{one}"><div class="sheet"><img src="{uri}" width="{width}" '
            f'height="{height}" decoding="sync" alt="{escape(ALT[one].format(**values))}"><svg viewBox="{scene.box}" '
            f'preserveAspectRatio="none" aria-hidden="true">{strokes}</svg></div></div>'
        )

    legend = "".join(
        f'<span class="{kind}"{"" if kind in shown else " hidden"}><svg viewBox="0 0 26 12" aria-hidden="true">'
        f"{_stroke(kind, 'M3 6H23')}</svg><b>{len(frame.lines[kind])}</b> {words}</span>"
        for kind, (words, *_) in KINDS.items()
    )
    stages = "".join(map(stage, views))
    return f'<div class="picture"><div class="stages">{stages}</div><div class="legend">{legend}</div></div>'


def _output(values: dict[str, Any]) -> str:
    return " ".join(f"<span>{escape(text.format(**values))}</span>" for text in OUTPUT)


def _options(words: dict[Any, str]) -> str:
    return "".join(f'<option value="{escape(str(value))}">{escape(text)}</option>' for value, text in words.items())


class PredictionBrowser:
    """Images with true and predicted outlines, errors and scores, as HTML that needs no kernel.

    ``items``: (sample, target maps) pairs; the maps are (C, H, W) float32 in 0..1, of the sample's size, as
    `nucseg.model.network.predict` returns them. ``thresholds``, ``ridges``, ``min_areas``: steps of the sliders, the
    values of `nucseg.instances.decode` (probabilities 0..1, ratios 0..1, px). They start at the steps nearest to the
    decoder's own. If every sample has a single map, which needs no ridge, that slider is left out. ``size``: longest
    side of the embedded images, px. All steps are computed here, which takes a few seconds per image. Raises
    ``InputError`` if there are no items or no steps, if maps do not match their sample, or if a step is out of range.

    Make it the last value of a notebook cell to show it. The page needs no network: it contains the images (WebP), the
    outlines and a short script.
    """

    def __init__(
        self,
        items: Iterable[Item],
        *,
        thresholds: Sequence[float] = THRESHOLDS,
        ridges: Sequence[float] = RIDGES,
        min_areas: Sequence[int] = MIN_AREAS,
        size: int = 448,
    ) -> None:
        self.thresholds, self.ridges = sorted(set(thresholds)), sorted(set(ridges))
        self.min_areas = sorted(set(min_areas))
        if not all((self.thresholds, self.ridges, self.min_areas)) or self.min_areas[0] < 0 or size < 1:
            raise InputError(
                "Give at least one threshold, one ridge and one min_area, none negative, and a size of at least 1 px."
            )
        self._scenes = _scenes(items)
        if not any(scene.splits for scene in self._scenes):
            self.ridges = [self.ridges[_nearest(self.ridges, RIDGE)]]
        self._images = [scene.picture(size) for scene in self._scenes]
        self._frames = [
            [[[scene.frame(t, r, a) for a in self.min_areas] for r in self.ridges] for t in self.thresholds]
            for scene in self._scenes
        ]

    def data(self) -> dict[str, Any]:
        """Data for the script: the frames of all samples, with each outline and each frame stored once."""
        parts = zip(self._scenes, self._frames, self._images, strict=True)
        return {
            "samples": [_packed(scene, frames, image) for scene, frames, (image, _, _) in parts],
            "thresholds": [f"{t:g}" for t in self.thresholds],
            "ridges": [f"{r:g}" for r in self.ridges],
            "areas": self.min_areas,
            "views": VIEWS,
            "both": BOTH,
            "sides": SIDES,
            "scores": SCORES,
            "alt": ALT,
            "output": OUTPUT,
        }

    def _repr_html_(self) -> str:
        t, r = _nearest(self.thresholds, START[0]), _nearest(self.ridges, START[1])
        a = _nearest(self.min_areas, START[2])
        scene, frame = self._scenes[0], self._frames[0][t][r][a]
        values = _values(scene, frame, self.thresholds[t], self.ridges[r], self.min_areas[a])
        tissues = sorted({scene.sample.tissue for scene in self._scenes})
        data = json.dumps(self.data(), ensure_ascii=False, separators=(",", ":"))
        return Template(_asset("browser.html")).substitute(
            id=f"nucseg-{uuid4().hex[:12]}",  # unique, because a page may hold several browsers
            css=_asset("browser.css"),
            images=_options(dict(enumerate(scene.name for scene in self._scenes))),
            tissues=_options({"": "all"} | {tissue: tissue for tissue in tissues}),
            sorts=_options(SORTS),
            orders=_options({order: order for order in ORDERS}),
            picture=_picture(scene, frame, "prediction", values, self._images[0]),
            threshold=values["threshold"],
            thresholds=len(self.thresholds) - 1,
            at_threshold=t,
            ridge=values["ridge"],
            ridges=len(self.ridges) - 1,
            at_ridge=r,
            hide_ridge=" hidden" if len(self.ridges) == 1 else "",
            area=values["area"],
            areas=len(self.min_areas) - 1,
            at_area=a,
            opacity=OPACITY,
            overlay=OPACITY / 100,
            output=_output(values),
            script=_asset("browser.js").strip(),
            data=data.replace("<", "\\u003c"),  # else a sample's name could close the script element
        )


def _nearest(steps: Sequence[float], wanted: float) -> int:
    return min(range(len(steps)), key=lambda i: abs(steps[i] - wanted))


def _packed(scene: Scene, frames: list[list[list[Frame]]], image: str) -> dict[str, Any]:
    """A sample for the script. Outlines and frames are stored once, in lists, and referred to by their index."""
    lines: dict[str, int] = {}
    unique: dict[str, int] = {}

    def numbers(some: list[str]) -> list[int]:
        return [lines.setdefault(line, len(lines)) for line in some]

    def number(frame: Frame) -> int:
        content: dict[str, Any] = {key: round(getattr(frame.scores, key), 4) for key in SCORES}
        content |= {kind: numbers(frame.lines[kind]) for kind in VIEWS["errors"]}
        return unique.setdefault(json.dumps(content), len(unique))

    truth = numbers(frames[0][0][0].lines["truth"])
    steps = [[[number(frame) for frame in row] for row in table] for table in frames]
    return {
        "name": scene.name,
        "tissue": scene.sample.tissue,
        "image": image,
        "box": scene.box,
        "truth": truth,
        "steps": steps,
        "frames": [json.loads(content) for content in unique],
        "lines": list(lines),
    }


def browse(items: Iterable[Item], *, size: int = 512) -> Any:
    """Create the browser for a running notebook: sliders with fine steps, decoded at each move.

    ``items`` and ``size``: as for `PredictionBrowser`. The list of images always shows the scores at the sliders' first
    values, wherever they are now. Returns an ``ipywidgets.VBox``: make it the last value of a cell to
    show it. Raises ``InputError`` if ipywidgets is not installed, and as `PredictionBrowser` does.
    """
    try:
        import ipywidgets
    except ImportError as error:
        raise InputError("browse needs ipywidgets: install 'nucseg[book]', or use PredictionBrowser.") from error
    scenes = _scenes(items)
    images = [scene.picture(size) for scene in scenes]
    listed = [scene.frame(*START).scores for scene in scenes]
    style, picture = ipywidgets.HTML(f"<style>{_asset('browser.css')}</style>"), ipywidgets.HTML()
    controls = _controls(ipywidgets, sorted({scene.sample.tissue for scene in scenes}))
    image, threshold, ridge, area = (controls[name] for name in ("image", "threshold", "ridge", "area"))

    def fill(_: Any = None) -> None:
        shown = [i for i, scene in enumerate(scenes) if controls["tissue"].value in ("", scene.sample.tissue)]
        key, chosen = controls["sort"].value, image.value
        if key != "name":
            shown.sort(key=lambda i: getattr(listed[i], key))
        if controls["order"].value == "descending":
            shown.reverse()
        key = "pq" if key == "name" else key
        image.unobserve(draw, "value")  # setting the list selects its first image, which need not be drawn
        image.options = [(f"{scenes[i].name} — {SCORES[key]} {getattr(listed[i], key):.2f}", i) for i in shown]
        image.value = chosen if chosen in shown else shown[0]
        image.observe(draw, "value")
        draw()

    def draw(_: Any = None) -> None:
        scene = scenes[image.value]
        frame = scene.frame(threshold.value, ridge.value, area.value)
        values = _values(scene, frame, threshold.value, ridge.value, area.value)
        drawn = _picture(scene, frame, controls["view"].value, values, images[image.value])
        overlay, zoom = controls["opacity"].value / 100, controls["zoom"].value
        picture.value = (
            f'<div class="nucseg-browser" data-view="{controls["view"].value}"{" data-zoomed" if zoom > 1 else ""} '
            f'style="--overlay:{overlay};--zoom:{zoom}">{drawn}<output>{_output(values)}</output></div>'
        )

    def step(by: int) -> None:
        shown = [i for _, i in image.options]
        image.value = shown[(shown.index(image.value) + by) % len(shown)]

    for name in ("tissue", "sort", "order"):
        controls[name].observe(fill, "value")
    for name in ("image", "view", "threshold", "ridge", "area", "opacity", "zoom"):
        controls[name].observe(draw, "value")
    before, after = (ipywidgets.Button(description=f"{word} image", tooltip=word) for word in ("Previous", "Next"))
    before.on_click(lambda _: step(-1))
    after.on_click(lambda _: step(1))
    if not any(scene.splits for scene in scenes):
        ridge.layout.display = "none"
    fill()
    return ipywidgets.VBox([style, ipywidgets.HBox([before, after]), *controls.values(), picture])


def _controls(w: Any, tissues: list[str]) -> dict[str, Any]:
    """The widgets by name, in the order in which they are shown; ``w`` is ipywidgets."""
    at_start = f"scores at threshold {START[0]}, ridge {START[1]} and minimum area {START[2]} px"
    look: dict[str, Any] = {"style": {"description_width": "11em"}, "layout": {"width": "36em", "max_width": "100%"}}
    steps = {"min": 0.02, "max": 0.98, "step": 0.02}
    hints = ["Nuclei as annotated", "Nuclei as predicted", "Found, missed and spurious nuclei", "Truth and prediction"]

    def dropdown(what: str, hint: str, *options: tuple[str, str]) -> Any:
        return w.Dropdown(options=options, description=what, tooltip=hint, **look)

    def slider(what: str, hint: str, start: int, top: int) -> Any:
        return w.IntSlider(start, min=0, max=top, description=what, tooltip=hint, **look)

    threshold = w.FloatSlider(START[0], description="Probability threshold", **steps, **look)
    threshold.tooltip = "Pixels above the threshold belong to nuclei"
    ridge = w.FloatSlider(START[1], description="Ridge between peaks", min=0.3, max=1, step=0.02, **look)
    ridge.tooltip = "Peaks of the distance map that meet above this share of the lower one are one nucleus"
    view = w.ToggleButtons(options=[*VIEWS, BOTH], value="prediction", description="Outlines", tooltips=hints, **look)
    view.tooltip, view.style.button_width = "Outlines to draw", "8em"
    return {
        "tissue": dropdown("Tissue", "Tissue of the images in the list", ("all", ""), *((t, t) for t in tissues)),
        "sort": dropdown(
            "Sort by", f"Sort the list by name or by {at_start}", *((words, key) for key, words in SORTS.items())
        ),
        "order": dropdown("Order", "Order of the list of images", *((order, order) for order in ORDERS)),
        "image": dropdown("Image", f"The image shown; {at_start}"),
        "view": view,
        "threshold": threshold,
        "ridge": ridge,
        "area": slider("Minimum area, px", "Smaller predicted nuclei are dropped", START[2], 400),
        "opacity": slider("Opacity, %", "Opacity of the outlines", OPACITY, 100),
        "zoom": w.IntSlider(1, min=1, max=4, description="Zoom", tooltip="Magnification of the image", **look),
    }
