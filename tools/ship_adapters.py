"""Make the adapters that ship with nucseg: float16, each with a card.

    python -m tools.ship_adapters --runs results/best/broad-small --name nuinsseg-best --root data/nuinsseg
    python -m tools.ship_adapters --run results/recipe-long/broad-gpu/strong-fold_1 --name nuinsseg-strong-1 \\
        --root data/nuinsseg
    python -m tools.ship_adapters --all results/all-images/broad-gpu --name nuinsseg-all

From the runs of the first three folds, by number and not by score: NAME-1 to NAME-3; from one run: NAME. The
scores on their cards are those of the file itself, in half precision, on its test fold. From a run of the split 'all':
NAME, without a score.
Writes a safetensors file and a card each to nucseg/assets/adapters.
"""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

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

- Data: NuInsSeg (Mahbod et al. 2024, CC BY 4.0; {note}), {train} images{of}.
  {val} more selected the epoch.{tuned}
- {scores}
- Budget: {epochs} epochs of one {crop} px window per image, images scaled to {size} px; {minutes:.0f} minutes on
  {device}.
{purpose}- Pixel size: images of {field_px} px with an assumed {um} µm/px (usual for a 40x scan; the authors do not
  state it).
- Made by `{command}`, commit {commit}, {date}; in half precision by `tools/ship_adapters.py`.
  SHA-256 of the file: {sha}.
- Not for: anything clinical. Expect lower scores on other stains, scanners and tissues: check
  on your own images, and fine-tune (`nucseg finetune`).
- Licence: Apache-2.0, as nucseg's code; please cite NuInsSeg.
"""


SCORES = (
    "Scores of this file on the {test} test images of that fold, which were used neither to train nor to tune,\n"
    "  scored as the benchmark does (mean, 95% bootstrap interval over images): Dice {dice}, AJI {aji},\n"
    "  PQ {pq}."
)
NO_SCORES = (
    "No scores of its own, because no image is left to measure it on: see the five folds of the same recipe, trained\n"
    "  on fewer images (`{folds}`)."
)


def main() -> None:
    """Write the files, score those of a fold, and write the cards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, help="folder of the runs of the five folds")
    parser.add_argument("--run", type=Path, help="folder of one run of a fold")
    parser.add_argument("--all", type=Path, help="folder of a run of the split 'all'")
    parser.add_argument("--name", required=True, help="nuinsseg for the preset instance, nuinsseg-best for best")
    parser.add_argument("--root", type=Path, help="folder of NuInsSeg, with --runs or --run")
    parser.add_argument("--purpose", default="", help="a line on the cards: what the adapter is for")
    arguments = parser.parse_args()
    purpose = f"- For: {arguments.purpose}\n" if arguments.purpose else ""
    if arguments.all:
        ship(
            arguments.all,
            arguments.name,
            {"of": "", "purpose": purpose},
            NO_SCORES.format(folds="results/best/broad-gpu"),
        )
        return
    dataset = NuInsSeg(arguments.root)
    if arguments.run:
        ship_scored(arguments.run, arguments.name, dataset, purpose)
        return
    for fold in range(1, COUNT + 1):
        ship_scored(arguments.runs / f"fold_{fold}", f"{arguments.name}-{fold}", dataset, purpose)


def ship_scored(run: Path, name: str, dataset: NuInsSeg, purpose: str) -> None:
    """Write the adapter of a fold's run, score the file on the fold's test images, and write its card."""
    path, about = half(run, name), read_run(run).about
    fold, part = about["config"]["fold"], about["config"].get("score_part", "test")
    split = folds(dataset)[fold - 1]
    threshold = None if read_decoding(path) else 0.5  # None: as tuned for this adapter
    scores = evaluate(load(path), dataset, split.test, fold=f"fold {fold}", threshold=threshold)
    change = f", {scores['pq'].mean() - read_run(run).scores['pq'].mean():+.4f} by float16" if part == "test" else ""
    print(f"{name}: PQ {scores['pq'].mean():.4f}{change}")
    made, words = summarise(scores), {"test": str(len(split.test))}
    for score in ("dice", "aji", "pq"):
        row = made.loc[score]
        words[score] = f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
    ship(
        run,
        name,
        {"of": f" of the training part of fold {fold} of the benchmark's five", "purpose": purpose},
        SCORES.format(**words),
    )


def half(run: Path, name: str) -> Path:
    """Write the run's adapter in half precision, with the pixel size of NuInsSeg; return its path."""
    tensors, config, base = read_adapter(run / "best.safetensors")
    known = {field.name for field in fields(ModelConfig)}
    config = {n: v for n, v in config.items() if n in known}
    config |= {"field_px": FIELD, "um_per_px": MICROMETRES_PER_PIXEL}
    path = ADAPTERS / f"{name}.safetensors"
    save_adapter(path, halved(tensors), config, base, read_decoding(run / "best.safetensors"))
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    return path


def ship(run: Path, name: str, words: dict[str, Any], scores: str) -> None:
    """Write the run's adapter and its card."""
    path, about = half(run, name), read_run(run).about
    words |= {
        "name": name,
        "scores": scores,
        "rank": about["config"]["rank"],
        "base_name": f"the base `{about['base']['name']}`",
        "base": about["base"]["sha256"][:12],
        "note": about["data"]["note"] or "as published",
        "field_px": FIELD,
        "um": MICROMETRES_PER_PIXEL,
        "minutes": about["seconds"] / 60,
        "commit": about["commit"][:7],
        "date": about["date"][:10],
        "sha": sha256(path),
        "tuned": " Decoding and object confidence were tuned on the validation images." if read_decoding(path) else "",
    }
    words |= {n: about["split"][n] for n in ("train", "val")}
    words |= {n: about["config"][n] for n in ("epochs", "crop", "size")}
    words |= {n: about[n] for n in ("device", "command")}
    with write_atomic(ADAPTERS / f"{name}.md") as part:
        part.write_text(CARD.format(**words), encoding="utf-8")


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in float16, but BatchNorm's statistics as they are, because variances may be large."""
    exact = ("running_mean", "running_var", "num_batches_tracked")
    return {name: t if name.endswith(exact) else t.half() for name, t in tensors.items()}


if __name__ == "__main__":
    main()
