import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nucseg.errors import InputError
from nucseg.instances import components, foreground


def test_components_by_hand():
    probability = np.array(
        [
            [0.9, 0.0, 0.0, 0.0],
            [0.0, 0.9, 0.0, 0.6],
            [0.0, 0.0, 0.0, 0.6],
            [0.4, 0.0, 0.0, 0.6],
        ]
    )
    expected = [[1, 0, 0, 0], [0, 1, 0, 2], [0, 0, 0, 2], [0, 0, 0, 2]]  # a corner joins; 0.4 is background
    assert components(probability).tolist() == expected
    assert components(probability, min_area=3).max() == 1  # 3 px stay, 2 px go
    assert components(probability, threshold=0.3).max() == 3
    assert components(probability, threshold=0.95).max() == 0


def test_touching_nuclei_become_one():
    labels = np.zeros((8, 8), np.int32)
    labels[2:6, 1:4], labels[2:6, 4:7] = 1, 2
    assert components(foreground(labels)[0]).max() == 1  # the design's limit, measured later in the book


@settings(max_examples=100, deadline=None)
@given(probability=hnp.arrays(np.float32, (9, 11), elements=st.floats(0, 1, width=32)), area=st.integers(0, 12))
def test_invariants(probability, area):
    labels = components(probability, 0.5, area)
    assert labels.dtype == np.int32 and labels.shape == probability.shape
    present = np.unique(labels[labels > 0])
    assert present.tolist() == list(range(1, len(present) + 1))
    assert (probability[labels > 0] > 0.5).all()
    if len(present):
        assert np.bincount(labels.ravel())[1:].min() >= area
    if area <= 1:
        assert ((labels > 0) == (probability > 0.5)).all()
    again = components(foreground(labels)[0])
    assert (again > 0).tolist() == (labels > 0).tolist()


def test_bad_input():
    with pytest.raises(InputError, match="\\(H, W\\)"):
        components(np.zeros((1, 4, 4)))
    with pytest.raises(InputError, match="threshold"):
        components(np.zeros((4, 4)), threshold=1.5)
