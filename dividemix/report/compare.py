"""The report of several runs: groups of runs that differ only in their seed, mean and standard deviation of each group,
and the page that compares them."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from dividemix.report.issues import Agreement, LabelIssues, against_truth
from dividemix.report.page import auc_of_nets, beside_paper, number, render
from dividemix.run import FREE_FLAGS, RunFolder

Group = tuple[str, list[RunFolder]]  # name, runs that differ only in their seed
Lists = Mapping[Path, LabelIssues | None]  # by run folder: which of its labels look wrong; None without scores

# noise_file is free because a run may continue with another file of the same labels; of two runs it is a setting.
_NO_SETTING = (FREE_FLAGS | {"seed", "noise_seed", "id"}) - {"noise_file"}
_VALIDATION = "best validation"
_LIST_QUALITY = ("labels that look wrong", "recall of the list", "precision of the list")
_FORMS = {"AUC, mean of nets": ".4f"} | dict.fromkeys((f"{name}, %" for name in _LIST_QUALITY), ".1f")


def group_by_setting(runs: Sequence[RunFolder]) -> list[Group]:
    """Groups of runs that differ only in their seed, in the order of `runs`. A group of several runs has the name of
    its first run, without the seed."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(repr(sorted(setting(run).items())), []).append(run)
    names = distinct_names([group[0].path for group in groups.values()])
    return [
        (name if len(group) == 1 else re.sub(r"_seed\d+", "", name), group)
        for name, group in zip(names, groups.values(), strict=True)
    ]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, each with as many of its parent folders as make it differ from the others."""
    folders = [path.resolve().parts for path in paths]

    def name(folder: tuple[str, ...]) -> str:
        others = [another for another in folders if another != folder]
        n = next(n for n in range(1, len(folder) + 1) if all(another[-n:] != folder[-n:] for another in others))
        return "/".join(folder[-n:])

    return list(map(name, folders))


def setting(run: RunFolder) -> dict[str, str]:
    """All that decides the result, except the seeds: flags, number of epochs and, where no seed makes the noise, the
    images and labels."""
    # 25 of a recipe equals 25.0 of a flag.
    flags = {k: str(v).removesuffix(".0") for k, v in run.args.items() if k not in _NO_SETTING}
    flags |= {"images and labels": run.labels_digest} if "list_path" in run.labels else {}
    return flags | {"epochs": str(len(run.records))}


def differing_flags(groups: Sequence[Group]) -> list[list[str]]:
    """Rows (flag, its value in each group) of the flags that are not equal in all groups."""
    settings = [setting(group[0]) for _, group in groups]
    rows = [[name, *(values.get(name, "-") for values in settings)] for name in sorted(set().union(*settings))]
    return [row for row in rows if len(set(row[1:])) > 1]


def run_table(runs: Sequence[RunFolder], lists: Lists) -> pd.DataFrame:
    """One row a run, with the number of labels that look wrong. Where the true labels are known: recall and precision
    of this list."""
    rows = []
    for name, run in zip(distinct_names([run.path for run in runs]), runs, strict=True):
        issues = lists.get(run.path)
        truth = against_truth(issues) or Agreement(0, 0, 0, 0, 0)
        listed = (int(issues.is_issue.sum()), len(issues)) if issues else (0, 0)
        counts = listed, (truth.listed_wrong, truth.wrong), (truth.listed_wrong, truth.listed)
        quality = [f"{a} of {b} ({a / b:.1%})" if b else "-" for a, b in counts]
        row = {"run": name, "epochs": str(len(run.records))}
        row |= {column: number(value) for column, value in accuracies(run).items()}
        rows.append(row | {"AUC net 1/2": auc_of_nets(run)} | dict(zip(_LIST_QUALITY, quality, strict=True)))
    return table_of(rows, runs)


def spread_table(groups: Sequence[Group], lists: Lists) -> pd.DataFrame:
    """One row a group: mean and, of several seeds, sample standard deviation (n - 1)."""
    rows = []
    for name, runs in groups:
        values = pd.DataFrame([measures(run, lists.get(run.path)) for run in runs], dtype=float)
        cells = {column: mean_and_deviation(values[column], _FORMS.get(column, ".2f")) for column in values}
        rows.append({"setting": name, "seeds": str(len(runs))} | cells)
    return table_of(rows, [run for _, runs in groups for run in runs])


def table_of(rows: list[dict[str, str]], runs: Sequence[RunFolder]) -> pd.DataFrame:
    """Without the column of validation accuracy where no run is measured by it."""
    is_validated = any(run.measured == "val_acc" for run in runs)
    return pd.DataFrame(rows).drop(columns=[] if is_validated else _VALIDATION)


def measures(run: RunFolder, issues: LabelIssues | None) -> dict[str, float | None]:
    """The numbers of a run that are averaged over seeds; None or NaN where it lacks one."""
    truth = against_truth(issues)
    aucs = pd.Series([run.records[-1].get(f"auc_net{k}") for k in run.nets], dtype=float)
    return accuracies(run) | {
        "AUC, mean of nets": aucs.mean(skipna=False),
        "labels that look wrong, %": None if issues is None else 100 * issues.is_issue.mean(),
        "precision of the list, %": truth and truth.precision and 100 * truth.precision,
        "recall of the list, %": truth and truth.recall and 100 * truth.recall,
    }


def accuracies(run: RunFolder) -> dict[str, float | None]:
    last = run.last_record
    values = {"best": run.best, "last epoch": last.get("test_acc"), "last 10": last.get("last10_acc")}
    return values | {_VALIDATION: run.best_validation}


def mean_and_deviation(values: Sequence[float] | pd.Series, form: str = ".2f") -> str:
    """'94.55 ± 0.12' with the sample standard deviation (n - 1), '94.55' of one value, '-' where a value is missing."""
    values = np.asarray(values, float)
    if not len(values) or np.isnan(values).any():
        return "-"
    mean = format(values.mean(), form)
    return mean if len(values) == 1 else f"{mean} ± {format(values.std(ddof=1), form)}"


def console_table(table: pd.DataFrame) -> str:
    """A table for the terminal, its columns two spaces apart."""
    widths = {name: 1 + max(map(len, [name, *table[name]])) for name in table.columns[1:]}
    table = table.set_index(table.columns[0]).rename_axis(index=None, columns=table.columns[0])
    return table.to_string(col_space=widths)


def other_validation(groups: Sequence[Group]) -> str:
    """A sentence if groups were validated on held-out images of lists with other labels; else ''. Seeds of one setting
    may have other labels each, if other groups have the same."""
    digests = [{run.labels_digest for run in runs if len(run.labels.get("held_out", ()))} for _, runs in groups]
    if all(a & b for a, b in combinations(filter(None, digests), 2)):
        return ""
    return (
        "The validation labels differ between runs: held-out images have the labels of their run's own list. So their "
        "validation accuracies cannot be compared; compare on test images."
    )


def comparison_page(groups: Sequence[Group], lists: Lists, figures: dict[str, Path]) -> bytes:
    """The HTML file of several runs. figures: the PNG files of `figures.draw_comparison`, by name."""
    runs = [run for _, group in groups for run in group]
    return render(
        "report.html.jinja",
        figures,
        title=f"{len(runs)} runs",
        groups=[(name, beside_paper(group[0])[1]) for name, group in groups],
        several_seeds=any(len(group) > 1 for _, group in groups),
        spread=spread_table(groups, lists),
        rows=run_table(runs, lists),
        other_validation=other_validation(groups),
        differing=differing_flags(groups),
    )
