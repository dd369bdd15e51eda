"""Throughput of the network by device, engine and precision: megapixels per second of one image of one field.

    python -m benchmarks.engines [--side 1344] [--turns 5] [--quick]

The configurations that this machine has are run in turns. Writes results/engines: throughput.csv (one row per device,
engine and precision: the network alone, and `nucseg.segment` end to end) and run.json.
"""

import time
from importlib.util import find_spec

import numpy as np
import pandas as pd
import torch

from benchmarks.side_by_side import in_turns, parser
from experiments.common import record
from nucseg.data.synth import TISSUES, generate
from nucseg.inference.engines import engine_for
from nucseg.inference.segmenter import Segmenter, load
from nucseg.model.adapters import DEFAULT_ADAPTER
from nucseg.model.network import NucleiModel, pick_device, place
from nucseg.records.provenance import device_name


def image_of(side: int) -> np.ndarray:
    """Return a mosaic of synthetic tissue: (side, side, 3) uint8 RGB."""
    n = -(-side // 512)
    tiles = [[generate(TISSUES[(row * n + column) % 31], 0).image for column in range(n)] for row in range(n)]
    return np.concatenate([np.concatenate(row, axis=1) for row in tiles])[:side, :side].copy()


def configurations() -> list[tuple[torch.device, str, str]]:
    """List the devices, engines and precisions of this machine."""
    cpu, best = torch.device("cpu"), pick_device("auto")
    fast = place(load(device="cpu"), cpu).precision  # the default there
    found = [(cpu, "torch", precision) for precision in dict.fromkeys(("float32", fast))]
    if find_spec("openvino"):
        found += [(cpu, "openvino", precision) for _, _, precision in list(found)]
    if best.type != "cpu":
        found += [(best, "torch", "float32")]
        found += [(best, "torch", precision) for precision in ("float16", "bfloat16") if best.type == "cuda"]
    return found


def timed(model: NucleiModel, image: np.ndarray, engine: str, whole: bool) -> float:
    """Return the seconds of the network alone, or of reading, network and decoding (``whole``)."""
    run, segmenter = engine_for(model, engine), Segmenter([model], engine=engine)
    began = time.perf_counter()
    if whole:
        segmenter.segment(image)
    else:
        run(image[None])  # returns an array in memory, so a GPU has finished
    return time.perf_counter() - began


def main() -> None:
    """Measure every configuration in turns, and write the record."""
    options = parser(__doc__)
    options.add_argument("--side", type=int, default=1344, help="side of the image, px, a multiple of 64")
    options.add_argument("--turns", type=int, default=5, help="number of measurements each (default: 5)")
    arguments = options.parse_args()
    side, turns = (256, 1) if arguments.quick else (arguments.side, arguments.turns)
    image, tasks, rows = image_of(side), {}, []
    for device, engine, precision in configurations():
        model = place(load(device="cpu"), device, precision)
        for whole in (False, True):
            key = f"{device.type} {engine} {precision} {whole}"
            tasks[key] = lambda model=model, engine=engine, whole=whole: timed(model, image, engine, whole)
    seconds = {key: float(np.median(values)) for key, values in in_turns(tasks, turns).items()}
    for device, engine, precision in configurations():
        network, whole = (side**2 / 1e6 / seconds[f"{device.type} {engine} {precision} {w}"] for w in (False, True))
        rows.append(
            {
                "device": device_name(device),
                "engine": engine,
                "precision": precision,
                "network_megapixels_a_second": network,
                "megapixels_a_second": whole,
            }
        )
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.3f"))
    if not arguments.quick:
        about = {"side_px": side, "turns": turns, "adapter": DEFAULT_ADAPTER}
        record("engines", {"throughput": table}, pick_device("auto"), **about)


if __name__ == "__main__":
    main()
