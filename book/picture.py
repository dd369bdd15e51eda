"""Make the README's picture: synthetic tissue with the outlines of its nuclei. ``python book/picture.py``"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from nucseg.viz import figures
from nucseg.data.synth import generate

TISSUES = (
    "human liver",
    "human pancreas",
    "human cerebellum",
    "human kidney",
    "human placenta",
    "human tongue",
)

figures.use_style()
figure, axes = plt.subplots(2, 3, figsize=(9, 6.3))
for ax, tissue in zip(axes.flat, TISSUES, strict=True):
    sample = generate(tissue, 3, 256)
    figures.overlay(sample.image, sample.labels, ax)
    ax.set_title(tissue)
figures.scale_bar(axes[0, 0])
figure.savefig(
    Path(__file__).parent / "_static" / "tissue.jpg",
    dpi=110,
    pil_kwargs={"quality": 88},
)
