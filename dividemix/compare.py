"""Several runs: which of them differ in their seed alone, mean and spread of each such group, and the page that sets
them side by side."""

import hashlib
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dividemix.html_report import number, numbers
from dividemix.label_issues import Agreement, percent
from dividemix.page import page, paragraph, png_figure, section, table
from dividemix.run import FREE_FLAGS
from dividemix.runfolder import RunFolder

_SEEDS = frozenset(["seed", "noise_seed", "id"])
_LABELS = frozenset(["noise_file"])  # may change between two starts of a run, which sees to it that its labels do not
Group = tuple[str, list[RunFolder]]  # its name, the runs


def group_by_setting(runs: Sequence[RunFolder]) -> list[Group]:
    """Runs whose settings differ in nothing but the seed together, in the order given. A group has the name of its
    first run, without the seed."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(repr(sorted(setting(run).items())), []).append(run)
    names = distinct([group[0].path for group in groups.values()])
    return [
        (name if len(group) == 1 else without_seed(name), group)
        for name, group in zip(names, groups.values(), strict=True)
    ]


def distinct(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders that they are in as tell one from the others."""
    parts = [path.resolve().parts for path in paths]

    def name(own: tuple[str, ...]) -> str:
        others = [other for other in parts if other != own]
        n = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        return "/".join(own[-n:])

    return list(map(name, parts))


def setting(run: RunFolder) -> dict[str, str]:
    """The flags that decide what is computed, but for the seeds; how long it trained counts, and on which labels, where
    no seed makes these."""
    given = {k: v for k, v in run.args.items() if k not in (FREE_FLAGS | _SEEDS) - _LABELS}
    # A recipe's 25 is a flag's 25.0.
    flags = {k: str(int(v) if isinstance(v, float) and v.is_integer() else v) for k, v in given.items()}
    if {"list_path", "list_given"} <= run.labels.keys():
        paths, labels = (np.ascontiguousarray(run.labels[name]).tobytes() for name in ("list_path", "list_given"))
        flags["images and labels"] = hashlib.sha256(paths + labels).hexdigest()[:12]
    return flags | {"epochs": str(len(run.records))}


def without_seed(name: str) -> str:
    return re.sub(r"_seed\d+", "", name)


def differing(groups: Sequence[Group]) -> list[list[str]]:
    """Rows (flag, its value in each group) of the flags in which the groups differ."""
    settings = [setting(group[0]) for _, group in groups]
    names = sorted({name for each in settings for name in each})
    rows = [[name, *(each.get(name, "-") for each in settings)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def run_rows(runs: Sequence[RunFolder], agreements: Sequence[Agreement | None]) -> list[tuple[str, ...]]:
    """A head and one row a run. Where the truth is known: how many of the wrong labels the run lists, how many of those
    listed are wrong, and how many of the largest losses are, as many as there are wrong labels."""
    listed = ("wrong labels listed", "of those listed, wrong", "of the largest losses, wrong")
    validated = ["validation, peak"] if any(run.measured == "val_acc" for run in runs) else []
    rows = [("run", "epochs", "best", "last epoch", "last 10", *validated, "AUC net 1/2", *listed)]
    for name, run, found in zip(distinct([run.path for run in runs]), runs, agreements, strict=True):
        last = run.records[-1]
        peak = [peak_validation(run)] if validated else []
        accuracy = [number(value) for value in (run.best, last.get("test_acc"), last.get("last10_acc"), *peak)]
        both = [number(last.get(f"auc_net{k}"), ".3f") for k in run.nets]
        auc = "-" if set(both) == {"-"} else "/".join(both)
        pairs = [(found.found, found.wrong), (found.found, found.listed), (found.by_loss, found.wrong)] if found else []
        cells = [f"{a} of {b} ({percent(a / b)})" if b else "-" for a, b in pairs] or ["-"] * 3
        rows.append((name, str(len(run.records)), *accuracy, auc, *cells))
    return rows


def spread_rows(groups: Sequence[Group], agreements: dict[Path, Agreement | None]) -> list[tuple[str, ...]]:
    """A head and one row a group: mean and, of several seeds, standard deviation over them (n - 1)."""

    def auc(run: RunFolder) -> float | None:
        both = [run.records[-1].get(f"auc_net{k}") for k in run.nets]
        return sum(both) / len(both) if all(isinstance(value, int | float) for value in both) else None

    def of_list(name: str) -> Callable[[RunFolder], float | None]:
        def value(run: RunFolder) -> float | None:
            found = agreements.get(run.path)
            part = getattr(found, name) if found else None
            return None if part is None else 100 * part

        return value

    columns: dict[str, tuple[Callable[[RunFolder], float | None], str]] = {
        "best": (lambda run: run.best, ".2f"),
        "last epoch": (lambda run: run.records[-1].get("test_acc"), ".2f"),
        "last 10": (lambda run: run.records[-1].get("last10_acc"), ".2f"),
        "AUC, mean of nets": (auc, ".4f"),
        "precision of the list, %": (of_list("precision"), ".1f"),
        "recall of the list, %": (of_list("recall"), ".1f"),
    }
    if any(run.measured == "val_acc" for _, runs in groups for run in runs):
        columns["validation, peak"] = (peak_validation, ".2f")
    rows = [("setting", "seeds", *columns)]
    for name, runs in groups:
        cells = [mean_and_spread([value(run) for run in runs], form) for value, form in columns.values()]
        rows.append((name, str(len(runs)), *cells))
    return rows


def peak_validation(run: RunFolder) -> float | None:
    return max(numbers(run, "val_acc"), default=None)


def mean_and_spread(values: Sequence[float | None], form: str) -> str:
    """'mean ± standard deviation', without the latter for one value; '-' where not every run has one."""
    if any(not isinstance(value, int | float) for value in values):
        return "-"
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


# ---------------------------------------------------------------------------------------------------------------------
# The page


def comparison_page(groups: Sequence[Group], agreements: dict[Path, Agreement | None], figures: dict[str, Path]) -> str:
    runs = [run for _, group in groups for run in group]
    images = [png_figure(path.read_bytes(), name.replace("_", " ")) for name, path in figures.items()]
    several = any(len(group) > 1 for _, group in groups)
    spread = "Mean ± standard deviation over the seeds (n - 1)." if several else "No two runs differ in the seed alone."
    differ = differing(groups)
    body = [
        f"<h1>{len(runs)} runs</h1>",
        section("Settings", paragraph(spread, dim=True), table(spread_rows(groups, agreements))),
        section("Curves", f'<div class="figures">{"".join(images)}</div>'),
        section(
            "Runs",
            paragraph("Labels: where the truth is known. Scores are in-sample.", dim=True),
            table(run_rows(runs, [agreements.get(run.path) for run in runs])),
        ),
        section("Where the settings differ", table([("flag", *(name for name, _ in groups)), *differ]))
        if differ
        else "",
    ]
    return page(f"{len(runs)} runs: DivideMix report", "\n".join(body))
