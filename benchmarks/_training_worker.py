"""Run one training step per input line, with the nucseg on the path; answer with its CPU seconds and loss."""

import json
import sys
import time

import numpy as np
import torch

try:
    from nucseg.config import apply, preset
    from nucseg.data.synth import generate
    from nucseg.model.network import build_model, place
    from nucseg.training.loop import _loss, _trainable

    batch_size = "batch_size"
except ImportError:  # before the package had rooms
    from nucseg.presets import preset
    from nucseg.synth import generate
    from nucseg.train import _loss, _trainable

    from nucseg.config import apply
    from nucseg.model import build_model, place

    batch_size = "batch"
from nucseg import cli
from nucseg.instances import encode

getattr(cli, "_keep_freed_memory", lambda: None)()  # as each command does, in commits that have it
torch.set_num_threads(1)
side, precision = int(sys.argv[1]), sys.argv[2]
config = apply(preset("instance"), {"base": "offline", "crop": 256, batch_size: 4}, "benchmark")
torch.manual_seed(0)
model = place(build_model(config), torch.device("cpu"), precision).train()
optimiser = torch.optim.AdamW(_trainable(model), lr=1e-3)
samples = [generate("human liver", i, size=side) for i in range(8)]
images = torch.from_numpy(np.stack([sample.image.transpose(2, 0, 1) for sample in samples]))
targets = torch.from_numpy(np.stack([encode(sample.labels) for sample in samples]))
sys.stdin.readline()
print("ready", flush=True)
for step, _ in enumerate(sys.stdin):
    start, chosen = time.process_time(), [(4 * step + i) % 8 for i in range(4)]
    loss = _loss(model(images[chosen]), targets[chosen], config)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(_trainable(model), 1.0)
    optimiser.step()
    print(json.dumps([time.process_time() - start, loss.item()]), flush=True)
