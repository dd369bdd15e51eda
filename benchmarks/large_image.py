"""Time and memory to segment images of several sizes up to 20,000 x 20,000 px with `nucseg predict`.

    python -m benchmarks.large_image [--sides 2500 5000 10000 20000] [--engine auto] [--against COMMIT] [--quick]

The images are mosaics of synthetic tissue, written tile by tile. Each runs in a separate process. With --against, an
earlier commit segments the largest image, too. Writes results/large-image: sizes.csv (one row per size) and run.json,
with the details of the largest.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile

from benchmarks.side_by_side import ROOT, exported, parser
from experiments.common import record
from nucseg.data.synth import TISSUES, generate
from nucseg.inference.options import ENGINES
from nucseg.model.adapters import DEFAULT_ADAPTER
from nucseg.model.network import pick_device

RUN = "import sys; from nucseg.cli import main; sys.exit(main())"  # `python -m nucseg` fails in early commits
SIDES = (2500, 5000, 10_000, 20_000)  # px


def mosaic(side: int, patches: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the image's tiles of 512 px, rotated by position; the last ones are padded."""
    for row, column in np.ndindex(-(-side // 512), -(-side // 512)):
        yield np.ascontiguousarray(np.rot90(patches[patch_at(row, column, len(patches))], (row + column) % 4))


def patch_at(row: int, column: int, count: int) -> int:
    """Return which of ``count`` patches is at a place of the mosaic."""
    return (row * 7 + column * 3) % count


def write_mosaic(path: Path, side: int) -> None:
    """Write the mosaic as a tiled, compressed BigTIFF."""
    across = -(-side // 512)
    needed = {patch_at(row, column, len(TISSUES)) for row, column in np.ndindex(across, across)}
    none = np.zeros(0)
    patches = [generate(tissue, 0, size=512).image if k in needed else none for k, tissue in enumerate(TISSUES)]
    tifffile.imwrite(
        path,
        mosaic(side, patches),
        shape=(side, side, 3),
        dtype=np.uint8,
        tile=(512, 512),
        photometric="rgb",
        compression="zlib",
        bigtiff=True,
        resolution=(40000, 40000),
        resolutionunit="CENTIMETER",
    )


def measure(side: int, options: Sequence[str], package: Path = ROOT) -> dict[str, Any]:
    """Segment one mosaic in a separate process; return its size, nuclei, seconds, CPU seconds, memory and files.

    ``options``: of `nucseg predict`. ``package``: the folder that holds the package.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "large.tif", Path(folder) / "out"
        write_mosaic(path, side)
        words = [sys.executable, "-c", RUN, "predict", str(path), "--out", str(out), *options]
        began = time.monotonic()
        process = subprocess.Popen(words, cwd=package, env=os.environ | {"PYTHONPATH": str(package)})
        _, status, usage = os.wait4(process.pid, 0)  # the usage of this process alone
        seconds = time.monotonic() - began
        if status:
            raise SystemExit(f"nucseg predict failed on {side} px.")
        about = json.loads((out / "large.json").read_text())
        sizes = {p.name: round(p.stat().st_size / 2**20, 1) for p in sorted(out.iterdir()) if p.is_file()}
        shutil.rmtree(out)
        return {
            "side_px": side,
            "nuclei": about["nuclei"],
            "seconds": round(seconds, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "megapixels_a_second": round(side**2 / 1e6 / seconds, 2),
            "peak_memory_gib": round(usage.ru_maxrss / 2**20, 2),
            "image_mib": round(path.stat().st_size / 2**20, 1),
            "files_mib": sizes,
        }


def main() -> None:
    """Measure every size, and write the record."""
    options = parser(__doc__)
    options.add_argument("--sides", type=int, nargs="+", default=SIDES, help="sides of the images, px")
    options.add_argument("--engine", default="auto", choices=ENGINES, help="what runs the network (default: auto)")
    options.add_argument(
        "--against", help="earlier commit that segments the largest image, too, with its own default adapter"
    )
    arguments = options.parse_args()
    rows, before = [], {}
    for side in (700,) if arguments.quick else sorted(arguments.sides):
        rows.append(measure(side, ("--engine", arguments.engine)))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.against:
        with exported(arguments.against) as package:
            earlier = measure(rows[-1]["side_px"], (), package)
        names = ("nuclei", "seconds", "cpu_seconds", "peak_memory_gib")
        before = {"before": {"commit": arguments.against} | {name: earlier[name] for name in names}}
        print(json.dumps(before), flush=True)
    if not arguments.quick:
        sizes = pd.DataFrame(rows).drop(columns="files_mib")
        about = {"adapter": DEFAULT_ADAPTER, "engine": arguments.engine} | rows[-1] | before
        record("large-image", {"sizes": sizes}, pick_device("auto"), **about)


if __name__ == "__main__":
    main()
