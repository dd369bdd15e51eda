"""A dataset of dark discs on a pale ground, and a configuration, that a test can train on in seconds."""

import numpy as np
import pandas as pd

from nucseg.config import Config
from nucseg.data.datasets import Sample

# A run that takes seconds
SMALL = Config(
    base="random", size=64, rank=2, alpha=2, lr=3e-3, batch_size=4, epochs=3, device="cpu", lora_target="qkv"
)


class Blobs:
    """``count`` images of ``size`` px in two tissues, each with a few discs."""

    name = "synthetic"

    def __init__(self, count: int = 12, size: int = 64):
        self.count, self.size = count, size
        tissues = ["left" if i % 2 else "right" for i in range(count)]
        self.table = pd.DataFrame({"tissue": tissues, "stem": [f"blob_{i:03d}" for i in range(count)]})
        self.table = self.table.sort_values(["tissue", "stem"], ignore_index=True)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng(index)
        labels = np.zeros((self.size, self.size), np.int32)
        rows, columns = np.mgrid[: self.size, : self.size]
        for number in range(1, 4):
            y, x = rng.integers(0, self.size, 2)
            labels[(rows - y) ** 2 + (columns - x) ** 2 < (self.size // 7) ** 2] = number
        _, labels = np.unique(labels, return_inverse=True)
        labels = labels.reshape(self.size, self.size).astype(np.int32)
        image = np.where(labels[..., None] > 0, (90, 50, 120), (225, 190, 215)) + rng.normal(0, 8, (*labels.shape, 3))
        row = self.table.iloc[index]
        return Sample(image.clip(0, 255).astype(np.uint8), labels, row.tissue, row.stem)
