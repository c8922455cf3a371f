"""seeds: which training images are held out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dividemix import DivideMixError
from dividemix.seeds import hold_out


@given(st.lists(st.integers(0, 4), min_size=3, max_size=60), st.floats(0.01, 0.9), st.integers(0, 99))
def test_each_class_gives_its_share_and_keeps_an_image(classes, fraction, seed):
    """A rare class would have no image left to learn from, or all that are held out be of one class."""
    labels = np.array(classes)
    try:
        index, held_out = hold_out(np.arange(len(labels)), fraction, seed, labels)
    except DivideMixError:
        assert len(labels) - round(fraction * len(labels)) < 2
        return
    assert sorted([*index, *held_out]) == [*range(len(labels))]
    assert (np.diff(index) > 0).all() and (np.diff(held_out) > 0).all()
    assert set(labels[index]) == set(labels)
    spare = len(labels) - len(set(classes))
    assert len(held_out) == min(max(1, round(fraction * len(labels))), spare)
    for c in set(classes):
        n = (labels == c).sum() - 1  # all but the one that is kept
        assert abs((labels[held_out] == c).sum() - len(held_out) * n / max(spare, 1)) <= 1


def test_what_is_held_out_is_drawn_and_repeats():
    """A continued run would train on what it held out, or every seed hold out the first of each class."""
    labels = np.repeat([0, 1, 2], 20)
    drawn = [hold_out(np.arange(60), 0.2, seed, labels)[1].tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for fraction, classes in ((0.0, np.zeros(3, int)), (0.5, np.arange(3))):  # nothing, and of classes of one image
        index, held_out = hold_out(np.arange(3), fraction, 1, classes)
        assert index.tolist() == [0, 1, 2] and len(held_out) == 0
    assert len(hold_out(np.arange(5), 0.01, 1)[1]) == 1
    with pytest.raises(DivideMixError, match="at least 2"):
        hold_out(np.arange(3), 0.7, 1)
