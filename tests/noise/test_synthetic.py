"""Injected noise: the authors' to the label, and instance-dependent noise as published, computed in blocks."""

import hashlib
import json

import numpy as np
import pytest
from helpers.nets import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # scikit-learn needs it, the project does not

from dividemix import DivideMixError
from dividemix.noise import synthetic
from dividemix.noise.synthetic import asym_transition, inject, inject_instance_dependent, next_class
from dividemix.seeds import draws

GOLDEN_NOISE = json.loads((GOLDEN / "noise.json").read_text())


@pytest.mark.parametrize("name", GOLDEN_NOISE)
def test_seed_123_is_the_authors_noise(name):
    """Other noise than the authors' could not be compared with their numbers."""
    golden = GOLDEN_NOISE[name]
    dataset, r, mode = name.split("_")
    classes = int(dataset.removeprefix("cifar"))
    labels = inject([i % classes for i in range(50_000)], mode, float(r), classes, golden["seed"])
    assert labels[:20] == golden["first20"]
    assert sum(label != i % classes for i, label in enumerate(labels)) == golden["changed"]
    assert hashlib.sha256(json.dumps(labels).encode()).hexdigest() == golden["sha256"]


KINDS = [("sym", "with_self"), ("sym", "exclude_self"), ("asym", "with_self")]


@given(st.integers(1, 300), st.floats(0, 1), st.integers(2, 20), st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_exactly_r_n_samples_are_drawn_and_a_seed_gives_one_list(n, r, classes, seed, kind):
    """A rate that is only about right, or noise that changes between runs, makes two results incomparable."""
    mode, definition = kind
    labels = np.arange(n) % classes
    noisy = np.array(inject(labels, mode, r, classes, seed, definition=definition))
    assert noisy.tolist() == inject(labels, mode, r, classes, seed, definition=definition)
    assert len(noisy) == n and 0 <= noisy.min() <= noisy.max() < classes
    # A map that changes every class shows which samples were drawn.
    drawn = labels != inject(labels, "asym", r, classes, seed, transition=next_class(classes))
    assert drawn.sum() == int(r * n) and not (noisy != labels)[~drawn].any()
    assert definition == "with_self" or (noisy != labels)[drawn].all()


def test_exclude_self_draws_every_other_class_alike():
    """A class that is never drawn, or twice as often, is another noise."""
    counts = np.bincount(inject([3] * 9_000, "sym", 1.0, 10, 0, definition="exclude_self"), minlength=10)
    assert counts[3] == 0 and stats.chisquare(np.delete(counts, 3)).pvalue > 1e-4


def test_asymmetric_maps():
    """Another map is another experiment: the paper's for CIFAR-10, a ring in each superclass for CIFAR-100."""
    assert asym_transition(10)[0] == asym_transition(10, "cifar10")[0] == [0, 1, 0, 5, 7, 3, 6, 7, 8, 1]
    assert asym_transition(10, "digits")[0] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    transition = asym_transition(100)[0]
    assert sorted(transition) == list(range(100))
    for five in synthetic.CIFAR100_SUPERCLASSES:
        assert list(five) == sorted(five)
        assert [transition[c] for c in five] == [*five[1:], five[0]]


def test_unknown_names_are_refused():
    """The authors' script writes a list that is too short and trains on it."""
    with pytest.raises(DivideMixError, match="pairflip"):
        inject([0, 1], "pairflip", 0.5, 2, 0)
    with pytest.raises(DivideMixError, match="include_self"):
        inject([0, 1], "sym", 0.5, 2, 0, definition="include_self")


def random_images(n: int, side: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def sample_by_sample(images, labels, r, num_class, seed):
    """The algorithm as the paper writes it, from the same draws."""
    rng = draws(seed, "noise")
    rates = stats.truncnorm((0 - r) / 0.1, (1 - r) / 0.1, loc=r, scale=0.1)
    low, high = stats.norm(r, 0.1).cdf([0, 1])
    q = rates.ppf((rng.uniform(low, high, len(labels)) - low) / (high - low))
    uniform = rng.random(len(labels))
    w = [rng.standard_normal((images[0].size, num_class)) for _ in range(num_class)]
    noisy = []
    for x, y, q_i, u in zip(images, labels, q, uniform, strict=True):
        p = x.reshape(-1).astype(float) @ w[y]
        p[y] = -np.inf
        p = q_i * np.exp(p - p.max()) / np.exp(p - p.max()).sum()
        p[y] += 1 - q_i
        assert p.sum() == pytest.approx(1)
        noisy.append(int(np.searchsorted(p.cumsum(), u, side="right")))
    return np.array(noisy)


@pytest.mark.parametrize("r", [0.05, 0.4, 0.95])
def test_instance_dependent_noise_is_the_papers_algorithm(monkeypatch, r):
    """Noise by another rule cannot be compared with anybody's numbers at this rate; and the true labels must stay."""
    images, labels = random_images(300) // 64, np.random.default_rng(1).integers(0, 4, 300)  # dark: scores are close
    before, expected = labels.copy(), sample_by_sample(images, labels, r, 4, 7)
    for block in (2048, 13):
        monkeypatch.setattr(synthetic, "_BLOCK", block)
        noisy = inject_instance_dependent(images, labels, r, 4, 7)
        np.testing.assert_array_equal(noisy, expected)
        np.testing.assert_array_equal(labels, before)
        assert noisy.dtype == np.int64


@pytest.mark.parametrize("r", [0, 0.1, 0.5, 1])
def test_the_share_of_wrong_labels_is_as_expected(r):
    """Else our own file would be refused, or another rate's accepted. Near 0 and 1 the flip rates are truncated."""
    mean = stats.truncnorm(-r / 0.1, (1 - r) / 0.1, loc=r, scale=0.1).mean()
    assert synthetic.mean_flip_rate(r) == pytest.approx(mean, abs=1e-9)
    labels = np.arange(10_000) % 10
    wrong = (inject_instance_dependent(random_images(10_000, side=1), labels, r, 10, 0) != labels).mean()
    assert wrong == pytest.approx(mean, abs=0.025)  # five standard deviations
