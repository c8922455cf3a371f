"""The report's figures: one small panel each, so that a page can set them side by side or, on a phone, below each
other. `draw_all` and `draw_comparison` write them as PNG files; the panels draw on any matplotlib axes."""

import io
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dividemix.files import write_atomically
from dividemix.report.compare import Group
from dividemix.report.issues import LabelIssues, transition
from dividemix.run import Histogram, RunFolder, histograms

CLEAN, WRONG, ALL, LINE = "#0072b2", "#d55e00", "#999999", "#333333"  # told apart by the colour-blind, too
NET = {1: "#0072b2", 2: "#d55e00"}
STYLES = [("#009e73", "-"), ("#cc79a7", "--"), ("#e69f00", "-."), ("#56b4e9", ":"), ("#d55e00", "-"), ("#0072b2", "--")]
PHASES = {  # phases that belong together -> colour
    ("warmup1", "warmup2"): "#e69f00",
    ("train1", "train2"): "#009e73",
    ("loss",): "#56b4e9",
    ("gmm",): "#cc79a7",
    ("test", "imagenet"): "#0072b2",
    ("val",): "#f0e442",
    ("save",): "#d55e00",
}
_NAMED = 12  # classes up to which a heat map names them and writes its numbers
_DRAWN = 1000  # classes up to which there is a heat map

Draw = Callable[[Axes], None]


def draw_all(run: RunFolder, issues: LabelIssues | None, folder: Path) -> dict[str, Path]:
    """Write what can be drawn of a run. -> the files by the name of the figure"""
    panels: dict[str, Draw] = {"accuracy": partial(draw_accuracy, run=run)}
    epochs = numbers(run)
    for name, metrics, title in (
        ("auc", ["auc"], "AUC of the clean probability"),
        ("labeled", ["labeled"], "size of the labeled set"),
        ("clean", ["clean_precision", "clean_recall"], "labeled set: precision and recall"),
    ):
        if any(f"{metrics[0]}_net{k}" in epochs for k in run.nets):
            panels[name] = partial(draw_nets, run=run, metrics=metrics, title=title)
    for name in ("net1", "net2"):
        if divided := [entry for entry in run.histograms if name in entry]:
            title = f"net {name[-1]}, division of epoch {divided[-1]['epoch']}"
            panels[f"losses_{name}"] = partial(draw_losses, histogram=divided[-1][name], title=title)
    if issues is not None and len(issues.class_names) <= _DRAWN:
        panels["transition"] = partial(draw_transition, issues=issues)
    return write_panels(panels | {"seconds": partial(draw_seconds, run=run)}, folder)


def draw_comparison(groups: Sequence[Group], folder: Path) -> dict[str, Path]:
    """Write the curves of several runs, those of one group in one colour: groups of runs with their names."""
    panels: dict[str, Draw] = {"accuracy": partial(overlay, groups=groups, metric=None)}
    names = {"auc": "AUC of the clean probability", "labeled": "size of the labeled set"}
    names |= {"clean_precision": "labeled set: part that is right", "clean_recall": "right labels: part labeled"}
    for name, title in names.items():
        if any(mean_of_nets(run, name).notna().any() for _, runs in groups for run in runs):
            panels[name] = partial(overlay, groups=groups, metric=name, title=title)
    return write_panels(panels, folder)


def write_panels(panels: dict[str, Draw], folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.png" for name in panels}
    for name, draw in panels.items():
        write_atomically(files[name], png(draw))
    return files


def png(draw: Draw) -> bytes:
    """A panel as a PNG. Names from the data are text, never formulas; a script that the font lacks is no warning."""
    style: Any = {"text.parse_math": False, "axes.titlesize": 11, "legend.fontsize": 8}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = Figure(figsize=(5.2, 3.9), layout="constrained")
        draw(figure.subplots())
        content = io.BytesIO()
        figure.savefig(content, dpi=160, format="png")
    return content.getvalue()


def numbers(run: RunFolder) -> pd.DataFrame:
    """The metrics over the epochs (the index), NaN where an epoch lacks one; those that no epoch has are left out."""
    return pd.DataFrame(run.records).set_index("epoch").select_dtypes("number")


# ---------------------------------------------------------------------------------------------------------------------
# Curves over the epochs


def draw_accuracy(axes: Axes, run: RunFolder) -> None:
    """Accuracy of both networks together and of each over the epochs: on the test set where epochs are tested, else on
    the validation set; the best epoch is marked. ImageNet's beside WebVision's."""
    epochs, is_tested, several = numbers(run), run.measured == "test_acc", len(run.nets) > 1
    kind, both = "test" if is_tested else "validation", epochs[run.measured]
    for k in run.nets:
        if several and (name := f"{run.measured}_net{k}") in epochs:
            axes.plot(epochs[name], color=NET[k], linewidth=0.9, alpha=0.8, label=f"net {k}")
    axes.plot(both, color="#009e73", linewidth=2.2, label="both networks" if several else "the network")
    if is_tested and "val_acc" in epochs:
        axes.plot(epochs["val_acc"], color=LINE, linewidth=0.9, linestyle=":", label="held-out part")
    if "imagenet_acc" in epochs:
        axes.plot(epochs["imagenet_acc"], color="#cc79a7", linewidth=1.2, label="both, ImageNet")
    axes.plot(both.idxmax(), both.max(), "o", color="#009e73", markersize=7, label=f"peak {both.max():.2f}")
    if is_tested and len(both) >= 10:
        last10 = epochs["last10_acc"].iloc[-1]
        label = f"mean of the last 10: {last10:.2f}"
        axes.plot(both.index[[-10, -1]], [last10, last10], color=LINE, linewidth=1.5, label=label)
    finish_curves(axes, run, f"{kind} accuracy", f"{kind} accuracy, %")


def draw_nets(axes: Axes, run: RunFolder, metrics: Sequence[str], title: str) -> None:
    """Metrics that each network has, over the epochs: colours tell the networks, line styles the metrics."""
    epochs = numbers(run)
    for metric, style in zip(metrics, ("-", "--"), strict=False):
        for k in run.nets:
            label = f"net {k}" if len(metrics) == 1 else f"{metric.removeprefix('clean_')}, net {k}"
            if (name := f"{metric}_net{k}") in epochs:
                axes.plot(epochs[name], style, color=NET[k], label=label)
    finish_curves(axes, run, title, "samples" if metrics[0] == "labeled" else "")


def finish_curves(axes: Axes, run: RunFolder, title: str, unit: str) -> None:
    warm_up = run.args["warm_up"]
    if run.divides and len(run.records) > warm_up:
        axes.axvline(warm_up - 0.5, color=LINE, linestyle="--", linewidth=1, label="end of warm-up")
    finish_axes(axes, title, unit)


def finish_axes(axes: Axes, title: str, unit: str) -> None:
    axes.set(xlabel="epoch", ylabel=unit, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.grid(alpha=0.3)
    axes.legend()


def overlay(axes: Axes, groups: Sequence[Group], metric: str | None, title: str = "accuracy") -> None:
    """One curve a run, one style a group; metric: one that each network has, whose mean is drawn; None: the accuracy
    of both networks together."""
    for i, (name, runs) in enumerate(groups):
        color, style = STYLES[i % len(STYLES)]
        label = visible(name if len(runs) == 1 else f"{name} ({len(runs)} seeds)")
        for run in runs:
            y = numbers(run)[run.measured] if metric is None else mean_of_nets(run, metric)
            if y.notna().any():
                marker = "." if len(y) < 30 else ""
                axes.plot(y, style, marker=marker, color=color, linewidth=1.6, label=label)
                label = None
    if metric is None:
        runs = [run for _, group in groups for run in group]
        measured = sorted({{"test_acc": "test", "val_acc": "validation"}[run.measured] for run in runs})
        alone = any(len(run.nets) == 1 for run in runs)
        title = f"{' or '.join(measured)} accuracy{'' if alone else ', both networks'}"
    finish_axes(axes, title, "%" if metric is None else "")


def mean_of_nets(run: RunFolder, metric: str) -> pd.Series:
    return numbers(run).reindex(columns=[f"{metric}_net{k}" for k in run.nets]).mean(axis=1, skipna=False)


def visible(name: str) -> str:
    """A legend leaves out names that begin with an underscore; a font takes none that are no text."""
    name = name.encode("utf-8", "backslashreplace").decode()
    return f" {name}" if name.startswith("_") else name


# ---------------------------------------------------------------------------------------------------------------------
# Other panels


def draw_losses(axes: Axes, histogram: Histogram, title: str) -> None:
    """A network's normalised loss as a density, the mixture's two Gaussians, and where p = threshold."""
    edges = np.linspace(0, 1, histograms.BINS + 1)
    styles = {"all": ("samples", ALL), "clean": ("label truly clean", CLEAN), "wrong": ("label truly wrong", WRONG)}
    below = np.zeros(histograms.BINS)
    for name, density in histograms.densities(histogram).items():
        label, color = f"{styles[name][0]} ({sum(histogram[name])})", styles[name][1]
        axes.stairs(below + density, edges, baseline=below, fill=True, color=color, alpha=0.55, label=label)
        below = below + density
    x = np.linspace(0, 1, 2000)
    components = histograms.gaussians(x, histogram)
    for component, color, name in zip(components, (CLEAN, WRONG), ("clean", "noisy"), strict=True):
        axes.plot(x, component, color=color, linewidth=2, label=f"fitted Gaussian, {name}")
    for i, boundary in enumerate(histograms.boundaries(histogram)):
        label = f"clean probability = {histogram['threshold']:g}" if i == 0 else None
        axes.axvline(boundary, color=LINE, linestyle="--", linewidth=1.5, label=label)
    # The clean peak is often ten times as high as everything else: a root scale shows both.
    axes.set_yscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    axes.set(xlabel="normalised loss", ylabel="density (root scale)", title=title)
    axes.legend()


def draw_transition(axes: Axes, issues: LabelIssues) -> None:
    """Noise transition matrix, as it is where the truth is known, else as the suggestions estimate it: a heat map of
    parts from 0 to 1, rows by the true or corrected label; a class without samples is an empty row."""
    actual, kind = (issues.cleaned, "corrected") if issues.true is None else (issues.true, "true")
    n = len(issues.class_names)
    matrix = transition(actual, issues.given, n)[1]
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues", interpolation="nearest", aspect="auto")
    axes.figure.colorbar(image, ax=axes)
    if n <= _NAMED:
        names = list(map(shorter, issues.class_names))
        long = max(map(len, names)) > 3
        axes.set_xticks(range(n), names, rotation=60 if long else 0, ha="right" if long else "center", fontsize=8)
        axes.set_yticks(range(n), names, fontsize=8)
        for i, j in zip(*np.nonzero(matrix >= 0.005), strict=True):
            color = "white" if matrix[i, j] > 0.5 else "black"
            text = f"{matrix[i, j]:.2f}".removeprefix("0")
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    title = "noise: estimated" if kind == "corrected" else "noise: as it is"
    axes.set(xlabel="given label", ylabel=f"{kind} label", title=title)


def shorter(name: str, limit: int = 14) -> str:
    name = " ".join(visible(name).split())
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def draw_seconds(axes: Axes, run: RunFolder) -> None:
    """Where the time of each epoch went, stacked."""
    seconds = numbers(run).filter(like="seconds_").rename(columns=lambda name: name.removeprefix("seconds_"))
    others = tuple(name for name in seconds if not any(name in phases for phases in PHASES))
    x, below = seconds.index, np.zeros(len(seconds))
    for phases, color in {**PHASES, others: "#000000"}.items():
        stack = seconds[[name for name in phases if name in seconds]]
        height = stack.sum(axis=1).to_numpy()
        if height.any():
            label = {"warmup1": "warm-up", "train1": "training"}.get(phases[0], ", ".join(stack))
            axes.bar(x, height, 1.0 if len(x) > 30 else 0.8, bottom=below, color=color, label=label)
            below = below + height
    finish_axes(axes, "time per phase", "seconds")
    axes.grid(visible=False)
    axes.set_ylim(0, 1.35 * max(below.max(), 1e-3))  # room for the legend
    axes.legend(ncols=3, loc="upper center")
