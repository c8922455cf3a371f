"""The equations: properties that hold for every input, and closed forms."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dividemix.algorithm import (
    co_guess,
    co_refine,
    linear_rampup,
    mixup,
    neg_entropy,
    prior_penalty,
    semi_loss,
    sharpen,
)


def logits(size=30.0):
    shapes = st.tuples(st.integers(1, 9), st.integers(2, 12))
    return hnp.arrays(np.float32, shapes, elements=st.floats(-size, size, width=32)).map(torch.from_numpy)


def assert_probabilities(p):
    assert torch.isfinite(p).all()
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(dim=1), torch.ones(len(p)), atol=1e-5, rtol=0)


@given(logits(), st.floats(0.01, 2.0))
@example(torch.zeros(1, 100), 0.01)
def test_sharpen_gives_probabilities_and_keeps_the_order(x, T):
    """Else targets are no distribution, or NaN: near T = 0, p^(1/T) underflows to 0/0 as written."""
    p = F.softmax(x, dim=1)
    q = sharpen(p, T)
    assert_probabilities(q)
    assert (q.gather(1, p.argmax(dim=1, keepdim=True)) >= q.amax(dim=1, keepdim=True) - 1e-6).all()


@given(logits(size=5))
def test_sharpen_is_the_identity_at_T_1_and_the_formula_elsewhere(x):
    """Eq. 4 with the wrong exponent (T instead of 1 / T) would soften instead of sharpen."""
    p = F.softmax(x, dim=1)
    torch.testing.assert_close(sharpen(p, 1.0), p, atol=1e-6, rtol=1e-5)
    squares = p.double() ** 2
    torch.testing.assert_close(
        sharpen(p, 0.5).double(), squares / squares.sum(dim=1, keepdim=True), atol=1e-6, rtol=1e-5
    )


@given(logits(size=10), st.data())
def test_co_refine_lies_between_label_and_prediction(x, data):
    """w = 1 must give the label, w = 0 the sharpened mean prediction: anything else trusts the wrong one of the two."""
    rows, classes = x.shape
    given_labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    labels = F.one_hot(torch.tensor(given_labels), classes).float()
    views = [x, x.flip(0)]
    torch.testing.assert_close(co_refine(labels, torch.ones(rows), views, 0.5), labels)
    mean = (F.softmax(x, dim=1) + F.softmax(x.flip(0), dim=1)) / 2
    torch.testing.assert_close(co_refine(labels, torch.zeros(rows), views, 0.5), sharpen(mean, 0.5))
    w = torch.full((rows,), 0.25)
    torch.testing.assert_close(co_refine(labels, w, views, 1.0), 0.25 * labels + 0.75 * mean, atol=1e-6, rtol=1e-5)


@given(logits(size=10))
def test_co_guess_averages_probabilities_not_logits(x):
    """A mean of logits would let one confident network outvote all others."""
    views = [x, 2 * x, -x, x.flip(0)]
    mean = torch.stack([F.softmax(view.double(), dim=1) for view in views]).mean(dim=0)
    torch.testing.assert_close(co_guess(views, 1.0).double(), mean, atol=1e-6, rtol=1e-5)


@given(st.integers(1, 8), st.floats(0.5, 1.0), st.randoms())
def test_mixup_is_convex_and_moves_inputs_and_targets_together(rows, lam, random):
    """An image mixed with one partner and a target with another would teach wrong labels."""
    index = list(range(rows))
    random.shuffle(index)
    inputs, targets = torch.rand(rows, 3, 2, 2), F.one_hot(torch.arange(rows)).float()
    mixed, mixed_targets = mixup(inputs, targets, lam, torch.tensor(index))
    for i, j in enumerate(index):
        torch.testing.assert_close(mixed[i], lam * inputs[i] + (1 - lam) * inputs[j])
        torch.testing.assert_close(mixed_targets[i], lam * targets[i] + (1 - lam) * targets[j])
    assert_probabilities(mixed_targets)


def test_semi_loss_is_a_mean_over_rows_and_a_mean_over_rows_and_classes():
    """Lu summed over classes makes lambda_u = 25 act like 250; the mean of no rows is NaN."""
    logits_x, logits_u = torch.randn(6, 10), torch.randn(4, 10)
    targets_x, targets_u = torch.softmax(torch.randn(6, 10), 1), torch.softmax(torch.randn(4, 10), 1)
    Lx, Lu = semi_loss(logits_x, targets_x, logits_u, targets_u)
    torch.testing.assert_close(Lx, F.cross_entropy(logits_x, targets_x))
    torch.testing.assert_close(Lu, F.mse_loss(logits_u.softmax(1), targets_u))
    assert semi_loss(logits_x, targets_x, torch.empty(0, 10), torch.empty(0, 10)) == (Lx, 0)


@given(st.floats(0, 400), st.integers(0, 50), st.floats(0, 200))
def test_rampup_starts_at_warm_up_and_is_full_16_epochs_later(t, warm_up, lambda_u):
    """A ramp that starts before the first division, or never fills, changes the weight of Lu in every epoch."""
    expected = lambda_u * min(max((t - warm_up) / 16, 0), 1)
    assert math.isclose(linear_rampup(t, warm_up, lambda_u), expected, abs_tol=1e-6)
    of_tensor = linear_rampup(torch.tensor(t, dtype=torch.float64), warm_up, lambda_u)
    assert math.isclose(float(of_tensor), expected, abs_tol=1e-6)


@given(logits())
@settings(max_examples=50)
def test_prior_penalty_is_a_divergence_from_uniform(x):
    """A penalty that is negative, or not zero for a uniform mean, would push the nets elsewhere than to all classes."""
    pbar = F.softmax(x.double(), dim=1).mean(dim=0)
    expected = (1 / x.shape[1] * torch.log(1 / x.shape[1] / pbar)).sum()
    torch.testing.assert_close(prior_penalty(x).double(), expected, atol=1e-4, rtol=1e-4)
    assert prior_penalty(torch.zeros(4, 7)).abs() < 1e-6


def test_penalties_stay_finite_where_a_probability_underflows():
    """log(0): the authors' forms give inf or NaN once a class is never predicted, and the run is lost."""
    x = torch.tensor([[1000.0, 0.0, -1000.0], [900.0, 0.0, -900.0]], requires_grad=True)
    for value in (prior_penalty(x), neg_entropy(x)):
        (gradient,) = torch.autograd.grad(value, x)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@given(logits(size=20))
def test_neg_entropy_lies_between_minus_log_C_and_zero(x):
    """The sign decides whether warm-up is pushed away from or towards overconfidence."""
    value = neg_entropy(x)
    assert -math.log(x.shape[1]) - 1e-4 <= value <= 1e-6
    assert math.isclose(neg_entropy(torch.zeros(3, 10)), -math.log(10), rel_tol=1e-5)
