"""Time and peak memory of a training step, for each variant of the study ablation.

    python benchmarks/training_cost.py [--budget small] [--base offline]

Each variant trains for a few steps on synthetic tissue in a separate process, so that peaks are separate too. Writes
results/training-cost: costs.csv (one row per variant) and run.json. Run it on an idle machine: the times in the
recorded runs are from machines that were also busy otherwise.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from nucseg.config import Config
from nucseg.data.synth import generate
from nucseg.files import write_atomic, write_json
from nucseg.instances import encode
from nucseg.model.network import build_model, parameter_ledger, pick_device, place
from nucseg.records.provenance import commit, device_name, peak_memory_mib
from nucseg.studies.study import read_study
from nucseg.training.loop import _loss, _trainable

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "training-cost"
STEPS = 8


def one(config: Config) -> dict:
    """Time ``STEPS`` steps of one variant: seconds per step (median), images per second, peak memory in MiB."""
    device = pick_device(config.device)
    model = place(build_model(config), device, config.precision).train()
    optimiser = torch.optim.AdamW(_trainable(model), lr=config.lr)
    side = config.crop or config.size
    sample = generate("human liver", 0, size=side)
    images = torch.from_numpy(np.stack([sample.image.transpose(2, 0, 1)] * config.batch_size)).to(device)
    maps = encode(sample.labels)[: 1 if config.head != "instance" or config.without == "distance" else 2]
    targets = torch.from_numpy(np.stack([maps] * config.batch_size)).to(device)
    seconds = []
    for _ in range(STEPS + 2):  # the first two warm up
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default="small")
    parser.add_argument("--base", default="offline")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    study = read_study(ROOT / "studies" / "ablation.toml", arguments.budget, {"base": arguments.base})
    configs = {folder.name: config for config, folder in study.tasks(OUT)}
    if arguments.variant:
        print(json.dumps(one(configs[arguments.variant])))
        return
    rows = []
    for name in configs:
        command = [sys.executable, __file__, "--budget", arguments.budget, "--base", arguments.base, "--variant", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append({"variant": name} | json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    with write_atomic(OUT / "costs.csv") as part:
        table.drop(columns=["device"]).to_csv(part, index=False, float_format="%.4f")
    config = next(iter(configs.values()))
    about = {
        "command": f"python benchmarks/training_cost.py --budget {arguments.budget} --base {arguments.base}",
        "batch_size": config.batch_size,
        "side_px": config.crop or config.size,
        "steps": STEPS,
        "device": rows[0]["device"],
        "versions": {"torch": torch.__version__},
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(OUT / "run.json", about)


if __name__ == "__main__":
    main()
