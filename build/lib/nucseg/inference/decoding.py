"""The decoding parameters that turn a model's maps into nuclei, tuned on validation images, stored in the adapter."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from nucseg.errors import InputError
from nucseg.inference.confidence import Confidence, features, fit, out_of_image, true_objects
from nucseg.instances import MIN_AREA, RIDGE, SMOOTH_PX, labels_from
from nucseg.metrics import aji, contingency, dice, pq

# The values that `tune` tries, one parameter after the other. The smallest area is not tuned: the confidence drops
# fragments as well, and keeps small nuclei.
GRID: dict[str, tuple[float, ...]] = {
    "threshold": (0.4, 0.45, 0.5, 0.55, 0.6),
    "ridge": (0.8, 0.85, 0.9, 0.95),
    "smooth_px": (1.0, 1.5, 2.0, 3.0, 4.0),
}
CONFIDENCES = tuple(k / 50 for k in range(36))  # 0 to 0.7


@dataclass(frozen=True)
class Decoding:
    """The parameters of decoding. Lengths and areas are in px of images whose nuclei are as large as NuInsSeg's.

    - ``threshold``: foreground probability, 0..1, above which a pixel belongs to a nucleus.
    - ``ridge``, ``smooth_px``: as in `instances.decode`.
    - ``min_area``: smaller objects are dropped.
    - ``min_confidence``: objects of lower confidence are dropped, 0..1; needs ``classifier``.
    """

    threshold: float = 0.5
    ridge: float = RIDGE
    smooth_px: float = SMOOTH_PX
    min_area: float = MIN_AREA
    min_confidence: float = 0.0
    classifier: Confidence | None = field(default=None, compare=False)

    def check(self) -> None:
        """Raise ``InputError`` for a value out of range, or ``min_confidence`` above 0 without a classifier."""
        if not 0 <= self.min_confidence <= 1:
            raise InputError(f"min_confidence is {self.min_confidence!r}: it must lie between 0 and 1.")
        if self.min_confidence and self.classifier is None:
            raise InputError("This adapter gives no object confidence: leave min_confidence at 0, or tune it first.")

    def cut(self, maps: np.ndarray, scale: float = 1.0) -> np.ndarray:
        """(C, H, W) maps, 0..1 -> (H, W) int32 label map of all objects, whatever their confidence.

        ``scale``: size of the nuclei in these images relative to their size in NuInsSeg, both in px.
        """
        smallest, smooth = round(self.min_area * scale**2), min(self.smooth_px * scale, 100)
        return labels_from(maps, self.threshold, smallest, self.ridge, smooth)

    def decode(self, maps: np.ndarray, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """(C, H, W) maps, 0..1 -> (H, W) int32 label map 1..n, and the (n,) confidence of each nucleus.

        The confidence is 1 if there is no classifier. ``scale`` as in `cut`.
        """
        return self.select(self.cut(maps, scale), maps, scale)

    def select(self, labels: np.ndarray, maps: np.ndarray, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Keep the nuclei of an (H, W) label map 1..n that are confident enough, as `decode` does."""
        if self.classifier is None:
            return labels, np.ones(int(labels.max(initial=0)))
        confidence = self.classifier.predict(features(labels, maps, scale))
        wanted = confidence >= self.min_confidence
        return keep(labels, wanted), confidence[wanted]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists for an adapter's header."""
        classifier = self.classifier.to_dict() if self.classifier else None
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"classifier": classifier}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Decoding":
        """Restore a decoding from `to_dict`; an empty dictionary gives the defaults.

        Raises ``InputError`` for entries that this version does not know.
        """
        unknown = stored.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise InputError(f"The adapter's decoding has an entry {min(unknown)!r} of another version of nucseg.")
        found = stored.get("classifier")
        return cls(**(stored | {"classifier": Confidence.from_dict(found) if found else None}))


def decoding_of(model: Any) -> Decoding:
    """Return the decoding that a model's adapter was tuned with; the default one if it was not tuned."""
    return Decoding.from_dict(getattr(model, "decoding", {}))


def keep(labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(H, W) label map 1..n and (n,) bool -> label map of the wanted nuclei, renumbered 1..m in the same order."""
    return np.concatenate([[0], np.where(wanted, np.cumsum(wanted), 0)]).astype(np.int32)[labels]


def mean_score(truths: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> float:
    """Mean of Dice, AJI and PQ over images; ``truths`` and ``results`` hold one (H, W) label map per image.

    PQ alone would drop every doubtful object: it counts objects, so a confidence tuned on it costs foreground (Dice).
    """
    tables = [contingency(t, r) for t, r in zip(truths, results, strict=True)]
    return float(np.mean([(dice(table) + aji(table) + pq(table)) / 3 for table in tables]))


def tune(
    maps: Sequence[np.ndarray], truths: Sequence[np.ndarray], start: Decoding = Decoding(), scale: float = 1.0
) -> tuple[Decoding, dict[str, float]]:
    """Choose the decoding with the best `mean_score` on validation images, and fit the object confidence there.

    ``maps``: one (2, H, W) array per image, of images that the model was not trained on. ``truths``: (H, W) label
    maps. The values in `GRID` are tried for one parameter after the other. ``min_confidence`` is chosen on
    cross-fitted probabilities (`out_of_image`); the stored classifier is fitted on all images.

    Returns the decoding and its scores: `mean_score` on these images before tuning (``score_start``), with the tuned
    parameters (``score_decoding``) and with the confidence too (``score_confidence``; only its classifier is
    cross-fitted), ``log_loss`` and ``brier`` of the cross-fitted probabilities, the number of ``objects`` and the
    share of ``true`` ones.
    """
    chosen = start
    best = first = mean_score(truths, [start.cut(m, scale) for m in maps])
    for name, values in GRID.items():
        for value in values:
            change: dict[str, Any] = {name: value}
            trial = replace(chosen, **change)
            found = mean_score(truths, [trial.cut(m, scale) for m in maps]) if trial != chosen else best
            if found > best:
                chosen, best = trial, found
    labels = [chosen.cut(m, scale) for m in maps]
    table = np.concatenate([features(l, m, scale) for l, m in zip(labels, maps, strict=True)])  # noqa: E741
    per_image = [true_objects(t, l) for t, l in zip(truths, labels, strict=True)]  # noqa: E741
    true = np.concatenate(per_image)
    image = np.repeat(np.arange(len(maps)), [len(t) for t in per_image])
    about = {"score_start": first, "score_decoding": best, "objects": len(true), "true": float(true.mean())}
    if true.all() or not true.any():  # one class only: no classifier can be fitted
        return chosen, about | {"score_confidence": best}
    probability = out_of_image(table, true, image)
    scores = [
        mean_score(truths, [keep(l, probability[image == i] >= least) for i, l in enumerate(labels)])  # noqa: E741
        for least in CONFIDENCES
    ]
    k = int(np.argmax(scores))
    safe = np.clip(np.where(true, probability, 1 - probability), 1e-6, 1)
    about |= {"score_confidence": scores[k], "log_loss": float(-np.log(safe).mean())}
    about |= {"brier": float(((probability - true) ** 2).mean())}
    return replace(chosen, min_confidence=CONFIDENCES[k], classifier=fit(table, true)), about
