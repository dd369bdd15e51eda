"""The effect of seams between fields and blocks on the label map and scores of a 2,048 px image.

    python -m experiments.seams

Two images are used: one of a single tissue, and a mosaic of sixteen tissues, the worst case. They would fit into one
field of the usual size, so they are cut into fields of 1,344 px. Nuclei on a border between two fields are scored
separately, with the border there and with the border elsewhere. Writes results/seams/run.json.
"""

import json
from dataclasses import asdict

import numpy as np

from experiments import common
from nucseg.data.synth import TISSUES, generate
from nucseg.images.slides import open_slide
from nucseg.inference.fields import Span, spans
from nucseg.inference.segmenter import Segmenter, load
from nucseg.metrics import contingency, score
from nucseg.model.adapters import DEFAULT_ADAPTER
from nucseg.model.network import predict

SIDE, FIELD_PX = 2048, 1344
SHIFT = 160  # px, the shift of the fields


def images() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the two images by name: (SIDE, SIDE, 3) RGB and (SIDE, SIDE) label map each."""
    n = SIDE // 512
    tissues = list(TISSUES)[:: len(TISSUES) // n**2][: n**2]
    image, labels = np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros((SIDE, SIDE), np.int32)
    for at, tissue in enumerate(tissues):
        patch = generate(tissue, 1, size=512)
        here = np.s_[at // n * 512 :, at % n * 512 :]
        image[here][:512, :512] = patch.image
        labels[here][:512, :512] = np.where(patch.labels > 0, patch.labels + labels.max(), 0)
    one = generate("human liver", 1, size=SIDE)
    return {"one tissue": (one.image, one.labels), "sixteen tissues": (image, labels)}


def label_map(segmenter: Segmenter, maps: np.ndarray, block: int) -> np.ndarray:
    """The label map of all blocks."""
    labels = np.zeros(maps.shape[1:], np.int32)
    list(segmenter.label_blocks(maps, labels, block=block))
    return labels


class Tiled(Segmenter):
    """A segmenter whose fields have a side of ``FIELD_PX``."""

    def layout(self, shape: tuple[int, int]) -> tuple[list[Span], list[Span]]:
        """Return the spans of the rows and of the columns."""
        scale = self.scale(self.models[0])
        return spans(shape[0], scale, (FIELD_PX,)), spans(shape[1], scale, (FIELD_PX,))


def field_maps(segmenter: Segmenter, image: np.ndarray) -> np.ndarray:
    """(2, H, W) uint8 maps, field by field."""
    maps = np.zeros((2, *image.shape[:2]), np.uint8)
    with open_slide(image) as slide:
        list(segmenter.predict_rows(slide, maps))
    return maps


def on_borders(shift: int) -> np.ndarray:
    """(SIDE, SIDE) bool: within 2 px of a border between the cores of fields that are moved by ``shift`` px."""
    length = SIDE + shift
    ends = [span.high - shift for span in spans(length, sides=(FIELD_PX,)) if span.high < length]
    near = (np.abs(np.arange(SIDE)[:, None] - np.array(ends) + 0.5) <= 2).any(axis=1)
    return near[:, None] | near[None, :]


def border_nuclei(truth: np.ndarray, whole: np.ndarray, moved: np.ndarray) -> dict[str, float]:
    """Compare how two layouts segment the nuclei that a border of only one of them crosses.

    A nucleus's score is the IoU of the prediction that overlaps it best; it is found if that is above 0.5.
    """
    tables = [contingency(truth, labels) for labels in (whole, moved)]
    best, ids = [np.zeros(len(table.true_ids)) for table in tables], tables[0].true_ids
    for table, iou in zip(tables, best, strict=True):
        np.maximum.at(iou, table.rows, table.iou)
    here, there = (np.isin(ids, truth[on_borders(shift)]) for shift in (0, SHIFT))
    first, second = here & ~there, there & ~here
    crossed = np.concatenate([best[0][first], best[1][second]])
    clear = np.concatenate([best[1][first], best[0][second]])
    drawn = np.random.default_rng(0).choice(crossed - clear, (10_000, len(crossed)))
    return {
        "nuclei": len(crossed),
        "found_crossed": round(float((crossed > 0.5).mean()), 4),
        "found_clear": round(float((clear > 0.5).mean()), 4),
        "iou_crossed": round(float(crossed.mean()), 4),
        "iou_clear": round(float(clear.mean()), 4),
        "iou_difference_interval": [round(float(q), 4) for q in np.quantile(drawn.mean(axis=1), (0.025, 0.975))],
    }


def rounded(truth: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Dice, AJI and PQ of two label maps."""
    scores = asdict(score(truth, labels))
    return {name: round(scores[name], 4) for name in ("dice", "aji", "pq")}


def main() -> None:
    """Compare label maps that are cut in different ways, and write the scores of each pair."""
    model = load()
    segmenter, agreement, truth_scores, crossed = Tiled([model]), {}, {}, {}
    for name, (image, truth) in images().items():
        maps = field_maps(segmenter, image)
        whole = label_map(segmenter, maps, SIDE)
        padded = np.pad(image, ((SHIFT, 0), (SHIFT, 0), (0, 0)), mode="symmetric")
        moved = label_map(segmenter, field_maps(segmenter, padded)[:, SHIFT:, SHIFT:], SIDE)
        at_once = label_map(segmenter, field_maps(Segmenter([model]), image), SIDE)
        exact = segmenter.decoding().decode(predict(model, image, segmenter.scale(model)))[0]
        others = {
            "decoded in blocks of 512 px, and at once": label_map(segmenter, maps, 512),
            f"fields moved by {SHIFT} px": moved,
            "fields, and the network seeing all of it at once": at_once,
        }
        agreement[name] = {pair: rounded(whole, other) for pair, other in others.items()}
        agreement[name]["at once, with maps as stored and without merging and rounding"] = rounded(at_once, exact)
        against_truth = {
            "fields": whole,
            f"fields moved by {SHIFT} px": moved,
            "the network seeing all of it at once": at_once,
        }
        truth_scores[name] = {way: rounded(truth, labels) for way, labels in against_truth.items()}
        crossed[name] = border_nuclei(truth, whole, moved)
    print(json.dumps([agreement, truth_scores, crossed], indent=2))
    common.record(
        "seams",
        {},
        model.mean.device,
        side_px=SIDE,
        field_px=FIELD_PX,
        adapter=DEFAULT_ADAPTER,
        agreement=agreement,
        against_truth=truth_scores,
        nuclei_on_borders=crossed,
    )


if __name__ == "__main__":
    main()
