"""Ignored areas, carried through any augmentation of a label map.

Augmentation (`data.augment`) moves labels by nearest neighbour, so an area encoded in the labels moves along, pixel for
pixel, whatever the change.
"""

from dataclasses import replace

import numpy as np

from nucseg.data.datasets import Sample

FOLDED = 2**30  # added to the labels of vague pixels: above any number of nuclei, and within int32


def fold_in(sample: Sample) -> Sample:
    """Return the sample with its vague area encoded in its labels; the sample itself if it has none."""
    if sample.vague is None:
        return sample
    return replace(sample, labels=(sample.labels + FOLDED * sample.vague).astype(np.int32), vague=None)


def take_out(sample: Sample) -> Sample:
    """Invert `fold_in`, after any change that moves labels by nearest neighbour."""
    vague = sample.labels >= FOLDED
    return replace(sample, labels=np.where(vague, sample.labels - FOLDED, sample.labels).astype(np.int32), vague=vague)
