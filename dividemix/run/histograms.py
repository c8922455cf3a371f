"""Loss histograms: what an epoch's division looks like, small enough to keep of every epoch, and drawn as SVG.

The run folder's histograms.jsonl holds an object {"epoch": ..., "net1": ..., "net2": ...} for each divided epoch.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dividemix.codivide import Division

BINS = 60
Histogram = dict[str, Any]  # of one network
_MIXTURE = ("means", "variances", "weights")  # the clean component first
_LEFT, _RIGHT, _TOP, _BASE = 40, 628, 12, 248  # the axes' ends in the drawing, whose frame the template has


def count(division: Division, truly_clean: NDArray[np.bool_] | None = None) -> Histogram:
    """How many samples are in each of 60 bins of the normalised loss from 0 to 1, and the fitted mixture."""
    loss = division.loss
    losses = {"all": loss} if truly_clean is None else {"clean": loss[truly_clean], "wrong": loss[~truly_clean]}
    histogram: Histogram = {kind: np.histogram(values, BINS, (0, 1))[0].tolist() for kind, values in losses.items()}
    histogram |= {name: getattr(division, name).tolist() for name in _MIXTURE}
    return histogram | {"threshold": float(division.threshold)}


def densities(histogram: Histogram) -> dict[str, NDArray[np.float64]]:
    """The bars, in the unit of `gaussians`: (60,) each; those of all parts together integrate to 1."""
    counts = {kind: np.array(histogram[kind]) for kind in ("all", "clean", "wrong") if kind in histogram}
    unit = BINS / sum(numbers.sum() for numbers in counts.values())
    return {kind: numbers * unit for kind, numbers in counts.items()}


def gaussians(x: NDArray, histogram: Histogram) -> NDArray[np.float64]:
    """Weighted densities of the mixture's components at x (M,) -> (2, M)."""
    means, variances, weights = (np.array(histogram[name])[:, None] for name in _MIXTURE)
    return weights * np.exp(-((x - means) ** 2) / (2 * variances)) / np.sqrt(2 * np.pi * variances)


def boundaries(histogram: Histogram) -> list[float]:
    """The losses at which the clean probability is the threshold."""
    x = np.linspace(0, 1, 2000)
    clean, noisy = gaussians(x, histogram)
    labeled = clean > histogram["threshold"] * (clean + noisy)
    return x[1:][labeled[1:] != labeled[:-1]].tolist()


def peak(histograms: Iterable[Histogram]) -> float:
    """The largest density among bars and curves: the top of the common axis."""
    x = np.linspace(0, 1, 500)
    tops = [max(sum(densities(one).values()).max(), gaussians(x, one).max()) for one in histograms]
    return float(max(tops, default=1.0))


def paths(histogram: Histogram, top: float) -> list[tuple[str, str]]:
    """The drawing for report.html.jinja: (class, d) of its SVG paths. top: see `peak`. On a root scale: the clean peak
    is often ten times as high as everything else."""

    def across(x: NDArray | float) -> Any:
        return _LEFT + x * (_RIGHT - _LEFT)

    def up(density: NDArray) -> NDArray:
        return _BASE - np.sqrt(np.clip(density, 0, top) / top) * (_BASE - _TOP)

    def line(x: Iterable, y: Iterable) -> str:
        return "M" + " ".join(f"{a:.4g} {b:.4g}" for a, b in zip(x, y, strict=True))

    edges, below = np.repeat(across(np.linspace(0, 1, BINS + 1)), 2), np.zeros(BINS)
    drawn = []
    for name, density in densities(histogram).items():
        upper, lower = (np.repeat(up(heights), 2) for heights in (below + density, below))
        corners = np.concatenate([edges[1:-1], edges[-2:0:-1]]), np.concatenate([upper, lower[::-1]])
        drawn.append((f"bars {name}", f"{line(*corners)}Z"))
        below = below + density
    x = np.linspace(0, 1, 101)
    for curve, name in zip(gaussians(x, histogram), ("clean", "wrong"), strict=True):
        drawn.append((f"curve {name}", line(across(x), up(curve))))
    return drawn + [("threshold", line(np.full(2, across(loss)), [_TOP, _BASE])) for loss in boundaries(histogram)]
