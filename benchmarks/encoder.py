"""CPU seconds of the image encoder at 1,024 px: stock MobileSAM and nucseg's merged one, in torch and OpenVINO.

    python -m benchmarks.encoder [--turns 5] [--quick]

One thread. Writes results/encoder-speed: run.json, with the ratios and the largest difference between the outputs.
"""

from typing import Any

import numpy as np
import torch

from benchmarks.side_by_side import cpu_seconds, in_turns, parser, ratio
from experiments.common import record
from nucseg.config import ModelConfig
from nucseg.model.bases import load_base
from nucseg.model.merged import merged
from nucseg.model.network import build_model
from nucseg.model.sam import build_sam, part, quiet_tracing

SIDE = 1024


def compiled(encoder: torch.nn.Module, x: torch.Tensor, precision: str) -> Any:
    """Compile the encoder with OpenVINO for inputs like ``x``."""
    import openvino

    with quiet_tracing():
        model = openvino.convert_model(encoder, example_input=x, input=list(x.shape))
    return openvino.Core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    )


@torch.inference_mode()
def main() -> None:
    """Measure, and write the record."""
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=5, help="number of measurements each (default: 5)")
    arguments = options.parse_args()
    turns = 1 if arguments.quick else arguments.turns
    torch.set_num_threads(1)
    base = load_base("offline")
    sam = build_sam()
    sam.image_encoder.load_state_dict(part(base.state, "image_encoder."))
    stock = sam.image_encoder.eval()
    model = build_model(ModelConfig(base="offline", head="instance"), base)
    ours = merged(model).model.encoder.to(memory_format=torch.channels_last)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32))
    engines = {precision: compiled(ours, x, precision) for precision in ("f32", "bf16")}
    expected = stock(x).numpy()
    off = {"torch": ours(x).numpy(), **{name: run(x.numpy())[0] for name, run in engines.items()}}
    tasks = {"stock": lambda: cpu_seconds(lambda: stock(x)), "torch": lambda: cpu_seconds(lambda: ours(x))}
    for name, run in engines.items():
        tasks[name] = lambda run=run: cpu_seconds(lambda: run(x.numpy()))  # type: ignore[misc]
    seconds = in_turns(tasks, turns)
    names = {"torch": "torch, float32", "f32": "OpenVINO, float32", "bf16": "OpenVINO, bfloat16"}
    rows = {
        label: ratio(seconds["stock"], seconds[name])
        | {"largest_difference": float(np.abs(off[name] - expected).max() / np.abs(expected).max())}
        for name, label in names.items()
    }
    print(rows)
    if not arguments.quick:
        record("encoder-speed", {}, against="mobile_sam, torch, float32", side_px=SIDE, threads=1, ratios=rows)


if __name__ == "__main__":
    main()
