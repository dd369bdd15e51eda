"""Time of `nucseg.metrics.score` compared with cellseg-metrics (AJI and PQ) on one image: 512 px, 100 nuclei.

    python -m benchmarks.metrics_speed [--quick]

Both run alternately in the same process. Prints the medians and their ratio. The exit code is 1 if the ratio is under
10. Nothing is recorded.
"""

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from cellseg_metrics.functional import aggregated_jaccard_index, panoptic_quality

from benchmarks.side_by_side import parser
from nucseg.metrics import score

LEAST_RATIO = 10


def label_map(size: int = 512, across: int = 10) -> np.ndarray:
    """Separate discs of different radii on a grid: (size, size) int32."""
    pitch = size // across
    y, x = np.mgrid[:size, :size]
    row, column = np.minimum(y // pitch, across - 1), np.minimum(x // pitch, across - 1)
    radius = np.random.default_rng(0).uniform(8, pitch / 2 - 2, (across, across))[row, column]
    distance = np.hypot(y - (row + 0.5) * pitch, x - (column + 0.5) * pitch)
    return np.where(distance < radius, row * across + column + 1, 0).astype(np.int32)


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def main() -> int:
    repeats = 2 if parser(__doc__).parse_args().quick else 15
    truth = label_map()
    prediction = np.roll(truth, (3, 2), axis=(0, 1))
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(seconds(lambda: score(truth, prediction)))
        theirs.append(
            seconds(lambda: (aggregated_jaccard_index(truth, prediction), panoptic_quality(truth, prediction)))
        )
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"{truth.max()} nuclei, {truth.shape[0]} px, median of {repeats} runs each")
    print(f"nucseg.metrics.score, all 8 scores     {1e3 * a:8.2f} ms")
    print(f"cellseg-metrics, AJI and PQ, SQ, DQ    {1e3 * b:8.2f} ms")
    print(f"ratio                                  {b / a:8.1f}")
    return 0 if b / a >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
