"""Which labels look wrong: label_issues.csv and cleaned_labels.csv, from what `scoring` left in the run folder.

A label is an issue where its quality is below the run's p_threshold and the networks suggest another class. Quality is
the mean clean probability of the two networks, or an ablation's one; of a cross-entropy run, which divides nothing, it
is the probability that both networks together give the label. All scores are in-sample: the networks were trained on
these labels.

The columns of label_issues.csv follow cleanlab's CleanLearning, which takes the file as it is:
`CleanLearning(classifier).fit(X, labels, label_issues=pandas.read_csv("label_issues.csv"))`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dividemix import warn
from dividemix.checkpoint import csv_bytes, write_atomically
from dividemix.runfolder import RunFolder

if TYPE_CHECKING:
    from pandas import DataFrame, Series

IN_SAMPLE = "scores are in-sample: the networks were trained on these labels"
_CLASSES_SHOWN = 10
_FEW, _NEARLY_ALL = 10, 0.95  # labels of a class, and the part of them that looks wrong, from which it is suspicious
_MOST_CLASSES = 100_000  # where their names are not known


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
    p_clean: list[NDArray[np.float64]] | None  # net 1's and, where there is one, net 2's; None of a cross-entropy run
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

    @property
    def num_class(self) -> int:
        known = [each for each in (self.given, self.suggested, self.true) if each is not None]
        return max(len(self.class_names), *(int(each.max(initial=0)) + 1 for each in known))

    def class_name(self, label: int) -> str:
        return self.class_names[label] if label < len(self.class_names) else str(label)


@dataclass(frozen=True)
class Agreement:
    """The list against the truth. wrong: how many labels are wrong; listed: how many are issues; found: how many are
    both; by_loss: how many of the `wrong` labels with the largest loss are wrong, which is what a ranking by loss alone
    finds when it is told how many there are."""

    n: int
    wrong: int
    listed: int
    found: int
    by_loss: int
    wrong_after: int  # labels that are still, or newly, wrong when the suggestions are taken

    @property
    def precision(self) -> float | None:
        return self.found / self.listed if self.listed else None

    @property
    def recall(self) -> float | None:
        return self.found / self.wrong if self.wrong else None


# ---------------------------------------------------------------------------------------------------------------------
# Finding them


def judge(scores: dict[str, NDArray], given: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Quality, is_issue and mean loss of each label, from the arrays of label_scores.npz."""
    if p_clean := of_nets(scores, "p_clean"):
        quality = sum(p_clean) / len(p_clean)
    else:
        quality = scores["p_given"].astype(np.float64)
    losses = of_nets(scores, "loss")
    loss = sum(losses) / len(losses)
    return quality, (quality < scores["threshold"]) & (scores["prediction"] != given), loss


def of_nets(scores: dict[str, NDArray], name: str) -> list[NDArray]:
    """Net 1's and net 2's arrays, those that are there."""
    return [scores[f"{name}_net{k}"] for k in (1, 2) if f"{name}_net{k}" in scores]


def worst_first(quality: NDArray, is_issue: NDArray, loss: NDArray) -> NDArray[np.int64]:
    """The rows in the order in which they are worth a look: issues before others, then by quality, then by loss."""
    return np.lexsort((-loss, quality, ~is_issue))


def find(run: RunFolder) -> LabelIssues | None:
    """None of a run without scores: it is not finished, or older than they are."""
    scores, labels = run.label_scores, run.labels
    if not scores or "list_given" not in labels:
        return None
    try:
        index = scores["index"]
        given = labels["list_given"][index]
        quality, is_issue, loss = judge(scores, given)
        known = "true" in labels and np.array_equal(labels["index"], index)
        issues = LabelIssues(
            index=index,
            paths=decoded(labels["list_path"][index]) if "list_path" in labels else None,
            given=given,
            suggested=scores["prediction"].astype(np.int64),
            quality=quality,
            is_issue=is_issue,
            loss=loss,
            p_clean=of_nets(scores, "p_clean") or None,
            confidence=scores["confidence"],
            true=labels["true"] if known else None,
            class_names=run.class_names,
            threshold=float(scores["threshold"]),
            epochs=int(scores["epochs"]),
        )
        lengths = {len(each) for each in (given, quality, is_issue, loss, issues.suggested, issues.confidence)}
        if lengths != {len(index)} or not len(index):
            raise ValueError("arrays that do not go together")
        numbers = [quality, loss, issues.confidence, issues.threshold, *(issues.p_clean or [])]
        if not all(np.isfinite(each).all() for each in numbers):
            raise ValueError("numbers that are none")
        classes = [given, issues.suggested, *([] if issues.true is None else [issues.true])]
        if any(each.min() < 0 or each.max() >= (len(run.class_names) or _MOST_CLASSES) for each in classes):
            raise ValueError("labels of no class")
    except (KeyError, IndexError, ValueError, TypeError) as error:
        warn(f"{run.path / 'label_scores.npz'} is left out, it is not what a run writes ({error})")
        return None
    return issues


def decoded(paths: NDArray[np.bytes_]) -> list[str]:
    return [path.decode(errors="backslashreplace") for path in paths.tolist()]


def against_truth(issues: LabelIssues) -> Agreement | None:
    """None where the truth is unknown."""
    if issues.true is None:
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


def by_class(issues: LabelIssues) -> list[tuple[int, int, int]]:
    """(given class, how many of its labels are issues, how many it has), those with the most issues first."""
    listed = np.bincount(issues.given[issues.is_issue], minlength=issues.num_class)
    counts = np.bincount(issues.given, minlength=issues.num_class)
    order = np.argsort(-listed, kind="stable")
    return [(int(c), int(listed[c]), int(counts[c])) for c in order if counts[c]]


def lost_classes(issues: LabelIssues) -> list[str]:
    """A line for each class whose labels nearly all look wrong. One mixture is fitted to the losses of all classes: one
    that is harder to learn than the others, or rare, has the losses of wrong labels."""
    return [
        f"{printable(issues.class_name(c))}: {few} of {many} labels look wrong, nearly all: more likely a class that "
        "the networks have not learned than so many errors; look at its images before you drop them"
        for c, few, many in by_class(issues)
        if many >= _FEW and few >= _NEARLY_ALL * many
    ]


def summary(issues: LabelIssues) -> list[str]:
    """What the list says, for the terminal."""
    listed = int(issues.is_issue.sum())
    lines = [f"labels: {listed} of {len(issues)} look wrong ({listed / len(issues):.1%}); {IN_SAMPLE}"]
    rows = [row for row in by_class(issues) if row[1]]
    shown = [f"{printable(issues.class_name(c))}: {few} of {many}" for c, few, many in rows[:_CLASSES_SHOWN]]
    if rest := rows[_CLASSES_SHOWN:]:
        shown.append(f"{len(rest)} more classes: {sum(row[1] for row in rest)} of {sum(row[2] for row in rest)}")
    if shown:
        lines.append(f"  by given class: {', '.join(shown)}")
    lines += [f"  {line}" for line in lost_classes(issues)[:_CLASSES_SHOWN]]
    if found := against_truth(issues):
        lines += [f"  {line}" for line in truth_lines(found)]
    return lines


def truth_lines(found: Agreement) -> list[str]:
    lines = [
        f"against the truth: {found.found} of the {found.listed} listed are wrong (precision "
        f"{percent(found.precision)}), of {found.wrong} wrong ones (recall {percent(found.recall)}); wrong labels "
        f"{found.wrong / found.n:.1%}, after the suggestions {found.wrong_after / found.n:.1%}"
    ]
    if found.wrong:
        share = percent(found.by_loss / found.wrong)
        lines.append(f"by loss alone: of the {found.wrong} with the largest loss {found.by_loss} are wrong ({share})")
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


def issues_table(issues: LabelIssues) -> "DataFrame":
    """One row a sample."""
    p_clean = [*(issues.p_clean or []), None, None]  # one column for each network, empty where there is none
    columns = {"given_label": issues.given, "suggested_label": issues.suggested, "label_quality": issues.quality}
    columns |= {"is_label_issue": issues.is_issue, "loss": issues.loss}
    columns |= {"p_clean_net1": p_clean[0], "p_clean_net2": p_clean[1], "confidence": issues.confidence}
    if issues.class_names:
        labels = {"given_class": issues.given, "suggested_class": issues.suggested}
        columns |= {name: texts(map(issues.class_name, each.tolist())) for name, each in labels.items()}
    return table_of(issues, columns)


def cleaned_table(issues: LabelIssues) -> "DataFrame":
    """One row a sample: the corrected label, and what it was."""
    return table_of(issues, {"label": issues.cleaned, "was": issues.given})


def table_of(issues: LabelIssues, columns: dict[str, Any]) -> "DataFrame":
    """The columns behind those that say which sample a row is."""
    import pandas

    first = {"index": issues.index} | ({} if issues.paths is None else {"path": texts(issues.paths)})
    return pandas.DataFrame(first | columns)


def texts(values: Iterable[str]) -> "Series":
    """A column of names as they are: pandas' own type for text takes only what is Unicode."""
    import pandas

    return pandas.Series(list(values), dtype=object)


# ---------------------------------------------------------------------------------------------------------------------
# The transition matrix: how often each class is given each label


def transition_counts(actual: NDArray, given: NDArray, num_class: int) -> NDArray[np.int64]:
    """(C, C): samples of the class [row] that have the given label [column]; labels (N,) each."""
    return np.bincount(actual * num_class + given, minlength=num_class**2).reshape(num_class, num_class)


def transition_rates(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(C, C): P(given label | class), rows that add up to 1; NaN for a class without samples."""
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=1, keepdims=True)


def transition_table(run: RunFolder) -> "DataFrame | None":
    """transition.csv: one row for each true class c: true_label, true_class, samples; rate_0, rate_1 ..., which is
    P(given label 0 | c) and so on, empty where the class has no samples; count_0, count_1 ... None where the truth is
    not known."""
    import pandas

    names = run.class_names
    if "true" not in run.labels or not names:
        return None
    counts = transition_counts(run.labels["true"], run.labels["given"], len(names))
    columns = {"true_label": range(len(names)), "true_class": texts(names), "samples": counts.sum(axis=1)}
    columns |= {f"rate_{c}": column for c, column in enumerate(transition_rates(counts).round(6).T)}
    return pandas.DataFrame(columns | {f"count_{c}": column for c, column in enumerate(counts.T)})
