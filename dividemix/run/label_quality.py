"""From the networks' mean probabilities to the list: which labels are doubtful, how doubtful, and how many."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_SMALLEST = 1e-12  # instead of a probability of 0: no division by 0


class LabelQuality(NamedTuple):
    """The list of N labels."""

    quality: NDArray[np.float64]  # (N,) in [0, 1], small is doubtful; below 0.5 where another class is more likely
    is_issue: NDArray[np.bool_]  # (N,)
    suggested: NDArray[np.int64]  # (N,) the most likely class
    wrong_share: float  # estimated share of wrong labels
    wrong_share_error: float  # its standard error by the number of labels; the method's own error may be larger


def label_quality(probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> LabelQuality:
    """Judge the given labels (N,) by the networks' mean probabilities (N, C).

    The quality of a label is p / (p + q): p is its probability, q that of the most likely other class. The number of
    wrong labels of each given class is estimated as in confident learning (Northcutt, Jiang, Chuang, JAIR 2021): a
    class is confident where its probability reaches the mean of the labels given to it, and the share of labels is
    counted where another class is confident, and more likely. So many labels of the class, those with the smallest
    quality, are issues, but for those where the given class is the most likely: as it is, or relative to these means.
    docs/label-lists.md compares this rule with others.
    """
    p = np.asarray(probabilities, np.float64)
    num_class, rows = p.shape[1], np.arange(len(labels))
    suggested, p_given = p.argmax(axis=1), p[rows, labels]
    without_given = p.copy()
    without_given[rows, labels] = 0
    quality = p_given / (p_given + without_given.max(axis=1)).clip(_SMALLEST)

    counts = np.bincount(labels, minlength=num_class)
    means = np.bincount(labels, p_given, minlength=num_class) / counts.clip(1)
    relative = p / np.where(counts > 0, means.clip(_SMALLEST), np.inf)  # (N, C)
    confident = np.where(relative >= 1, p, -1)  # -1: this class is not
    is_confident = confident.max(axis=1) >= 0
    is_wrong = is_confident & (confident.argmax(axis=1) != labels) & (suggested != labels)
    n_confident = np.bincount(labels[is_confident], minlength=num_class).clip(1)
    share = np.bincount(labels[is_wrong], minlength=num_class) / n_confident  # (C,) of wrong labels
    error = np.sqrt(share * (1 - share) / n_confident)

    order = np.lexsort((quality, labels))  # class by class, the smallest quality first
    position = rows - (counts.cumsum() - counts)[labels[order]]  # within the class
    is_issue = np.zeros(len(labels), bool)
    is_issue[order] = position < np.round(share * counts)[labels[order]]
    is_issue &= (suggested != labels) & (relative.argmax(axis=1) != labels)
    weights = counts / len(labels)
    return LabelQuality(quality, is_issue, suggested, float(share @ weights), float(np.linalg.norm(error * weights)))


def list_equal_images(
    quality: NDArray[np.float64],
    is_issue: NDArray[np.bool_],
    suggested: NDArray[np.int64],
    probabilities: NDArray[np.floating],
    labels: NDArray[np.integer],
    duplicate_of: NDArray[np.integer],
) -> None:
    """Change the list of N labels, in place, where equal images have different labels: at least one is wrong, whatever
    the networks say. The most frequent label of such images is kept; of equally frequent ones that with the larger mean
    probability. The others are issues of quality 0, with the kept label as the suggestion.

    duplicate_of (N,): the same number for equal images, below 0 for an image that is there once. probabilities (N, C)
    """
    rows = np.flatnonzero(duplicate_of >= 0)
    rows = rows[np.argsort(duplicate_of[rows], kind="stable")]
    for equal in np.split(rows, np.flatnonzero(np.diff(duplicate_of[rows])) + 1):
        classes, counts = np.unique(labels[equal], return_counts=True)
        if len(classes) > 1:
            mean = probabilities[equal].mean(axis=0)[classes]
            kept = classes[np.lexsort((mean, counts))[-1]]
            wrong, right = equal[labels[equal] != kept], equal[labels[equal] == kept]
            is_issue[right], suggested[right] = False, kept  # else the labels would be different again
            quality[wrong], is_issue[wrong], suggested[wrong] = 0, True, kept
