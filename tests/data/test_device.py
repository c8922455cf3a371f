"""Batches of the device data set: one pass, the authors' restarts, draws that follow from the generator alone."""

from itertools import chain

import numpy as np
import pytest
import torch
from helpers.nets import half
from hypothesis import given, settings
from hypothesis import strategies as st

from dividemix.data.device import DeviceImages


def dataset(n, flip=True):
    """n images of one grey value each, so that a view's centre pixel tells which image it shows."""
    images = np.broadcast_to(np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None], (n, 16, 16, 3)).copy()
    return DeviceImages(images, np.arange(n), (0.0,) * 3, (1 / 255,) * 3, flip)


def shown(views):
    """Which images the views (B, 3, 16, 16) show."""
    return (views[:, 0, 8, 8].round().long() - 1).tolist()


@given(st.integers(2, 60), st.integers(1, 60), st.integers(1, 17), st.integers(0, 999))
@settings(max_examples=40)
def test_a_pass_shows_every_labeled_sample_once(n, labeled, batch_size, seed):
    """A sample left out or shown twice; an unlabeled batch of the wrong size; a weight on another sample."""
    labeled = min(labeled, n)
    data, division = dataset(n), half(n, labeled)
    division.clean_probability[:] = np.linspace(0.6, 0.9, n)
    seen_x, seen_u = [], []
    for batch in data.mixmatch_batches(division, batch_size, np.random.default_rng(seed)):
        x1, x2, labels, w, u1, u2 = data.mixmatch_views(*batch)
        assert shown(x1) == shown(x2) == labels.tolist()
        assert shown(u1) == shown(u2)
        np.testing.assert_allclose(w, division.clean_probability[labels], rtol=1e-6)
        seen_x.append(labels.tolist())
        seen_u.append(shown(u1))
    assert sorted(chain.from_iterable(seen_x)) == list(range(labeled))
    assert all(len(rows) == batch_size for rows in seen_x[:-1])
    assert set(chain.from_iterable(seen_u)) <= set(range(labeled, n))
    unlabeled = n - labeled
    passes = -(-unlabeled // batch_size) if unlabeled else 0
    for i, rows in enumerate(seen_u):
        last = passes and i % passes == passes - 1
        assert len(rows) == (0 if not unlabeled else (unlabeled - (passes - 1) * batch_size) if last else batch_size)
    if passes and len(seen_u) >= passes:  # the first pass shows each unlabeled sample once
        assert sorted(chain.from_iterable(seen_u[:passes])) == list(range(labeled, n))


def test_the_unlabeled_set_is_reshuffled_when_it_restarts():
    """The same order again would pair the same labeled and unlabeled images all epoch long."""
    data = dataset(60)
    batches = data.mixmatch_batches(half(60, 50), 10, np.random.default_rng(0))
    passes = [tuple(unlabeled.tolist()) for _, unlabeled, *_ in batches]
    assert len(passes) == 5
    assert len(set(passes)) > 1


def test_two_views_are_independent():
    """One crop for both views would make the guess an average of one prediction."""
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    data = DeviceImages(images, np.zeros(40, np.int64), (0.5,) * 3, (0.5,) * 3, True)
    (batch, *_) = data.mixmatch_batches(half(40), 20, np.random.default_rng(0))
    x1, x2, _, _, u1, u2 = data.mixmatch_views(*batch)
    for a, b in ((x1, x2), (u1, u2)):
        assert (a != b).flatten(1).any(dim=1).float().mean() > 0.9


def test_warmup_is_a_pass_in_a_new_order():
    """An epoch in file order would train class after class."""
    data = dataset(50)
    first, second = ([index.tolist() for index, _ in data.warmup_batches(16, np.random.default_rng(k))] for k in (0, 1))
    assert [len(rows) for rows in first] == [16, 16, 16, 2]
    assert sorted(chain.from_iterable(first)) == sorted(chain.from_iterable(second)) == list(range(50))
    assert first != second


def test_the_generator_alone_decides_the_draws():
    """A draw from a global stream would make a continued run differ from the uninterrupted one."""
    data = dataset(30)
    torch.manual_seed(0)
    a = data.mixmatch_batches(half(30), 4, np.random.default_rng(5))
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    b = data.mixmatch_batches(half(30), 4, np.random.default_rng(5))
    for left, right in zip(a, b, strict=True):
        for x, y in zip(left, right, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("batch_size", [1, 7, 50, 1000])
def test_evaluation_goes_through_all_images_in_order(batch_size):
    """A tail that is dropped would change every accuracy a little."""
    data = dataset(50)
    batches = list(data.eval_batches(batch_size))
    assert list(chain.from_iterable(shown(x) for x, _ in batches)) == list(range(50))
    assert len(batches) == len(data.eval_batches(batch_size))


def test_originals_are_the_images_without_padding():
    """Else the report shows a black frame, or another image beside a label."""
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    data = DeviceImages(images, np.arange(5), (0.5,) * 3, (0.5,) * 3, True)
    np.testing.assert_array_equal(list(data.originals(np.array([3, 1]))), images[[3, 1]])
