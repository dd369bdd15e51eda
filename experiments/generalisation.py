"""Adapters on images unlike those they were trained on: another laboratory, other pixel sizes, other stains.

    python -m experiments.generalisation --root data/nuinsseg --bbbc038 data/bbbc038

- laboratory: BBBC038's 50 held-out histology images, of unknown pixel size, as they are. The base of nuinsseg-1 was
  trained on them; the base of the other adapters was not.
- half, double: NuInsSeg's first test fold, reduced to half and enlarged to double its size, with the pixel size told.
- stains: the same images, the amount of haematoxylin or eosin multiplied.

The adapters of the first fold (NAMES) are compared under all conditions, nuinsseg-all in the laboratory alone, because
it was trained on the other images. Each adapter decodes as it does by default. Adapters measured before are not
measured again. Writes results/generalisation:
scores.csv (one row per adapter, condition and image) and run.json.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from experiments import common
from nucseg.data.augment import restain
from nucseg.data.bbbc038 import held_out_histology
from nucseg.data.datasets import ImageFolder, NuInsSeg, Sample
from nucseg.data.splits import folds
from nucseg.files import sha256
from nucseg.inference.segmenter import Segmenter, load
from nucseg.metrics import score
from nucseg.model.adapters import adapter_path
from nucseg.model.network import pick_device

NAMES = ("nuinsseg-1", "nuinsseg-best-1", "nuinsseg-strong-1")  # trained on the first fold
ALL = "nuinsseg-all"
FACTORS = (0.5, 0.7, 1.4, 2.0)
LABORATORY = "laboratory"


def resized(sample: Sample, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Image and label map at ``factor`` times their size."""
    size = tuple(round(side * factor) for side in sample.labels.shape[::-1])
    image = Image.fromarray(sample.image).resize(size, Image.Resampling.BILINEAR)
    labels = Image.fromarray(sample.labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(image), np.asarray(labels)


def conditions(sample: Sample) -> Iterator[tuple[str, np.ndarray, np.ndarray, float]]:
    """(condition, image, label map, size relative to the original) of one image."""
    yield "as it is", sample.image, sample.labels, 1.0
    for name, factor in (("half", 0.5), ("double", 2.0)):
        yield name, *resized(sample, factor), factor
    for stain in ("haematoxylin", "eosin"):
        for factor in FACTORS:
            amounts = (factor, 1, 1) if stain == "haematoxylin" else (1, factor, 1)
            yield f"{stain} x {factor:g}", restain(sample.image, amounts), sample.labels, 1.0


def laboratory(folder: Path, limit: int = 0) -> tuple[ImageFolder, list[int]]:
    """BBBC038 in ``folder``, and the indices of its held-out histology images (at most ``limit``; 0: all)."""
    wanted = set(held_out_histology())
    images = ImageFolder(folder / "images", folder / "masks")
    return images, [i for i, stem in enumerate(images.table["stem"]) if stem[:12] in wanted][: limit or None]


def measured(hashes: dict[str, str]) -> pd.DataFrame:
    """The recorded scores of the adapters whose files have these SHA-256, by name; empty if there are none."""
    folder = common.RESULTS / "generalisation"
    if not (folder / "run.json").exists():
        return pd.DataFrame()
    recorded = json.loads((folder / "run.json").read_text(encoding="utf-8"))["adapters"]
    table = pd.read_csv(folder / "scores.csv")
    return table[[hashes.get(name) == recorded.get(name) for name in table["adapter"]]]


def main() -> None:
    """Score every adapter under every condition, and write the record."""
    options = common.parser(__doc__)
    options.add_argument("--bbbc038", type=Path, required=True, help="folder with images and masks in it")
    arguments = options.parse_args()
    dataset, rows = NuInsSeg(arguments.root), []
    hashes = {name: sha256(adapter_path(name)) for name in (*NAMES, ALL)}
    before = measured(hashes) if not arguments.limit else pd.DataFrame()
    models = {name: load(name) for name in hashes if before.empty or name not in set(before["adapter"])}
    other, chosen = laboratory(arguments.bbbc038, arguments.limit)
    for index in tqdm(chosen, desc=LABORATORY, unit="image"):
        sample = other[index]
        for name, model in models.items():
            found = score(sample.labels, Segmenter([model]).segment(sample.image))
            rows.append({"adapter": name, "condition": LABORATORY, "stem": sample.stem} | asdict(found))
    for index in tqdm(folds(dataset)[0].test[: arguments.limit or None], desc="first fold", unit="image"):
        sample = dataset[index]
        for condition, image, labels, factor in conditions(sample):
            for name in [name for name in NAMES if name in models]:
                segmenter = Segmenter([models[name]], um_per_px=models[name].config.um_per_px / factor)
                found = score(labels, segmenter.segment(image))
                row = {"adapter": name, "condition": condition, "tissue": sample.tissue, "stem": sample.stem}
                rows.append(row | asdict(found))
    table = pd.concat([before, pd.DataFrame(rows)], ignore_index=True)
    common.print_means(table, ["condition", "adapter"])
    common.record(
        "generalisation",
        {"scores": table[["adapter", "condition", "tissue", "stem", "dice", "aji", "pq"]]},
        pick_device("auto"),
        data=common.data(len(folds(dataset)[0].test), arguments.data_note)
        | {"laboratory": f"{len(chosen)} histology images of BBBC038"},
        adapters=hashes,
    )


if __name__ == "__main__":
    main()
