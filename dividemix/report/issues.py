"""Which labels look wrong: label_issues.csv and cleaned_labels.csv, made of the scores in the run folder.

cleanlab's CleanLearning reads label_issues.csv:
`CleanLearning(classifier).fit(X, labels, label_issues=pandas.read_csv("label_issues.csv"))`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dividemix.files import csv_bytes, write_atomically
from dividemix.run import RunFolder, label_quality, net_arrays

IN_SAMPLE = "scores are in-sample: the networks were trained on these labels"
_CLASSES_SHOWN = 10
_MIN_LABELS, _NEARLY_ALL = 10, 0.95  # a class of so many labels, of which this share looks wrong, was not learned


@dataclass(frozen=True)
class LabelIssues:
    """N training samples with their labels, as arrays (N,)."""

    index: NDArray[np.int64]  # positions in the data set's list of training samples
    paths: list[str] | None  # image files below the data folder; bytes that are not UTF-8 as \\x..
    given_labels: NDArray[np.int64]
    suggested_labels: NDArray[np.int64]  # both networks' prediction
    quality: NDArray[np.float64]  # from 0 to 1, see `run.label_quality`
    is_issue: NDArray[np.bool_]
    loss: NDArray[np.float32]  # mean of both networks
    p_clean: list[NDArray[np.float64]]  # of each network; none after plain cross-entropy
    confidence: NDArray[np.float32]  # both networks' probability of their prediction
    true_labels: NDArray[np.int64] | None  # None where they are unknown
    class_names: list[str]
    threshold: float  # labels of a lower quality can be issues
    epochs: int  # finished epochs when the scores were made

    def __len__(self) -> int:
        return len(self.index)

    @property
    def cleaned_labels(self) -> NDArray[np.int64]:
        """The given labels, with the suggestion in place of each issue."""
        return np.where(self.is_issue, self.suggested_labels, self.given_labels)


@dataclass(frozen=True)
class Agreement:
    """The list of issues compared with the true labels. All fields count labels."""

    n: int
    wrong: int  # of all n
    listed: int  # issues
    listed_wrong: int  # issues that are wrong
    by_loss: int  # wrong ones among the `wrong` largest losses: what a ranking by loss lists if told how many
    wrong_after: int  # of all n after the correction

    @property
    def precision(self) -> float | None:
        return self.listed_wrong / self.listed if self.listed else None

    @property
    def recall(self) -> float | None:
        return self.listed_wrong / self.wrong if self.wrong else None


# ---- The issues of a run ----


def find(run: RunFolder) -> LabelIssues | None:
    """The labels of a run with their scores; None where the run has no scores yet."""
    scores, labels = run.label_scores, run.labels
    if not (scores and labels):
        return None
    index = scores["index"]
    given_labels = labels["list_given"][index]
    quality, is_issue, loss = label_quality(scores, given_labels)
    # A run that continues without some damaged images has fewer samples than the scores of its earlier end.
    truth_fits = "true" in labels and np.array_equal(labels["index"], index)
    paths = labels["list_path"][index].tolist() if "list_path" in labels else None
    return LabelIssues(
        index=index,
        paths=paths and [path.decode(errors="backslashreplace") for path in paths],
        given_labels=given_labels,
        suggested_labels=scores["prediction"].astype(np.int64),
        quality=quality,
        is_issue=is_issue,
        loss=loss,
        p_clean=net_arrays(scores, "p_clean"),
        confidence=scores["confidence"],
        true_labels=labels["true"] if truth_fits else None,
        class_names=run.class_names,
        threshold=float(scores["threshold"]),
        epochs=int(scores["epochs"]),
    )


def against_truth(issues: LabelIssues | None) -> Agreement | None:
    """None where the true labels are unknown."""
    if issues is None or issues.true_labels is None:
        return None
    wrong = issues.given_labels != issues.true_labels
    n_wrong = int(wrong.sum())
    by_loss = np.argsort(-issues.loss, kind="stable")[:n_wrong]
    return Agreement(
        n=len(issues),
        wrong=n_wrong,
        listed=int(issues.is_issue.sum()),
        listed_wrong=int((issues.is_issue & wrong).sum()),
        by_loss=int(wrong[by_loss].sum()),
        wrong_after=int((issues.cleaned_labels != issues.true_labels).sum()),
    )


# ---- For the terminal and the page ----


def by_class(issues: LabelIssues) -> list[tuple[str, int, int]]:
    """(given class, number of issues, number of labels), classes with the most issues first."""
    counts = pd.Series(issues.is_issue).groupby(issues.given_labels).agg(["sum", "size"])
    counts = counts.sort_values("sum", ascending=False, kind="stable")
    return [(issues.class_names[c], n_issues, n_labels) for c, n_issues, n_labels in counts.itertuples()]


def unlearned_classes(issues: LabelIssues) -> str:
    """A line that names the classes whose labels nearly all look wrong; empty without such a class. One mixture is
    fitted to the losses of all classes: a rare class, or one that is hard to learn, has losses as of wrong labels."""
    rows = [row for row in by_class(issues) if row[2] >= _MIN_LABELS and row[1] >= _NEARLY_ALL * row[2]]
    classes = "this class" if len(rows) == 1 else "these classes"
    advice = f"probably the networks have not learned {classes}; look at the images before you drop them"
    return f"nearly all labels of {named_counts(rows)} look wrong: {advice}" if rows else ""


def named_counts(rows: list[tuple[str, int, int]]) -> str:
    """Rows of `by_class` in words: the first ten by name, the others together."""
    shown = [f"{printable(name)} ({n_issues} of {n_labels})" for name, n_issues, n_labels in rows[:_CLASSES_SHOWN]]
    if remaining := rows[_CLASSES_SHOWN:]:
        n_issues, n_labels = (sum(row[column] for row in remaining) for column in (1, 2))
        shown.append(f"{len(remaining)} more classes ({n_issues} of {n_labels})")
    return ", ".join(shown)


def summary(issues: LabelIssues) -> list[str]:
    """Lines for the terminal."""
    lines = [f"labels: {issues.is_issue.sum()} of {len(issues)} look wrong ({issues.is_issue.mean():.1%}); {IN_SAMPLE}"]
    rows, warning = [row for row in by_class(issues) if row[1]], unlearned_classes(issues)
    lines += [f"  by given class: {named_counts(rows)}"] if rows else []
    lines += [f"  {warning}"] if warning else []
    if truth := against_truth(issues):
        lines.append(
            f"  against the truth: {truth.listed_wrong} of the {truth.listed} listed labels are wrong (precision "
            f"{percent(truth.precision)}), of {truth.wrong} wrong labels in all (recall {percent(truth.recall)}); "
            f"wrong labels: {truth.wrong / truth.n:.1%} as given, {truth.wrong_after / truth.n:.1%} as corrected"
        )
        if truth.wrong:
            share = f"{truth.by_loss} of the {truth.wrong} labels with the largest losses"
            lines.append(f"  by loss alone: {share} are wrong ({truth.by_loss / truth.wrong:.1%})")
    return lines


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


# ---- Files ----


def write(issues: LabelIssues, folder: Path) -> list[Path]:
    """label_issues.csv and cleaned_labels.csv. -> their paths"""
    tables = {"label_issues.csv": issues_table(issues), "cleaned_labels.csv": cleaned_table(issues)}
    for name, table in tables.items():
        write_atomically(folder / name, csv_bytes(table))
    return [folder / name for name in tables]


def issues_table(issues: LabelIssues) -> pd.DataFrame:
    """label_issues.csv, one row a sample. The column of a network that the run does not have is empty."""
    p_clean = [*issues.p_clean, None, None]
    names = np.array(issues.class_names, dtype=object)
    columns = {"given_label": issues.given_labels, "suggested_label": issues.suggested_labels}
    columns |= {"label_quality": issues.quality, "is_label_issue": issues.is_issue, "loss": issues.loss}
    columns |= {"p_clean_net1": p_clean[0], "p_clean_net2": p_clean[1], "confidence": issues.confidence}
    classes = [texts(names[labels]) for labels in (issues.given_labels, issues.suggested_labels)]
    columns |= dict(zip(("given_class", "suggested_class"), classes, strict=True))
    return table_of(issues, columns)


def cleaned_table(issues: LabelIssues) -> pd.DataFrame:
    """cleaned_labels.csv, one row a sample: the corrected label, and the given one."""
    return table_of(issues, {"label": issues.cleaned_labels, "was": issues.given_labels})


def table_of(issues: LabelIssues, columns: dict[str, Any]) -> pd.DataFrame:
    """These columns, after the index and the path of each sample."""
    return pd.DataFrame({"index": issues.index} | ({"path": issues.paths} if issues.paths else {}) | columns)


def texts(values: Iterable[str]) -> pd.Series:
    """A column of names, which may hold what is not Unicode: pandas' own type for text refuses that."""
    return pd.Series(list(values), dtype=object)


# ---- The noise transition matrix: how often each class is given each label ----


def transition(true_labels: NDArray, given_labels: NDArray, num_class: int) -> tuple[NDArray, NDArray]:
    """Counts and P(given label [column] | true class [row]), (C, C) each, of labels (N,). A row of the second adds up
    to 1, or is NaN for a class without samples."""
    counts = np.zeros((num_class, num_class), np.int64)
    np.add.at(counts, (true_labels, given_labels), 1)
    with np.errstate(invalid="ignore"):
        return counts, counts / counts.sum(axis=1, keepdims=True)


def transition_table(run: RunFolder) -> pd.DataFrame | None:
    """transition.csv, one row for each true class c: true_label, true_class, samples; rate_0, rate_1, ..., which are
    P(given label 0 | c) and so on, empty for a class without samples; count_0, count_1, ... None where the true labels
    are unknown."""
    if "true" not in run.labels:
        return None
    names = run.class_names
    counts, rates = transition(run.labels["true"], run.labels["given"], len(names))
    table = pd.DataFrame({"true_label": range(len(names)), "true_class": texts(names), "samples": counts.sum(axis=1)})
    return table.join([pd.DataFrame(rates.round(6)).add_prefix("rate_"), pd.DataFrame(counts).add_prefix("count_")])
