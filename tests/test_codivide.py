"""Co-divide: losses -> clean probability -> an exact partition."""

import warnings

import numpy as np
import pytest
from helpers.nets import GOLDEN, half
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture

from dividemix import Diverged, DivideMixWarning
from dividemix.codivide import Mixture, clean_probability, codivide, normalise, smoothed


def two_groups(clean=150, wrong=100, seed=0):
    """Losses of samples whose first `clean` labels are right."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.gamma(2, 0.1, clean), rng.normal(3, 0.5, wrong)]).astype(np.float32)


def test_golden_clean_probability():
    """The authors' mixture: another initialisation, number of EM steps or regularisation divides other samples."""
    golden = np.load(GOLDEN / "codivide.npz")
    np.testing.assert_allclose(clean_probability(golden["losses"]), golden["clean_probability"], atol=0.02)
    history = clean_probability(golden["loss_history"], window=5)
    np.testing.assert_allclose(history, golden["clean_probability_last5"], atol=0.02)


@given(st.integers(2, 60), st.integers(0, 2**20), st.floats(0.05, 0.95))
@settings(max_examples=40)
def test_labeled_and_unlabeled_are_an_exact_partition(n, seed, threshold):
    """A sample in both sets, or in none, would be trained on twice or never."""
    division = codivide(np.random.default_rng(seed).random(n), threshold)
    np.testing.assert_array_equal(division.labeled, division.clean_probability > threshold)
    assert ((division.clean_probability >= 0) & (division.clean_probability <= 1)).all()


def test_the_clean_component_is_the_one_with_the_smaller_mean():
    """Components come in any order: taken by position, every second run would train on the wrong labels."""
    losses = two_groups()
    for sign in (1, -1):  # the mirrored losses have the small group at the other end
        division = codivide(sign * losses, 0.5, truly_clean=(np.arange(250) < 150) == (sign == 1))
        assert division.means[0] < division.means[1]
        assert division.auc > 0.99
        assert (division.labeled == ((np.arange(250) < 150) == (sign == 1))).mean() > 0.9
    assert codivide(losses, 0.5).auc is None
    assert codivide(losses, 0.5, truly_clean=np.ones(250, bool)).auc is None


def test_window_averages_normalised_losses_and_does_not_normalise_again():
    """Raw losses shrink over the epochs: averaged before normalising, only the first epochs would decide."""
    history = np.stack([two_groups(seed=k) * 10**k for k in range(4)])
    np.testing.assert_allclose(smoothed(history, 2), (normalise(history[2]) + normalise(history[3])) / 2)
    np.testing.assert_allclose(smoothed(history[:1], 5), normalise(history[0]))
    assert smoothed(history, 4).max() < 1


@pytest.mark.parametrize("losses", [[1.0] * 9, [1.0], [1.0, np.nan, 2.0], [1.0, np.inf]])
def test_losses_that_divide_nothing_are_refused(losses):
    """0/0 in the normalisation turns every weight into NaN without a word."""
    with pytest.raises(Diverged, match="--lr"):
        codivide(np.array(losses), 0.5)


def test_precision_and_recall_of_the_labeled_set_by_hand():
    """The metrics say how good the labels are that are trained on: exchanged, they would say the opposite."""
    division = half(10, 4)  # the first four are labeled
    clean = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0], bool)
    assert division.precision_recall(clean) == (3 / 4, 3 / 5)
    assert half(10, 0).precision_recall(clean) == (None, 0.0)
    assert division.precision_recall(np.zeros(10, bool)) == (0.0, None)


# ---- A network's mixture through the epochs ----


@pytest.mark.parametrize(("windows", "rows_kept"), [((1,), 0), ((3,), 2), ((1, 3), 2)])
def test_a_mixture_keeps_the_losses_that_the_next_window_averages(windows, rows_kept):
    """Else the window is shorter than it says, or each checkpoint grows by what nobody reads."""
    mixture, rows = Mixture(0.6, *windows), [two_groups(seed=k) for k in range(5)]
    for epoch, row in enumerate(rows):
        division = mixture.divide(row, random_state=epoch)
        expected = codivide(np.stack(rows[: epoch + 1]), 0.6, windows[0], random_state=epoch)
        np.testing.assert_array_equal(division.clean_probability, expected.clean_probability)
        assert len(mixture.history) == min(rows_kept, epoch + 1)
    np.testing.assert_equal(mixture.history, rows[len(rows) - rows_kept :])
    resumed = Mixture(0.6, max(windows))
    resumed.history = [row.copy() for row in mixture.history]
    mixture.window = max(windows)
    expected = codivide(np.stack([*rows, rows[0]]), 0.6, max(windows))
    for continued in (mixture, resumed):
        np.testing.assert_array_equal(continued.divide(rows[0]).clean_probability, expected.clean_probability)


def test_without_clean_samples_there_is_no_division_and_the_next_epoch_is_as_if_there_had_been_one():
    """Training on no labeled image crashes, and a window with a hole is another method."""
    rows = [two_groups(seed=k) for k in range(3)]
    mixture, reference = Mixture(0.5, 3), Mixture(0.5, 3)
    for epoch, row in enumerate(rows):
        mixture.threshold = 1 if epoch == 1 else 0.5
        expected = reference.divide(row, random_state=epoch)
        if epoch == 1:
            with pytest.warns(DivideMixWarning, match="net 2 finds no sample clean"):
                assert mixture.divide(row, name="net 2") is None
        else:
            np.testing.assert_array_equal(mixture.divide(row, random_state=epoch).loss, expected.loss)
        assert len(mixture.history) == min(epoch + 1, 2)


def test_a_division_carries_what_it_was_made_of():
    """Else the score files hold other losses or predictions than those that the epoch was divided by."""
    rows, prediction, clean = [two_groups(seed=k) for k in range(3)], np.arange(250) % 3, np.arange(250) < 150
    mixture = Mixture(0.5, 2)
    mixture.divide(rows[0])
    division = mixture.divide(rows[1], prediction, clean, 4)
    assert np.array_equal(division.raw_loss, rows[1]) and np.array_equal(division.prediction, prediction)
    expected = codivide(np.stack(rows[:2]), 0.5, 2, clean, 4)
    np.testing.assert_array_equal(division.clean_probability, expected.clean_probability)
    assert division.auc == expected.auc > 0.99
    mixture.threshold = -1
    with pytest.warns(DivideMixWarning, match="net 1 finds every sample clean"):
        assert mixture.divide(rows[2], name="net 1").labeled.all()
    other_samples, mixture = two_groups(150, 30, 1), Mixture(0.5)
    mixture.divide(rows[0])
    np.testing.assert_array_equal(mixture.divide(other_samples).labeled, codivide(other_samples, 0.5).labeled)


# ---- Many samples ----


def real_losses(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses (n,) as a network gives them after its warm-up, and which labels are right: 60 % with small losses."""
    rng = np.random.default_rng(0)
    clean = rng.random(n) < 0.6
    losses = np.where(clean, rng.gamma(1.5, 0.15, n), rng.normal(2.5, 0.9, n).clip(0.01))
    return losses.astype(np.float32), clean


def test_up_to_the_limit_nothing_is_left_out(monkeypatch):
    """The paper's data sets would be divided otherwise than by the authors' mixture, for a speed they do not need."""
    losses = real_losses(1000)[0]
    monkeypatch.setattr("dividemix.codivide.FIT_LIMIT", 1000)
    loss = normalise(losses).reshape(-1, 1)
    gmm = GaussianMixture(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=3).fit(loss)
    expected = gmm.predict_proba(loss)[:, gmm.means_.argmin()]
    np.testing.assert_array_equal(clean_probability(losses, random_state=3), expected)


def test_past_the_limit_a_seeded_subsample_gives_nearly_the_same_split(monkeypatch):
    """Else large data sets are divided by other losses than theirs, or by the first in a sorted list."""
    losses, clean = real_losses(50_000)
    order = np.argsort(losses)
    losses, clean = losses[order], clean[order]
    full = codivide(losses, 0.5, truly_clean=clean, random_state=1)
    monkeypatch.setattr("dividemix.codivide.FIT_LIMIT", 10_000)
    subsampled, again, other_seed = (codivide(losses, 0.5, truly_clean=clean, random_state=k) for k in (1, 1, 2))
    np.testing.assert_array_equal(subsampled.clean_probability, again.clean_probability)
    assert not np.array_equal(subsampled.means, full.means) and not np.array_equal(subsampled.means, other_seed.means)
    assert (subsampled.labeled != full.labeled).mean() < 0.005
    assert np.abs(subsampled.clean_probability - full.clean_probability).max() < 0.05
    assert subsampled.auc == pytest.approx(full.auc, abs=1e-4)


# ---- A mixture for each given class ----


def two_classes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses (500,), given labels and which of them are right. Class 1 is hard: its right labels have the losses of
    class 0's wrong ones."""
    easy, hard = two_groups(150, 100), two_groups(150, 100, 1) + 3
    return np.concatenate([easy, hard]), np.repeat([0, 1], 250), np.tile(np.arange(250) < 150, 2)


def test_each_given_class_is_divided_by_its_losses():
    """One mixture calls all of a hard class wrong. Other values than those of a mixture of the class alone, or a
    changed division of the paper's, would be another method."""
    losses, labels, clean = two_classes()
    paper, by_class = codivide(losses, 0.5), codivide(losses, 0.5, truly_clean=clean, labels=labels)
    assert not paper.labeled[250:].any() and (by_class.labeled == clean).mean() > 0.99 and by_class.auc > 0.99
    for rows in np.split(np.arange(500), 2):
        loss = normalise(losses)[rows].reshape(-1, 1)
        gmm = GaussianMixture(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(loss)
        expected = gmm.predict_proba(loss)[:, gmm.means_.argmin()]
        np.testing.assert_array_equal(by_class.clean_probability[rows], expected)
    for name in ("means", "variances", "weights", "loss"):  # those of all samples, for histograms and score files
        np.testing.assert_array_equal(getattr(by_class, name), getattr(paper, name))
    assert by_class.fallback == paper.fallback == ()


def test_classes_that_cannot_be_divided_go_by_all_samples(monkeypatch):
    """A mixture of nineteen losses, of equal ones, or of one group of them would call labels wrong at random."""
    one_group = np.random.default_rng(0).normal(3, 0.5, 200)  # the halves are 1.8 apart; both classes' groups over 6
    monkeypatch.setattr("dividemix.codivide.MIN_DISTANCE", 2)
    few, equal = two_groups(10, 9, 2), np.full(40, 0.5)
    losses = np.concatenate([two_classes()[0], one_group, few, equal])
    labels = np.repeat([7, 1, 3, 0, 5], [250, 250, 200, 19, 40])
    division, paper = codivide(losses, 0.5, labels=labels), codivide(losses, 0.5)
    assert division.fallback == (0, 3, 5)
    by_all = np.isin(labels, division.fallback)
    same = division.clean_probability == paper.clean_probability
    assert same[by_all].all() and not same[~by_all].all()


def test_a_run_divides_by_class_in_its_window_and_says_once_where_it_cannot():
    """Else --loss_window or --division is without effect, or a class that falls back is named in every epoch."""
    losses, labels, _ = two_classes()
    labels[:10] = 2
    warned: set[str] = set()
    mixture, rows = Mixture(0.5, 2, division="per_class", warned=warned), [losses, losses[::-1].copy()]
    with pytest.warns(DivideMixWarning, match="net 2.*no clear second group of losses: 2;"):
        first = mixture.divide(rows[0], name="net 2", labels=labels)
    with warnings.catch_warnings(action="error"):
        Mixture(0.5, division="per_class", warned=warned).divide(rows[0], name="net 1", labels=labels)
        second = mixture.divide(rows[1], random_state=3, labels=labels)
    for division, expected in (
        (first, codivide(rows[0], 0.5, labels=labels)),
        (second, codivide(np.stack(rows), 0.5, 2, random_state=3, labels=labels)),
    ):
        np.testing.assert_array_equal(division.clean_probability, expected.clean_probability)
        assert division.fallback == expected.fallback == (2,)
    paper = Mixture(0.5).divide(losses, labels=labels)
    np.testing.assert_array_equal(paper.clean_probability, codivide(losses, 0.5).clean_probability)


@pytest.mark.parametrize("window", [1, 3])
def test_a_run_goes_on_without_damaged_images(window):
    """A window of losses of other samples cannot be averaged: the run would end in a traceback."""
    rng = np.random.default_rng(0)
    mixture = Mixture(0.5, window)
    for n in (60, 60, 58):
        division = mixture.divide(rng.gamma(1 + 3 * (rng.random(n) < 0.4), 1).astype(np.float32))
    assert len(division.labeled) == 58 and len(mixture.history) == (1 if window > 1 else 0)
