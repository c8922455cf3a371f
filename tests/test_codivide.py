"""Co-divide: losses -> clean probability -> an exact partition."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, half
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture

from dividemix import DivideMixError
from dividemix.codivide import CoDivide, Division, clean_probability, codivide, normalise, smoothed


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


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_random_state_moves_the_division_only_within_tolerance(seed):
    """A division that depends on the seed of k-means would be noise in the method."""
    losses = two_groups()
    np.testing.assert_allclose(clean_probability(losses, random_state=seed), clean_probability(losses), atol=0.02)


@given(st.integers(2, 60), st.integers(0, 2**20), st.floats(0.05, 0.95))
@settings(max_examples=60)
def test_labeled_and_unlabeled_are_an_exact_partition(n, seed, threshold):
    """A sample in both sets, or in none, would be trained on twice or never."""
    division = codivide(np.random.default_rng(seed).random(n), threshold)
    labeled, unlabeled = np.flatnonzero(division.labeled), np.flatnonzero(~division.labeled)
    assert sorted([*labeled, *unlabeled]) == list(range(n))
    np.testing.assert_array_equal(division.labeled, division.clean_probability > threshold)
    assert ((division.clean_probability >= 0) & (division.clean_probability <= 1)).all()


def test_the_clean_component_is_the_one_with_the_smaller_mean():
    """The mixture's components come in any order: taken by position, every second run would train on the wrong
    labels."""
    division = codivide(two_groups(), 0.5, truly_clean=np.arange(250) < 150)
    assert division.means[0] < division.means[1]
    assert division.auc > 0.99
    assert division.labeled[:150].mean() > 0.9
    assert division.labeled[150:].mean() < 0.1


def test_window_averages_normalised_losses_and_does_not_normalise_again():
    """Raw losses shrink over the epochs: averaged before normalising, the first epochs would decide alone."""
    history = np.stack([two_groups(seed=k) * 10**k for k in range(4)])
    np.testing.assert_allclose(smoothed(history, 2), (normalise(history[2]) + normalise(history[3])) / 2)
    np.testing.assert_allclose(smoothed(history[:1], 5), normalise(history[0]))
    assert smoothed(history, 4).max() < 1


@pytest.mark.parametrize(
    ("losses", "words"), [([1.0] * 9, "equal"), ([1.0, np.nan, 2.0], "finite"), ([1.0, np.inf], "finite")]
)
def test_losses_that_divide_nothing_are_refused(losses, words):
    """0/0 in the normalisation turns every weight into NaN without a word."""
    with pytest.raises(DivideMixError, match=words):
        codivide(np.array(losses), 0.5)


def test_auc_is_undefined_without_both_kinds():
    """At r = 0 there is nothing to tell apart: a made-up number in the logs would be a lie."""
    losses = two_groups()
    assert codivide(losses, 0.5).auc is None
    assert codivide(losses, 0.5, truly_clean=np.ones(250, bool)).auc is None


def test_precision_and_recall_of_the_labeled_set_by_hand():
    """The metrics say how good the labels are that are trained on: exchanged, they would say the opposite."""
    division = half(10, 4)  # the first four are labeled
    clean = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0], bool)
    assert division.precision_recall(clean) == (3 / 4, 3 / 5)
    assert half(10, 0).precision_recall(clean) == (None, 0.0)
    assert division.precision_recall(np.zeros(10, bool)) == (0.0, None)


def test_empty_labeled_set_keeps_the_division_before():
    """Training on no labeled image crashes; a made-up division would be another method."""
    losses = torch.from_numpy(two_groups())
    first = CoDivide(threshold=1 - 1e-16)
    with pytest.warns(UserWarning, match="one more warm-up epoch"):
        assert first(losses, None, 0) is None
    later = CoDivide(threshold=0.5)
    division = later(losses, None, 0)
    later.threshold = 1 - 1e-16
    with pytest.warns(UserWarning, match="division before is kept"):
        assert later(losses, None, 1) is division


def test_state_round_trip_continues_with_the_same_divisions():
    """A continued run that forgot the loss history would divide otherwise than the uninterrupted one."""
    rows = [torch.from_numpy(two_groups(seed=k)) for k in range(7)]
    straight, stopped = CoDivide(0.6, window=5), CoDivide(0.6, window=5)
    for row in rows[:6]:
        straight(row, None, 0)
        stopped(row, None, 0)
    resumed = CoDivide(0.6, window=5)
    resumed.load_state(stopped.state())
    assert isinstance(resumed.division, Division)
    a, b = straight(rows[6], None, 1), resumed(rows[6], None, 1)
    np.testing.assert_array_equal(a.clean_probability, b.clean_probability)


# ---- Many samples ----


def real_losses(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Losses (n,) as a network gives them after its warm-up, and which labels are right: 60 % with small losses."""
    rng = np.random.default_rng(seed)
    clean = rng.random(n) < 0.6
    losses = np.where(clean, rng.gamma(1.5, 0.15, n), rng.normal(2.5, 0.9, n).clip(0.01))
    return losses.astype(np.float32), clean


def whole(losses: np.ndarray, random_state: int) -> np.ndarray:
    """Clean probability as scikit-learn computes it when it is given all losses, to fit and to predict, at once."""
    loss = normalise(losses).reshape(-1, 1)
    gmm = GaussianMixture(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=random_state).fit(loss)
    return gmm.predict_proba(loss)[:, gmm.means_.argmin()]


@pytest.mark.parametrize("chunk", [1000, 777, 1, 5000])
def test_up_to_the_limit_nothing_is_left_out(monkeypatch, chunk):
    """The paper's data sets would be divided otherwise than by the authors' mixture, for a speed they do not need."""
    losses = real_losses(1000)[0]
    monkeypatch.setattr("dividemix.codivide.FIT_LIMIT", 1000)
    monkeypatch.setattr("dividemix.codivide._CHUNK", chunk)
    np.testing.assert_array_equal(clean_probability(losses, random_state=3), whole(losses, 3))


def test_posteriors_of_many_samples_are_those_of_one_call():
    """A sample at the seam of two chunks, or in the short last one, would get another weight."""
    losses = real_losses(200_001)[0]
    np.testing.assert_array_equal(clean_probability(losses), whole(losses, 0))


def test_past_the_limit_a_subsample_gives_nearly_the_same_split(monkeypatch):
    """Large data sets would be divided by a mixture of other losses than their own."""
    losses, clean = real_losses(100_000)
    full = codivide(losses, 0.5, truly_clean=clean, random_state=1)
    monkeypatch.setattr("dividemix.codivide.FIT_LIMIT", 20_000)
    part = codivide(losses, 0.5, truly_clean=clean, random_state=1)
    assert not np.array_equal(part.means, full.means)
    assert (part.labeled != full.labeled).mean() < 0.002
    assert np.abs(part.clean_probability - full.clean_probability).max() < 0.05
    assert part.auc == pytest.approx(full.auc, abs=1e-4)


def test_the_subsample_is_seeded_and_not_the_first_samples(monkeypatch):
    """A continued run would divide otherwise; or a list in the order of its classes would be judged by the first."""
    monkeypatch.setattr("dividemix.codivide.FIT_LIMIT", 5000)
    losses = np.sort(real_losses(50_000)[0])
    division, again, other = (codivide(losses, 0.5, random_state=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(division.clean_probability, again.clean_probability)
    assert not np.array_equal(division.means, other.means)
    assert 0.5 < division.labeled.mean() < 0.7


# ---- Other samples every epoch ----


def test_the_caller_can_tell_a_division_of_the_samples_before():
    """Clothing1M divides other images every epoch: the old division of the old images would be used on the new."""
    losses = [torch.from_numpy(two_groups(150, wrong, seed)) for seed, wrong in enumerate((100, 70, 30))]
    dividing = CoDivide(threshold=0.5)
    assert len(dividing(losses[0], None, 0).labeled) == 250 and not dividing.kept
    dividing.threshold = 1 - 1e-16
    with pytest.warns(UserWarning, match="division before is kept"):
        assert len(dividing(losses[1], None, 0).labeled) == 250
    assert dividing.kept
    dividing.threshold = 0.5
    assert len(dividing(losses[2], None, 0).labeled) == 180 and not dividing.kept
    first = CoDivide(threshold=1 - 1e-16)
    with pytest.warns(UserWarning, match="one more warm-up epoch"):
        assert first(losses[0], None, 0) is None
    assert not first.kept
