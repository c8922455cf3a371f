"""Noise that is injected: the authors' to the label."""

import hashlib
import json

import numpy as np
import pytest
from helpers.nets import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from dividemix import DivideMixError
from dividemix.noise.synthetic import CIFAR100_SUPERCLASSES, asym_transition, inject

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


@given(
    st.integers(1, 300),
    st.floats(0, 1),
    st.integers(2, 20),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["sym", "asym"]),
)
def test_exactly_r_n_samples_are_drawn_and_a_seed_gives_one_list(n, r, classes, seed, mode):
    """A rate that is only about right, or noise that changes between runs, makes two results incomparable."""
    labels = [i % classes for i in range(n)]
    noisy = inject(labels, mode, r, classes, seed)
    assert noisy == inject(labels, mode, r, classes, seed)
    assert len(noisy) == n
    assert all(0 <= label < classes for label in noisy)
    # A map that moves every class shows which samples were drawn.
    moved = inject(labels, "asym", r, classes, seed, transition=[(c + 1) % classes for c in range(classes)])
    drawn = {i for i in range(n) if moved[i] != labels[i]}
    assert len(drawn) == int(r * n)
    assert {i for i in range(n) if noisy[i] != labels[i]} <= drawn


@given(st.integers(1, 300), st.floats(0, 1), st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_exclude_self_makes_every_drawn_label_wrong(n, r, classes, seed):
    """Else a nominal 50 % is not 50 %, or the two definitions draw other samples at one seed."""
    labels = [i % classes for i in range(n)]
    noisy = np.array(inject(labels, "sym", r, classes, seed, definition="exclude_self"))
    moved = inject(labels, "asym", r, classes, seed, transition=[(c + 1) % classes for c in range(classes)])
    assert 0 <= noisy.min() <= noisy.max() < classes
    np.testing.assert_array_equal(noisy != labels, np.array(moved) != labels)


def test_exclude_self_draws_every_other_class_alike():
    """A class that is never drawn, or twice as often, is another noise."""
    given = inject([3] * 90_000, "sym", 1.0, 10, 0, definition="exclude_self")
    counts = np.bincount(given, minlength=10)
    assert counts[3] == 0
    assert np.abs(np.delete(counts, 3) - 10_000).max() < 500  # five standard deviations


def test_asymmetric_map_of_cifar10_is_the_papers():
    """Another map is another experiment."""
    assert asym_transition(10)[0] == [0, 1, 0, 5, 7, 3, 6, 7, 8, 1]


def test_asymmetric_map_of_cifar100_is_a_ring_inside_each_superclass():
    """A label that leaves its superclass would make CIFAR-100's asymmetric noise easier than it is meant to be."""
    transition = asym_transition(100)[0]
    assert sorted(transition) == list(range(100))
    for five in CIFAR100_SUPERCLASSES:
        assert list(five) == sorted(five)
        assert [transition[c] for c in five] == [*five[1:], five[0]]


def test_other_sets_go_to_the_next_class():
    """Digits and Fashion-MNIST have 10 classes too, but CIFAR-10's map means nothing for them."""
    assert asym_transition(10, "digits")[0] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert asym_transition(3)[0] == [1, 2, 0]


def test_unknown_mode_is_refused():
    """The authors' script writes a list that is too short and trains on it."""
    with pytest.raises(DivideMixError, match="pairflip"):
        inject([0, 1], "pairflip", 0.5, 2, 0)
    with pytest.raises(DivideMixError, match="include_self"):
        inject([0, 1], "sym", 0.5, 2, 0, definition="include_self")
