"""Time of `nucseg.instances.encode` and `decode` at 512 px: 49 and 256 nuclei, many of which touch.

    python -m benchmarks.instances_speed [--quick]

The maps are decoded both unchanged and as a network would predict them: from a stride-2 grid, blurred and noisy.
Prints the medians. The exit code is 1 if a median is over its limit. Nothing is recorded.
"""

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from benchmarks.side_by_side import parser
from experiments.representations import NOISES, degrade
from nucseg.instances import decode, encode

SIZE = 512
LIMITS = {49: (60, 40), 256: (60, 80)}  # nuclei: ms to encode, ms to decode


def label_map(nuclei: int) -> np.ndarray:
    """Discs around the jittered points of a grid, each pixel assigned to the nearest: (512, 512) int32."""
    across = round(nuclei**0.5)
    pitch = SIZE / across
    points = (np.indices((across, across)).reshape(2, -1).T + 0.5) * pitch
    points += np.random.default_rng(0).uniform(-0.2, 0.2, points.shape) * pitch
    y, x = np.mgrid[:SIZE, :SIZE]
    labels, nearest = np.zeros((SIZE, SIZE), np.int32), np.full((SIZE, SIZE), min(17.0, 0.45 * pitch))
    for number, (row, column) in enumerate(points, 1):
        distance = np.hypot(y - row, x - column)
        labels[distance < nearest] = number
        nearest = np.minimum(nearest, distance)
    return labels


def milliseconds(task: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        task()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> int:
    repeats = 2 if parser(__doc__).parse_args().quick else 15
    good = True
    for nuclei, (encode_limit, decode_limit) in LIMITS.items():
        truth = label_map(nuclei)
        maps = encode(truth)
        noisy = degrade(maps, 2, *NOISES["blur 2, noise 0.15"], seed=0)
        times = [
            milliseconds(lambda truth=truth: encode(truth), repeats),
            milliseconds(lambda maps=maps: decode(maps), repeats),
            milliseconds(lambda noisy=noisy: decode(noisy), repeats),
        ]
        good &= times[0] < encode_limit and max(times[1:]) < decode_limit
        print(
            f"{nuclei:4} nuclei, {100 * (truth > 0).mean():.0f}% foreground: encode {times[0]:.1f} ms, "
            f"decode {times[1]:.1f} ms, of noisy maps {times[2]:.1f} ms ({decode(noisy).max()} found)"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
