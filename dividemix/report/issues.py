"""Which labels look wrong: label_issues.csv, suspects.csv and cleaned_labels.csv, made of the scores in the run folder.

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

from dividemix.data import printable
from dividemix.files import csv_bytes, write_atomically
from dividemix.run import (
    RunFolder,
    borderline,
    doubtful,
    failures,
    net_arrays,
    quality_by_split,
    rank_by_split,
    worst_first,
)

IN_SAMPLE = "scores are in-sample: the networks were trained on these labels"
_CLASSES_SHOWN = 10
# A class of at least _MIN_LABELS labels may be lost (the networks have not learned it) where _NEARLY_ALL of them look
# wrong, or most of them and _FAR_MORE times the share of the other classes
_MIN_LABELS, _NEARLY_ALL, _MOST, _FAR_MORE = 10, 0.95, 0.5, 2


@dataclass(frozen=True)
class LabelIssues:
    """N training samples with their labels, as arrays (N,), by rising index."""

    index: NDArray[np.int64]  # positions in the data set's list of training samples
    held_out: NDArray[np.bool_]  # not trained on, but used to choose the best epoch
    paths: list[str] | None  # image files below the data folder; bytes that are not UTF-8 as \\x..
    duplicate_of: NDArray[np.int64]  # index of the first training sample with the same pixels; -1 without an equal
    given_labels: NDArray[np.int64]
    suggested_labels: NDArray[np.int64]  # the class with the largest mean probability
    quality: NDArray[np.float64]  # from 0 to 1, see `run.label_quality`
    is_issue: NDArray[np.bool_]
    loss: NDArray[np.float32]  # mean of both networks
    p_clean: list[NDArray[np.float64]]  # of each network, NaN for held-out samples; none after plain cross-entropy
    confidence: NDArray[np.float32]  # mean probability of the suggested class
    true_labels: NDArray[np.int64] | None  # None where they are unknown
    class_names: list[str]
    wrong_share: float  # estimated share of wrong labels, and the standard error of the estimate
    wrong_share_error: float
    failures: list[str]  # why nothing here means anything; empty for a usable list
    relabelled: bool  # whether --labels or --corrections replaced labels
    epochs: int  # finished epochs when the scores were made

    def __len__(self) -> int:
        return len(self.index)

    @property
    def cleaned_labels(self) -> NDArray[np.int64]:
        """The given labels, with the suggestion in place of each issue."""
        return np.where(self.is_issue, self.suggested_labels, self.given_labels)

    def name_of_first(self, row: int) -> str:
        """The path (index, where there are no paths) of the first sample with the same pixels; '' without an equal."""
        first = np.searchsorted(self.index, self.duplicate_of[row])
        return "" if self.duplicate_of[row] < 0 else self.paths[first] if self.paths else str(self.index[first])

    @property
    def conflicts(self) -> dict[str, list[int]]:
        """The samples that are there under different labels: name of the first -> their rows."""
        rows = pd.Series(range(len(self))).groupby(self.duplicate_of).agg(list).drop(-1, errors="ignore")
        rows = [group for group in rows if len(np.unique(self.given_labels[group])) > 1]
        return {self.name_of_first(group[0]): group for group in rows}

    @property
    def rank(self) -> NDArray[np.int64]:
        """The place of each label among those of its split: 1 for the most doubtful; issues come before others."""
        return rank_by_split(self.quality, self.is_issue, self.held_out)

    @property
    def worst(self) -> NDArray[np.int64]:
        """The rows, most doubtful first."""
        return worst_first(self.quality, self.is_issue, self.held_out)

    @property
    def doubtful(self) -> NDArray[np.int64]:
        """The rows to look at: the issues, then the most doubtful of the others."""
        return doubtful(self.worst, self.is_issue)

    @property
    def borderline(self) -> NDArray[np.int64]:
        """The rows on both sides of the end of the list."""
        return borderline(self.worst, self.is_issue)


@dataclass(frozen=True)
class Agreement:
    """The list of issues compared with the true labels. All fields count labels."""

    n: int
    wrong: int  # of all n
    listed: int  # issues
    listed_wrong: int  # issues that are wrong
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
    index, losses = scores["index"], net_arrays(scores, "loss")
    listed = quality_by_split(scores, labels["list_given"])
    paths = labels["list_path"][index].tolist() if "list_path" in labels else None
    return LabelIssues(
        index=index,
        held_out=scores["held_out"],
        paths=paths and [path.decode(errors="backslashreplace") for path in paths],
        duplicate_of=scores.get("duplicate_of", np.full(len(index), -1)),
        given_labels=labels["list_given"][index],
        suggested_labels=listed.suggested,
        quality=listed.quality,
        is_issue=listed.is_issue,
        loss=np.mean(losses, axis=0),
        p_clean=net_arrays(scores, "p_clean"),
        confidence=scores["probabilities"][np.arange(len(index)), listed.suggested],
        true_labels=labels["list_true"][index] if "list_true" in labels else None,
        class_names=run.class_names,
        wrong_share=listed.wrong_share,
        wrong_share_error=listed.wrong_share_error,
        failures=failures(run),
        relabelled=bool(run.args.get("labels") or run.args.get("corrections")),
        epochs=int(scores["epochs"]),
    )


def against_truth(issues: LabelIssues | None) -> Agreement | None:
    """None where the true labels are unknown."""
    if issues is None or issues.true_labels is None:
        return None
    wrong = issues.given_labels != issues.true_labels
    return Agreement(
        n=len(issues),
        wrong=int(wrong.sum()),
        listed=int(issues.is_issue.sum()),
        listed_wrong=int((issues.is_issue & wrong).sum()),
        wrong_after=int((issues.cleaned_labels != issues.true_labels).sum()),
    )


# ---- For the terminal and the page ----


def by_class(issues: LabelIssues) -> list[tuple[str, int, int]]:
    """(given class, number of issues, number of labels), classes with the most issues first."""
    counts = pd.Series(issues.is_issue).groupby(issues.given_labels).agg(["sum", "size"])
    counts = counts.sort_values("sum", ascending=False, kind="stable")
    return [(issues.class_names[c], n_issues, n_labels) for c, n_issues, n_labels in counts.itertuples()]


def lost_classes(issues: LabelIssues) -> str:
    """A line that names the classes whose labels look wrong far more often than others; empty without such a class."""
    n_issues, rows = int(issues.is_issue.sum()), []
    for row in by_class(issues):
        share, rest = row[1] / row[2], (n_issues - row[1]) / max(len(issues) - row[2], 1)
        if row[2] >= _MIN_LABELS and (share >= _NEARLY_ALL or (share > _MOST and share > _FAR_MORE * rest)):
            rows.append(row)
    classes = "this class" if len(rows) == 1 else "these classes"
    advice = f"probably the networks have not learned {classes}; look at the images before you drop or change them"
    return f"most labels of {named_counts(rows)} look wrong: {advice}" if rows else ""


def named_counts(rows: list[tuple[str, int, int]]) -> str:
    """Rows of `by_class` in words: the first ten by name, the others together."""
    shown = [f"{printable(name)} ({n_issues} of {n_labels})" for name, n_issues, n_labels in rows[:_CLASSES_SHOWN]]
    if remaining := rows[_CLASSES_SHOWN:]:
        n_issues, n_labels = (sum(row[column] for row in remaining) for column in (1, 2))
        shown.append(f"{len(remaining)} more classes ({n_issues} of {n_labels})")
    return ", ".join(shown)


def estimate(issues: LabelIssues) -> str:
    """A sentence on the share of wrong labels, and on what an accuracy that is measured with such labels can reach."""
    share, error = 100 * issues.wrong_share, 100 * issues.wrong_share_error
    reach = f"measured with these labels, even a perfect classifier gets about {100 - share:.0f} %"
    if issues.relabelled:
        reach = "the true share is higher: a run cannot notice wrong suggestions of an earlier run"
    uncertainty = f"standard error {error:.1f}, the method's own error may be larger"
    return f"estimated share of wrong labels: {share:.1f} % ({uncertainty}); {reach}"


def equal_images(issues: LabelIssues) -> list[str]:
    """At most one sentence: how many images are there under different labels, with the first three of them."""
    conflicts = issues.conflicts
    names = [
        f"{printable(name)} ({' / '.join(printable(issues.class_names[c]) for c in issues.given_labels[rows])})"
        for name, rows in [*conflicts.items()][:3]
    ]
    more = ", ..." if len(conflicts) > 3 else ""
    listed = "at least one label of each is wrong, and comes first in the list"
    return [
        f"images that are there under different labels: {len(conflicts)} ({', '.join(names)}{more}); {listed}"
    ] * bool(conflicts)


def warnings(issues: LabelIssues) -> list[str]:
    """Lines that nobody should miss: the list means nothing, a class is lost, or the suggestions do harm."""
    lines = [f"THIS LIST MEANS NOTHING: {'; '.join(issues.failures)}"] if issues.failures else []
    truth, lost = against_truth(issues), lost_classes(issues)
    if truth and truth.wrong_after > truth.wrong:
        counts = f"{truth.wrong} are wrong as given, {truth.wrong_after} as corrected"
        lines.append(f"THE SUGGESTIONS MAKE THE LABELS WORSE: of {truth.n} labels {counts}")
    return lines + ([lost] if lost and not issues.failures else [])


def summary(issues: LabelIssues) -> list[str]:
    """Lines for the terminal."""
    lines = [f"labels: {issues.is_issue.sum()} of {len(issues)} look wrong ({issues.is_issue.mean():.1%}); {IN_SAMPLE}"]
    rows = [row for row in by_class(issues) if row[1]]
    lines += [] if issues.failures else [f"  {estimate(issues)}"]
    lines += [f"  by given class: {named_counts(rows)}"] if rows else []
    lines += [f"  {line}" for line in equal_images(issues)]
    if truth := against_truth(issues):
        lines.append(
            f"  against the truth: {truth.listed_wrong} of the {truth.listed} listed labels are wrong (precision "
            f"{percent(truth.precision)}), of {truth.wrong} wrong labels in all (recall {percent(truth.recall)}); "
            f"wrong labels: {truth.wrong / truth.n:.1%} as given, {truth.wrong_after / truth.n:.1%} as corrected"
        )
    return lines


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


# ---- Files ----


def write(issues: LabelIssues, folder: Path) -> list[Path]:
    """label_issues.csv, suspects.csv and, unless the list means nothing, cleaned_labels.csv. -> their paths"""
    table = issues_table(issues)
    tables = {"label_issues.csv": table, "suspects.csv": suspects_table(issues, table)}
    tables |= {} if issues.failures else {"cleaned_labels.csv": cleaned_table(issues)}
    (folder / "cleaned_labels.csv").unlink(missing_ok=True)  # of an earlier end of the run
    for name, table in tables.items():
        write_atomically(folder / name, csv_bytes(table))
    return [folder / name for name in tables]


def issues_table(issues: LabelIssues) -> pd.DataFrame:
    """label_issues.csv, one row a sample, numbers with four significant digits. The column of a network that the run
    does not have is empty."""
    p_clean = [*issues.p_clean, None, None]
    names = np.array(issues.class_names, dtype=object)
    columns = {"split": np.where(issues.held_out, "val", "train")}
    columns |= {"given_label": issues.given_labels, "suggested_label": issues.suggested_labels}
    columns |= {"label_quality": issues.quality, "is_label_issue": issues.is_issue, "rank": issues.rank}
    columns |= {"loss": issues.loss, "p_clean_net1": p_clean[0], "p_clean_net2": p_clean[1]}
    columns |= {"confidence": issues.confidence}
    columns |= {"duplicate_of": texts(map(issues.name_of_first, range(len(issues))))}
    classes = [texts(names[labels]) for labels in (issues.given_labels, issues.suggested_labels)]
    columns |= dict(zip(("given_class", "suggested_class"), classes, strict=True))
    table = table_of(issues, columns)
    for name in table.select_dtypes("floating"):
        table[name] = [float(f"{value:.4g}") for value in table[name]]
    return table


def suspects_table(issues: LabelIssues, table: pd.DataFrame) -> pd.DataFrame:
    """suspects.csv: the issues of `issues_table`, worst first: file (index, where there are no files), class names.
    Held-out samples come between the others: the worst tenth of each split stands first, and so on."""
    columns = ["path" if issues.paths else "index", "split", "given_class", "suggested_class"]
    return table[columns].iloc[issues.worst[: issues.is_issue.sum()]]


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
