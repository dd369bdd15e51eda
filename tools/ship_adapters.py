"""Make the adapters that ship with nucseg from the runs of the first three folds: float16, each with a card.

    python -m tools.ship_adapters --runs results/best/broad-small --name nuinsseg-best --root data/nuinsseg

Writes nucseg/assets/adapters/NAME-1 to NAME-3, a safetensors file and a card each. The folds are the first
three by number, not by score. The scores on the card are those of the file itself, in half precision, on its test fold.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from nucseg.config import ModelConfig
from nucseg.data.datasets import NuInsSeg
from nucseg.data.splits import folds
from nucseg.files import sha256, write_atomic
from nucseg.inference.evaluate import evaluate
from nucseg.inference.segmenter import FIELD, load
from nucseg.model.adapters import ADAPTERS, read_adapter, read_decoding, save_adapter
from nucseg.records.runs import read_run
from nucseg.records.statistics import summarise
from nucseg.viz.figures import MICROMETRES_PER_PIXEL

COUNT = 3

CARD = """# The adapter `{name}`

LoRA of rank {rank} and the instance head, float16, for {base_name} (SHA-256 {base}…): segments nuclei in H&E
images.

- Data: NuInsSeg (Mahbod et al. 2024, CC BY 4.0; {note}), the {train} training images of {fold} of the benchmark's five;
  {val} more selected the epoch.{tuned} Its {test} test images were not used.
- Scores of this file on those {test} images, scored as the benchmark does (mean, 95% bootstrap interval over images):
  Dice {dice}, AJI {aji}, PQ {pq}.
- Budget: {epochs} epochs of one {crop} px window per image, images scaled to {size} px; {minutes:.0f} minutes on
  {device}.
- Pixel size: images of {field_px} px with an assumed {um} µm/px (usual for a 40x scan; the authors do not state it).
- Made by `{command}`, commit {commit}, {date}; in half precision by `tools/ship_adapters.py`.
  SHA-256 of the file: {sha}.
- Not for: anything clinical. Expect lower scores on other stains, scanners and tissues: check
  on your own images, and fine-tune (`nucseg finetune`).
- Licence: Apache-2.0, as nucseg's code; please cite NuInsSeg.
"""


def main() -> None:
    """Write the files, score them, and write the cards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--name", required=True, help="nuinsseg for the preset instance, nuinsseg-best for best")
    parser.add_argument("--root", type=Path, required=True)
    arguments = parser.parse_args()
    dataset = NuInsSeg(arguments.root)
    for fold in range(1, COUNT + 1):
        run = arguments.runs / f"fold_{fold}"
        tensors, config, base = read_adapter(run / "best.safetensors")
        known = {field.name for field in fields(ModelConfig)}
        config = {n: v for n, v in config.items() if n in known} | {
            "field_px": FIELD,
            "um_per_px": MICROMETRES_PER_PIXEL,
        }
        path = ADAPTERS / f"{arguments.name}-{fold}.safetensors"
        save_adapter(path, halved(tensors), config, base, read_decoding(run / "best.safetensors"))
        threshold = None if read_decoding(path) else 0.5  # None: as tuned for this adapter
        split = folds(dataset)[fold - 1]
        test, validation = split.test, len(split.val)
        scores = evaluate(load(path), dataset, test, fold=f"fold {fold}", threshold=threshold)
        recorded = read_run(run)
        change = scores["pq"].mean() - recorded.scores["pq"].mean()
        print(
            f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, PQ {scores['pq'].mean():.4f}, {change:+.4f} by float16"
        )
        about, made = recorded.about, summarise(scores)
        words = {
            "name": path.stem,
            "rank": config["rank"],
            "base_name": f"the base `{about['base']['name']}`",
            "base": base[:12],
            "note": about["data"]["note"] or "as published",
            "fold": f"fold {fold}",
            "field_px": FIELD,
            "um": MICROMETRES_PER_PIXEL,
            "minutes": about["seconds"] / 60,
            "commit": about["commit"][:7],
            "date": about["date"][:10],
            "sha": sha256(path),
            "tuned": ""
            if threshold
            else f" Decoding and object confidence were tuned on {validation} validation images.",
        }
        words |= {n: about["split"][n] for n in ("train", "val", "test")}
        words |= {n: about["config"][n] for n in ("epochs", "crop", "size")}
        words |= {n: about[n] for n in ("device", "command")}
        for name in ("dice", "aji", "pq"):
            row = made.loc[name]
            words[name] = f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        with write_atomic(ADAPTERS / f"{path.stem}.md") as part:
            part.write_text(CARD.format(**words), encoding="utf-8")


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in float16, but BatchNorm's statistics as they are, because variances may be large."""
    exact = ("running_mean", "running_var", "num_batches_tracked")
    return {name: t if name.endswith(exact) else t.half() for name, t in tensors.items()}


if __name__ == "__main__":
    main()
