"""Co-divide: losses -> clean probability -> an exact partition."""

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
