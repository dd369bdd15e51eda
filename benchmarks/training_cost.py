"""Time and peak memory of a training step, for each variant of the study ablation.

    python -m benchmarks.training_cost [--budget small] [--base offline] [--quick]

Each variant trains for a few steps on synthetic tissue in a separate process, so that peaks of memory are separate too.
Writes results/training-cost: costs.csv (one row per variant) and run.json. Run it on an idle machine.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import torch

from benchmarks.side_by_side import ROOT, parser
from experiments.common import RESULTS, record
from nucseg.config import Config
from nucseg.data.synth import generate
from nucseg.instances import encode
from nucseg.model.network import build_model, parameter_ledger, pick_device, place
from nucseg.records.provenance import device_name, peak_memory_mib
from nucseg.studies.study import read_study
from nucseg.training.loop import _loss, _trainable

STEPS = 8


def one(config: Config, steps: int) -> dict:
    """Time ``steps`` steps of one variant: seconds per step (median), images per second, peak memory in MiB."""
    device = pick_device(config.device)
    model = place(build_model(config), device, config.precision).train()
    optimiser = torch.optim.AdamW(_trainable(model), lr=config.lr)
    side = config.crop or config.size
    sample = generate("human liver", 0, size=side)
    images = torch.from_numpy(np.stack([sample.image.transpose(2, 0, 1)] * config.batch_size)).to(device)
    maps = encode(sample.labels)[: 1 if config.head != "instance" or config.without == "distance" else 2]
    targets = torch.from_numpy(np.stack([maps] * config.batch_size)).to(device)
    seconds = []
    for _ in range(steps + 2):  # the first two warm up
        start = time.perf_counter()
        loss = _loss(model(images), targets, config)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    middle = float(np.median(seconds[2:]))
    return {
        "trainable": parameter_ledger(model)["trainable"],
        "seconds_a_step": middle,
        "images_a_second": config.batch_size / middle,
        "peak_memory_mib": peak_memory_mib(device),
        "precision": model.precision,
        "device": device_name(device),
    }


def main() -> None:
    """Measure every variant in a separate process, and write the table."""
    options = parser(__doc__)
    options.add_argument("--budget", default="small", help="budget of the study (default: small)")
    options.add_argument("--base", default="offline", help="base checkpoint (default: offline)")
    options.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    study = read_study(ROOT / "studies" / "ablation.toml", arguments.budget, {"base": arguments.base})
    configs = {folder.name: config for config, folder in study.tasks(RESULTS)}
    if arguments.variant:
        print(json.dumps(one(configs[arguments.variant], 1 if arguments.quick else STEPS)))
        return
    rows = []
    for name in list(configs)[: 1 if arguments.quick else None]:
        words = ["--budget", arguments.budget, "--base", arguments.base, "--variant", name]
        words += ["--quick"] * arguments.quick
        command = [sys.executable, "-m", "benchmarks.training_cost", *words]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        rows.append({"variant": name} | json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    if arguments.quick:
        return
    config = next(iter(configs.values()))
    record(
        "training-cost",
        {"costs": pd.DataFrame(rows).drop(columns=["device"])},
        pick_device(config.device),
        batch_size=config.batch_size,
        side_px=config.crop or config.size,
        steps=STEPS,
    )


if __name__ == "__main__":
    main()
