"""Run every benchmark, one after the other, each in a separate process. For an idle machine.

    python -m benchmarks.all [--only NAME ...] [--against COMMIT] [--quick] [--list]

Those that record write results/…, which the book reads; --quick tries them at the smallest sizes and records nothing.
training_step compares with an earlier commit and is skipped without --against. The exit code is 1 if one failed.
"""

import subprocess
import sys
import time

from benchmarks.side_by_side import ROOT, parser

BENCHMARKS = {
    "instances_speed": "encoding and decoding label maps at 512 px, against limits",
    "metrics_speed": "scores at 512 px, against cellseg-metrics",
    "scores": "scores by size, seconds and memory (results/scores-speed)",
    "encoder": "the image encoder, against stock MobileSAM (results/encoder-speed)",
    "engines": "throughput by device, engine and precision (results/engines)",
    "throughput": "segmentation, against MobileSAM's automatic mask generator (results/throughput)",
    "end_to_end": "from image to label map, against the report's design (results/end-to-end)",
    "large_image": "segmentation by size, seconds and memory (results/large-image)",
    "training_cost": "training steps by variant of the ablation (results/training-cost)",
    "training_profile": "a training step by group of operations (results/training-profile)",
    "training_step": "training steps, against an earlier commit (results/training-speed)",
}


def main() -> int:
    """Run the benchmarks; return 1 if one of them failed."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help="benchmarks to run")
    options.add_argument("--against", default="", help="earlier commit for training_step")
    options.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    arguments = options.parse_args()
    if arguments.list:
        print("\n".join(f"{name:17s} {about}" for name, about in BENCHMARKS.items()))
        return 0
    failed = []
    for name in arguments.only or BENCHMARKS:
        words = [sys.executable, "-m", f"benchmarks.{name}", *["--quick"] * arguments.quick]
        if name == "training_step":
            if not arguments.against:
                print("training_step: skipped, because it needs --against COMMIT", flush=True)
                continue
            words += ["--against", arguments.against]
        print(f"{name}: {BENCHMARKS[name]}", flush=True)
        began = time.monotonic()
        if code := subprocess.call(words, cwd=ROOT):
            failed.append(f"{name} (exit code {code})")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
