"""The recipe that knows nothing of the noise (`--recipe blind`): no function here sees r, noise_mode or a true label.

`estimate` says of an epoch's divisions how many labels are wrong, and whether to one class each; `choose` takes the row
of the paper's table that fits the last estimates: its lambda_u for this epoch, its threshold and loss window from the
next division on. All follows from the records: a continued run chooses as the uninterrupted one."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dividemix.codivide import Division, Mixture
from dividemix.engine import MixMatch
from dividemix.recipes import ROWS, Recipe

NAMES = ("lambda_u", "p_threshold", "loss_window")  # what is chosen: names of flags and in an epoch's record
LAST = 5  # epochs whose estimates decide, by their median: an odd one changes nothing
MARGIN = 0.02  # what another row must be nearer by than the one in use: no row is taken and left every other epoch
FIELDS = ("noise_rate_estimate", "concentration", *NAMES)  # in an epoch's record; None in warm-up
MANY_CLASSES = 50  # from here on CIFAR-100's rows, below CIFAR-10's
HISTORY = max(row.loss_window for row in ROWS)  # epochs of losses to keep, whatever window is in use
CONF_PENALTY = False  # in warm-up, before anything is known of the noise: RESULTS.md tells what either costs


class Estimate(NamedTuple):
    """What one epoch's divisions say of the given labels."""

    noise_rate: float  # share of wrong labels
    # Of the wrong labels of a class's images the share of the most frequent, mean over the images: 1 / (C - 1) where
    # they go to all classes alike, 1 where they go to one class each.
    concentration: float


def estimate(divisions: Sequence[Division | None], labels: NDArray, num_class: int) -> Estimate | None:
    """Both networks' divisions and the given labels (N,) -> estimate; None without a division.

    A label counts as wrong by 1 - clean probability, and not at all where the network predicts it: the mixture alone
    takes clean labels of hard images for wrong, most of all in the first epochs. Where none counts, the wrong ones are
    taken as spread.
    """
    views = [division for division in divisions if division]
    if not views:
        return None
    wrong = np.zeros((num_class, num_class))  # predicted class, given label
    for division in views:
        np.add.at(wrong, (division.prediction, labels), 1 - division.clean_probability)
    np.fill_diagonal(wrong, 0)
    total = wrong.sum()
    concentration = wrong.max(axis=1).sum() / total if total else spread(num_class)
    return Estimate(float(total / (len(views) * len(labels))), float(concentration))


def choose(estimates: Sequence[Estimate], num_class: int) -> Recipe | None:
    """The row of the paper's table for the estimates of the divided epochs so far; None before the first."""
    row = None
    for end in range(1, len(estimates) + 1):
        row = nearest(recent(estimates[:end]), num_class, row)
    return row


def recent(estimates: Sequence[Estimate]) -> Estimate:
    """What the last epochs say together: their medians."""
    return Estimate(*np.median(estimates[-LAST:], axis=0).tolist())


def nearest(estimate: Estimate, num_class: int, in_use: Recipe | None = None) -> Recipe:
    """The asymmetric row (no unlabeled loss) where concentration is past half way between spread and 1, else the
    symmetric one with the nearest share of wrong labels; the row `in_use` has MARGIN more.

    Two classes cannot tell the two kinds apart, and CIFAR-100 has no asymmetric row: there the rate alone decides.
    """
    dataset = "cifar100" if num_class >= MANY_CLASSES else "cifar10"
    rows = [row for row in ROWS if row.dataset == dataset]
    half_way = (1 + spread(num_class)) / 2
    for row in rows:
        if row.mode == "asym" and estimate.concentration > half_way - MARGIN * (row is in_use):
            return row
    symmetric = [row for row in rows if row.mode == "sym"]
    return min(symmetric, key=lambda row: abs(row.wrong - estimate.noise_rate) - MARGIN * (row is in_use))


def spread(num_class: int) -> float:
    """The concentration of wrong labels that go to all other classes alike."""
    return 1 / max(num_class - 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Through the epochs of a run


def setting(row: Recipe | None, flags: Mapping[str, float | None]) -> dict[str, float]:
    """lambda_u, p_threshold and loss_window of a row; without one those that all noise but the strongest has, and no
    unlabeled loss. `flags` that are not None win."""
    chosen = {"lambda_u": 0, "p_threshold": Recipe.p_threshold, "loss_window": Recipe.loss_window}
    chosen |= {name: getattr(row, name) for name in NAMES} if row else {}
    return chosen | {name: value for name, value in flags.items() if value is not None}


@dataclass
class Choice:
    """A run's choices: lambda_u of each divided epoch, and threshold and window of its `mixtures`. `record` is what the
    present epoch's record says of them, FIELDS."""

    records: Sequence[Mapping[str, Any]]  # the run's, also those still to come
    mixtures: Sequence[Mixture]
    labels: NDArray[np.int64]  # the given ones (N,)
    num_class: int
    flags: Mapping[str, float | None]  # see `setting`
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.record: dict[str, float | None] = dict.fromkeys(FIELDS)
        self._divide_by(setting(choose(self._estimates(), self.num_class), self.flags))

    def by(self, divisions: Sequence[Division | None], mixmatch: MixMatch) -> MixMatch:
        """This epoch's divisions and the method's settings -> these settings with lambda_u as chosen. Prints a line
        where the row is another than before."""
        latest = estimate(divisions, self.labels, self.num_class)
        before = self._estimates()
        now = [*before, latest] if latest else before
        row = choose(now, self.num_class)
        chosen = setting(row, self.flags)
        used = self.mixtures[0].threshold, self.mixtures[0].window
        self._divide_by(chosen)
        values = [*(latest or (None, None)), chosen["lambda_u"], *used]
        self.record = dict(zip(FIELDS, values, strict=True))
        if row is not choose(before, self.num_class):
            self.say(line(recent(now), row, self.flags))
        return dataclasses.replace(mixmatch, lambda_u=chosen["lambda_u"])

    def _estimates(self) -> list[Estimate]:
        """Those of the epochs so far that made one."""
        estimates = [Estimate(*map(record.get, FIELDS[:2])) for record in self.records]
        return [estimate for estimate in estimates if None not in estimate]

    def _divide_by(self, chosen: Mapping[str, float]) -> None:
        for mixture in self.mixtures:
            mixture.threshold, mixture.window = chosen["p_threshold"], int(chosen["loss_window"])


def line(estimate: Estimate, row: Recipe, flags: Mapping[str, float | None]) -> str:
    """What is printed of a new choice."""
    seen = f"{estimate.noise_rate:.1%} of the labels seem wrong, concentration {estimate.concentration:.2f}"
    values = setting(row, flags).items()
    chosen = [f"{name} {value:g}{'' if flags[name] is None else ' (given)'}" for name, value in values]
    return f"blind: {seen}: as for {row.name} from now on: {', '.join(chosen)}"
