"""Training steps of this commit beside those of an earlier one: images a second, and the losses, which must agree.

    python -m benchmarks.training_step --against COMMIT [--turns 8] [--crop 256]

Both run the preset instance on the base offline, on the same synthetic images, in turns, on one thread. Written to
results/training-speed: run.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.side_by_side import ROOT, Process, exported, ratio
from experiments.common import record

WORKER = Path(__file__).with_name("_training_worker.py")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", required=True, help="commit to compare with")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--crop", type=int, default=256, help="side of the images, px")
    arguments = parser.parse_args()
    found = {}
    with exported(arguments.against) as before:
        for precision in ("float32", "bfloat16"):
            words = (str(arguments.crop), precision)
            processes = [Process(path, str(WORKER), *words) for path in (before, ROOT)]
            rows = [[json.loads(process.ask()) for process in processes] for _ in range(arguments.turns + 2)]
            for process in processes:
                process.close()
            seconds, losses = np.array(rows)[2:, :, 0], np.array(rows)[:, :, 1]
            found[precision] = ratio(list(seconds[:, 0]), list(seconds[:, 1])) | {
                "losses_before": losses[:, 0].round(5).tolist(),
                "losses_now": losses[:, 1].round(5).tolist(),
            }
            print(precision, found[precision])
    record("training-speed", {}, against=arguments.against, crop_px=arguments.crop, threads=1, ratios=found)


if __name__ == "__main__":
    main()
