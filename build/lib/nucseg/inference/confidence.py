"""Object confidence: the probability that a predicted nucleus is real, from its shape and the maps inside it.

Detectors score each object, but decoding dense maps gives no such score. The features here are cheap (sums over the
pixels of each label) and depend only on the object and its immediate surroundings. Lengths are relative to the size of
nuclei, so that one classifier serves every magnification. The classifier is a perceptron with one hidden layer, small
enough to be stored as text in an adapter's header. It is fitted on images that the network was not trained on; the
target is whether the object matches a true nucleus at an IoU above 0.5.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nucseg.errors import InputError

FEATURES = (
    "log_area",  # log of the area over TYPICAL_AREA
    "foreground_mean",
    "foreground_min",
    "foreground_max",
    "foreground_sd",
    "distance_mean",
    "distance_max",
    "rim_foreground",  # mean over the outermost pixels
    "outside_foreground",  # mean over the adjacent background pixels; 0 if there are none
    "contrast",  # step across the outline: rim minus outside
    "elongation",  # log of the ratio of the axes of the ellipse with the same second moments
    "ellipse_fill",  # area over the area of that ellipse: 1 for an ellipse, less for concave or ragged shapes
    "roundness",  # 4 pi area over the squared length of the outline
    "touching",  # share of the outline that is shared with another nucleus
    "cut_off",  # share of the outline on the image's edge
)
TYPICAL_AREA = 800.0  # px; NuInsSeg's median nucleus has a diameter of 32 px
HIDDEN = 12  # units of the hidden layer
DECAY = 0.02


def features(labels: np.ndarray, maps: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """(H, W) label map and its (2, H, W) maps, 0..1 -> (n, k) float64, one row per label 1..n; see `FEATURES`.

    ``scale``: size of the nuclei in these images relative to their size in NuInsSeg's images of 512 px, both in px.
    A label without pixels gets a row of zeros. Raises ``InputError`` if the shapes differ.
    """
    count = int(labels.max(initial=0))
    if maps.ndim != 3 or maps.shape[1:] != labels.shape:
        raise InputError(f"Maps of shape {maps.shape} do not belong to a label map of shape {labels.shape}.")
    if not count:
        return np.zeros((0, len(FEATURES)))
    rows, columns = np.nonzero(labels)
    ids = labels[rows, columns]
    foreground, distance = (maps[min(c, len(maps) - 1)][rows, columns].astype(np.float64) for c in (0, 1))

    def total(values: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(ids, values, count + 1)[1:]

    area = total()
    safe = np.maximum(area, 1)
    mean = total(foreground) / safe
    lowest, highest, deepest = np.ones(count + 1), np.zeros(count + 1), np.zeros(count + 1)
    np.minimum.at(lowest, ids, foreground)
    np.maximum.at(highest, ids, foreground)
    np.maximum.at(deepest, ids, distance)
    y, x = total(rows) / safe, total(columns) / safe
    dy, dx = rows - y[ids - 1], columns - x[ids - 1]
    # pixels count as unit squares in the second moments, so that an object of one pixel has an extent
    yy, xx, xy = total(dy * dy) / safe + 1 / 12, total(dx * dx) / safe + 1 / 12, total(dy * dx) / safe
    half, root = (yy + xx) / 2, np.sqrt(((yy - xx) / 2) ** 2 + xy**2)
    major, minor = half + root, np.maximum(half - root, 1 / 12)
    edges, shared, border, rim, outside = _outline(labels, maps[0], count)
    length = np.maximum(edges, 1) * math.pi / 4  # a disc's staircase is 4 / pi times as long as its outline
    table = [
        np.log(safe / (TYPICAL_AREA * scale**2)),
        mean,
        lowest[1:],
        highest[1:],
        np.sqrt(np.maximum(total(foreground**2) / safe - mean**2, 0)),
        total(distance) / safe,
        deepest[1:],
        rim,
        outside,
        rim - outside,
        0.5 * np.log(major / minor),
        area / (4 * math.pi * np.sqrt(major * minor)),
        4 * math.pi * area / length**2,
        shared / np.maximum(edges, 1),
        border / np.maximum(edges, 1),
    ]
    return np.where(area[:, None] > 0, np.stack(table, axis=1), 0.0)


def _outline(labels: np.ndarray, foreground: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """Five (n,) arrays: the outline's pixel edges, those shared with another nucleus, those on the image's edge,
    and the mean foreground on the inner and on the outer (background) side of the outline."""
    padded = np.pad(labels, 1, constant_values=-1)  # -1: beyond the image
    values = np.pad(foreground.astype(np.float64), 1)
    edges, shared, border, open_edges = (np.zeros(count + 1) for _ in range(4))
    inner, outer = np.zeros(count + 1), np.zeros(count + 1)
    for axis in (0, 1):
        a = np.s_[:-1, :] if axis == 0 else np.s_[:, :-1]
        b = np.s_[1:, :] if axis == 0 else np.s_[:, 1:]
        for here, there in ((a, b), (b, a)):
            met = (padded[here] > 0) & (padded[here] != padded[there])
            own, other = padded[here][met], padded[there][met]
            edges += np.bincount(own, minlength=count + 1)
            shared += np.bincount(own[other > 0], minlength=count + 1)
            border += np.bincount(own[other < 0], minlength=count + 1)
            free = other == 0
            open_edges += np.bincount(own[free], minlength=count + 1)
            inner += np.bincount(own, values[here][met], count + 1)
            outer += np.bincount(own[free], values[there][met][free], count + 1)
    return (
        edges[1:],
        shared[1:],
        border[1:],
        inner[1:] / np.maximum(edges[1:], 1),
        outer[1:] / np.maximum(open_edges[1:], 1),
    )


@dataclass(frozen=True)
class Confidence:
    """A fitted classifier: standardised features, one hidden layer with tanh, and a logit."""

    mean: np.ndarray  # (k,)
    std: np.ndarray  # (k,)
    hidden: np.ndarray  # (k + 1, h), the last row is the bias
    out: np.ndarray  # (h + 1,), the last entry is the bias

    def predict(self, table: np.ndarray) -> np.ndarray:
        """(n, k) features -> (n,) float64 probabilities."""
        if not len(table):
            return np.zeros(0)
        x = np.clip((table - self.mean) / self.std, -5, 5)
        h = np.tanh(x @ self.hidden[:-1] + self.hidden[-1])
        return 1 / (1 + np.exp(-(h @ self.out[:-1] + self.out[-1])))

    def to_dict(self) -> dict[str, Any]:
        """Return the classifier as plain lists for JSON, with six significant digits."""
        numbers = {n: getattr(self, n) for n in ("mean", "std", "hidden", "out")}
        return {"features": list(FEATURES)} | {
            n: np.vectorize(lambda v: float(f"{v:.6g}"), otypes=[float])(a).tolist() for n, a in numbers.items()
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Confidence":
        """Restore a classifier from `to_dict`. Raises ``InputError`` if this version computes other features."""
        if stored.get("features") != list(FEATURES):
            raise InputError("The adapter's object confidence uses other features: use the version that wrote it.")
        return cls(*(np.array(stored[n], float) for n in ("mean", "std", "hidden", "out")))


def fit(table: np.ndarray, true: np.ndarray, decay: float = DECAY, seed: int = 0) -> Confidence:
    """Fit a classifier to (n, k) features and to (n,) bool: whether each object is a true nucleus.

    ``decay``: strength of the L2 penalty on the weights (not the biases). The same seed gives the same classifier.
    Raises ``InputError`` unless there are both true and false objects.
    """
    true = np.asarray(true, bool)
    if true.all() or not true.any():
        raise InputError("A confidence needs true and false objects to learn from: validate on more images.")
    mean, std = table.mean(0), np.maximum(table.std(0), 1e-6)
    x = torch.from_numpy(np.clip((table - mean) / std, -5, 5))
    y = torch.from_numpy(true.astype(np.float64))
    generator = torch.Generator().manual_seed(seed)
    k = table.shape[1]
    hidden = (torch.randn(k + 1, HIDDEN, generator=generator, dtype=torch.float64) / math.sqrt(k)).requires_grad_()
    out = (torch.randn(HIDDEN + 1, generator=generator, dtype=torch.float64) / math.sqrt(HIDDEN)).requires_grad_()
    optimiser = torch.optim.LBFGS([hidden, out], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        logits = torch.tanh(x @ hidden[:-1] + hidden[-1]) @ out[:-1] + out[-1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y)
        loss = loss + decay * (hidden[:-1].square().mean() * k + out[:-1].square().mean())
        loss.backward()
        return loss

    optimiser.step(closure)
    return Confidence(mean, std, hidden.detach().numpy(), out.detach().numpy())


def out_of_image(table: np.ndarray, true: np.ndarray, images: np.ndarray, parts: int = 5) -> np.ndarray:
    """Cross-fitted probabilities, (n,): each from a classifier that was fitted without the object's image.

    ``table``: (n, k) features. ``true``: (n,) bool. ``images``: (n,) int, the image of each object. If the other
    images do not hold both true and false objects, the probability is the overall share of true objects.
    """
    true, part = np.asarray(true, bool), np.asarray(images) % parts
    result = np.full(len(true), true.mean() if len(true) else 0.0)
    for k in np.unique(part):
        held = part == k
        if 0 < true[~held].sum() < (~held).sum():
            result[held] = fit(table[~held], true[~held]).predict(table[held])
    return result


def true_objects(truth: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n,) bool: whether each label 1..n overlaps a nucleus of ``truth`` at an IoU above 0.5.

    ``truth``, ``labels``: (H, W) label maps.
    """
    n, m = int(labels.max(initial=0)), int(truth.max(initial=0))
    pairs = np.bincount(labels.ravel().astype(np.int64) * (m + 1) + truth.ravel(), minlength=(n + 1) * (m + 1))
    shared = pairs.reshape(n + 1, m + 1)
    union = shared.sum(1)[:, None] + shared.sum(0)[None] - shared
    return (shared / np.maximum(union, 1) > 0.5)[1:, 1:].any(axis=1)
