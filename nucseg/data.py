"""Images with their label maps: NuInsSeg, folders of one's own, and how they are split into folds."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One image with its label map.

    ``image``: (H, W, 3) uint8 RGB. ``labels``: (H, W) int32 label map, 0 = background, nuclei 1..n.
    ``vague``: (H, W) bool, True where the annotators could not tell, or None where that is not known.
    """

    image: np.ndarray
    labels: np.ndarray
    tissue: str
    stem: str
    vague: np.ndarray | None = None
