"""Profile of training: the time of a step by group of operations, and of an epoch by stage.

    python -m benchmarks.training_profile [--preset best] [--base offline] [--steps 5] [--quick]

A step is profiled with torch.profiler on synthetic tissue; loading, training and scoring one batch are timed without
it. Writes results/training-profile: operations.csv (one row per operation, with its group, calls, and seconds per
step), stages.csv (seconds per batch) and run.json, with the share of each group.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import default_collate

from benchmarks.side_by_side import parser
from experiments.common import record
from nucseg.config import PRESETS, Config, preset
from nucseg.data.datasets import InMemory
from nucseg.data.synth import TISSUES, Synthetic
from nucseg.inference.evaluate import evaluate
from nucseg.model.network import build_model, pick_device, place
from nucseg.training.loop import _loss, _trainable, _TrainingImages

# The first group with a word in the operation's name holds it
GROUPS = {
    "convolutions": ("conv",),
    "normalisation": ("norm",),
    "matrix products": ("mm", "matmul", "linear", "einsum"),
    "attention": ("attention", "softmax"),
    "activations": ("gelu", "relu", "sigmoid", "silu", "hardswish", "dropout"),
    "LoRA": ("adapted",),  # outside its matrix products
    "views and indexing": ("index", "permute", "stride", "view", "slice", "transpose", "expand", "squeeze", "resize"),
    "copies between layouts and dtypes": ("copy", "to", "contiguous", "clone", "cat", "stack", "empty", "pad"),
    "interpolation and pooling": ("upsample", "interpolate", "pool"),
    "loss": ("entropy", "log", "exp", "nll"),
    "optimiser": ("foreach", "adam", "lerp", "addcdiv", "addcmul"),
    "sums and means": ("sum", "mean", "amax"),
    "additions and products": ("add", "mul", "sub", "div", "pow", "rsub", "neg", "sqrt"),
}


def group_of(operation: str) -> str:
    """Return the group of an operation by the words of its name.

    >>> group_of("aten::native_group_norm_backward"), group_of("aten::addmm"), group_of("aten::add_")
    ('normalisation', 'matrix products', 'additions and products')
    """
    name = operation.rpartition("::")[2].lower()
    for group, words in GROUPS.items():
        if any(name.strip("_") == word if word == "to" else word in name for word in words):
            return group
    return "other"


def step(model: Any, optimiser: torch.optim.Optimizer, images: Any, targets: Any, config: Config) -> None:
    """Take one training step."""
    device = model.mean.device
    loss = _loss(model(images.to(device)), targets.to(device), config)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(_trainable(model), config.grad_clip)
    optimiser.step()
    loss.item()  # waits for a GPU


def operations(task: Callable[[], None], steps: int, device: torch.device) -> pd.DataFrame:
    """Profile a task; return one row per operation: its group, calls and own seconds per step, longest first."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=activities) as found:
        for _ in range(steps):
            task()
    rows = []
    for event in found.key_averages():
        micro = event.self_device_time_total if cuda else event.self_cpu_time_total
        row = {"operation": event.key, "group": group_of(event.key), "calls": event.count / steps}
        rows.append(row | {"seconds": micro / 1e6 / steps})
    return pd.DataFrame(rows).sort_values("seconds", ascending=False, ignore_index=True)


def seconds(task: Callable[[], Any], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    """Profile, and write the record."""
    options = parser(__doc__)
    options.add_argument("--preset", default="best", choices=list(PRESETS), help="configuration (default: best)")
    options.add_argument("--base", default="offline", help="base checkpoint (default: offline)")
    options.add_argument("--steps", type=int, default=5, help="number of profiled steps (default: 5)")
    arguments = options.parse_args()
    steps = 1 if arguments.quick else arguments.steps
    config = replace(preset(arguments.preset), base=arguments.base, data="synthetic")
    if arguments.quick:
        config = replace(config, size=128, crop=64, batch_size=1)
    device = pick_device(config.device)
    model = place(build_model(config), device, config.precision).train()
    optimiser = torch.optim.AdamW(_trainable(model), lr=config.lr)
    data = InMemory(Synthetic(1, size=128 if arguments.quick else 512, tissues=TISSUES[: config.batch_size]))
    images = _TrainingImages(data, config)
    keys = [(0, index) for index in range(config.batch_size)]
    batch = default_collate([images[key] for key in keys])

    def train() -> None:
        step(model, optimiser, *batch, config)

    train()  # warm up
    table = operations(train, steps, device)
    stages = {
        "load": seconds(lambda: [images[key] for key in keys], steps),
        "train": seconds(train, steps),
        "score": seconds(lambda: evaluate(model, data, [key[1] for key in keys], progress=False), 1),
    }
    shares = table.groupby("group")["seconds"].sum().sort_values(ascending=False)
    shares = (shares / shares.sum()).round(4)
    print(shares.to_string(), stages, sep="\n")
    if not arguments.quick:
        rows = pd.DataFrame([{"stage": name, "seconds_a_batch": value} for name, value in stages.items()])
        about = {"preset": arguments.preset, "batch_size": config.batch_size, "side_px": config.crop or config.size}
        about |= {"steps": steps, "precision": model.precision, "shares": shares.to_dict()}
        record("training-profile", {"operations": table, "stages": rows}, device, **about)


if __name__ == "__main__":
    main()
