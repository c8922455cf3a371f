"""Several runs: which of them differ in their seed alone, mean and spread of each such group, and the page that sets
them side by side."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dividemix.report.issues import Agreement
from dividemix.report.page import auc_of_nets, beside_paper, number, render
from dividemix.run import FREE_FLAGS, RunFolder

Group = tuple[str, list[RunFolder]]  # its name, the runs
Agreements = dict[Path, Agreement | None]  # by run folder

# noise_file may change between two starts of a run, which sees to it that its labels do not.
_NO_SETTING = (FREE_FLAGS | {"seed", "noise_seed", "id"}) - {"noise_file"}
_VALIDATION = "validation, peak"
_LISTED = ("wrong labels listed", "of those listed, wrong", "of the largest losses, wrong")
_FORMS = {"AUC, mean of nets": ".4f", "precision of the list, %": ".1f", "recall of the list, %": ".1f"}


def group_by_setting(runs: Sequence[RunFolder]) -> list[Group]:
    """Runs whose settings differ in nothing but the seed together, in the order given. A group has the name of its
    first run, without the seed."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(repr(sorted(setting(run).items())), []).append(run)
    names = distinct([group[0].path for group in groups.values()])
    return [
        (name if len(group) == 1 else re.sub(r"_seed\d+", "", name), group)
        for name, group in zip(names, groups.values(), strict=True)
    ]


def distinct(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders that they are in as tell one from the others."""
    folders = [path.resolve().parts for path in paths]

    def name(parts: tuple[str, ...]) -> str:
        others = [folder for folder in folders if folder != parts]
        n = next(n for n in range(1, len(parts) + 1) if all(folder[-n:] != parts[-n:] for folder in others))
        return "/".join(parts[-n:])

    return list(map(name, folders))


def setting(run: RunFolder) -> dict[str, str]:
    """The flags that decide what is computed, but for the seeds; how long it trained counts, and on which labels, where
    no seed makes these."""
    # A recipe's 25 is a flag's 25.0.
    flags = {k: str(v).removesuffix(".0") for k, v in run.args.items() if k not in _NO_SETTING}
    if "list_path" in run.labels:
        content = b"".join(run.labels[name].tobytes() for name in ("list_path", "list_given"))
        flags["images and labels"] = hashlib.sha256(content).hexdigest()[:12]
    return flags | {"epochs": str(len(run.records))}


def differing(groups: Sequence[Group]) -> list[list[str]]:
    """Rows (flag, its value in each group) of the flags in which the groups differ."""
    settings = [setting(group[0]) for _, group in groups]
    rows = [[name, *(values.get(name, "-") for values in settings)] for name in sorted(set().union(*settings))]
    return [row for row in rows if len(set(row[1:])) > 1]


def run_table(runs: Sequence[RunFolder], agreements: Agreements) -> pd.DataFrame:
    """One row a run. Where the truth is known: how many of the wrong labels the run lists, how many of those listed are
    wrong, and how many of the largest losses are, as many as there are wrong labels."""
    rows = []
    for name, run in zip(distinct([run.path for run in runs]), runs, strict=True):
        truth = agreements.get(run.path)
        pairs = [(truth.found, truth.wrong), (truth.found, truth.listed), (truth.by_loss, truth.wrong)] if truth else []
        listed = [f"{a} of {b} ({a / b:.1%})" if b else "-" for a, b in pairs] or ["-"] * 3
        row = {"run": name, "epochs": str(len(run.records))}
        row |= {column: number(value) for column, value in accuracies(run).items()}
        rows.append(row | {"AUC net 1/2": auc_of_nets(run)} | dict(zip(_LISTED, listed, strict=True)))
    return table_of(rows, runs)


def spread_table(groups: Sequence[Group], agreements: Agreements) -> pd.DataFrame:
    """One row a group: mean and, of several seeds, standard deviation over them (n - 1)."""
    rows = []
    for name, runs in groups:
        values = pd.DataFrame([measures(run, agreements.get(run.path)) for run in runs], dtype=float)
        cells = {column: mean_and_deviation(values[column], _FORMS.get(column, ".2f")) for column in values}
        rows.append({"setting": name, "seeds": str(len(runs))} | cells)
    return table_of(rows, [run for _, runs in groups for run in runs])


def table_of(rows: list[dict[str, str]], runs: Sequence[RunFolder]) -> pd.DataFrame:
    """Without the validation accuracy where the epochs of all runs are tested."""
    is_validated = any(run.measured == "val_acc" for run in runs)
    return pd.DataFrame(rows).drop(columns=[] if is_validated else _VALIDATION)


def measures(run: RunFolder, truth: Agreement | None) -> dict[str, float | None]:
    """The numbers of a run that have a mean over seeds; None or NaN for what it lacks."""
    aucs = pd.Series([run.records[-1].get(f"auc_net{k}") for k in run.nets], dtype=float)
    return accuracies(run) | {
        "AUC, mean of nets": aucs.mean(skipna=False),
        "precision of the list, %": truth and truth.precision and 100 * truth.precision,
        "recall of the list, %": truth and truth.recall and 100 * truth.recall,
    }


def accuracies(run: RunFolder) -> dict[str, float | None]:
    last = run.records[-1]
    values = {"best": run.best, "last epoch": last.get("test_acc"), "last 10": last.get("last10_acc")}
    return values | {_VALIDATION: max(run.numbers("val_acc"), default=None)}


def mean_and_deviation(values: Sequence[float] | pd.Series, form: str = ".2f") -> str:
    """'94.55 ± 0.12', the standard deviation with n - 1; of one value without it; '-' where one is lacking (NaN)."""
    values = np.asarray(values, float)
    if not len(values) or np.isnan(values).any():
        return "-"
    mean = format(values.mean(), form)
    return mean if len(values) == 1 else f"{mean} ± {format(values.std(ddof=1), form)}"


def aligned(table: pd.DataFrame) -> str:
    """A table for the terminal."""
    return table.set_index(table.columns[0]).rename_axis(index=None, columns=table.columns[0]).to_string()


def comparison_page(groups: Sequence[Group], agreements: Agreements, figures: dict[str, Path]) -> bytes:
    runs = [run for _, group in groups for run in group]
    return render(
        figures,
        name_of_all=f"{len(runs)} runs",
        groups=[(name, beside_paper(group[0])[1]) for name, group in groups],
        several_seeds=any(len(group) > 1 for _, group in groups),
        spread=spread_table(groups, agreements),
        rows=run_table(runs, agreements),
        differing=differing(groups),
    )
