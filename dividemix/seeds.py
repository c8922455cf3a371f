"""One seed, every draw: each phase of each epoch has a generator of its own, so that a continued run needs the epoch's
number and no generator's state."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from dividemix import DivideMixError

# A generator's third number; append only
PHASES = ("init", "subset", "validation", "warmup", "divide", "train", "sample", "warmup sample", "noise")


def draws(seed: int, phase: str, epoch: int = 0, net: int = 0) -> np.random.Generator:
    """The generator of one phase: a function of these four alone, so a continued run draws what the uninterrupted one
    did."""
    return np.random.default_rng([seed, PHASES.index(phase), epoch, net])


def seeded(seed: int, net: int, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Build a network whose initial weights depend on (seed, net) alone; the global stream is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(draws(seed, "init", net=net).integers(2**63)))
        return build()


def hold_out(index: NDArray, part: float, seed: int, labels: NDArray | None = None) -> tuple[NDArray, NDArray]:
    """Split the training samples `index` for --val_fraction: (to train on, held out), each ascending; none are held out
    at 0. With `labels`, of the samples `index`, each class gives its share, and keeps one sample at least. Raises
    DivideMixError where fewer than 2 are left."""
    held_out = np.empty(0, dtype=index.dtype)
    if part:
        order = draws(seed, "validation").permutation(len(index))
        size = max(1, round(part * len(index)))
        if labels is not None:
            order = order[np.argsort(labels[order], kind="stable")]
            is_last = np.append(labels[order][1:] != labels[order][:-1], True)
            order, kept = order[~is_last], order[is_last]
            size = min(size, len(order))
            steps = np.arange(len(order) + 1) * size // max(len(order), 1)  # every so many of the classes in a row
            is_drawn = steps[1:] > steps[:-1]
            order = np.concatenate([order[is_drawn], order[~is_drawn], kept])
        held_out, index = np.sort(index[order[:size]]), np.sort(index[order[size:]])
    if len(index) < 2:
        raise DivideMixError(f"{len(index)} training samples are left: at least 2 are needed")
    return index, held_out
