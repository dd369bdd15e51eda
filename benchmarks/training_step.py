"""CPU seconds of training steps of this commit and of an earlier one, and their losses, which must agree.

    python -m benchmarks.training_step --against COMMIT [--turns 8] [--crop 256] [--quick]

Both train the preset instance on the base offline, with the same synthetic images, in turns, on one thread. Writes
results/training-speed: run.json.
"""

import json
from pathlib import Path

import numpy as np

from benchmarks.side_by_side import ROOT, Process, exported, parser, ratio
from experiments.common import record

WORKER = Path(__file__).with_name("_training_worker.py")


def main() -> None:
    """Measure, and write the record."""
    options = parser(__doc__)
    options.add_argument("--against", required=True, help="commit to compare with")
    options.add_argument("--turns", type=int, default=8, help="number of measured steps each (default: 8)")
    options.add_argument("--crop", type=int, default=256, help="side of the images, px (default: 256)")
    arguments = options.parse_args()
    turns, crop = (1, 64) if arguments.quick else (arguments.turns, arguments.crop)
    found = {}
    with exported(arguments.against) as before:
        for precision in ("float32", "bfloat16"):
            words = (str(crop), precision)
            processes = [Process(path, str(WORKER), *words) for path in (before, ROOT)]
            rows = [[json.loads(process.ask()) for process in processes] for _ in range(turns + 2)]
            for process in processes:
                process.close()
            seconds, losses = np.array(rows)[2:, :, 0], np.array(rows)[:, :, 1]
            found[precision] = ratio(list(seconds[:, 0]), list(seconds[:, 1])) | {
                "losses_before": losses[:, 0].round(5).tolist(),
                "losses_now": losses[:, 1].round(5).tolist(),
            }
            print(precision, found[precision])
    if not arguments.quick:
        record("training-speed", {}, against=arguments.against, crop_px=crop, threads=1, ratios=found)


if __name__ == "__main__":
    main()
