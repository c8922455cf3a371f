"""From the networks' mean probabilities to the list: which labels are doubtful, how doubtful, and how many."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_SMALLEST = 1e-12  # a probability of 0 has no logarithm


class LabelQuality(NamedTuple):
    """The list of N labels."""

    quality: NDArray[np.float64]  # (N,) in [0, 1], small is doubtful; below 0.5 where another class is more likely
    is_issue: NDArray[np.bool_]  # (N,); these have the smallest quality
    suggested: NDArray[np.int64]  # (N,) the most likely class
    wrong_share: float  # estimated share of wrong labels
    wrong_share_error: float  # its standard error


def label_quality(probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> LabelQuality:
    """Judge the given labels (N,) by the networks' mean probabilities (N, C).

    The quality of a label is p / (p + q), with p its probability and q that of the most likely other class. The labels
    of confident learning (Northcutt, Jiang, Chuang, JAIR 2021) are counted, which gives the share of wrong labels; so
    many labels with the smallest quality are issues, of those where another class is more likely.
    """
    p = np.asarray(probabilities, np.float64)
    rows = np.arange(len(labels))
    suggested = p.argmax(axis=1)
    p_given = p[rows, labels]
    others = p.copy()
    others[rows, labels] = -1
    p_other = others.max(axis=1).clip(_SMALLEST)
    quality = p_given / (p_given + p_other)

    counts = np.bincount(labels, minlength=p.shape[1])
    means = np.bincount(labels, p_given, minlength=p.shape[1]) / counts.clip(1)
    confident = np.where((p >= means) & (counts > 0), p, -1)  # of no class: -1 everywhere
    is_confident, confident_class = confident.max(axis=1) > 0, confident.argmax(axis=1)
    is_wrong = is_confident & (confident_class != labels)
    wrong_share = is_wrong.sum() / max(is_confident.sum(), 1)
    wrong_share_error = np.sqrt(wrong_share * (1 - wrong_share) / max(is_confident.sum(), 1))

    doubtful = np.argsort(quality, kind="stable")[: round(wrong_share * len(labels))]
    is_issue = np.zeros(len(labels), bool)
    is_issue[doubtful] = suggested[doubtful] != labels[doubtful]
    return LabelQuality(quality, is_issue, suggested, float(wrong_share), float(wrong_share_error))
