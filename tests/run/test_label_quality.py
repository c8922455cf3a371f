"""Which labels are listed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dividemix.run.label_quality import label_quality


def test_by_hand():
    """Else labels are called wrong without a reason, or the list is not the head of its class's ranking."""
    p = [[0.8, 0.2], [0.7, 0.3], [0.1, 0.9], [0.45, 0.55]] + [[0.2, 0.8], [0.4, 0.6]]
    result = label_quality(np.array(p, np.float32), np.array([0, 0, 0, 0, 1, 1]))
    # Class 0 is confident from (.8 + .7 + .1 + .45) / 4 = .5125, class 1 from .7: of the labels 0, two are confidently
    # right, one confidently wrong and one neither, so 4 / 3 of them are wrong, which is one.
    assert result.quality == pytest.approx([0.8, 0.7, 0.1, 0.45, 0.8, 0.6])
    assert result.is_issue.tolist() == [False, False, True, False, False, False]
    assert result.suggested.tolist() == [0, 0, 1, 1, 1, 1]
    assert result.wrong_share == pytest.approx(4 / 3 / 6)
    assert result.wrong_share_error == pytest.approx(np.sqrt(1 / 3 * 2 / 3 / 3) * 4 / 6)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 5))
def test_any_probabilities(seed, n, num_class):
    """A crash or a quality that is no number, where a class has no labels, or a probability is 0 or 1."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(num_class, rng.choice([0.001, 1, 100])), n).astype(np.float32)
    labels = rng.integers(0, num_class, n)
    result = label_quality(p, labels)
    assert ((result.quality >= 0) & (result.quality <= 1)).all() and 0 <= result.wrong_share <= 1
    assert not result.is_issue[result.suggested == labels].any()
    for label in np.unique(labels):
        rows = labels == label
        listed, rest = result.quality[rows & result.is_issue], result.quality[rows & ~result.is_issue]
        assert not len(listed) or not len(rest) or listed.max() <= rest.min()
