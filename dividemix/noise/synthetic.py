"""Noise injected into true labels. Symmetric and asymmetric noise depend only on the true label and follow the authors'
code: with seed 123 every label is the same as theirs. Instance-dependent noise depends on the image, too."""

import random
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dividemix import DivideMixError
from dividemix.seeds import draws

MODES = ("sym", "asym")
DEFINITIONS = ("with_self", "exclude_self")  # of symmetric noise: whether a new label may be the true one

# CIFAR-10 (paper, Sec. 4.1): truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse.
CIFAR10_MAP = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}

# CIFAR-100: the five fine classes (alphabetical, as the data set numbers them) of each of its 20 superclasses.
CIFAR100_SUPERCLASSES = (
    (4, 30, 55, 72, 95),  # aquatic mammals
    (1, 32, 67, 73, 91),  # fish
    (54, 62, 70, 82, 92),  # flowers
    (9, 10, 16, 28, 61),  # food containers
    (0, 51, 53, 57, 83),  # fruit and vegetables
    (22, 39, 40, 86, 87),  # household electrical devices
    (5, 20, 25, 84, 94),  # household furniture
    (6, 7, 14, 18, 24),  # insects
    (3, 42, 43, 88, 97),  # large carnivores
    (12, 17, 37, 68, 76),  # large man-made outdoor things
    (23, 33, 49, 60, 71),  # large natural outdoor scenes
    (15, 19, 21, 31, 38),  # large omnivores and herbivores
    (34, 63, 64, 66, 75),  # medium-sized mammals
    (26, 45, 77, 79, 99),  # non-insect invertebrates
    (2, 11, 35, 46, 98),  # people
    (27, 29, 44, 78, 93),  # reptiles
    (36, 50, 65, 74, 80),  # small mammals
    (47, 52, 56, 59, 96),  # trees
    (8, 13, 48, 58, 90),  # vehicles 1
    (41, 69, 81, 85, 89),  # vehicles 2
)


def next_class(num_class: int) -> list[int]:
    """c -> c + 1, the last class to the first."""
    return [(c + 1) % num_class for c in range(num_class)]


def asym_transition(num_class: int, dataset: str | None = None) -> tuple[list[int], str]:
    """The map of asymmetric noise, label -> label, as a list of num_class labels, and a description to print.

    CIFAR-10 has the paper's map, CIFAR-100 a ring inside each superclass, any other data set c -> c + 1. Without
    `dataset`, 10 or 100 classes mean CIFAR.
    """
    if num_class == 10 and dataset in (None, "cifar10"):
        description = "truck->automobile, bird->airplane, deer->horse, cat<->dog (the paper's map)"
        return [CIFAR10_MAP.get(c, c) for c in range(10)], description
    if num_class == 100 and dataset in (None, "cifar100"):
        ring = {a: b for five in CIFAR100_SUPERCLASSES for a, b in zip(five, five[1:] + five[:1], strict=True)}
        return [ring[c] for c in range(100)], "ring inside each CIFAR-100 superclass, fine labels ascending"
    return next_class(num_class), "class c -> c+1, last -> first"


def inject(
    labels: Sequence[int],
    mode: str,
    r: float,
    num_class: int,
    seed: int,
    transition: Sequence[int] | None = None,
    definition: str = "with_self",
) -> list[int]:
    """Noisy copy of `labels` (N,): exactly int(r * N) samples are drawn, and each of them gets a new label (Sec. 4.1).

    sym: uniform over all num_class classes, the true one included, as in the paper (with 10 classes and r = 0.5, 45 %
    of the labels become wrong); with the `definition` exclude_self uniform over the other classes (50 % become wrong).
    asym: transition[label], by default `asym_transition(num_class)`. The same seed gives the same labels, and for sym
    a larger r draws the same samples and more. Raises DivideMixError for an unknown mode or definition.
    """
    if mode not in MODES:
        raise DivideMixError(f"noise_mode '{mode}' is unknown: use {' or '.join(MODES)}")
    if definition not in DEFINITIONS:
        raise DivideMixError(f"noise_definition '{definition}' is unknown: use {' or '.join(DEFINITIONS)}")
    rng = random.Random(seed)
    order = list(range(len(labels)))
    rng.shuffle(order)
    drawn = set(order[: int(r * len(labels))])
    transition = asym_transition(num_class)[0] if transition is None else transition

    def new_label(label: int) -> int:  # sym: one randint for each drawn sample, in their order, as in the authors' code
        if mode == "asym":
            return transition[label]
        if definition == "with_self":
            return rng.randint(0, num_class - 1)
        return (label + rng.randint(1, num_class - 1)) % num_class

    return [new_label(int(label)) if i in drawn else int(label) for i, label in enumerate(labels)]


# ---- Instance-dependent noise ----
#
# Source: the generator of Xia, Liu, Han, Wang, Gong, Liu, Niu, Tao, Sugiyama, "Part-dependent Label Noise: Towards
# Instance-dependent Label Noise", NeurIPS 2020 (arXiv 2006.07836). The same distribution; the random draws differ.

_FLIP_RATE_STD = 0.1  # over the samples, before the flip rates are truncated to [0, 1]
_BLOCK = 2048  # samples at a time: 50 MB for images of 32x32 pixels


def inject_instance_dependent(
    images: NDArray[np.uint8], labels: NDArray[np.int64], r: float, num_class: int, seed: int
) -> NDArray[np.int64]:
    """Noisy copy of `labels` (N,) for images (N, ...).

    Sample i gets a wrong label with probability q_i, drawn from a normal distribution with mean r and standard
    deviation 0.1, truncated to [0, 1]. With the true label y, it gets the wrong label c with probability
    q_i softmax(x_i W_y)_c, with a softmax over the classes other than y. x_i is the image as a vector of pixel
    values, 0 to 255, as in the authors' code, so one class nearly always has all of it; W_y (features, C) is normal.
    """
    rng = draws(seed, "noise")
    # A uniform draw between the normal distribution function at 0 and at 1, put through its inverse.
    normal = NormalDist(r, _FLIP_RATE_STD)
    q = np.array([normal.inv_cdf(u) for u in rng.uniform(normal.cdf(0), normal.cdf(1), len(labels))]).clip(0, 1)
    uniform = rng.random(len(labels))  # a label is where the cumulative distribution passes it
    x = images.reshape(len(labels), -1)
    noisy = labels.copy()
    for y in range(num_class):
        projection = rng.standard_normal((x.shape[1], num_class))  # W_y, drawn also for a class without samples
        index = np.flatnonzero(labels == y)
        for start in range(0, len(index), _BLOCK):
            block = index[start : start + _BLOCK]
            p = label_distribution(x[block] @ projection, y, q[block])
            noisy[block] = (p.cumsum(axis=1) <= uniform[block, None]).sum(axis=1).clip(max=num_class - 1)
    return noisy


def label_distribution(scores: NDArray[np.float64], y: int, q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities (B, C): 1 - q for class y, q softmax(scores) over the other classes. scores (B, C), q (B,)."""
    scores[:, y] = -np.inf
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p *= (q / p.sum(axis=1))[:, None]
    p[:, y] = 1 - q
    return p


def mean_flip_rate(r: float) -> float:
    """The mean of the flip rates, which is the expected share of wrong labels. It is r, except near 0 and 1, where the
    truncation moves it (r = 0.1: 0.129, r = 0: 0.080)."""
    normal = NormalDist(r, _FLIP_RATE_STD)
    return r + _FLIP_RATE_STD**2 * (normal.pdf(0) - normal.pdf(1)) / (normal.cdf(1) - normal.cdf(0))
