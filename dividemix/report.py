"""What a run did, for people: a figure in each run folder and a table of several runs.

    python -m dividemix.report RUN [RUN ...]

Reads run folders only. The figure `report.png`: both networks' loss histograms with the fitted mixture and the
threshold, coloured by what is truly clean and truly wrong where the truth is known, and the accuracy over the epochs of
all runs given: on the test set or, where epochs are not tested (Clothing1M), on the validation set.
"""

import argparse
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dividemix import DivideMixError
from dividemix.checkpoint import write_atomically
from dividemix.options import Parser, command_line

CLEAN, WRONG, LINE = "#0072b2", "#d55e00", "#333333"  # told apart by the colour-blind, too


@dataclass(frozen=True)
class RunFolder:
    """What the report needs of a run: a record per epoch; the last epoch's scores, the labels and the final metrics
    (empty where missing)."""

    path: Path
    args: dict[str, Any]
    records: list[dict[str, Any]]
    scores: dict[str, NDArray]
    labels: dict[str, NDArray]
    result: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def divided(self) -> list[int]:
        """The networks (1, 2) that have a division in the last epoch."""
        return [k for k in (1, 2) if f"clean_probability_net{k}" in self.scores]

    @property
    def measured(self) -> str:
        """The accuracy that every epoch has."""
        return "test_acc" if "test_acc" in self.records[-1] else "val_acc"

    @property
    def best(self) -> float | None:
        """Test accuracy of the best epoch; None where it is not known yet."""
        return self.records[-1].get("best_acc", self.result.get("test_acc"))

    @property
    def truly_wrong(self) -> NDArray[np.bool_] | None:
        return self.labels["given"] != self.labels["true"] if "true" in self.labels else None


def read_run(path: Path) -> RunFolder:
    """Raises DivideMixError where there is no run, or none with a finished epoch."""
    try:
        args = dict(json.loads((path / "args.json").read_text())["args"])
        lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
        # Half a line at the end is being written, or was when the run was killed.
        records = [dict(json.loads(line)) for line in lines if line.endswith("\n")]
        numbers = [args["warm_up"]]
        for record in records:
            numbers += [record["epoch"], record["test_acc" if "test_acc" in records[-1] else "val_acc"]]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("text where a number is expected")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DivideMixError(f"{path} is not a run folder ({error})") from error
    if not records:
        raise DivideMixError(f"{path} has no finished epoch yet")
    try:
        result = dict(json.loads((path / "result.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError):  # not finished yet
        result = {}
    scores = sorted((path / "scores").glob("epoch_*.npz"), key=lambda file: (len(file.name), file.name))
    return RunFolder(path, args, records, arrays(scores[-1]) if scores else {}, arrays(path / "labels.npz"), result)


def arrays(path: Path) -> dict[str, NDArray]:
    """An .npz without pickles as a dict, {} where there is none. Raises DivideMixError for a damaged one."""
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DivideMixError(f"{path} is damaged ({error})") from error


def found_wrong(run: RunFolder) -> dict[str, int] | None:
    """Training labels that both networks together take for wrong (mean clean probability below the threshold): how
    many `flagged`, how many `found` of those truly wrong, and how many are `wrong`. None where the run has no
    division or the truth is unknown."""
    if len(run.divided) < 2 or run.truly_wrong is None:
        return None
    mean = (run.scores["clean_probability_net1"] + run.scores["clean_probability_net2"]) / 2
    flagged = mean < run.scores["threshold_net1"]
    return {
        "flagged": int(flagged.sum()),
        "found": int((flagged & run.truly_wrong).sum()),
        "wrong": int(run.truly_wrong.sum()),
    }


def table(runs: Sequence[RunFolder]) -> str:
    """One line a run, aligned, for the terminal."""
    rows = [
        (
            "run",
            "epochs",
            "best",
            "last epoch",
            "last 10",
            "AUC net 1/2",
            "wrong labels found",
            "of those flagged, wrong",
        )
    ]
    for run in runs:
        last, issues = run.records[-1], found_wrong(run)
        both = [cell(last.get(f"auc_net{k}"), ".3f") for k in (1, 2)]
        auc = "-" if both == ["-", "-"] else "/".join(both)
        found = precision = "-"
        if issues and issues["wrong"] and issues["flagged"]:
            found = f"{issues['found']} of {issues['wrong']} ({issues['found'] / issues['wrong']:.1%})"
            precision = f"{issues['found']} of {issues['flagged']} ({issues['found'] / issues['flagged']:.1%})"
        accuracy = [cell(value, ".2f") for value in (run.best, last.get("test_acc"), last.get("last10_acc"))]
        rows.append((run.name, str(len(run.records)), *accuracy, auc, found, precision))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def draw(path: Path, compare: Sequence[Path] = ()) -> list[Path]:
    """Make report.png in the run folder `path`, with the accuracy curves of `compare` beside its own. -> the files
    written."""
    run = read_run(path)
    others = [read_run(other) for other in compare]
    panels = len(run.divided) + 1
    figure = Figure(figsize=(5.2 * panels, 4.2), layout="constrained")
    *histograms, accuracy = figure.subplots(1, panels, squeeze=False)[0]
    for k, axes in zip(run.divided, histograms, strict=True):
        draw_losses(axes, run, k)
    draw_accuracy(accuracy, [*others, run])
    figure.suptitle(f"{run.name}: epoch {run.records[-1]['epoch']}")
    file = path / "report.png"
    content = io.BytesIO()
    figure.savefig(content, dpi=130)
    write_atomically(file, content.getbuffer())
    return [file]


def draw_losses(axes: Axes, run: RunFolder, k: int) -> None:
    """Histogram of net k's normalised loss as a density, the mixture's two Gaussians, and where p = threshold."""
    loss, wrong = run.scores[f"loss_net{k}"], run.truly_wrong
    bins = np.linspace(0, max(float(loss.max()), 1e-6), 61)
    density = np.full(len(loss), 1 / (len(loss) * (bins[1] - bins[0])))
    if wrong is None:
        axes.hist(loss, bins, weights=density, color="#999999", label="samples")
    else:
        parts = [loss[~wrong], loss[wrong]]
        names = [f"label truly clean ({len(parts[0])})", f"label truly wrong ({len(parts[1])})"]
        weights = [density[~wrong], density[wrong]]
        axes.hist(parts, bins, weights=weights, color=[CLEAN, WRONG], stacked=True, alpha=0.55, label=names)
    x = np.linspace(0, bins[-1], 2000)
    components = gaussians(x, *(run.scores[f"{name}_net{k}"] for name in ("means", "variances", "weights")))
    for component, color, name in zip(components, (CLEAN, WRONG), ("clean", "noisy"), strict=True):
        axes.plot(x, component, color=color, linewidth=2, label=f"fitted Gaussian, {name}")
    threshold = float(run.scores[f"threshold_net{k}"])
    labeled = components[0] > threshold * components.sum(axis=0)
    for i, boundary in enumerate(x[1:][labeled[1:] != labeled[:-1]]):
        label = f"clean probability = {threshold:g}" if i == 0 else None
        axes.axvline(boundary, color=LINE, linestyle="--", linewidth=1.5, label=label)
    # The clean peak is often ten times as high as everything else: a root scale shows both.
    axes.set_yscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    auc = run.records[-1].get(f"auc_net{k}")
    title = f"net {k}: loss of the {len(loss)} training samples"
    axes.set(
        xlabel="normalised loss",
        ylabel="density (root scale)",
        title=title if auc is None else f"{title}, AUC {auc:.3f}",
    )
    axes.legend(fontsize=8)


def gaussians(x: NDArray, means: NDArray, variances: NDArray, weights: NDArray) -> NDArray:
    """Weighted densities of the mixture's components at x (M,) -> (2, M)."""
    means, variances, weights = (part[:, None] for part in (means, variances, weights))
    return weights * np.exp(-((x - means) ** 2) / (2 * variances)) / np.sqrt(2 * np.pi * variances)


def draw_accuracy(axes: Axes, runs: Sequence[RunFolder]) -> None:
    """Accuracy of the two networks together over the epochs, on the test set where epochs are tested, else on the
    validation set; one curve a run, the run drawn for last and thickest. ImageNet's beside WebVision's, thin."""
    styles = [("-", "o", "#009e73"), ("--", "s", "#cc79a7"), (":", "^", "#e69f00"), ("-.", "D", "#56b4e9")]
    for i, run in enumerate(reversed(runs)):
        style, marker, color = styles[i % len(styles)]
        x = [record["epoch"] for record in run.records]
        y = [record[run.measured] for record in run.records]
        tested = run.measured == "test_acc"
        best = f"best {run.best:.1f}" if tested else f"validation, best {max(y):.1f}"
        label = f"{run.name} ({best}, last {y[-1]:.1f})"
        axes.plot(x, y, style, marker=marker, markersize=3, color=color, linewidth=2.2 if i == 0 else 1.5, label=label)
        if "imagenet_acc" in run.records[-1]:
            imagenet = [record["imagenet_acc"] for record in run.records]
            axes.plot(x, imagenet, style, color=color, linewidth=0.8, label=f"{run.name}, ImageNet")
    warm_up = runs[-1].args["warm_up"]
    if runs[-1].divided and len(runs[-1].records) > warm_up:
        axes.axvline(warm_up - 0.5, color=LINE, linestyle="--", linewidth=1, label="end of warm-up")
    kinds = sorted({{"test_acc": "test", "val_acc": "validation"}[run.measured] for run in runs})
    kind = f"{' or '.join(kinds)} accuracy"
    axes.set(xlabel="epoch", ylabel=f"{kind}, %", title=f"{kind} (both networks)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m dividemix.report", description="Draw report.png of each run and print a table of all."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    args: argparse.Namespace = parser.parse_args(argv)
    runs = [read_run(path) for path in args.runs]
    print(table(runs))
    for path in args.runs:
        for file in draw(path, compare=[other for other in args.runs if other != path]):
            print(f"figure: {file}")


if __name__ == "__main__":
    command_line(main)
