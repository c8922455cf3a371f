"""Several runs: which of them differ in their seed alone, mean and spread of each such group, and the page that sets
them side by side."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dividemix import recipes
from dividemix.label_issues import Agreement, percent
from dividemix.page import number, render
from dividemix.run import FREE_FLAGS
from dividemix.runfolder import RunFolder

if TYPE_CHECKING:
    from pandas import DataFrame, Series

_SEEDS = frozenset(["seed", "noise_seed", "id"])
_LABELS = frozenset(["noise_file"])  # may change between two starts of a run, which sees to it that its labels do not
_LISTED = ("wrong labels listed", "of those listed, wrong", "of the largest losses, wrong")
_FORMS = {"AUC, mean of nets": ".4f", "precision of the list, %": ".1f", "recall of the list, %": ".1f"}
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


def run_table(runs: Sequence[RunFolder], agreements: dict[Path, Agreement | None]) -> "DataFrame":
    """One row a run. Where the truth is known: how many of the wrong labels the run lists, how many of those listed are
    wrong, and how many of the largest losses are, as many as there are wrong labels."""
    import pandas

    rows = []
    for name, run in zip(distinct([run.path for run in runs]), runs, strict=True):
        last, found = run.records[-1], agreements.get(run.path)
        both = [number(last.get(f"auc_net{k}"), ".3f") for k in run.nets]
        pairs = [(found.found, found.wrong), (found.found, found.listed), (found.by_loss, found.wrong)] if found else []
        cells = [f"{a} of {b} ({percent(a / b)})" if b else "-" for a, b in pairs] or ["-"] * 3
        listed = dict(zip(_LISTED, cells, strict=True))
        rows.append(
            {
                "run": name,
                "epochs": str(len(run.records)),
                "best": number(run.best),
                "last epoch": number(last.get("test_acc")),
                "last 10": number(last.get("last10_acc")),
                "validation, peak": number(peak_validation(run)),
                "AUC net 1/2": "-" if set(both) == {"-"} else "/".join(both),
            }
            | listed
        )
    validated = any(run.measured == "val_acc" for run in runs)
    return pandas.DataFrame(rows).drop(columns=[] if validated else "validation, peak")


def spread_table(groups: Sequence[Group], agreements: dict[Path, Agreement | None]) -> "DataFrame":
    """One row a group: mean and, of several seeds, standard deviation over them (n - 1)."""
    import pandas

    rows = []
    for name, runs in groups:
        values = pandas.DataFrame([measures(run, agreements.get(run.path)) for run in runs], dtype=float)
        cells = {column: mean_and_deviation(values[column], _FORMS.get(column, ".2f")) for column in values}
        rows.append({"setting": name, "seeds": str(len(runs))} | cells)
    validated = any(run.measured == "val_acc" for _, runs in groups for run in runs)
    return pandas.DataFrame(rows).drop(columns=[] if validated else "validation, peak")


def measures(run: RunFolder, found: Agreement | None) -> dict[str, float | None]:
    """The numbers of a run that have a mean over seeds; None for what it lacks."""
    aucs = [run.records[-1].get(f"auc_net{k}") for k in run.nets]
    return {
        "best": run.best,
        "last epoch": run.records[-1].get("test_acc"),
        "last 10": run.records[-1].get("last10_acc"),
        "AUC, mean of nets": None if None in aucs else sum(aucs) / len(aucs),
        "precision of the list, %": found and found.precision and 100 * found.precision,
        "recall of the list, %": found and found.recall and 100 * found.recall,
        "validation, peak": peak_validation(run),
    }


def peak_validation(run: RunFolder) -> float | None:
    return max(run.numbers("val_acc"), default=None)


def mean_and_deviation(values: "Sequence[float] | Series", form: str = ".2f") -> str:
    """'94.55 ± 0.12', the standard deviation with n - 1; of one value without it; '-' where one is lacking (NaN)."""
    values = np.asarray(values, float)
    if not len(values) or np.isnan(values).any():
        return "-"
    mean = format(values.mean(), form)
    return mean if len(values) == 1 else f"{mean} ± {format(values.std(ddof=1), form)}"


def aligned(table: "DataFrame") -> str:
    """A table for the terminal."""
    return table.set_index(table.columns[0]).rename_axis(index=None, columns=table.columns[0]).to_string()


# ---------------------------------------------------------------------------------------------------------------------
# The page


def comparison_page(
    groups: Sequence[Group], agreements: dict[Path, Agreement | None], figures: dict[str, Path]
) -> bytes:
    runs = [run for _, group in groups for run in group]
    paper = {name: recipes.in_paper(group[0].script, group[0].args)[0] for name, group in groups}
    return render(
        figures,
        name_of_all=f"{len(runs)} runs",
        groups=[(name, recipes.setting_differences(group[0].args, paper[name])) for name, group in groups],
        several_seeds=any(len(group) > 1 for _, group in groups),
        spread=spread_table(groups, agreements),
        rows=run_table(runs, agreements),
        differing=differing(groups),
    )
