"""CPU seconds and memory to score large label maps, by size; and the ratio to cellseg-metrics at 512 px.

    python -m benchmarks.scores [--largest 20000] [--quick]

Each size runs in a separate process, so that peaks of memory are separate too. Writes results/scores-speed: sizes.csv
(one row per size) and run.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import pandas as pd

from benchmarks.metrics_speed import label_map
from benchmarks.side_by_side import ROOT, cpu_seconds, in_turns, parser, ratio
from experiments.common import record
from nucseg.metrics import score

SIZES = ((512, 16), (1024, 32), (2048, 64), (4096, 128), (8192, 256))  # px, nuclei across


def tissue(size: int, across: int) -> np.ndarray:
    """Return discs of different radii on a grid, many of which touch: (size, size) int32."""
    rng, pitch = np.random.default_rng(0), size // across
    labels = np.zeros((size, size), np.int32)
    y, x = np.mgrid[:pitch, :pitch] - (pitch - 1) / 2
    for number, (row, column) in enumerate(np.ndindex(across, across), 1):
        tile = labels[row * pitch :, column * pitch :][:pitch, :pitch]
        tile[np.hypot(y, x) < rng.uniform(0.25, 0.52) * pitch] = number
    return labels


def one(size: int, across: int) -> None:
    """Score one pair of maps; print the CPU seconds and memory as JSON."""
    truth = tissue(size, across)
    prediction = np.roll(truth, (3, 2), axis=(0, 1))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    score(truth, prediction)
    spent, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"size_px": size, "nuclei": int(truth.max()), "cpu_seconds": spent, "memory_gib": (peak - before) / 2**20}
    print(json.dumps(row))


def main() -> None:
    """Measure, and write the record."""
    options = parser(__doc__)
    options.add_argument("--largest", type=int, default=20000, help="side of the largest map, px (default: 20000)")
    options.add_argument("--one", nargs=2, type=int, metavar=("SIZE", "ACROSS"), help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.one:
        one(*arguments.one)
        return
    from cellseg_metrics.functional import aggregated_jaccard_index, panoptic_quality

    rows = []
    sizes = SIZES[:1] if arguments.quick else (*SIZES, (arguments.largest, arguments.largest // 70))
    for size, across in sizes:
        words = [sys.executable, "-m", "benchmarks.scores", "--one", str(size), str(across)]
        rows.append(json.loads(subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout))
        print(rows[-1], flush=True)
    truth = label_map()
    prediction = np.roll(truth, (3, 2), axis=(0, 1))
    seconds = in_turns(
        {
            "cellseg-metrics": lambda: cpu_seconds(
                lambda: (aggregated_jaccard_index(truth, prediction), panoptic_quality(truth, prediction))
            ),
            "nucseg": lambda: cpu_seconds(lambda: score(truth, prediction)),
        },
        1 if arguments.quick else 15,
    )
    beside = ratio(seconds["cellseg-metrics"], seconds["nucseg"])
    print(beside)
    if not arguments.quick:
        record("scores-speed", {"sizes": pd.DataFrame(rows)}, cellseg_metrics_512_px=beside, threads=1)


if __name__ == "__main__":
    main()
