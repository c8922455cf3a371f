"""Which labels look wrong: label_issues.csv and cleaned_labels.csv, from what `scoring` left in the run folder.

cleanlab's CleanLearning takes label_issues.csv as it is:
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
_FEW, _NEARLY_ALL = 10, 0.95  # labels of a class, and the part of them that looks wrong, from which it is suspicious


@dataclass(frozen=True)
class LabelIssues:
    """N training samples with their labels, as arrays (N,)."""

    index: NDArray[np.int64]  # which of the data set's training samples they are
    paths: list[str] | None  # below the data folder, where the images are files; bytes that are no UTF-8 as \\x..
    given: NDArray[np.int64]
    suggested: NDArray[np.int64]  # both networks' prediction
    quality: NDArray[np.float64]
    is_issue: NDArray[np.bool_]
    loss: NDArray[np.float32]  # mean of both networks
    p_clean: list[NDArray[np.float64]]  # net 1's and, where there is one, net 2's; none of a cross-entropy run
    confidence: NDArray[np.float32]  # probability that both networks together give their prediction
    true: NDArray[np.int64] | None  # where it is known
    class_names: list[str]
    threshold: float  # of the quality
    epochs: int  # after how many the scores were made

    def __len__(self) -> int:
        return len(self.index)

    @property
    def cleaned(self) -> NDArray[np.int64]:
        """The corrected labels."""
        return np.where(self.is_issue, self.suggested, self.given)


@dataclass(frozen=True)
class Agreement:
    """The list against the truth, numbers of labels."""

    n: int
    wrong: int
    listed: int  # that are issues
    found: int  # issues that are wrong
    by_loss: int  # wrong ones of the `wrong` largest losses: what a ranking by loss finds when it is told how many
    wrong_after: int  # still, or newly, wrong when the suggestions are taken

    @property
    def precision(self) -> float | None:
        return self.found / self.listed if self.listed else None

    @property
    def recall(self) -> float | None:
        return self.found / self.wrong if self.wrong else None


# ---------------------------------------------------------------------------------------------------------------------
# Finding them


def find(run: RunFolder) -> LabelIssues | None:
    """None of a run that has no scores yet."""
    scores, labels = run.label_scores, run.labels
    if not (scores and labels):
        return None
    index = scores["index"]
    given = labels["list_given"][index]
    quality, is_issue, loss = label_quality(scores, given)
    # A run that goes on without some damaged images has other samples than the scores of its end before.
    is_known = "true" in labels and np.array_equal(labels["index"], index)
    paths = labels["list_path"][index].tolist() if "list_path" in labels else None
    return LabelIssues(
        index=index,
        paths=paths and [path.decode(errors="backslashreplace") for path in paths],
        given=given,
        suggested=scores["prediction"].astype(np.int64),
        quality=quality,
        is_issue=is_issue,
        loss=loss,
        p_clean=net_arrays(scores, "p_clean"),
        confidence=scores["confidence"],
        true=labels["true"] if is_known else None,
        class_names=run.class_names,
        threshold=float(scores["threshold"]),
        epochs=int(scores["epochs"]),
    )


def against_truth(issues: LabelIssues | None) -> Agreement | None:
    """None where the truth is unknown."""
    if issues is None or issues.true is None:
        return None
    wrong = issues.given != issues.true
    n_wrong = int(wrong.sum())
    by_loss = np.argsort(-issues.loss, kind="stable")[:n_wrong]
    return Agreement(
        n=len(issues),
        wrong=n_wrong,
        listed=int(issues.is_issue.sum()),
        found=int((issues.is_issue & wrong).sum()),
        by_loss=int(wrong[by_loss].sum()),
        wrong_after=int((issues.cleaned != issues.true).sum()),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Saying so


def by_class(issues: LabelIssues) -> list[tuple[str, int, int]]:
    """(given class, how many of its labels are issues, how many it has), those with the most issues first."""
    counts = pd.Series(issues.is_issue).groupby(issues.given).agg(["sum", "size"])
    counts = counts.sort_values("sum", ascending=False, kind="stable")
    return [(issues.class_names[c], few, many) for c, few, many in counts.itertuples()]


def lost_classes(issues: LabelIssues) -> list[str]:
    """A line for each class whose labels nearly all look wrong. One mixture is fitted to the losses of all classes: one
    that is harder to learn than the others, or rare, has the losses of wrong labels."""
    return [
        f"{printable(name)}: {few} of {many} labels look wrong, nearly all: more likely a class that "
        "the networks have not learned than so many errors; look at its images before you drop them"
        for name, few, many in by_class(issues)
        if many >= _FEW and few >= _NEARLY_ALL * many
    ]


def summary(issues: LabelIssues) -> list[str]:
    """What the list says, for the terminal."""
    lines = [f"labels: {issues.is_issue.sum()} of {len(issues)} look wrong ({issues.is_issue.mean():.1%}); {IN_SAMPLE}"]
    rows = [row for row in by_class(issues) if row[1]]
    shown = [f"{printable(name)}: {few} of {many}" for name, few, many in rows[:_CLASSES_SHOWN]]
    if rest := rows[_CLASSES_SHOWN:]:
        shown.append(f"{len(rest)} more classes: {sum(row[1] for row in rest)} of {sum(row[2] for row in rest)}")
    lines += [f"  by given class: {', '.join(shown)}"] if shown else []
    lines += [f"  {line}" for line in lost_classes(issues)[:_CLASSES_SHOWN]]
    if truth := against_truth(issues):
        lines.append(
            f"  against the truth: {truth.found} of the {truth.listed} listed are wrong (precision "
            f"{percent(truth.precision)}), of {truth.wrong} wrong ones (recall {percent(truth.recall)}); wrong labels "
            f"{truth.wrong / truth.n:.1%}, after the suggestions {truth.wrong_after / truth.n:.1%}"
        )
        if truth.wrong:
            share = f"{truth.by_loss} are wrong ({truth.by_loss / truth.wrong:.1%})"
            lines.append(f"  by loss alone: of the {truth.wrong} with the largest loss {share}")
    return lines


def percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.1%}"


def printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write(issues: LabelIssues, folder: Path) -> list[Path]:
    """label_issues.csv and cleaned_labels.csv. -> their paths"""
    tables = {"label_issues.csv": issues_table(issues), "cleaned_labels.csv": cleaned_table(issues)}
    for name, table in tables.items():
        write_atomically(folder / name, csv_bytes(table))
    return [folder / name for name in tables]


def issues_table(issues: LabelIssues) -> pd.DataFrame:
    """One row a sample."""
    p_clean = [*issues.p_clean, None, None]  # one column for each network, empty where there is none
    names = np.array(issues.class_names, dtype=object)
    columns = {"given_label": issues.given, "suggested_label": issues.suggested, "label_quality": issues.quality}
    columns |= {"is_label_issue": issues.is_issue, "loss": issues.loss}
    columns |= {"p_clean_net1": p_clean[0], "p_clean_net2": p_clean[1], "confidence": issues.confidence}
    columns |= {"given_class": texts(names[issues.given]), "suggested_class": texts(names[issues.suggested])}
    return table_of(issues, columns)


def cleaned_table(issues: LabelIssues) -> pd.DataFrame:
    """One row a sample: the corrected label, and what it was."""
    return table_of(issues, {"label": issues.cleaned, "was": issues.given})


def table_of(issues: LabelIssues, columns: dict[str, Any]) -> pd.DataFrame:
    """The columns behind those that say which sample a row is."""
    return pd.DataFrame({"index": issues.index} | ({"path": issues.paths} if issues.paths else {}) | columns)


def texts(values: Iterable[str]) -> pd.Series:
    """A column of names as they are: pandas' own type for text takes only what is Unicode."""
    return pd.Series(list(values), dtype=object)


# ---------------------------------------------------------------------------------------------------------------------
# The transition matrix: how often each class is given each label


def transition(actual: NDArray, given: NDArray, num_class: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(C, C) each, from labels (N,) each: samples of the class [row] that have the given label [column]; and
    P(given label | class), whose rows add up to 1, or are NaN for a class without samples."""
    counts = np.bincount(actual * num_class + given, minlength=num_class**2).reshape(num_class, num_class)
    with np.errstate(invalid="ignore"):
        return counts, counts / counts.sum(axis=1, keepdims=True)


def transition_table(run: RunFolder) -> pd.DataFrame | None:
    """transition.csv: one row for each true class c: true_label, true_class, samples; rate_0, rate_1 ..., which is
    P(given label 0 | c) and so on, empty where the class has no samples; count_0, count_1 ... None where the truth is
    not known."""
    if "true" not in run.labels:
        return None
    names = run.class_names
    counts, rates = transition(run.labels["true"], run.labels["given"], len(names))
    table = pd.DataFrame({"true_label": range(len(names)), "true_class": texts(names), "samples": counts.sum(axis=1)})
    return table.join([pd.DataFrame(rates.round(6)).add_prefix("rate_"), pd.DataFrame(counts).add_prefix("count_")])
