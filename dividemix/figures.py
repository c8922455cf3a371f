"""The report's figures: one small panel each, so that a page can set them side by side or, on a phone, below each
other. `draw_all` and `draw_comparison` write them as PNG files; the panels draw on any matplotlib axes."""

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dividemix import histograms
from dividemix.checkpoint import write_atomically
from dividemix.histograms import Histogram
from dividemix.label_issues import LabelIssues, transition_counts, transition_rates
from dividemix.runfolder import RunFolder

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
    panels: dict[str, Draw] = {"accuracy": lambda axes: draw_accuracy(axes, run)}
    if any(value is not None for k in (1, 2) for value in run.column(f"auc_net{k}")):
        panels["auc"] = lambda axes: draw_nets(axes, run, ["auc"], "AUC of the clean probability")
    if any(value is not None for k in (1, 2) for value in run.column(f"labeled_net{k}")):
        panels["labeled"] = lambda axes: draw_nets(axes, run, ["labeled"], "size of the labeled set")
    if any(value is not None for k in (1, 2) for value in run.column(f"clean_precision_net{k}")):
        names = ["clean_precision", "clean_recall"]
        panels["clean"] = lambda axes: draw_nets(axes, run, names, "labeled set: precision and recall")
    for k in (1, 2):
        if last := [entry for entry in run.histograms if f"net{k}" in entry]:
            title = f"net {k}, division of epoch {last[-1]['epoch']}"
            panels[f"losses_net{k}"] = lambda axes, h=last[-1][f"net{k}"], title=title: draw_losses(axes, h, title)
    if issues is not None and issues.num_class <= _DRAWN:
        panels["transition"] = lambda axes: draw_transition(axes, issues)
    if any(key.startswith("seconds_") for key in run.records[-1]):
        panels["seconds"] = lambda axes: draw_seconds(axes, run)
    return write_panels(panels, folder)


def draw_comparison(groups: Sequence[tuple[str, Sequence[RunFolder]]], folder: Path) -> dict[str, Path]:
    """Write the curves of several runs, those of one group in one colour: groups of runs with their names."""
    runs = [run for _, group in groups for run in group]
    panels: dict[str, Draw] = {"accuracy": lambda axes: overlay(axes, groups, None)}
    names = {"auc": "AUC of the clean probability", "labeled": "size of the labeled set"}
    names |= {"clean_precision": "labeled set: part that is right", "clean_recall": "right labels: part labeled"}
    for name, title in names.items():
        if any(value is not None for run in runs for value in mean_of_nets(run, name)):
            panels[name] = lambda axes, name=name, title=title: overlay(axes, groups, name, title)
    return write_panels(panels, folder)


def write_panels(panels: dict[str, Draw], folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, draw in panels.items():
        files[name] = folder / f"{name}.png"
        write_atomically(files[name], png(draw))
    return files


def png(draw: Draw) -> bytes:
    """A panel as a PNG. Names from the data are text, never formulas; a script that the font lacks is no warning."""
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = Figure(figsize=(5.2, 3.9), layout="constrained")
        draw(figure.subplots())
        content = io.BytesIO()
        figure.savefig(content, dpi=160, format="png")
    return content.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Curves over the epochs


def draw_accuracy(axes: Axes, run: RunFolder) -> None:
    """Accuracy of both networks together and of each over the epochs: on the test set where epochs are tested, else on
    the validation set; the best epoch is marked. ImageNet's beside WebVision's."""
    x, tested = run.column("epoch"), run.measured == "test_acc"
    kind = "test" if tested else "validation"
    for k, color in NET.items():
        y = numbers(run.column(f"{run.measured}_net{k}"))
        if len(run.nets) > 1 and not np.isnan(y).all():
            axes.plot(x, y, color=color, linewidth=0.9, alpha=0.8, label=f"net {k}")
    both = numbers(run.column(run.measured))
    label = "both networks" if len(run.nets) > 1 else "the network"
    axes.plot(x, both, color="#009e73", linewidth=2.2, label=label)
    if tested and "val_acc" in run.records[-1]:
        axes.plot(x, numbers(run.column("val_acc")), color=LINE, linewidth=0.9, linestyle=":", label="held-out part")
    if "imagenet_acc" in run.records[-1]:
        axes.plot(x, numbers(run.column("imagenet_acc")), color="#cc79a7", linewidth=1.2, label="both, ImageNet")
    if not np.isnan(both).all():
        best = int(np.nanargmax(both))
        axes.plot(x[best], both[best], "o", color="#009e73", markersize=7, label=f"peak {both[best]:.2f}")
    if tested and len(x) >= 10 and (last10 := run.records[-1].get("last10_acc")) is not None:
        label = f"mean of the last 10: {last10:.2f}"
        axes.plot([x[-10], x[-1]], [last10, last10], color=LINE, linewidth=1.5, label=label)
    finish_curves(axes, run, f"{kind} accuracy", f"{kind} accuracy, %")


def draw_nets(axes: Axes, run: RunFolder, metrics: Sequence[str], title: str) -> None:
    """Metrics that each network has, over the epochs: colours tell the networks, line styles the metrics."""
    for metric, style in zip(metrics, ("-", "--"), strict=False):
        for k, color in [(k, NET[k]) for k in run.nets]:
            name = f"net {k}" if len(metrics) == 1 else f"{metric.removeprefix('clean_')}, net {k}"
            axes.plot(run.column("epoch"), numbers(run.column(f"{metric}_net{k}")), style, color=color, label=name)
    finish_curves(axes, run, title, "samples" if metrics[0] == "labeled" else "")


def finish_curves(axes: Axes, run: RunFolder, title: str, unit: str) -> None:
    warm_up = run.args.get("warm_up")
    if run.divides and isinstance(warm_up, int | float) and len(run.records) > warm_up:
        axes.axvline(warm_up - 0.5, color=LINE, linestyle="--", linewidth=1, label="end of warm-up")
    finish_axes(axes, title, unit)


def finish_axes(axes: Axes, title: str, unit: str) -> None:
    axes.set(xlabel="epoch", ylabel=unit)
    axes.set_title(title, fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def overlay(
    axes: Axes, groups: Sequence[tuple[str, Sequence[RunFolder]]], metric: str | None, title: str = "accuracy"
) -> None:
    """One curve a run, one style a group; metric: one that each network has, whose mean is drawn; None: the accuracy
    of both networks together."""
    for i, (name, runs) in enumerate(groups):
        color, style = STYLES[i % len(STYLES)]
        label = visible(name if len(runs) == 1 else f"{name} ({len(runs)} seeds)")
        for run in runs:
            y = numbers(run.column(run.measured) if metric is None else mean_of_nets(run, metric))
            if not np.isnan(y).all():
                marker = "." if len(y) < 30 else ""
                axes.plot(run.column("epoch"), y, style, marker=marker, color=color, linewidth=1.6, label=label)
                label = None
    kinds = {"test_acc": "test", "val_acc": "validation"}
    if metric is None:
        measured = sorted({kinds[run.measured] for _, runs in groups for run in runs})
        alone = any(len(run.nets) == 1 for _, runs in groups for run in runs)
        title = f"{' or '.join(measured)} accuracy{'' if alone else ', both networks'}"
    finish_axes(axes, title, "%" if metric is None else "")


def mean_of_nets(run: RunFolder, metric: str) -> list[float | None]:
    both = sum(numbers(run.column(f"{metric}_net{k}")) for k in run.nets) / len(run.nets)
    return [None if np.isnan(value) else value for value in both.tolist()]


def numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    """None, and whatever else is no number, leaves a gap in a curve."""
    return np.array([v if isinstance(v, int | float) else np.nan for v in values], np.float64)


def visible(name: str) -> str:
    """A legend leaves out names that begin with an underscore; a font takes none that are no text."""
    name = name.encode("utf-8", "backslashreplace").decode()
    return f" {name}" if name.startswith("_") else name


# ---------------------------------------------------------------------------------------------------------------------
# Other panels


def draw_losses(axes: Axes, histogram: Histogram, title: str) -> None:
    """A network's normalised loss as a density, the mixture's two Gaussians, and where p = threshold."""
    edges = np.linspace(0, 1, histograms.BINS + 1)
    names = {"all": "samples", "clean": "label truly clean", "wrong": "label truly wrong"}
    colors, below = {"all": ALL, "clean": CLEAN, "wrong": WRONG}, np.zeros(histograms.BINS)
    for name, density in histograms.densities(histogram).items():
        label = f"{names[name]} ({sum(histogram[name])})"
        axes.stairs(below + density, edges, baseline=below, fill=True, color=colors[name], alpha=0.55, label=label)
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
    axes.set(xlabel="normalised loss", ylabel="density (root scale)")
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8)


def draw_transition(axes: Axes, issues: LabelIssues) -> None:
    """Noise transition matrix, as it is where the truth is known, else as the suggestions estimate it: a heat map of
    parts from 0 to 1, rows by the true or corrected label; a class without samples is an empty row."""
    actual, kind = (issues.cleaned, "corrected") if issues.true is None else (issues.true, "true")
    n = issues.num_class
    matrix = transition_rates(transition_counts(actual, issues.given, n))
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues", interpolation="nearest", aspect="auto")
    axes.figure.colorbar(image, ax=axes)
    if n <= _NAMED:
        names = [shorter(issues.class_name(c)) for c in range(n)]
        long = max(map(len, names)) > 3
        axes.set_xticks(range(n), names, rotation=60 if long else 0, ha="right" if long else "center", fontsize=8)
        axes.set_yticks(range(n), names, fontsize=8)
        for i, j in zip(*np.nonzero(matrix >= 0.005), strict=True):
            color = "white" if matrix[i, j] > 0.5 else "black"
            text = f"{matrix[i, j]:.2f}".removeprefix("0")
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    axes.set(xlabel="given label", ylabel=f"{kind} label")
    axes.set_title("noise: estimated" if kind == "corrected" else "noise: as it is", fontsize=11)


def shorter(name: str, limit: int = 14) -> str:
    name = " ".join(visible(name).split())
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def draw_seconds(axes: Axes, run: RunFolder) -> None:
    """Where the time of each epoch went, stacked."""
    x, below = np.array(run.column("epoch")), np.zeros(len(run.records))
    known = {phase for phases in PHASES for phase in phases}
    found = {key.removeprefix("seconds_") for record in run.records for key in record if key.startswith("seconds_")}
    stacks = dict(PHASES) | ({tuple(sorted(found - known)): "#000000"} if found - known else {})
    for phases, color in stacks.items():
        seconds = sum(np.nan_to_num(numbers(run.column(f"seconds_{phase}"))) for phase in phases)
        if seconds.any():
            name = {"warmup1": "warm-up", "train1": "training"}.get(
                phases[0], ", ".join(p for p in phases if p in found)
            )
            axes.bar(x, seconds, 1.0 if len(x) > 30 else 0.8, bottom=below, color=color, label=name)
            below = below + seconds
    axes.set(xlabel="epoch", ylabel="seconds")
    axes.set_title("time per phase", fontsize=11)
    axes.set_ylim(0, 1.35 * max(below.max(), 1e-3))  # room for the legend
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.legend(fontsize=8, ncols=3, loc="upper center")
