"""The numbers of the runs beside the paper's: results.csv, RESULTS.md and the curves of each row, from run folders.

A number that stands here was read from a run that has come to its end; what was not run says so, with the command that
runs it.
"""

import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from dividemix import DivideMixError, figures, measured, warn
from dividemix.checkpoint import csv_bytes, write_atomically
from dividemix.compare import mean_and_deviation
from dividemix.experiments import DATA, MEASURES, SMOKE, TABLES, Experiment
from dividemix.measured import Found
from dividemix.plan import decides
from dividemix.runfolder import read_run

LAST = 10  # epochs that "last" is the mean of
NOTE = (
    "Test accuracy in per cent: best is the peak over the epochs, last the mean of the last 10. Ours: mean ± standard "
    "deviation over n seeds (none of one seed), all with the same noise; a subset of the images is drawn by each seed. "
    "Cross-entropy beside the paper's is net 1 alone, as there. Only runs that have come to their end are in the "
    "tables; `results.csv` has each run."
)


@dataclass(frozen=True)
class Outcome:
    """One run of a row. setting: '' for the row's own, else what differs. numbers: by the names of the row's measures,
    without those that the run does not have."""

    experiment: Experiment
    seed: int
    setting: str
    found: Found
    numbers: dict[str, float]
    is_finished: bool

    @property
    def seconds(self) -> float:
        return sum(map(measured.seconds, self.found.records))

    @property
    def commits(self) -> list[str]:
        """Of all starts: a run may have been continued with another version."""
        starts = self.found.about.get("starts")
        starts = [each for each in starts if isinstance(each, dict)] if isinstance(starts, list) else []
        return list(dict.fromkeys(str(each.get("commit") or "-") for each in starts or [self.found.about]))


def outcomes(experiment: Experiment, out_dir: Path) -> list[Outcome]:
    """All runs of a row that are in out_dir and have an epoch, by setting and seed."""
    runs, begin = [], f"{experiment.run_name}_seed"
    for folder in out_dir.glob(f"{begin}*") if out_dir.is_dir() else []:
        seed, _, end = folder.name.removeprefix(begin).partition("_")
        found = measured.read(folder)
        if seed.isdecimal() and found.records:
            whole = found.is_finished(expected_epochs(found, experiment))
            values = numbers(experiment, found)
            runs.append(Outcome(experiment, int(seed), departs(experiment, found, end), found, values, whole))
    return sorted(runs, key=lambda run: (run.setting, run.seed))


def expected_epochs(found: Found, experiment: Experiment) -> int:
    value = found.args.get("num_epochs")
    return value if isinstance(value, int) else experiment.num_epochs


def departs(experiment: Experiment, found: Found, end: str) -> str:
    """What makes a run another one than the row asks for: the flags in its folder's name (`plan.variant`; what follows
    from them is not said), those that are not the row's all the same, and whether the data are the published ones."""
    notes = [end] if end else []
    notes += [
        note for note in experiment.setting_differences(found.args) if not decides(f"_{end}", note.split()[0][2:])
    ]
    lines = found.about.get("data", {})
    lines = lines.get("lines") if isinstance(lines, dict) else None
    official = f"(official {experiment.data})"
    if experiment.data in ("cifar10", "cifar100") and not (isinstance(lines, list) and official in str(lines[:1])):
        notes.append(f"not the official {experiment.data}")
    return ", ".join(notes)


def numbers(experiment: Experiment, found: Found) -> dict[str, float]:
    """The run's value of each measure of the row."""
    own = found.column(experiment.column)
    last = found.records[-1]
    chosen_by = "val_acc" if "val_acc" in last else "test_acc"
    top = max(found.records, key=lambda record: number(record.get(chosen_by)))
    values: dict[str, Any] = {name: top.get(name) for name in MEASURES}
    if experiment.script == "Train_clothing1M.py":  # tested once, with each network's best epoch
        values["test_acc"] = found.result.get("test_acc")
    if own:
        of_both = experiment.column == "test_acc"  # where an epoch is chosen by held-out labels, this is its accuracy
        values["best"] = last.get("best_acc", max(own)) if of_both else max(own)
        values["last"] = statistics.fmean(own[-LAST:]) if len(own) >= LAST else None
    return {name: values[name] for name in experiment.paper if isinstance(values.get(name), int | float)}


def number(value: Any) -> float:
    """0 for what is none."""
    return value if isinstance(value, int | float) else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# results.csv


def results_csv(runs: Sequence[Outcome]) -> bytes:
    """A line for each run, also for those that are under way."""
    head = ["row", "table", "seed", "setting", "finished", *MEASURES, *(f"paper_{name}" for name in MEASURES)]
    head += ["epochs", "seconds", "commit", "torch", "python", "device", "run_folder"]
    rows = []
    for run in runs:
        experiment, about = run.experiment, run.found.about
        own = [f"{run.numbers[name]:.4f}" if name in run.numbers else "" for name in MEASURES]
        paper = ["" if experiment.paper.get(name) is None else experiment.paper[name] for name in MEASURES]
        versions = about.get("versions") if isinstance(about.get("versions"), dict) else {}
        row = [experiment.name, experiment.table, run.seed, run.setting or "the row's", run.is_finished, *own, *paper]
        row += [len(run.found.records), f"{run.seconds:.1f}", " ".join(run.commits)]
        row += [versions.get("torch", ""), versions.get("python", ""), about.get("machine", ""), run.found.folder.name]
        rows.append(row)
    return csv_bytes(pandas.DataFrame(rows, columns=head, dtype=object))


# ---------------------------------------------------------------------------------------------------------------------
# RESULTS.md


def markdown(
    experiments: Sequence[Experiment],
    runs: dict[str, list[Outcome]],
    command: Callable[[Experiment], str],
    curves: dict[str, str],
) -> str:
    """runs: of each row, by its name; command: what makes a row; curves: of a row, the figure's path."""
    lines = ["# Results", "", NOTE]
    finished = [run for each in runs.values() for run in each if run.is_finished]
    machines = sorted({str(run.found.about.get("machine")) for run in finished})
    lines += ["", *(f"Made on: {machine}." for machine in machines)] if machines else []
    for table, title in (TABLES | {SMOKE: "In miniature: a test of the machinery, no results"}).items():
        rows = [experiment for experiment in experiments if experiment.table == table]
        if rows:
            lines += ["", f"## {title}", "", *table_lines(rows, runs, command)]
            images = [f"![{row.name}]({curves[row.name]})" for row in rows if row.name in curves]
            lines += ["", *images] if images else []
    return "\n".join(lines) + "\n"


def table_lines(
    rows: Sequence[Experiment], runs: dict[str, list[Outcome]], command: Callable[[Experiment], str]
) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row.paper))
    measures = " / ".join(MEASURES[name] for name in names)
    with_paper = any(value is not None for row in rows for value in row.paper.values())
    head = ["row", *([f"paper: {measures}"] if with_paper else []), f"ours: {measures}"]
    head += [*(["difference"] if with_paper else []), "n", "epochs", "seconds a run", "commit", "not the row's"]
    lines = [joined(head), joined(["---"] * len(head))]
    for row in rows:
        finished = [run for run in runs.get(row.name, []) if run.is_finished]
        settings = list(dict.fromkeys(run.setting for run in finished))
        for setting in settings:
            group = [run for run in finished if run.setting == setting]
            lines.append(joined(group_cells(row, names, group, with_paper)))
        if "" not in settings:
            begun = sum(not run.is_finished for run in runs.get(row.name, []))
            why = DATA[row.data].title if DATA[row.data].folder else ""
            state = f"{begun} begun" if begun else f"not run: needs {why}" if why else "not run"
            own = [f"{state}; `{command(row)}`", *([""] if with_paper else []), "", "", "", "", ""]
            lines.append(joined([row.name, *([papers(row, names)] if with_paper else []), *own]))
    return lines


def group_cells(row: Experiment, names: Sequence[str], group: Sequence[Outcome], with_paper: bool) -> list[str]:
    """A row's line: of the runs of one setting, finished ones."""
    values = {name: [run.numbers[name] for run in group if name in run.numbers] for name in names}
    differences = [
        "-"
        if row.paper.get(name) is None or not values[name]
        else f"{statistics.fmean(values[name]) - row.paper[name]:+.2f}"
        for name in names
    ]
    epochs = sorted({len(run.found.records) for run in group})
    commits = sorted({commit for run in group for commit in run.commits})
    return [
        row.name,
        *([papers(row, names)] if with_paper else []),
        " / ".join(mean_and_deviation(values[name]) for name in names),
        *([" / ".join(differences)] if with_paper else []),
        str(len(group)),
        ", ".join(map(str, epochs)),
        f"{statistics.fmean(run.seconds for run in group):.0f}",
        ", ".join(short_commit(commit) for commit in commits),
        group[0].setting,
    ]


def papers(row: Experiment, names: Sequence[str]) -> str:
    values = [row.paper.get(name) for name in names]
    return " / ".join("-" if v is None else f"{v:.1f}" if round(v, 1) == v else f"{v:.2f}" for v in values)


def short_commit(commit: str) -> str:
    name, plus, _ = commit.partition("+")
    return name[:9] + ("+" if plus else "")


def joined(row: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


# ---------------------------------------------------------------------------------------------------------------------
# Curves, and all files


def draw_curves(experiments: Sequence[Experiment], runs: dict[str, list[Outcome]], folder: Path) -> dict[str, str]:
    """A figure of each row that has runs: test accuracy over the epochs, a style for each setting, and the paper's
    numbers as lines. -> their paths, from the folder above"""
    drawn: dict[str, str] = {}
    for row in experiments:
        groups: dict[str, list[Any]] = {}
        for run in runs.get(row.name, []) if row.run_name == row.name else []:
            try:
                groups.setdefault(run.setting or "as the row says", []).append(read_run(run.found.folder))
            except DivideMixError as error:
                warn(f"no curve: {error}")
        if groups:

            def draw(axes: Any, row: Experiment = row, groups: dict[str, list[Any]] = groups) -> None:
                # Cross-entropy beside the paper's is net 1; the curves of Clothing1M are of its validation set.
                comparable = row.column == "test_acc" and row.script != "Train_clothing1M.py"
                for name, style in (("best", "--"), ("last", ":"), ("test_acc", "--")):
                    if comparable and row.paper.get(name) is not None:
                        axes.axhline(
                            row.paper[name], linestyle=style, color=figures.LINE, label=f"paper, {MEASURES[name]}"
                        )
                named = [(textwrap.shorten(each.replace("_", " "), 40), own) for each, own in groups.items()]
                figures.overlay(axes, named, None)
                axes.set_title(f"{row.name}: {axes.get_title()}", fontsize=11)

            figures.write_panels({row.name: draw}, folder)
            drawn[row.name] = f"{folder.name}/{row.name}.png"
    return drawn


def curves_or_warning(*args: Any) -> dict[str, str]:
    """As `draw_curves`: a figure must not lose the tables."""
    try:
        return draw_curves(*args)
    except Exception as error:
        warn(f"no curves: {error}")
        return {}


def write(
    experiments: Sequence[Experiment], out_dir: Path, command: Callable[[Experiment], str], with_curves: bool = True
) -> list[Path]:
    """Write results.csv, RESULTS.md and the curves of these rows into out_dir. -> the files. Raises DivideMixError."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        runs = {experiment.name: outcomes(experiment, out_dir) for experiment in experiments}
        curves = curves_or_warning(experiments, runs, out_dir / "curves") if with_curves else {}
        files = {
            "results.csv": results_csv([run for each in runs.values() for run in each]),
            "RESULTS.md": markdown(experiments, runs, command, curves).encode(),
        }
        for name, content in files.items():
            write_atomically(out_dir / name, content)
    except OSError as error:
        raise DivideMixError(f"--out_dir {out_dir}: cannot be written ({error.strerror}); choose another") from error
    return [out_dir / name for name in files]
