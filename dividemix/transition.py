"""The transition matrix of noisy labels: how often each class is given each label, as lines for people and a CSV file.

Counts (C, C) hold the samples of the true class [row] that have the given label [column].
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dividemix import csvfile

FILE = "transition.csv"
_SHOWN = 12  # classes whose matrix is printed whole; of more, a line tells the extremes
_LARGEST = 1000  # classes that have a matrix: that of 1000 has 2 MB, as a file
_FLIPS = 5  # the most frequent ones


def describe(
    truth: NDArray[np.int64], given: NDArray[np.int64], names: Sequence[str]
) -> tuple[list[str], bytes | None]:
    """Lines for people, and the file's content, of given labels (N,) beside the true ones (N,). Nothing of more classes
    than a matrix can show."""
    if len(names) > _LARGEST:
        return [f"no transition matrix: it is made of up to {_LARGEST} classes, not of {len(names)}"], None
    counts = count(truth, given, len(names))
    plain = [repr(name)[1:-1] for name in names]  # a name from a file may hold anything, also line ends
    lines = table(counts, plain) if len(names) <= _SHOWN else [summary(counts, plain)]
    return lines, to_csv(counts, names)


def count(truth: NDArray[np.int64], given: NDArray[np.int64], num_class: int) -> NDArray[np.int64]:
    return np.bincount(truth * num_class + given, minlength=num_class**2).reshape(num_class, num_class)


def rates(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(C, C): P(given label | true class), rows that add up to 1; NaN for a class without samples."""
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=1, keepdims=True)


def to_csv(counts: NDArray[np.int64], names: Sequence[str]) -> bytes:
    """One row for each true class c, in the order of the classes: true_label, true_class, samples; rate_0, rate_1 ...,
    P(given label 0 | c) and so on, empty where the class has no samples; count_0, count_1 ..."""
    classes = range(len(counts))
    columns = [f"rate_{c}" for c in classes] + [f"count_{c}" for c in classes]
    shown = [["" if np.isnan(value) else f"{value:.6g}" for value in row] for row in rates(counts)]
    rows = ([c, names[c], counts[c].sum(), *shown[c], *counts[c]] for c in classes)
    return csvfile.to_csv(["true_label", "true_class", "samples", *columns], rows)


def table(counts: NDArray[np.int64], names: Sequence[str]) -> list[str]:
    """The matrix in per cent, a line for each true class; a dot for none."""
    titles = [name if name == str(c) else f"{c} {name}"[:14] for c, name in enumerate(names)]
    width = max(map(len, titles))
    lines = ["given label (column), % of each true class (row):"]
    lines.append(" " * width + "".join(f"{c:6d}" for c in range(len(counts))))
    for title, row in zip(titles, rates(counts), strict=True):
        cells = "".join(f"{100 * value:6.1f}" if value > 0 else f"{'.':>6}" for value in row)
        lines.append(f"{title:<{width}}" + ("  no samples" if np.isnan(row[0]) else cells))
    return lines


def summary(counts: NDArray[np.int64], names: Sequence[str]) -> str:
    """Share of wrong labels, the classes of whose labels fewest and most are right, and the most frequent flips."""
    p = rates(counts)
    kept = np.diagonal(p)
    worst, best = np.nanargmin(kept), np.nanargmax(kept)
    flips = np.where(np.isnan(p) | np.eye(len(p), dtype=bool), 0, p)
    order = np.argsort(-flips, axis=None, kind="stable")[:_FLIPS]
    top = [(a, b) for a, b in zip(*np.unravel_index(order, p.shape), strict=True) if flips[a, b] > 0]
    wrong = 1 - np.trace(counts) / counts.sum()
    right = f"right from {kept[worst]:.1%} of {names[worst]} to {kept[best]:.1%} of {names[best]}"
    most = ", ".join(f"{names[a]} -> {names[b]} {flips[a, b]:.1%}" for a, b in top) or "none"
    return f"given labels: {wrong:.1%} wrong; {right}; most frequent flips: {most}"
