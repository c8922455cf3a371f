"""--recipe blind: the rule on divisions of known noise, and that a run's training knows nothing else."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import assert_equal, last_state, read_records
from helpers.scripts import note_phases, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import dataloader_cifar
import Train_cifar
from dividemix import blind, noise
from dividemix.blind import Estimate, choose, estimate
from dividemix.codivide import Division
from dividemix.report import issues as label_issues
from dividemix.run.folder import read_run

NO_FLAGS = dict.fromkeys(blind.NAMES)
DIGITS = dataloader_cifar.load("digits", "")
FEW_DIGITS = dataclasses.replace(DIGITS, test_images=DIGITS.test_images[:20], test_labels=DIGITS.test_labels[:20])


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch, no_figures):
    """Most of a tiny run's time is its tests."""
    monkeypatch.setattr(dataloader_cifar, "load", lambda *_: FEW_DIGITS)


def division(p: np.ndarray, prediction: np.ndarray) -> Division:
    """By these clean probabilities (N,)."""
    loss, two = p.astype(np.float32), np.ones(2)
    return Division(p, p > 0.5, loss, np.array([0.1, 0.9]), two, two / 2, 0.5, None, loss, prediction)


def divided(mode: str, r: float, num_class: int, accuracy: float = 0.8, samples: int = 10_000):
    """Two networks' divisions under this noise, and the given labels: each network errs in 1 - `accuracy` of the
    images, in half of its errors for the next class, and divides 1 label in 50 wrongly."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, num_class, samples)
    labels = np.array(noise.inject(truth.tolist(), mode, r, num_class, seed=5))
    divisions = []
    for _ in range(2):
        shift = np.where(rng.random(samples) < 0.5, 1, rng.integers(1, num_class, samples))
        prediction = (truth + np.where(rng.random(samples) < accuracy, 0, shift)) % num_class
        clean = (labels == truth) ^ (rng.random(samples) < 0.02)
        divisions.append(division(np.where(clean, rng.beta(20, 1, samples), rng.beta(1, 20, samples)), prediction))
    return divisions, labels


# ---- The rule ----


@pytest.mark.parametrize(
    ("mode", "r", "num_class", "row"),
    [
        ("sym", 0.2, 10, ("cifar10", "sym", 0.2)),
        ("sym", 0.95, 10, ("cifar10", "sym", 0.9)),
        ("asym", 0.4, 10, ("cifar10", "asym", 0.4)),
        ("sym", 0.8, 100, ("cifar100", "sym", 0.8)),
        ("asym", 0.4, 100, ("cifar100", "sym", 0.5)),  # no asymmetric row there: the rate decides
        ("sym", 0.5, 14, ("cifar10", "sym", 0.5)),
        ("sym", 0.5, 2, ("cifar10", "sym", 0.2)),  # a quarter of the labels is wrong
        ("asym", 0.4, 2, ("cifar10", "sym", 0.5)),  # with two classes the same noise as symmetric of twice that rate
    ],
)
def test_each_noise_gets_the_papers_row(mode, r, num_class, row):
    """Else blind is only a name: a run whose noise the paper has gets another lambda_u than with --recipe paper."""
    # Where there are but two classes, a network that errs confirms a wrong label.
    estimated = estimate(*divided(mode, r, num_class, accuracy=0.8 if num_class > 2 else 0.9), num_class)
    chosen = choose([estimated], num_class)
    assert (chosen.dataset, chosen.mode, chosen.r) == row, estimated


@pytest.mark.parametrize(
    ("num_class", "steps"),
    [
        (10, [(0.31, 0, 0.5, 1), (0.32, 25, 0.5, 1), (0.76, 25, 0.5, 1), (0.77, 50, 0.6, 5), (1.0, 50, 0.6, 5)]),
        (100, [(0.34, 25, 0.5, 1), (0.35, 150, 0.5, 1), (0.84, 150, 0.5, 1), (0.85, 150, 0.6, 5)]),
    ],
)
def test_steps_lie_half_way_between_the_shares_of_wrong_labels_in_the_papers_rows(num_class, steps):
    """Else nominal rates are compared with real shares: of 80 % noise, 72 % of the labels are wrong."""
    for rate, *expected in steps:
        chosen = blind.setting(choose([Estimate(rate, 1 / (num_class - 1))], num_class), NO_FLAGS)
        assert list(chosen.values()) == expected, rate


@pytest.mark.parametrize(("mode", "r", "wrong", "concentration"), [("sym", 0.5, 0.45, 1 / 9), ("asym", 0.4, 0.2, 1)])
def test_the_estimate_is_near_the_truth_where_divisions_are_good(mode, r, wrong, concentration):
    """Else the record's noise_rate_estimate, which people will quote, is not the share of wrong labels."""
    (a, b), labels = divided(mode, r, 10, accuracy=1.0)
    assert estimate([a, b], labels, 10) == pytest.approx((wrong, concentration), abs=0.05)
    of_one = ((1 - a.clean_probability) * (a.prediction != labels)).mean()
    assert estimate([a, None], labels, 10).noise_rate == pytest.approx(of_one)
    assert estimate([None, None], labels, 10) is None and choose([], 10) is None
    undisputed = estimate([division(np.full(len(labels), 0.99), labels)] * 2, labels, 10)
    assert undisputed == pytest.approx((0, 1 / 9)) and choose([undisputed], 10).r == 0.2


@given(st.lists(st.floats(-0.01, 0.01), min_size=1, max_size=20), st.sampled_from([0.315, 0.585, 0.765]))
@settings(max_examples=40)
def test_estimates_that_waver_round_a_boundary_change_the_row_once_at_most(offsets, boundary):
    """Else a run trains with lambda_u 0 and 25 in turn, which is neither of the paper's settings."""
    estimates = [Estimate(boundary + offset, 0.12) for offset in offsets]
    rows = [choose(estimates[:n], 10) for n in range(1, len(estimates) + 1)]
    assert sum(a is not b for a, b in itertools.pairwise(rows)) <= 1


def test_one_odd_epoch_changes_nothing_and_lasting_change_is_followed():
    """Else a single bad division turns the unlabeled loss off, or the first epoch's poor estimate decides the run."""
    odd = [Estimate(0.45, 0.12)] * 3 + [Estimate(0.05, 0.9)] + [Estimate(0.45, 0.12)] * 3
    assert {choose(odd[:n], 10).r for n in range(1, len(odd) + 1)} == {0.5}
    later = [Estimate(0.45, 0.12)] * 20 + [Estimate(0.2, 0.12)] * 3
    assert (choose(later[:-1], 10).r, choose(later, 10).r) == (0.5, 0.2)


def test_flags_win_over_the_choice():
    """Else a user's own value is overridden by an estimate. 0 is a value."""
    flags, row = {"lambda_u": 0, "p_threshold": 0.7, "loss_window": None}, choose([Estimate(0.85, 0.12)], 10)
    assert blind.setting(row, flags) == {"lambda_u": 0, "p_threshold": 0.7, "loss_window": 5}
    assert blind.setting(None, flags) == {"lambda_u": 0, "p_threshold": 0.7, "loss_window": 1}


# ---- A run ----


def trained(out_dir: Path, *flags: str) -> tuple[dict, dict]:
    """-> a run's final metrics, and its last checkpoint"""
    final = Train_cifar.main(tiny(out_dir, "--limit_train", "32", *flags))
    return final, last_state(Path(final["run_dir"]))


def test_training_knows_nothing_of_the_noise(tmp_path, monkeypatch):
    """The mode's promise: the same labels under two claims, with other truths, end in the same weights."""
    truth = FEW_DIGITS.train_labels
    noisy = np.array(noise.inject(truth.tolist(), "asym", 0.4, 10, 7, noise.synthetic.next_class(10)))
    (tmp_path / "noise.json").write_text(json.dumps(noisy.tolist()))
    rng = np.random.default_rng(3)
    other_truth = np.where(rng.random(len(noisy)) < 0.38, (noisy + rng.integers(1, 10, len(noisy))) % 10, noisy)
    runs = []
    for mode, labels in (("asym", truth), ("sym", other_truth)):
        changed = dataclasses.replace(FEW_DIGITS, train_labels=labels)
        monkeypatch.setattr(dataloader_cifar, "load", lambda *_, changed=changed: changed)
        flags = ["--recipe", "blind", "--noise_mode", mode, "--r", "0.4", "--noise_file", f"{tmp_path}/noise.json"]
        runs.append(trained(tmp_path / mode, *flags, "--num_epochs", "3"))
    (first, a), (second, b) = runs
    assert first["auc_net1"] != second["auc_net1"]  # the truth did differ, and is used to report
    for name in ("nets", "optimizers"):
        assert_equal(a[name], b[name])
    assert all(first[name] == second[name] is not None for name in blind.FIELDS)


def test_the_papers_values_are_the_papers_run(tmp_path, monkeypatch):
    """Else the comparison of the two recipes measures something beside their values: other draws, or another order."""
    monkeypatch.setattr(blind, "estimate", lambda *_: Estimate(0.45, 0.12))
    flags = ["--num_epochs", "3", "--recipe"]
    (_, a), (_, b) = (trained(tmp_path, *flags, recipe, "--id", recipe) for recipe in ("blind", "paper"))
    for name in ("nets", "optimizers"):
        assert_equal(a[name], b[name])


def test_a_continued_run_chooses_as_the_uninterrupted_one(tmp_path, monkeypatch):
    """Else the estimates so far, or the losses that a window averages, are forgotten."""
    # Raised, so that the strongest row, which has a window, is chosen
    monkeypatch.setattr(blind, "estimate", lambda *given: Estimate(0.7 + 0.3 * estimate(*given).noise_rate, 0.2))
    flags = ["--recipe", "blind", "--num_epochs"]
    _, straight = trained(tmp_path, *flags, "3", "--id", "straight")
    for epochs in ("2", "3"):
        final, continued = trained(tmp_path, *flags, epochs)
    for name in ("nets", "optimizers", "histories", "records"):
        assert_equal(continued[name], straight[name])
    assert final["loss_window"] == 5


@pytest.fixture
def phases(monkeypatch) -> list[dict]:
    return note_phases(monkeypatch, Train_cifar)


def test_what_is_chosen_reaches_the_training(tmp_path, phases, monkeypatch, capsys):
    """Else the log and the record tell of a choice that nothing was trained with."""
    monkeypatch.setattr(blind, "estimate", lambda *_: Estimate(0.85, 0.12))
    final, state = trained(tmp_path, "--recipe", "blind", "--r", "0.2", "--lambda_u", "3", "--num_epochs", "3")
    calls = [call for call in phases if call["kind"] == "train"]
    assert [call["mixmatch"].lambda_u for call in calls] == [3] * 4
    assert [call["division"].threshold for call in calls] == [0.5] * 2 + [0.6] * 2
    records = [[record[name] for name in blind.FIELDS] for record in read_records(final["run_dir"])]
    assert records == [[None] * 5, [0.85, 0.12, 3, 0.5, 1], [0.85, 0.12, 3, 0.6, 5]]
    assert [len(history) for history in state["histories"]] == [2, 2]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("blind: ") and "lambda_u 3 (given)" in line for line in lines) == 1
    assert not any("Table 7" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "penalty"),
    [(["--noise_mode", "asym"], False), (["--conf_penalty", "on"], True), (["--method", "ce"], False)],
)
def test_warm_up_and_cross_entropy_know_nothing_of_the_noise(tmp_path, phases, flags, penalty):
    """Else warm-up is penalised by the kind of noise, or the baseline has nulls and an empty list."""
    final, _ = trained(tmp_path, "--recipe", "blind", "--num_epochs", "1", *flags)
    assert [call["mixmatch"].conf_penalty for call in phases] == [penalty] * 2
    if "ce" in flags:
        assert not set(blind.FIELDS) & final.keys()
        assert len(label_issues.find(read_run(Path(final["run_dir"])))) == 32
