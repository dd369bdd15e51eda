"""Time and memory to segment a 20,000 x 20,000 px image.

    python benchmarks/large_image.py [--side 20000]

The image is a mosaic of synthetic tissue, written tile by tile. Writes results/large-image/run.json.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
import torch

from nucseg.data.synth import TISSUES, generate
from nucseg.files import write_json
from nucseg.model.adapters import DEFAULT_ADAPTER
from nucseg.records.provenance import stamp

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "large-image"


def mosaic(side: int, patches: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the image's tiles of 512 px, rotated and mirrored by position; the last ones are padded."""
    n = -(-side // 512)
    for row, column in np.ndindex(n, n):
        patch = np.rot90(patches[(row * 7 + column * 3) % len(patches)], (row + column) % 4)
        yield np.ascontiguousarray(patch)


def write_mosaic(path: Path, side: int) -> None:
    """Write the mosaic as a tiled, compressed BigTIFF."""
    patches = [generate(tissue, 0, size=512).image for tissue in TISSUES]
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


def main() -> None:
    """Measure time and memory, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "large.tif", Path(folder) / "out"
        write_mosaic(path, arguments.side)
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "nucseg.cli", "predict", str(path), "--out", str(out)], check=True)
        seconds = time.monotonic() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        about = json.loads((out / "large.json").read_text())
        sizes = {p.name: round(p.stat().st_size / 2**20, 1) for p in sorted(out.iterdir()) if p.is_file()}
        shutil.rmtree(out)
    result = {
        "command": f"python benchmarks/large_image.py --side {arguments.side}",
        "side_px": arguments.side,
        "adapter": DEFAULT_ADAPTER,
        "nuclei": about["nuclei"],
        "seconds": round(seconds, 1),
        "megapixels_a_second": round(arguments.side**2 / 1e6 / seconds, 2),
        "peak_memory_gib": round(peak, 2),
        "files_mib": sizes,
        **stamp(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    write_json(OUT / "run.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
