"""CPU seconds from a 512 px image to its label map: the report's design and `nucseg.segment`, in equal precision.

    python -m benchmarks.end_to_end [--turns 5] [--quick]

The report's design: the image is enlarged to 1,024 px, MobileSAM's encoder with LoRA of rank 8 on its Linear layers,
a 1x1 convolution as head, a threshold and connected components; with random weights, so only its time has a meaning.
nucseg: the default adapter. One thread; all see the same image in a turn, one of another tissue in the next. Writes
results/end-to-end: run.json, with the ratios.
"""

from collections.abc import Callable
from importlib.util import find_spec
from itertools import cycle

import numpy as np
import torch
from PIL import Image
from skimage.measure import label
from torch import nn
from torch.nn import functional as F

from benchmarks.side_by_side import cpu_seconds, in_turns, parser, ratio
from experiments.common import record
from nucseg.data.synth import TISSUES, generate
from nucseg.inference.segmenter import Segmenter, load
from nucseg.model.adapters import DEFAULT_ADAPTER
from nucseg.model.heads import LinearHead
from nucseg.model.lora import inject
from nucseg.model.network import place
from nucseg.model.sam import build_sam

SIDE, REPORT_SIDE = 512, 1024
PRECISIONS = ("float32", "bfloat16")


class ReportDesign(nn.Module):
    """The report's system as published: nothing is merged, and the logits have a stride of 16 px."""

    def __init__(self) -> None:
        super().__init__()
        sam = build_sam()
        self.encoder, self.head = sam.image_encoder, LinearHead()
        inject(self.encoder, r=8, alpha=8.0)
        self.register_buffer("mean", sam.pixel_mean)
        self.register_buffer("std", sam.pixel_std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) RGB, 0..255 -> (B, 1, S/16, S/16) logits."""
        return self.head([self.encoder((images - self.mean) / self.std)])

    @torch.inference_mode()
    def segment(self, image: np.ndarray, precision: str) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (H, W) label map."""
        enlarged = np.asarray(Image.fromarray(image).resize((REPORT_SIDE, REPORT_SIDE), Image.Resampling.BILINEAR))
        images = torch.from_numpy(enlarged).permute(2, 0, 1)[None].float()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = self(images)
        logits = F.interpolate(logits.float(), size=image.shape[:2], mode="bilinear", align_corners=False)
        return label((torch.sigmoid(logits)[0, 0] > 0.5).numpy())


def main() -> None:
    """Measure, and write the record."""
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=5, help="number of measurements each (default: 5)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    images = [generate(tissue, 0, size=SIDE).image for tissue in TISSUES[:: len(TISSUES) // 6]]
    report, cpu = ReportDesign().eval(), torch.device("cpu")
    tasks: dict[str, Callable[[], float]] = {}

    def task(run: Callable[[np.ndarray], np.ndarray]) -> Callable[[], float]:
        shown = cycle(images)

        def once() -> float:
            image = next(shown)
            return cpu_seconds(lambda: run(image))

        return once

    for precision in PRECISIONS:
        tasks[f"report, {precision}"] = task(lambda image, precision=precision: report.segment(image, precision))  # type: ignore[misc]
        for engine in ("torch", *["openvino"] * bool(find_spec("openvino"))):
            model = place(load(device="cpu"), cpu, precision)
            tasks[f"{engine}, {precision}"] = task(Segmenter([model], engine=engine).segment)
    seconds = in_turns(tasks, 1 if arguments.quick else arguments.turns)
    rows = {
        name: ratio(seconds[f"report, {name.split(', ')[1]}"], spent) | {"seconds": round(float(np.median(spent)), 3)}
        for name, spent in seconds.items()
    }
    for name, row in rows.items():
        print(name, row)
    if not arguments.quick:
        record(
            "end-to-end", {}, adapter=DEFAULT_ADAPTER, side_px=SIDE, report_side_px=REPORT_SIDE, threads=1, rows=rows
        )


if __name__ == "__main__":
    main()
