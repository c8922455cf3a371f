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
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 300, 40, 12, 12, 52  # of the drawing, and around its axes


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


def svg(histogram: Histogram, top: float, title: str) -> str:
    """The drawing, for a page whose style gives the classes all, clean, wrong, threshold and axis their colours. top:
    see `peak`. On a root scale: the clean peak is often ten times as high as everything else. `title` as it is, so it
    must hold no text from outside."""

    def across(x: NDArray | float) -> Any:
        return _LEFT + x * (_WIDTH - _LEFT - _RIGHT)

    def up(density: NDArray | float) -> Any:
        part = np.sqrt(np.clip(density, 0, top) / top)
        return _TOP + (1 - part) * (_HEIGHT - _TOP - _BOTTOM)

    def path(d: str, name: str) -> str:
        return f'<path class="{name}" d="{d}"/>'

    def line(points: Iterable[tuple[float, float]]) -> str:
        return "M" + " ".join(f"{x:.4g} {y:.4g}" for x, y in points)

    edges, parts, below = across(np.linspace(0, 1, BINS + 1)), [], np.zeros(BINS)
    for name, density in densities(histogram).items():
        upper, lower = up(below + density), up(below)
        there = "".join(f"V{y:.4g}H{x:.4g}" for x, y in zip(edges[1:], upper, strict=True))
        back = "".join(f"V{y:.4g}H{x:.4g}" for x, y in zip(edges[-2::-1], lower[::-1], strict=True))
        parts.append(path(f"M{edges[0]:.4g} {lower[0]:.4g}{there}{back}", f"bars {name}"))
        below = below + density
    x = np.linspace(0, 1, 101)
    for curve, name in zip(gaussians(x, histogram), ("clean", "wrong"), strict=True):
        parts.append(path(line(zip(across(x), up(curve), strict=True)), f"curve {name}"))
    for loss in boundaries(histogram):
        parts.append(path(line([(across(loss), _TOP), (across(loss), _HEIGHT - _BOTTOM)]), "threshold"))
    base = _HEIGHT - _BOTTOM
    parts.append(path(line([(_LEFT, _TOP), (_LEFT, base), (_WIDTH - _RIGHT, base)]), "axis"))
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<text x="{across(tick):.4g}" y="{base + 20}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{across(0.5):.4g}" y="{base + 44}" text-anchor="middle">normalised loss</text>')
    middle = (_TOP + base) / 2
    turned = f'x="24" y="{middle:.4g}" transform="rotate(-90 24 {middle:.4g})" text-anchor="middle"'
    parts.append(f"<text {turned}>density, root scale</text>")
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
