"""One seed for every random draw. Each phase of each epoch has its own generator, so a continued run needs only the
number of the epoch and no state of a generator."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from dividemix import DivideMixError

# The position of a phase in this list is part of its seed: only append
PHASES = ("init", "subset", "validation", "warmup", "divide", "train", "sample", "warmup sample", "noise")


def draws(seed: int, phase: str, epoch: int = 0, net: int = 0) -> np.random.Generator:
    """The generator of one phase. It depends on these four arguments only: a continued run draws the same numbers."""
    return np.random.default_rng([seed, PHASES.index(phase), epoch, net])


def seeded(seed: int, net: int, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Build a network whose initial weights depend on (seed, net) only; torch's global stream is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(draws(seed, "init", net=net).integers(2**63)))
        return build()


def hold_out(index: NDArray, fraction: float, seed: int, labels: NDArray | None = None) -> tuple[NDArray, NDArray]:
    """Split the training samples `index` (N,) for --val_fraction -> (to train on, held out), both ascending. A fraction
    of 0 holds out none, any other at least one. With `labels` (N,) each class gives the same fraction and keeps at
    least one sample. Raises DivideMixError where fewer than 2 samples are left to train on."""
    held_out = np.empty(0, dtype=index.dtype)
    if fraction:
        order = draws(seed, "validation").permutation(len(index))
        size = max(1, round(fraction * len(index)))
        if labels is not None:
            order = order[np.argsort(labels[order], kind="stable")]
            is_last = np.append(labels[order][1:] != labels[order][:-1], True)
            order, one_of_each_class = order[~is_last], order[is_last]
            size = min(size, len(order))
            steps = np.arange(len(order) + 1) * size // max(len(order), 1)
            is_drawn = steps[1:] > steps[:-1]  # at regular distances in the order of the classes
            order = np.concatenate([order[is_drawn], order[~is_drawn], one_of_each_class])
        held_out, index = np.sort(index[order[:size]]), np.sort(index[order[size:]])
    if len(index) < 2:
        raise DivideMixError(f"{len(index)} training samples are left: at least 2 are needed")
    return index, held_out
