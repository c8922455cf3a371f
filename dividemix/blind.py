"""Settings chosen from the data (`--recipe blind`): no function here sees r, noise_mode or a true label.

`estimate` gives the share of wrong labels in an epoch's divisions, and how concentrated those of a class are on one
other class; `choose` takes the row of the paper's Table 7 that fits the last estimates. Its lambda_u holds from this
epoch on, its threshold and loss window from the next division on. The records of the run decide, so a continued run
chooses as an uninterrupted one."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dividemix.codivide import Division, Mixture
from dividemix.engine import MixMatch
from dividemix.recipes import ROWS, Recipe

NAMES = ("lambda_u", "p_threshold", "loss_window")  # flags that are chosen; the same names in an epoch's record
RECENT = 5  # epochs; the median of their estimates decides, so one odd epoch changes nothing
MARGIN = 0.02  # another row must be nearer by this much than the row in use: rows do not alternate
FIELDS = ("noise_rate_estimate", "concentration", *NAMES)  # of an epoch's record; None in warm-up
MANY_CLASSES = 50  # with so many or more CIFAR-100's rows, with fewer CIFAR-10's
HISTORY = max(row.loss_window for row in ROWS)  # epochs of losses to keep, whatever window is in use
CONF_PENALTY = False  # in warm-up, before the first estimate; RESULTS.md has the cost of both choices


class Estimate(NamedTuple):
    """An estimate from the divisions of one epoch."""

    noise_rate: float  # share of wrong labels
    # The share of the most frequent label among the wrong labels of a class, as a mean over all wrong labels: from
    # 1 / (C - 1) where they go to all other classes equally to 1 where those of a class all go to one other class.
    concentration: float


def estimate(divisions: Sequence[Division | None], labels: NDArray, num_class: int) -> Estimate | None:
    """Both networks' divisions and the given labels (N,) -> estimate; None without a division.

    A label counts as wrong by 1 - clean probability, but not where the network predicts it: the mixture alone takes
    right labels of hard images for wrong ones, mainly in the first epochs. Without any wrong label the concentration is
    that of evenly distributed ones.
    """
    valid = [division for division in divisions if division]
    if not valid:
        return None
    wrong = np.zeros((num_class, num_class))  # predicted class, given label
    for division in valid:
        np.add.at(wrong, (division.prediction, labels), 1 - division.clean_probability)
    np.fill_diagonal(wrong, 0)
    total = wrong.sum()
    concentration = wrong.max(axis=1).sum() / total if total else even_concentration(num_class)
    return Estimate(float(total / (len(valid) * len(labels))), float(concentration))


def choose(estimates: Sequence[Estimate], num_class: int) -> Recipe | None:
    """The row of the paper's table for the estimates of all divided epochs so far; None before the first."""
    row = None
    for end in range(1, len(estimates) + 1):
        row = nearest(median(estimates[:end]), num_class, row)
    return row


def median(estimates: Sequence[Estimate]) -> Estimate:
    """The medians of the recent epochs."""
    return Estimate(*np.median(estimates[-RECENT:], axis=0).tolist())


def nearest(estimate: Estimate, num_class: int, in_use: Recipe | None = None) -> Recipe:
    """The asymmetric row where the concentration is nearer to 1 than to that of evenly distributed wrong labels, else
    the symmetric row with the nearest share of wrong labels. The row `in_use` has an advantage of MARGIN.

    With two classes the two kinds of noise are the same, and CIFAR-100 has no asymmetric row: there the share decides.
    """
    dataset = "cifar100" if num_class >= MANY_CLASSES else "cifar10"
    rows = [row for row in ROWS if row.dataset == dataset]
    half_way = (1 + even_concentration(num_class)) / 2
    for row in rows:
        if row.mode == "asym" and estimate.concentration > half_way - MARGIN * (row is in_use):
            return row
    symmetric = [row for row in rows if row.mode == "sym"]
    return min(symmetric, key=lambda row: abs(row.wrong - estimate.noise_rate) - MARGIN * (row is in_use))


def even_concentration(num_class: int) -> float:
    """The concentration of wrong labels that go to all other classes equally."""
    return 1 / max(num_class - 1, 1)


# ---- The choices of a run, epoch by epoch ----


def setting(row: Recipe | None, flags: Mapping[str, float | None]) -> dict[str, float]:
    """lambda_u, p_threshold and loss_window: a row's, or 0 and `Recipe`'s defaults. `flags` that are not None win."""
    chosen = {"lambda_u": 0, "p_threshold": Recipe.p_threshold, "loss_window": Recipe.loss_window}
    chosen |= {name: getattr(row, name) for name in NAMES} if row else {}
    return chosen | {name: value for name, value in flags.items() if value is not None}


@dataclass
class Choice:
    """A run's choices: lambda_u of each divided epoch, threshold and window of its `mixtures`. record: this epoch's."""

    records: Sequence[Mapping[str, Any]]  # of the finished epochs; the run adds to them
    mixtures: Sequence[Mixture]
    labels: NDArray[np.int64]  # given labels (N,)
    num_class: int
    flags: Mapping[str, float | None]  # see `setting`
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.record: dict[str, float | None] = dict.fromkeys(FIELDS)
        self._set_mixtures(setting(choose(self._estimates(), self.num_class), self.flags))

    def update(self, divisions: Sequence[Division | None], mixmatch: MixMatch) -> MixMatch:
        """This epoch's divisions -> the settings with the chosen lambda_u. Prints a line where the row changes."""
        latest = estimate(divisions, self.labels, self.num_class)
        earlier = self._estimates()
        estimates = [*earlier, latest] if latest else earlier
        row = choose(estimates, self.num_class)
        chosen = setting(row, self.flags)
        used = self.mixtures[0].threshold, self.mixtures[0].window
        self._set_mixtures(chosen)
        values = [*(latest or (None, None)), chosen["lambda_u"], *used]
        self.record = dict(zip(FIELDS, values, strict=True))
        if row is not choose(earlier, self.num_class):
            self.say(choice_line(median(estimates), row, self.flags))
        return dataclasses.replace(mixmatch, lambda_u=chosen["lambda_u"])

    def _estimates(self) -> list[Estimate]:
        """Of the finished epochs that have one."""
        estimates = [Estimate(*map(record.get, FIELDS[:2])) for record in self.records]
        return [estimate for estimate in estimates if None not in estimate]

    def _set_mixtures(self, chosen: Mapping[str, float]) -> None:
        for mixture in self.mixtures:
            mixture.threshold, mixture.window = chosen["p_threshold"], int(chosen["loss_window"])


def choice_line(estimate: Estimate, row: Recipe, flags: Mapping[str, float | None]) -> str:
    """The line for the terminal."""
    estimated = f"{estimate.noise_rate:.1%} of the labels seem wrong, concentration {estimate.concentration:.2f}"
    values = setting(row, flags).items()
    chosen = [f"{name} {value:g}{'' if flags[name] is None else ' (given)'}" for name, value in values]
    return f"blind: {estimated}; settings of {row.name} from this epoch on: {', '.join(chosen)}"
