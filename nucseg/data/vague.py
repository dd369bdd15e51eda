"""Areas that count neither for nor against, carried through any change of a label map.

Changes of a sample (`data.augment`) move its labels by nearest neighbour. An area folded into them moves along, pixel
for pixel, whatever the change.
"""

from dataclasses import replace

import numpy as np

from nucseg.data.datasets import Sample

FOLDED = 2**30  # added to the label of each vague pixel: above any number of nuclei, and within int32


def fold_in(sample: Sample) -> Sample:
    """The sample with its vague area as part of its labels; itself where it has none."""
    if sample.vague is None:
        return sample
    return replace(sample, labels=(sample.labels + FOLDED * sample.vague).astype(np.int32), vague=None)


def take_out(sample: Sample) -> Sample:
    """The inverse of `fold_in`, after any change that moves labels by nearest neighbour."""
    vague = sample.labels >= FOLDED
    return replace(sample, labels=np.where(vague, sample.labels - FOLDED, sample.labels).astype(np.int32), vague=vague)
