"""Loss histograms: what an epoch's division looks like, small enough to keep of every epoch, and drawn as SVG.

    count(scores, truly_clean)      # {"net1": {"clean": [60 counts], "wrong": [60 counts], "means": [...], ...}, ...}

The run folder's histograms.jsonl holds one such object a divided epoch. 60 bins over the normalised loss from 0 to 1;
where the truth is not known there is "all" instead of "clean" and "wrong". means, variances, weights are those of the
fitted mixture, the clean component first.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 60
Histogram = dict[str, Any]  # of one network
_MIXTURE = ("means", "variances", "weights")
_LEFT, _RIGHT, _TOP, _BASE = 40, 628, 12, 248  # the axes' ends in the drawing, whose frame the template has


def count(scores: dict[str, NDArray], truly_clean: NDArray[np.bool_] | None = None) -> dict[str, Histogram]:
    """Of each network that has a division among the scores of an epoch (see `run.score_arrays`): 'net1', 'net2'."""
    found = {}
    for k in (1, 2):
        if f"means_net{k}" not in scores:
            continue
        loss = scores[f"loss_net{k}"]
        known = truly_clean is not None and len(truly_clean) == len(loss)
        parts = {"clean": loss[truly_clean], "wrong": loss[~truly_clean]} if known else {"all": loss}
        histogram: Histogram = {name: np.histogram(part, BINS, (0, 1))[0].tolist() for name, part in parts.items()}
        histogram |= {name: scores[f"{name}_net{k}"].tolist() for name in _MIXTURE}
        found[f"net{k}"] = histogram | {"threshold": float(scores[f"threshold_net{k}"])}
    return found


def is_sound(entry: Any) -> bool:
    """Whether a line of histograms.jsonl is what `count` made, with its epoch."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and -1e15 < value < 1e15  # neither NaN nor past what can be drawn

    def numbers(values: Any, n: int) -> bool:
        return isinstance(values, list) and len(values) == n and all(map(is_number, values))

    def whole(histogram: Any) -> bool:
        if not isinstance(histogram, dict) or not is_number(histogram.get("threshold")):
            return False
        names = [name for name in ("all", "clean", "wrong") if name in histogram]
        bins = all(numbers(histogram[name], BINS) and min(histogram[name]) >= 0 for name in names)
        mixture = all(numbers(histogram.get(name), 2) for name in _MIXTURE) and min(histogram["variances"]) > 0
        return names in (["all"], ["clean", "wrong"]) and bins and mixture and total(histogram) > 0

    return (
        isinstance(entry, dict)
        and isinstance(entry.get("epoch"), int)
        and all(whole(entry[name]) for name in ("net1", "net2") if name in entry)
    )


def total(histogram: Histogram) -> int:
    """How many samples it is of."""
    return sum(sum(histogram.get(name, [])) for name in ("all", "clean", "wrong"))


def densities(histogram: Histogram) -> dict[str, NDArray[np.float64]]:
    """The bars, in the unit of `gaussians`: (60,) each; those of all parts together integrate to 1."""
    unit = BINS / total(histogram)
    return {name: np.array(histogram[name]) * unit for name in ("all", "clean", "wrong") if name in histogram}


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
    tops = [max(float(sum(densities(each).values()).max()), float(gaussians(x, each).max())) for each in histograms]
    return max(tops, default=1.0)


def paths(histogram: Histogram, top: float) -> list[tuple[str, str]]:
    """The drawing for report.html.jinja: (class, d) of its SVG paths. top: see `peak`. On a root scale: the clean peak
    is often ten times as high as everything else."""

    def across(x: NDArray | float) -> Any:
        return _LEFT + x * (_RIGHT - _LEFT)

    def up(density: NDArray) -> NDArray:
        return _BASE - np.sqrt(np.clip(density, 0, top) / top) * (_BASE - _TOP)

    def line(x: NDArray, y: NDArray) -> str:
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
