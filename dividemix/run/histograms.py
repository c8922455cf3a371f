"""Loss histograms of an epoch's divisions, small enough to keep for every epoch, and their drawing as SVG.

histograms.jsonl in the run folder has one line {"epoch": ..., "net1": ..., "net2": ...} for each divided epoch.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dividemix.codivide import Division

BINS = 60
Histogram = dict[str, Any]  # of one network
_MIXTURE = ("means", "variances", "weights")  # the clean component first
_LEFT, _RIGHT, _TOP, _BASE = 40, 628, 12, 248  # ends of the axes in the drawing; the template draws the axes


def count(division: Division, truly_clean: NDArray[np.bool_] | None = None) -> Histogram:
    """The number of samples in each of 60 bins of the normalised loss from 0 to 1, and the fitted mixture."""
    loss = division.loss
    losses = {"all": loss} if truly_clean is None else {"clean": loss[truly_clean], "wrong": loss[~truly_clean]}
    histogram: Histogram = {kind: np.histogram(values, BINS, (0, 1))[0].tolist() for kind, values in losses.items()}
    histogram |= {name: getattr(division, name).tolist() for name in _MIXTURE}
    return histogram | {"threshold": float(division.threshold)}


def densities(histogram: Histogram) -> dict[str, NDArray[np.float64]]:
    """The heights of the bars (60,), in the unit of `gaussians`: all bars together integrate to 1."""
    counts = {kind: np.array(histogram[kind]) for kind in ("all", "clean", "wrong") if kind in histogram}
    unit = BINS / sum(numbers.sum() for numbers in counts.values())
    return {kind: numbers * unit for kind, numbers in counts.items()}


def gaussians(x: NDArray, histogram: Histogram) -> NDArray[np.float64]:
    """Weighted densities of the mixture's two components at x (M,) -> (2, M)."""
    means, variances, weights = (np.array(histogram[name])[:, None] for name in _MIXTURE)
    return weights * np.exp(-((x - means) ** 2) / (2 * variances)) / np.sqrt(2 * np.pi * variances)


def boundaries(histogram: Histogram) -> list[float]:
    """The losses at which the clean probability equals the threshold."""
    x = np.linspace(0, 1, 2000)
    clean, noisy = gaussians(x, histogram)
    labeled = clean > histogram["threshold"] * (clean + noisy)
    return x[1:][labeled[1:] != labeled[:-1]].tolist()


def peak(histograms: Iterable[Histogram]) -> float:
    """The largest density of bars and curves: the top of the axis that the histograms share."""
    x = np.linspace(0, 1, 500)
    tops = [max(sum(densities(item).values()).max(), gaussians(x, item).max()) for item in histograms]
    return float(max(tops, default=1.0))


def paths(histogram: Histogram, top: float) -> list[tuple[str, str]]:
    """The drawing for report.html.jinja: (class, d) of its SVG paths. top: see `peak`. The density axis is a square
    root, since the clean peak is often ten times as high as everything else."""

    def to_x(loss: NDArray | float) -> Any:
        return _LEFT + loss * (_RIGHT - _LEFT)

    def to_y(density: NDArray) -> NDArray:
        return _BASE - np.sqrt(np.clip(density, 0, top) / top) * (_BASE - _TOP)

    def line(x: Iterable, y: Iterable) -> str:
        return "M" + " ".join(f"{a:.4g} {b:.4g}" for a, b in zip(x, y, strict=True))

    edges, below = np.repeat(to_x(np.linspace(0, 1, BINS + 1)), 2), np.zeros(BINS)
    shapes = []
    for name, density in densities(histogram).items():
        upper, lower = (np.repeat(to_y(heights), 2) for heights in (below + density, below))
        corners = np.concatenate([edges[1:-1], edges[-2:0:-1]]), np.concatenate([upper, lower[::-1]])
        shapes.append((f"bars {name}", f"{line(*corners)}Z"))
        below = below + density
    x = np.linspace(0, 1, 101)
    for curve, name in zip(gaussians(x, histogram), ("clean", "wrong"), strict=True):
        shapes.append((f"curve {name}", line(to_x(x), to_y(curve))))
    return shapes + [("threshold", line(np.full(2, to_x(loss)), [_TOP, _BASE])) for loss in boundaries(histogram)]
