"""What the bases find in NuInsSeg before any fine-tuning: their own pretrained heads, on the test part of fold 1.

    python -m experiments.zero_shot --root data/nuinsseg

The base 'broad' is scored a second time with the statistics of its BatchNorm layers estimated on training images of the
fold, without annotations and without changing a weight. Nothing is chosen: default decoding, images at their own size.
Writes results/zero-shot: scores.csv (one row per base and image) and run.json.
"""

from dataclasses import replace

import pandas as pd

from experiments import common
from nucseg.config import Config, preset
from nucseg.data.datasets import NuInsSeg
from nucseg.data.splits import Split, folds
from nucseg.inference.evaluate import evaluate
from nucseg.model.network import NucleiModel, build_model, pick_device, place
from nucseg.training.batchnorm import estimate_statistics
from nucseg.training.loop import sampled

# name of the rows: the base, the normalisation of its head, and whether statistics are estimated
BASES = {
    "offline": ("offline", "group", False),
    "broad": ("broad", "batch", False),
    "broad, statistics estimated": ("broad", "batch", True),
}


def untrained(name: str, norm: str) -> tuple[NucleiModel, Config]:
    """A base with its pretrained head and without LoRA, at 512 px, on the CPU or the GPU."""
    config = replace(preset("best"), base=name, head_norm=norm, lora_target="none", lora_conv=False)
    return place(build_model(config), pick_device()), config


def main() -> None:
    """Score each base and write the table."""
    arguments = common.parser(__doc__).parse_args()
    dataset = NuInsSeg(arguments.root)
    split: Split = folds(dataset)[0]
    test = list(split.test)[: arguments.limit or None]
    tables, bases = [], {}
    for name, (base, norm, estimated) in BASES.items():
        model, config = untrained(base, norm)
        if estimated:
            estimate_statistics(model, sampled(dataset, config, split.train), head=True)
        scores = evaluate(model, dataset, test, fold=split.name)
        print(name, scores[["dice", "aji", "pq"]].mean().round(4).to_dict(), flush=True)
        tables.append(scores.assign(base=name))
        bases[name] = common.base_of(model)
    if not arguments.limit:
        common.record(
            "zero-shot",
            {"scores": pd.concat(tables)},
            model.mean.device,
            data=common.data(len(test), arguments.data_note),
            split={"name": split.name, "test": len(test), "sha256": split.file_list_hash(dataset)},
            bases=bases,
            size=config.size,
        )


if __name__ == "__main__":
    main()
