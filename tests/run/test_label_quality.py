"""Which labels are listed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dividemix.run.label_quality import label_quality, list_equal_images


def is_relatively_likely(p, labels):
    """Whether the given class has the largest probability, each divided by its mean over the labels of that class."""
    means = {label: p[labels == label, label].astype(np.float64).mean() for label in np.unique(labels)}
    best = [max(means, key=lambda label, row=row: row[label] / max(means[label], 1e-12)) for row in p]
    return np.array(best) == labels


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
        rows = (labels == label) & ~is_relatively_likely(p, labels)
        assert not (result.is_issue & ~rows)[labels == label].any()
        rows &= result.suggested != label
        listed, rest = result.quality[rows & result.is_issue], result.quality[rows & ~result.is_issue]
        assert not len(listed) or not len(rest) or listed.max() <= rest.min()


def test_equal_images_with_different_labels():
    """At least one of these labels is wrong for certain. It must be listed first, and the better one be left alone."""
    labels = np.array([0, 1, 0, 1, 2, 2, 2, 0])
    duplicate_of = np.array([0, 0, 0, 3, 3, 5, 5, -1])  # 2 : 1 labels; 1 : 1 labels; equal labels
    p = np.full((8, 3), 1 / 3)
    p[3:5] = [[0.1, 0.2, 0.7], [0.1, 0.5, 0.4]]  # on average 2 is more likely than 1
    quality, is_issue, suggested = np.full(8, 0.9), np.zeros(8, bool), labels.copy()
    is_issue[2], suggested[2] = True, 1  # the networks would change the label that is kept: then they differ again
    list_equal_images(quality, is_issue, suggested, p, labels, duplicate_of)
    assert np.flatnonzero(is_issue).tolist() == np.flatnonzero(quality == 0).tolist() == [1, 3]
    assert suggested.tolist() == [0, 0, 0, 2, 2, 2, 2, 0] and quality[0] == 0.9
    list_equal_images(quality, is_issue, suggested, p, labels, np.full(8, -1))  # nothing is there twice
    assert is_issue.sum() == 2


def test_a_rare_class_is_measured_by_its_own_labels():
    """A class of one image never is the most likely one after a short run: every label of it would be called wrong."""
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8], [0.6, 0.4]])
    result = label_quality(p, np.array([0, 0, 0, 0, 1]))  # class 0 is confident from .65, class 1 from .4
    assert result.is_issue.tolist() == [False, False, False, True, False] and result.suggested[4] == 0


def test_a_label_of_a_rare_class_stays_where_its_class_is_the_most_likely_one_relative_to_its_own_labels():
    """Most labels of a rare class may be wrong. Of networks that are not sure of it, its right labels have to stay."""
    sure, less_sure = [0.95, 0.03, 0.02], [0.85, 0.13, 0.02]
    others = [sure] * 4 + [less_sure] * 4 + [p[::-1] for p in [sure] * 4 + [less_sure] * 4]  # classes 0 and 2, from .9
    rare = [sure] * 3 + [[0.3, 0.65, 0.05]] + [[0.44, 0.12, 0.44]] * 2  # class 1, from .16; 3 / 4 of 6 are wrong: 4
    result = label_quality(np.array(others + rare), np.array([0] * 8 + [2] * 8 + [1] * 6))
    assert np.flatnonzero(result.is_issue).tolist() == [16, 17, 18]
    assert (result.quality[-2:] < 0.5).all() and (result.suggested[-2:] != 1).all()
