"""The report's figures, one small panel each. `draw_all` (one run) and `draw_comparison` (several) write them as PNG
files; the other draw functions draw one panel on matplotlib axes."""

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

CLEAN, WRONG, ALL, LINE = "#0072b2", "#d55e00", "#999999", "#333333"  # safe for colour-blind readers
NET_COLORS = {1: "#0072b2", 2: "#d55e00"}
STYLES = [("#009e73", "-"), ("#cc79a7", "--"), ("#e69f00", "-."), ("#56b4e9", ":"), ("#d55e00", "-"), ("#0072b2", "--")]
PHASE_COLORS = {  # phases that are drawn as one -> colour
    ("warmup1", "warmup2"): "#e69f00",
    ("train1", "train2"): "#009e73",
    ("loss",): "#56b4e9",
    ("gmm",): "#cc79a7",
    ("test", "imagenet"): "#0072b2",
    ("val",): "#f0e442",
    ("save",): "#d55e00",
}
_MAX_NAMED = 12  # with more classes a heat map has no class names and no numbers
_MAX_DRAWN = 1000  # with more classes there is no heat map

Draw = Callable[[Axes], None]


def draw_all(run: RunFolder, issues: LabelIssues | None, folder: Path) -> dict[str, Path]:
    """Write the figures of a run, as far as it has their data. -> file by name of the figure"""
    panels: dict[str, Draw] = {"accuracy": partial(draw_accuracy, run=run)} if run.measured else {}
    epochs = metric_table(run)
    for name, metrics, title, unit in (
        ("auc", ["auc"], "AUC of the clean probability", "AUC"),
        ("labeled", ["labeled"], "size of the labeled set", "samples"),
        ("clean", ["clean_precision", "clean_recall"], "labeled set: precision and recall", "share of samples"),
    ):
        if any(f"{metrics[0]}_net{k}" in epochs for k in run.nets):
            panels[name] = partial(draw_nets, run=run, metrics=metrics, title=title, unit=unit)
    for name in ("net1", "net2"):
        if divided := [entry for entry in run.histograms if name in entry]:
            title = f"net {name[-1]}, division of epoch {divided[-1]['epoch']}"
            panels[f"losses_{name}"] = partial(draw_losses, histogram=divided[-1][name], title=title)
    if issues is not None and len(issues.class_names) <= _MAX_DRAWN:
        panels["transition"] = partial(draw_transition, issues=issues)
    return write_panels(panels | {"seconds": partial(draw_seconds, run=run)}, folder)


def draw_comparison(groups: Sequence[Group], folder: Path) -> dict[str, Path]:
    """Write the curves of several runs, one colour for each group. -> file by name of the figure"""
    measured = [(name, [run for run in runs if run.measured]) for name, runs in groups]
    measured = [(name, runs) for name, runs in measured if runs]
    panels: dict[str, Draw] = {"accuracy": partial(draw_overlay, groups=measured, metric=None)} if measured else {}
    for name, title, unit in (
        ("auc", "AUC of the clean probability", "AUC, mean of both networks"),
        ("labeled", "size of the labeled set", "samples, mean of both networks"),
        ("clean_precision", "precision of the labeled set", "share of samples"),
        ("clean_recall", "recall of the labeled set", "share of samples"),
    ):
        if any(mean_of_nets(run, name).notna().any() for _, runs in groups for run in runs):
            panels[name] = partial(draw_overlay, groups=groups, metric=name, title=title, unit=unit)
    return write_panels(panels, folder)


def write_panels(panels: dict[str, Draw], folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.png" for name in panels}
    for name, draw in panels.items():
        write_atomically(files[name], png(draw))
    return files


def png(draw: Draw) -> bytes:
    """A panel as a PNG. Names from the data are never parsed as formulas; missing glyphs give no warning."""
    style: Any = {"text.parse_math": False, "axes.titlesize": 11, "legend.fontsize": 8}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = Figure(figsize=(5.2, 3.9), layout="constrained")
        draw(figure.subplots())
        content = io.BytesIO()
        figure.savefig(content, dpi=160, format="png")
    return content.getvalue()


def metric_table(run: RunFolder) -> pd.DataFrame:
    """One row an epoch (the index), one column a metric that has numbers, NaN where one is missing."""
    return pd.DataFrame(run.records).set_index("epoch").select_dtypes("number")


# ---- Curves over the epochs ----


def draw_accuracy(axes: Axes, run: RunFolder) -> None:
    """Accuracy over the epochs, of both networks together and of each, with the best epoch marked. It is that on the
    test set, or on the validation set where epochs are not tested. WebVision's runs have a curve for ImageNet, too."""
    epochs, is_tested, has_two_nets = metric_table(run), run.measured == "test_acc", len(run.nets) > 1
    kind, ensemble = "test" if is_tested else "validation", epochs[run.measured]
    for k in run.nets:
        if has_two_nets and (name := f"{run.measured}_net{k}") in epochs:
            axes.plot(epochs[name], color=NET_COLORS[k], linewidth=0.9, alpha=0.8, label=f"net {k}")
    axes.plot(ensemble, color="#009e73", linewidth=2.2, label="both networks" if has_two_nets else "the network")
    if is_tested and "val_acc" in epochs:
        axes.plot(epochs["val_acc"], color=LINE, linewidth=0.9, linestyle=":", label="validation accuracy")
    if "imagenet_acc" in epochs:
        axes.plot(epochs["imagenet_acc"], color="#cc79a7", linewidth=1.2, label="both networks, ImageNet")
    kept, color = ensemble, "#009e73"  # whose best epoch is marked
    if (name := f"{run.measured}_ema") in epochs:
        kept, color = epochs[name], LINE
        axes.plot(kept, color=color, linewidth=1.2, label="averaged weights")
    marks = {run.best_epochs[0]: (kept, color)}  # of both networks; or each network has its own
    if len({*run.best_epochs}) > 1:
        marks = {e: (epochs[f"{run.measured}_net{k}"], NET_COLORS[k]) for k, e in enumerate(run.best_epochs, start=1)}
    for epoch, (accuracy, color) in marks.items():
        label = f"best: {accuracy[epoch]:.2f}, epoch {epoch}"
        axes.plot(epoch, accuracy[epoch], "o", color=color, markersize=7, label=label)
    if is_tested and len(ensemble) >= 10:
        last10 = epochs.get("last10_acc_ema", epochs["last10_acc"]).iloc[-1]
        label = f"mean of the last 10: {last10:.2f}"
        axes.plot(ensemble.index[[-10, -1]], [last10, last10], color=LINE, linewidth=1.5, label=label)
    finish_curves(axes, run, f"{kind} accuracy", f"{kind} accuracy (%)")


def draw_nets(axes: Axes, run: RunFolder, metrics: Sequence[str], title: str, unit: str) -> None:
    """Metrics of each network over the epochs: a colour for each network, a line style for each metric."""
    epochs = metric_table(run)
    for metric, style in zip(metrics, ("-", "--"), strict=False):
        for k in run.nets:
            label = f"net {k}" if len(metrics) == 1 else f"{metric.removeprefix('clean_')}, net {k}"
            if (name := f"{metric}_net{k}") in epochs:
                axes.plot(epochs[name], style, color=NET_COLORS[k], label=label)
    finish_curves(axes, run, title, unit)


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


def draw_overlay(
    axes: Axes, groups: Sequence[Group], metric: str | None, title: str = "accuracy", unit: str = "accuracy (%)"
) -> None:
    """One curve a run, one style a group. metric: its mean over the networks; None: the accuracy of both together."""
    for i, (name, runs) in enumerate(groups):
        color, style = STYLES[i % len(STYLES)]
        label = visible(name if len(runs) == 1 else f"{name} ({len(runs)} seeds)")
        for run in runs:
            y = accuracy(run) if metric is None else mean_of_nets(run, metric)
            if y.notna().any():
                marker = "." if len(y) < 30 else ""
                axes.plot(y, style, marker=marker, color=color, linewidth=1.6, label=label)
                label = None
    if metric is None:
        runs = [run for _, group in groups for run in group]
        measured = sorted({{"test_acc": "test", "val_acc": "validation"}[run.measured] for run in runs})
        has_single_net = any(len(run.nets) == 1 for run in runs)
        title = f"{' or '.join(measured)} accuracy{'' if has_single_net else ', both networks'}"
    finish_axes(axes, title, unit)


def accuracy(run: RunFolder) -> pd.Series:
    """Of both networks together, with --ema of the averaged weights."""
    epochs = metric_table(run)
    return epochs.get(f"{run.measured}_ema", epochs[run.measured])


def mean_of_nets(run: RunFolder, metric: str) -> pd.Series:
    return metric_table(run).reindex(columns=[f"{metric}_net{k}" for k in run.nets]).mean(axis=1, skipna=False)


def visible(name: str) -> str:
    """A name that matplotlib shows: legends leave out names that begin with an underscore, and text must be Unicode."""
    name = name.encode("utf-8", "backslashreplace").decode()
    return f" {name}" if name.startswith("_") else name


# ---- Losses, noise, time ----


def draw_losses(axes: Axes, histogram: Histogram, title: str) -> None:
    """Density of a network's normalised losses, the fitted mixture's two Gaussians, and the threshold."""
    edges = np.linspace(0, 1, histograms.BINS + 1)
    styles = {"all": ("samples", ALL), "clean": ("right labels", CLEAN), "wrong": ("wrong labels", WRONG)}
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
    # The clean peak is often ten times as high as the rest: a square root scale shows both.
    axes.set_yscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    axes.set(xlabel="normalised loss", ylabel="density (root scale)", title=title)
    axes.legend()


def draw_transition(axes: Axes, issues: LabelIssues) -> None:
    """Noise transition matrix as a heat map: a row for each true label, or corrected label where the truth is unknown,
    with the share of its samples that has each given label. A class without samples is an empty row."""
    kind = "corrected" if issues.true_labels is None else "true"
    row_labels, n = {"corrected": issues.cleaned_labels, "true": issues.true_labels}[kind], len(issues.class_names)
    matrix = transition(row_labels, issues.given_labels, n)[1]
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues", interpolation="nearest", aspect="auto")
    axes.figure.colorbar(image, ax=axes, label="share of the row's samples")
    if n <= _MAX_NAMED:
        names = list(map(shortened, issues.class_names))
        turn: dict[str, Any] = {"rotation": 60, "ha": "right"} if max(map(len, names)) > 3 else {}
        axes.set_xticks(range(n), names, fontsize=8, **turn)
        axes.set_yticks(range(n), names, fontsize=8)
        for i, j in zip(*np.nonzero(matrix >= 0.005), strict=True):
            color = "white" if matrix[i, j] > 0.5 else "black"
            text = f"{matrix[i, j]:.2f}".removeprefix("0")
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    title = f"noise transition matrix{', estimated' if kind == 'corrected' else ''}"
    axes.set(xlabel="given label", ylabel=f"{kind} label", title=title)


def shortened(name: str, limit: int = 14) -> str:
    name = " ".join(visible(name).split())
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def draw_seconds(axes: Axes, run: RunFolder) -> None:
    """Seconds of each phase in each epoch, as stacked bars."""
    seconds = metric_table(run).filter(like="seconds_").rename(columns=lambda name: name.removeprefix("seconds_"))
    others = tuple(name for name in seconds if not any(name in phases for phases in PHASE_COLORS))
    x, below = seconds.index, np.zeros(len(seconds))
    for phases, color in {**PHASE_COLORS, others: "#000000"}.items():
        stack = seconds[[name for name in phases if name in seconds]]
        height = stack.sum(axis=1).to_numpy()
        if height.any():
            label = {"warmup1": "warm-up", "train1": "training", "gmm": "mixture fit"}.get(phases[0], ", ".join(stack))
            axes.bar(x, height, 1.0 if len(x) > 30 else 0.8, bottom=below, color=color, label=label)
            below = below + height
    finish_axes(axes, "time per phase", "seconds")
    axes.grid(visible=False)
    axes.set_ylim(0, 1.35 * max(below.max(), 1e-3))  # room for the legend
    axes.legend(ncols=3, loc="upper center")
