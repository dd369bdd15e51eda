"""Oracle comparison of target maps for touching nuclei: encode, degrade as a network would, decode, score.

    python -m experiments.representations --root data/nuinsseg

Writes results/representations, with run.json and these tables:

- tuning.csv: each representation under a few settings of its decoder, on 16 images.
- representations.csv: each with its best setting, on 31 other images, one per tissue. All images are from the training
  part of fold 1, and so are test images of other folds: the kind of map and its decoder were chosen with their label
  maps, but without any prediction.
- roundtrip_images.csv: `nucseg.instances` on all 665 label maps, without noise: the upper bound of decoding. Its
  means are roundtrip.csv (one row per tissue, at stride 2) and strides.csv (one row per stride).

Maps are degraded by blur (Gaussian, sigma in px) and smooth noise (Gaussian noise blurred by 4 px, standard deviation
as a share of a channel's range), clipped to 0..1, averaged down to the stride's grid and enlarged bilinearly, as a
head's output is. Takes about 6 minutes on one core; run the same command again to resume.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from skimage.segmentation import watershed
from torch.nn import functional as F

from experiments import common
from nucseg.data.datasets import NuInsSeg
from nucseg.data.splits import folds
from nucseg.files import write_atomic
from nucseg.instances import components, decode, encode, foreground, split
from nucseg.metrics import aji, contingency, pq

OUT = common.RESULTS / "representations"
NOISES = {  # blur in px, noise as a share of the range
    "none": (0.0, 0.0),
    "blur 1, noise 0.1": (1.0, 0.1),
    "blur 2, noise 0.1": (2.0, 0.1),
    "blur 2, noise 0.15": (2.0, 0.15),
}
STRIDES = (1, 2, 4)
NOISE_PX = 4.0
SOBEL = 21  # HoVer-Net's kernel at 40x
Maps = np.ndarray  # (C, H, W) float32, 0..1


def degrade(maps: Maps, stride: int, blur: float, noise: float, seed: int) -> Maps:
    """Degrade target maps as a network would; see the module's docstring."""
    if blur:
        maps = ndimage.gaussian_filter(maps, (0, blur, blur))
    if noise:
        field = np.random.default_rng(seed).standard_normal(maps.shape).astype(np.float32)
        field = ndimage.gaussian_filter(field, (0, NOISE_PX, NOISE_PX))
        maps = np.clip(maps + noise * field / field.std(), 0, 1)
    if stride > 1:
        grid = F.avg_pool2d(torch.from_numpy(maps)[None], stride)
        maps = F.interpolate(grid, scale_factor=stride, mode="bilinear", align_corners=False)[0].numpy()
    return maps


# ---- the other representations -------------------------------------------------------------------------------


def normalised(labels: np.ndarray) -> Maps:
    """Foreground, and the distance to the outline as a share of the nucleus's greatest distance."""
    return encode(labels, distance_px=1e6)


def boundary(labels: np.ndarray, width: float = 2) -> Maps:
    """Foreground, and the outermost ``width`` px of each nucleus (three classes: Chen et al. 2017, DCAN)."""
    band = np.zeros(labels.shape, np.float32)
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        if box is not None:
            inside = labels[box] == number
            band[box][inside & (ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1] <= width)] = 1
    return np.concatenate([foreground(labels), band[None]])


def hover(labels: np.ndarray) -> Maps:
    """Foreground, and HoVer-Net's maps: horizontal and vertical distance to the centroid, rescaled to 0..1."""
    maps = np.full((3, *labels.shape), 0.5, np.float32)
    maps[0] = labels > 0
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None:
            continue
        inside = labels[box] == number
        for channel, position in zip((2, 1), np.nonzero(inside), strict=True):
            offset = position - position.mean()
            scale = np.where(offset < 0, -offset.min(), offset.max())
            maps[channel][box][inside] = 0.5 + 0.5 * offset / np.maximum(scale, 1e-6)
    return maps


def binomial(order: int, derivative: bool) -> np.ndarray:
    """The two factors of a Sobel kernel of ``order`` taps."""
    kernel = np.ones(1)
    for _ in range(order - 1 - derivative):
        kernel = np.convolve(kernel, [1, 1])
    return np.convolve(kernel, [-1, 1]) if derivative else kernel / kernel.sum()


def stretched(x: np.ndarray) -> np.ndarray:
    return (x - x.min()) / max(float(np.ptp(x)), 1e-6)


def hover_energy(maps: Maps) -> np.ndarray:
    """(H, W) 0..1: low where the horizontal or the vertical map falls steeply, between nuclei."""
    rise, smooth = binomial(SOBEL, True), binomial(SOBEL, False)
    slopes = []
    for channel, axis in ((1, 1), (2, 0)):
        slope = ndimage.correlate1d(stretched(maps[channel]), rise, axis=axis)
        slopes.append(stretched(ndimage.correlate1d(slope, smooth, axis=1 - axis)))
    return np.minimum(*slopes) * (maps[0] > 0.5)


# ---- the decoders --------------------------------------------------------------------------------------------


def large(labels: np.ndarray, area: int) -> np.ndarray:
    return np.where(np.bincount(labels.ravel())[labels] >= area, labels, 0)


def seeded(height: np.ndarray, seeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Watershed from the seeds. Foreground components without a seed become nuclei; those under 50 px are dropped."""
    labels = watershed(-height, seeds, mask=mask)
    orphans = components((mask & (labels == 0)).astype(np.float32))
    return large(np.where(orphans > 0, orphans + labels.max(), labels), 50)


def by_threshold(height: np.ndarray, mask: np.ndarray, level: float, sigma: float) -> np.ndarray:
    """Watershed from the connected components above ``level`` of 5 px or more."""
    smooth = ndimage.gaussian_filter(height, sigma) if sigma else height
    return seeded(smooth, large(ndimage.label((smooth > level) & mask)[0], 5), mask)


def by_ridge(height: np.ndarray, mask: np.ndarray, ridge: float, sigma: float) -> np.ndarray:
    """nucseg's own decoder, on any landscape."""
    smooth = ndimage.gaussian_filter(height, sigma) if sigma else height
    return large(split(smooth, mask, ridge), 50)


def by_hover(energy: np.ndarray, mask: np.ndarray, level: float, opening: int) -> np.ndarray:
    """HoVer-Net's decoder: markers where the energy is high (there 0.6), filled, opened, of 10 px or more."""
    markers = ndimage.binary_fill_holes(mask & (energy > level))
    if opening:
        disc = np.hypot(*np.mgrid[-opening : opening + 1, -opening : opening + 1]) <= opening + 0.5
        markers = ndimage.binary_opening(markers, structure=disc)
    return seeded(ndimage.gaussian_filter(energy, 0.8), large(ndimage.label(markers)[0], 10), mask)


class Candidate(NamedTuple):
    """``encode``: label map -> maps. ``landscape``: maps -> (H, W), high in a nucleus, low between two."""

    encode: Callable[[np.ndarray], Maps]
    landscape: Callable[[Maps], np.ndarray]
    cut: Callable[..., np.ndarray]
    grid: Mapping[str, tuple]

    def decode(self, maps: Maps, **setting: float) -> np.ndarray:
        return self.cut(self.landscape(maps), maps[0] > 0.5, **setting)


def second(maps: Maps) -> np.ndarray:
    return maps[1]


def interior(maps: Maps) -> np.ndarray:
    return np.clip(maps[0] - maps[1], 0, 1)


def connected(_: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return components(mask.astype(np.float32), min_area=50)


RIDGE: dict[str, tuple] = {"ridge": (0.5, 0.6, 0.7, 0.8), "sigma": (0.0, 1.0)}
CANDIDATES = {
    "foreground, components": Candidate(foreground, lambda maps: maps[0], connected, {}),
    "boundary, threshold": Candidate(boundary, interior, by_threshold, {"level": (0.6, 0.7, 0.8), "sigma": (0.0,)}),
    "boundary, ridge": Candidate(boundary, interior, by_ridge, RIDGE),
    "hover, published": Candidate(hover, hover_energy, by_hover, {"level": (0.45, 0.5, 0.55, 0.6), "opening": (0, 2)}),
    "hover, ridge": Candidate(hover, hover_energy, by_ridge, RIDGE),
    "normalised, threshold": Candidate(
        normalised, second, by_threshold, {"level": (0.4, 0.5, 0.6), "sigma": (0.0, 1.0)}
    ),
    "normalised, ridge": Candidate(normalised, second, by_ridge, RIDGE),
    "distance, threshold": Candidate(encode, second, by_threshold, {"level": (0.5, 0.6, 0.7), "sigma": (0.0, 1.0)}),
    "distance, ridge": Candidate(encode, second, by_ridge, RIDGE),  # nucseg.instances
} | {
    f"distance {px} px, ridge": Candidate(
        lambda labels, px=px: encode(labels, px), second, by_ridge, {"ridge": (0.7,), "sigma": (0.0,)}
    )
    for px in (4, 8, 12)  # instead of 6
}


# ---- the measurements ----------------------------------------------------------------------------------------


def chosen_images(dataset: NuInsSeg) -> tuple[list[int], list[int]]:
    """Choose training images: one from every second tissue to tune, and another one from each tissue to compare."""
    train = np.array(folds(dataset)[0].train)
    tissue = dataset.table["tissue"].to_numpy()[train]
    rng = np.random.default_rng(0)
    pairs = [rng.permutation(train[tissue == name])[:2].tolist() for name in sorted(set(tissue))]
    return [pair[0] for pair in pairs[::2]], [pair[1] for pair in pairs]


def mean_scores(truths: Iterable[np.ndarray], predictions: Iterable[np.ndarray]) -> dict[str, float]:
    tables = [contingency(truth, prediction) for truth, prediction in zip(truths, predictions, strict=True)]
    return {"aji": float(np.mean([aji(t) for t in tables])), "pq": float(np.mean([pq(t) for t in tables]))}


def measure(
    truths: dict[int, np.ndarray], name: str, settings: list[dict], strides: Iterable[int], noises: Iterable[str]
) -> list[dict[str, Any]]:
    candidate, rows = CANDIDATES[name], []
    ideal = {index: candidate.encode(truth) for index, truth in truths.items()}
    for stride, noise in itertools.product(strides, noises):
        maps = [degrade(ideal[index], stride, *NOISES[noise], seed=index) for index in ideal]
        for setting in settings:
            scores = mean_scores(truths.values(), (candidate.decode(m, **setting) for m in maps))
            text = " ".join(f"{key}={value}" for key, value in setting.items())
            rows.append({"representation": name, "setting": text, "stride": stride, "noise": noise} | scores)
    return rows


def extend(path: Path, key: str, names: Iterable[str], rows_of: Callable[[str], list[dict]]) -> pd.DataFrame:
    """Extend the table at ``path`` by the rows of each missing name, and return it."""
    table = pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame({key: []})
    for name in names:
        if name not in set(table[key]):
            made = pd.DataFrame(rows_of(name))
            table = pd.concat([table, made], ignore_index=True) if len(table) else made
            with write_atomic(path) as part:
                table.to_csv(part, index=False, float_format="%.4f")
            print(path.name, name, flush=True)
    return pd.read_csv(path, keep_default_na=False)  # read back, so that new and old rows are rounded alike


def settings_of(name: str) -> dict[str, dict]:
    grid = CANDIDATES[name].grid
    each = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return {" ".join(f"{key}={value}" for key, value in setting.items()): setting for setting in each}


def best_setting(tuning: pd.DataFrame, name: str) -> dict:
    """Return the setting with the best mean of AJI and PQ over all kinds of noise."""
    rows = tuning[tuning["representation"] == name]
    quality = (rows["aji"] + rows["pq"]).groupby(rows["setting"], sort=False).mean()
    return settings_of(name)[str(quality.idxmax())]


def round_trip(dataset: NuInsSeg, tissue: str) -> list[dict]:
    """One row per image and stride: `nucseg.instances` encodes and decodes."""
    rows = []
    for index in np.flatnonzero(dataset.table["tissue"] == tissue):
        truth = dataset[int(index)].labels
        maps = encode(truth)
        for stride in STRIDES:
            scores = mean_scores([truth], [decode(degrade(maps, stride, 0, 0, 0))])
            about = {"tissue": tissue, "stem": dataset.table["stem"][index], "stride": stride}
            rows.append(about | {"nuclei": len(np.unique(truth[truth > 0]))} | scores)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    arguments = common.parser(__doc__).parse_args()
    dataset = NuInsSeg(arguments.root)
    tune_on, compare_on = ({i: dataset[i].labels for i in indices} for indices in chosen_images(dataset))

    def at_stride_2(name: str) -> list[dict[str, Any]]:
        return measure(tune_on, name, list(settings_of(name).values()), (2,), NOISES)

    tuning = extend(OUT / "tuning.csv", "representation", CANDIDATES, at_stride_2)

    def everywhere(name: str) -> list[dict[str, Any]]:
        return measure(compare_on, name, [best_setting(tuning, name)], STRIDES, NOISES)

    extend(OUT / "representations.csv", "representation", CANDIDATES, everywhere)

    tissues = dict.fromkeys(dataset.table["tissue"])
    images = extend(OUT / "roundtrip_images.csv", "tissue", tissues, lambda tissue: round_trip(dataset, tissue))
    mean = {"images": ("stem", "size"), "nuclei": ("nuclei", "sum"), "aji": ("aji", "mean"), "pq": ("pq", "mean")}
    half = images[images["stride"] == 2]
    for name, table in (("roundtrip", half.groupby("tissue")), ("strides", images.groupby("stride"))):
        table.agg(**mean).reset_index().to_csv(OUT / f"{name}.csv", index=False, float_format="%.4f")
    common.record(
        "representations",
        {},  # the tables are already written
        data=common.data(len(dataset), arguments.data_note),
        images={"tuning": names(dataset, tune_on), "comparison": names(dataset, compare_on)},
        noises={name: dict(zip(("blur_px", "noise"), value, strict=True)) for name, value in NOISES.items()},
    )


def names(dataset: NuInsSeg, indices: Iterable[int]) -> list[str]:
    return [dataset.table["stem"][index] for index in indices]


if __name__ == "__main__":
    main()
