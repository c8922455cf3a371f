"""Making noisy labels that depend on the true label alone: symmetric and asymmetric noise.

As the authors inject it, to the label: with seed 123 this is their noise. Noise that depends on the image is in
`noise_instance`, the labels that people gave in `noise_human`, the file that holds noisy labels in `noise_file`."""

import random
from collections.abc import Sequence

from dividemix import DivideMixError

MODES = ("sym", "asym")
DEFINITIONS = ("with_self", "exclude_self")  # of symmetric noise: what a drawn label can become

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
    """The asymmetric map, label -> label as a list of num_class, and its name for people.

    CIFAR-10's map for 10 classes, the ring inside each superclass for CIFAR-100's 100, else c -> c + 1. `dataset` says
    which set it is; without it the number of classes decides.
    """
    if num_class == 10 and dataset in (None, "cifar10"):
        named = "truck->automobile, bird->airplane, deer->horse, cat<->dog (the paper's map)"
        return [CIFAR10_MAP.get(c, c) for c in range(10)], named
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
    """Noisy copy of `labels` (N): exactly int(r * N) samples are drawn, and each of them gets a new label.

    sym: uniform over all num_class classes, the true one included (so 50 % nominal is 45 % real with 10 classes), as in
    the paper; with the `definition` exclude_self uniform over the other classes (50 % real). asym: transition[label],
    by default `asym_transition(num_class)`. The same seed gives the same list, and for sym a larger r draws a superset
    of samples. Raises DivideMixError for an unknown mode or definition.
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

    def noisy(label: int) -> int:  # of sym one randint a drawn sample, in the order of the samples: the authors' stream
        if mode == "asym":
            return transition[label]
        if definition == "with_self":
            return rng.randint(0, num_class - 1)
        return (label + rng.randint(1, num_class - 1)) % num_class

    return [noisy(int(label)) if i in drawn else int(label) for i, label in enumerate(labels)]
