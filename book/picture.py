"""Make the pictures of the README and of the first page, of synthetic tissue: ``python book/picture.py``

They are committed, as they change only with the code that makes them.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from nucseg import load
from nucseg.data.synth import generate
from nucseg.inference.segmenter import Segmenter
from nucseg.viz import figures

STATIC = Path(__file__).parent / "_static"
TISSUES = (
    "human liver",
    "human pancreas",
    "human cerebellum",
    "human kidney",
    "human placenta",
    "human tongue",
)


def tissues() -> None:
    """Six kinds of tissue with the outlines of their nuclei."""
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.3))
    for ax, tissue in zip(axes.flat, TISSUES, strict=True):
        sample = generate(tissue, 3, 256)
        figures.overlay(sample.image, sample.labels, ax)
        ax.set_title(tissue)
    figures.scale_bar(axes[0, 0])
    figure.savefig(STATIC / "tissue.jpg", dpi=110, pil_kwargs={"quality": 88})


def hero() -> None:
    """An image, the distance map that the network predicts for it, and the nuclei that are decoded."""
    image = generate("human placenta", 3, 512).image
    segmenter = Segmenter([load()])
    (maps,) = segmenter.maps([image], segmenter.models[0])
    view = slice(60, 380), slice(60, 380)
    figure = plt.figure(figsize=(9, 2.96), layout="none")
    axes = figure.subplots(
        1,
        3,
        gridspec_kw={"left": 0, "right": 1, "top": 1, "bottom": 0, "wspace": 0.02},
    )
    axes[0].imshow(image[view])
    axes[1].imshow(maps[1][view], cmap="magma", vmin=0, vmax=1)
    figures.overlay(image[view], segmenter.segment(image)[view], axes[2], width=1.6)
    figures.scale_bar(axes[0])
    for ax in axes:
        ax.set_axis_off()
    figure.savefig(
        STATIC / "hero.webp",
        dpi=150,
        pil_kwargs={"quality": 85, "method": 6},
    )


if __name__ == "__main__":
    figures.use_style()
    tissues()
    hero()
