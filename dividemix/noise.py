"""Noisy labels: making them, and reading and checking the file that holds them.

Symmetric and asymmetric noise as the authors inject it, to the label: with seed 123 this is their noise. The file is a
JSON list of N labels; one that exists wins over the seed, so that several runs and several codes share their noise.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dividemix import DivideMixError
from dividemix.checkpoint import write_atomically

MODES = ("sym", "asym")
_SURELY_DRAWN = 50  # labels that a class gets on average: the odds that it gets none are e^-50

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
    labels: Sequence[int], mode: str, r: float, num_class: int, seed: int, transition: Sequence[int] | None = None
) -> list[int]:
    """Noisy copy of `labels` (N): exactly int(r * N) samples are drawn, and each of them gets a new label.

    sym: uniform over all num_class classes, the true one included (so 50 % nominal is 45 % real with 10 classes).
    asym: transition[label], by default `asym_transition(num_class)`. The same seed gives the same list, and for sym a
    larger r draws a superset of samples. Raises DivideMixError for an unknown mode.
    """
    if mode not in MODES:
        raise DivideMixError(f"noise_mode '{mode}' is unknown: use {' or '.join(MODES)}")
    rng = random.Random(seed)
    order = list(range(len(labels)))
    rng.shuffle(order)
    noisy = set(order[: int(r * len(labels))])
    if mode == "asym":
        transition = asym_transition(num_class)[0] if transition is None else transition
        return [transition[int(label)] if i in noisy else int(label) for i, label in enumerate(labels)]
    # randint once for each noisy sample in the order of the samples: the authors' stream.
    return [rng.randint(0, num_class - 1) if i in noisy else int(label) for i, label in enumerate(labels)]


def file_name(dataset: str, r: float, mode: str) -> str:
    """`<r>_<mode>.json` as the authors write it (r with one decimal, more where it needs more), for other sets with a
    prefix."""
    rate = f"{r:.1f}" if round(r, 1) == r else repr(r)
    return f"{rate}_{mode}.json" if dataset.startswith("cifar") else f"{dataset}_{rate}_{mode}.json"


@dataclass(frozen=True)
class NoiseSpec:
    """The noise that was asked for: what a file is checked against, and what is injected where there is no file."""

    dataset: str
    mode: str
    r: float
    seed: int
    num_class: int
    transition: Sequence[int]


def noisy_labels(
    truth: NDArray[np.int64],
    spec: NoiseSpec,
    data_folder: Path | None,
    run_folder: Path,
    file: Path | None = None,
    *,
    begun: bool,
) -> tuple[NDArray[np.int64], str]:
    """Noisy labels (N,) int64 of the true labels (N,), and one sentence saying where they come from.

    A run that has `begun` goes on with its own copy in the run folder. Otherwise, in this order: `file`; `file_name`
    beside the data; else noise is injected, and saved beside the data where that folder can be written. The labels
    used are always copied to the run folder. Raises DivideMixError for a file that cannot be this noise, and for a
    `file` that is missing or holds other labels than the run began with.
    """
    name = file_name(spec.dataset, spec.r, spec.mode)
    if file is not None and not file.exists():
        raise DivideMixError(f"noise file {file} does not exist: mend --noise_file, or leave it out to make the noise")
    if begun and (run_folder / name).exists():
        own = read(run_folder / name, truth, spec)
        if file is not None and not np.array_equal(read(file, truth, spec), own):
            raise DivideMixError(
                f"noise file {file} holds other labels than {run_folder} began with: leave --noise_file out, give this "
                "run an --id, or --fresh to start anew"
            )
        return own, f"read from {run_folder / name}, this run's own copy"
    if file is not None:
        labels, origin = read(file, truth, spec), f"read from {file}"
    elif data_folder and (data_folder / name).exists():
        path = data_folder / name
        labels, origin = read(path, truth, spec), f"read from {path} (an existing file wins over --noise_seed)"
    else:
        made = inject(truth.tolist(), spec.mode, spec.r, spec.num_class, spec.seed, spec.transition)
        labels, origin = np.array(made, dtype=np.int64), f"made with seed {spec.seed}, saved as {run_folder / name}"
        if data_folder:
            path = data_folder / name
            try:
                write_labels(path, labels, exclusive=True)
                origin = f"made with seed {spec.seed}, saved as {path}"
            except FileExistsError:  # another run, started at the same time, was quicker: share its noise
                labels, origin = read(path, truth, spec), f"read from {path} (another run has just made it)"
            except OSError:
                pass  # a read-only data folder is fine: the run folder has its copy
    try:
        write_labels(run_folder / name, labels)
    except OSError as error:
        raise DivideMixError(f"noise file {run_folder / name} cannot be written: {error.strerror}") from error
    return labels, origin


def write_labels(path: Path, labels: NDArray[np.int64], exclusive: bool = False) -> None:
    write_atomically(path, json.dumps(labels.tolist()).encode(), exclusive)


def read(path: Path, truth: NDArray[np.int64], spec: NoiseSpec) -> NDArray[np.int64]:
    """A JSON list of N labels -> (N,) int64, checked against the truth (N,): type, length, range, share of changed
    labels, and whether each class is drawn.

    Raises DivideMixError naming the file and what is wrong with it.
    """
    advice = "delete it to have it made anew, or name another with --noise_file"
    n = len(truth)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise DivideMixError(f"noise file {path} is not a file: move it away, or name another with --noise_file")
    try:
        if path.stat().st_size > 64 + 32 * n:
            raise DivideMixError(f"noise file {path} is far too large for {n} labels: {advice}")
        labels = json.loads(path.read_bytes())
    except OSError as error:
        raise DivideMixError(f"noise file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DivideMixError(f"noise file {path} is not a complete JSON file ({error}): {advice}") from error
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DivideMixError(f"noise file {path} must hold one flat JSON list of whole numbers: {advice}")
    if len(labels) != n:
        raise DivideMixError(f"noise file {path} has {len(labels)} labels, the data set {n} training samples: {advice}")
    if n and not 0 <= min(labels) <= max(labels) < spec.num_class:
        raise DivideMixError(f"noise file {path} has labels outside 0..{spec.num_class - 1}: {advice}")
    noisy = np.array(labels, dtype=np.int64)
    changed = float((noisy != truth).mean())
    low, high = expected_changed(truth, spec)
    if not low <= changed <= high:
        raise DivideMixError(
            f"noise file {path} changes {changed:.1%} of the labels, --noise_mode {spec.mode} --r {spec.r:g} should "
            f"change {low:.1%} to {high:.1%}: it is another rate's or data set's; {advice}"
        )
    # Near rate 1 the share says nothing any more: CIFAR-10's file changes 99 % of CIFAR-100's labels, as it should.
    absent = np.flatnonzero(np.bincount(noisy, minlength=spec.num_class) == 0)
    if len(absent) and spec.mode == "sym" and spec.r * n / spec.num_class >= _SURELY_DRAWN:
        raise DivideMixError(
            f"noise file {path} gives no sample the label {absent[0]}, --noise_mode sym draws all {spec.num_class} "
            f"classes: it is another data set's; {advice}"
        )
    return noisy


def expected_changed(truth: NDArray[np.int64], spec: NoiseSpec) -> tuple[float, float]:
    """Bounds on the share of changed labels that this noise can have.

    sym: r (C-1)/C, up to r for files that never draw the true class; asym: r times the share of samples whose class
    the map moves. Each with 1 point to spare, or 4 standard deviations of the draw where the set is so small that
    these are more.
    """
    n, r = max(len(truth), 1), spec.r
    if spec.mode == "sym":
        kept = 1 / spec.num_class
        low, high, variance = r * (1 - kept), r, r * kept * (1 - kept)
    else:
        moved = float((np.asarray(spec.transition)[truth] != truth).mean())
        low = high = r * moved
        variance = r * (1 - r) * moved * (1 - moved)
    slack = max(0.01, 4 * math.sqrt(variance / n) + 1 / n)
    return max(low - slack, 0.0), min(high + slack, 1.0)
