"""Time of nucseg.segment compared with MobileSAM's automatic mask generator: same images, base and machine.

The generator computes in float32, as published. nucseg is timed in float32 for the comparison, and in its default
precision.

    python -m benchmarks.throughput [--images 3] [--quick]

Writes results/throughput: run.json. With the base 'offline', the generator's mask decoder is untrained, so only its
time is meaningful; after ``nucseg fetch mobile_sam`` both use MobileSAM's checkpoint.
"""

import time

import numpy as np
import torch
from mobile_sam import SamAutomaticMaskGenerator
from tqdm.auto import tqdm

from benchmarks.side_by_side import parser
from experiments.common import base_of, record
from nucseg.data.synth import generate
from nucseg.inference.segmenter import load, segment
from nucseg.model.adapters import DEFAULT_ADAPTER
from nucseg.model.bases import load_base
from nucseg.model.network import place
from nucseg.model.sam import build_sam

TISSUES = ("human liver", "human kidney", "human placenta", "mouse kidney", "human pancreas")


def main() -> None:
    """Time both on the same images, and write the record."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=3, help=f"number of images, up to {len(TISSUES)} (default: 3)")
    arguments = options.parse_args()
    images = 1 if arguments.quick else arguments.images
    model = load()
    device = model.mean.device
    samples = [generate(tissue, 0, size=512) for tissue in TISSUES[:images]]
    sam = build_sam()
    base = load_base(model.base_name)
    sam.load_state_dict({n: t for n, t in base.state.items() if not n.startswith("instance_head.")})
    generator = SamAutomaticMaskGenerator(sam.to(device).eval(), points_per_side=2 if arguments.quick else 32)
    own_precision = model.precision

    def timed(image, precision):
        place(model, device, precision)
        segment(image, model)  # the first call in a precision warms up
        began = time.perf_counter()
        nuclei = int(segment(image, model).max())
        return time.perf_counter() - began, nuclei

    rows = []
    for sample in tqdm(samples, desc="images"):
        row = {"tissue": sample.tissue, "nuclei_true": int(len(np.unique(sample.labels)) - 1)}
        row["seconds_nucseg_own"], _ = timed(sample.image, own_precision)
        row["seconds_nucseg"], row["nuclei_nucseg"] = timed(sample.image, "float32")
        began = time.perf_counter()
        with torch.inference_mode():
            row["masks_generator"] = len(generator.generate(sample.image))
        row["seconds_generator"] = time.perf_counter() - began
        rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
        print(rows[-1], flush=True)
    ours, own, theirs = (
        sum(row[f"seconds_{who}"] for row in rows) / len(rows) for who in ("nucseg", "nucseg_own", "generator")
    )
    if arguments.quick:
        return
    record(
        "throughput",
        {},
        device,
        adapter=DEFAULT_ADAPTER,
        base=base_of(model),
        rows=rows,
        images_a_second_nucseg=round(1 / ours, 3),
        images_a_second_generator=round(1 / theirs, 4),
        ratio=round(theirs / ours, 1),
        precision="float32",
        own_precision=own_precision,
        ratio_own_precision=round(theirs / own, 1),
    )


if __name__ == "__main__":
    main()
