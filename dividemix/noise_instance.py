"""Instance-dependent noise: which labels are wrong, and what they become, depends on the image.

Source: the generator of Xia, Liu, Han, Wang, Gong, Liu, Niu, Tao, Sugiyama, "Part-dependent Label Noise: Towards
Instance-dependent Label Noise", NeurIPS 2020 (arXiv 2006.07836). Other draws than theirs, the same distribution.
"""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dividemix.seeds import draws

_SPREAD = 0.1  # standard deviation of the flip rate over the samples, before it is cut to [0, 1]
_BLOCK = 2048  # samples at a time: 50 MB for images of 32x32 pixels


def inject(
    images: NDArray[np.uint8], labels: NDArray[np.int64], r: float, num_class: int, seed: int
) -> NDArray[np.int64]:
    """Noisy copy of `labels` (N,) for images (N, ...): sample i gets a wrong label with probability q_i, from a normal
    distribution with mean r and standard deviation 0.1 cut to [0, 1]; wrong label c with the probability
    q_i softmax(x_i W_y)_c over the classes other than its own y.

    x_i is the image as a vector of its pixel values, 0 to 255, as in the authors' code: W_y (features, C), one standard
    normal matrix for each class, then gives values so far apart that the softmax is nearly a choice.
    """
    rng = draws(seed, "noise")
    # By the inverse of the distribution function, which is that of a normal one between 0 and 1.
    normal = NormalDist(r, _SPREAD)
    q = np.array([normal.inv_cdf(u) for u in rng.uniform(normal.cdf(0), normal.cdf(1), len(labels))]).clip(0, 1)
    chance = rng.random(len(labels))  # against which the label's distribution is summed up
    x = images.reshape(len(labels), -1)
    noisy = labels.copy()
    for y in range(num_class):
        projection = rng.standard_normal((x.shape[1], num_class))  # W_y, also for a class without samples
        index = np.flatnonzero(labels == y)
        for start in range(0, len(index), _BLOCK):
            block = index[start : start + _BLOCK]
            p = label_distribution(x[block] @ projection, y, q[block])
            noisy[block] = (p.cumsum(axis=1) <= chance[block, None]).sum(axis=1).clip(max=num_class - 1)
    return noisy


def label_distribution(scores: NDArray[np.float64], y: int, q: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, C): 1 - q for the class y, and q softmax(scores) over the other classes. scores (B, C), q (B,)."""
    scores[:, y] = -np.inf
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p *= (q / p.sum(axis=1))[:, None]
    p[:, y] = 1 - q
    return p


def expected_wrong(r: float) -> float:
    """The share of wrong labels that is expected: the mean of the flip rates. It is r, but near 0 and 1, where the cut
    moves it (r 0.1: 0.129, r 0: 0.080)."""
    normal = NormalDist(r, _SPREAD)
    return r + _SPREAD**2 * (normal.pdf(0) - normal.pdf(1)) / (normal.cdf(1) - normal.cdf(0))
