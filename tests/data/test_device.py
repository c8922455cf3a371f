"""The device data set: views that equal torchvision's, and passes whose draws follow from the generator alone."""

from itertools import chain

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from helpers.nets import half
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from dividemix.data import autoaugment
from dividemix.data.device import PAD, DeviceImages, centre, crop_flip, draw_crops, pad_images, to_float


def random_images(n=8, size=16):
    return np.random.default_rng(0).integers(1, 256, (n, size, size, 3), dtype=np.uint8)


def dataset(n):
    """n images of one grey value each, so that a view's centre pixel tells which image it shows."""
    images = np.broadcast_to(np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None], (n, 16, 16, 3)).copy()
    return DeviceImages(images, np.arange(n), (0.0,) * 3, (1 / 255,) * 3, flip=True)


def shown(views):
    """Which images the views (B, 3, 16, 16) show."""
    return (views[:, 0, 8, 8].round().long() - 1).tolist()


def test_crop_and_flip_equal_torchvision_for_the_same_draws():
    """A crop that is shifted, wraps around, has a grey border, or flips before it crops, is not the paper's."""
    images = torch.from_numpy(random_images())
    rng = np.random.default_rng(1)
    index = torch.from_numpy(rng.integers(0, len(images), 64))
    crops = torch.from_numpy(draw_crops(rng, 64, flip=True))
    views = crop_flip(pad_images(images), index, crops)
    for view, i, (top, left, flip) in zip(views, index, crops.tolist(), strict=True):
        expected = TF.crop(TF.pad(images[i].permute(2, 0, 1), [PAD] * 4), top, left, 16, 16)
        expected = TF.horizontal_flip(expected) if flip else expected
        assert torch.equal(view.permute(2, 0, 1), expected)
    assert torch.equal(centre(pad_images(images)), images)


@pytest.mark.parametrize(("side", "pad"), [(32, 4), (28, 4), (16, 2), (5, 0)])
def test_the_border_is_the_papers_or_a_seventh_of_a_small_image(side, pad):
    """A shift by 4 of 16 pixels cuts a quarter of the image off: networks on digits then learn several times slower."""
    images = np.full((50, side, side, 3), 255, np.uint8)
    data = DeviceImages(images, np.zeros(50, np.int64), (0.0,) * 3, (1.0,) * 3, flip=True)
    [views] = [data.warmup_views(*batch)[0] for batch in data.warmup_batches(50, np.random.default_rng(0))]
    filled = (views[:, 0] > 0).any(dim=2).sum(dim=1)
    assert views.shape[2:] == (side, side) and filled.min() == side - pad and filled.max() == side
    assert np.array_equal(np.stack([*data.originals(np.arange(50))]), images)


def test_draws_are_uniform_and_independent_per_image():
    """Offsets that miss an edge, an unfair coin, or one draw for a whole batch weaken the augmentation."""
    crops = draw_crops(np.random.default_rng(0), 20_000, flip=True)
    for column, values in zip(crops.T, (9, 9, 2), strict=True):
        counts = np.bincount(column, minlength=values)
        assert len(counts) == values and chisquare(counts).pvalue > 1e-4
    columns = np.column_stack([crops[1:], crops[:-1, 0]]).astype(float)
    assert np.abs(np.corrcoef(columns.T) - np.eye(4)).max() < 0.03
    assert (draw_crops(np.random.default_rng(0), 1000, flip=False)[:, 2] == 0).all()


@pytest.mark.parametrize("n", [2, 0])
def test_normalisation_is_the_plain_formula_to_the_bit(n):
    """The fast form would move every result; mean and std mixed up still train, only worse."""
    images = torch.from_numpy(random_images(n)[:, :5, :7])
    before, (mean, std) = images.clone(), torch.tensor([[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]])
    result = to_float(images, mean, std)
    assert torch.equal(result, ((images.to(torch.float32) / 255 - mean) / std).permute(0, 3, 1, 2))
    assert result.is_contiguous(memory_format=torch.channels_last) and torch.equal(images, before)


@given(st.integers(2, 60), st.integers(1, 60), st.integers(1, 17), st.integers(0, 999))
@settings(max_examples=25)
def test_a_pass_shows_every_labeled_sample_once(n, labeled, batch_size, seed):
    """A sample left out or shown twice; an unlabeled batch of the wrong size; a weight on another sample."""
    labeled = min(labeled, n)
    data, division = dataset(n), half(n, labeled)
    division.clean_probability[:] = np.linspace(0.6, 0.9, n)
    seen_x, seen_u, rest = [], [], []
    for batch in data.mixmatch_batches(division, batch_size, np.random.default_rng(seed)):
        x1, x2, labels, w, u1, u2 = data.mixmatch_views(*batch)
        assert shown(x1) == shown(x2) == labels.tolist() and shown(u1) == shown(u2)
        np.testing.assert_allclose(w, division.clean_probability[labels], rtol=1e-6)
        seen_x.append(labels.tolist())
        seen_u.append(shown(u1))
        rest = rest or [*range(labeled, n)]  # what this pass over the unlabeled set has still to show
        assert len(seen_u[-1]) == min(batch_size, len(rest)) and {*seen_u[-1]} <= {*rest}
        rest = [i for i in rest if i not in seen_u[-1]]
    assert sorted(chain.from_iterable(seen_x)) == list(range(labeled))
    assert all(len(rows) == batch_size for rows in seen_x[:-1])


def test_order_and_views_are_new_in_each_pass_and_the_generator_decides_them():
    """The same images would meet all epoch long, or a continued run differ from the uninterrupted one."""
    data = DeviceImages(random_images(60), np.arange(60), (0.5,) * 3, (0.5,) * 3, True)
    passes = []
    for global_seed, seed in ((0, 5), (1, 5), (1, 6)):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002
        passes.append([*data.mixmatch_batches(half(60, 50), 10, np.random.default_rng(seed))])
    first, same_seed, other_seed = (torch.cat([torch.cat(batch[:2]) for batch in batches]) for batches in passes)
    assert torch.equal(first, same_seed) and not torch.equal(first, other_seed)
    for x, y in zip(*passes[:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
    assert len({tuple(unlabeled.tolist()) for _, unlabeled, *_ in passes[0]}) > 1  # a new order in each pass
    x1, x2, _, _, u1, u2 = data.mixmatch_views(*passes[0][0])
    for a, b in ((x1, x2), (u1, u2)):
        assert (a != b).flatten(1).any(dim=1).float().mean() > 0.7  # of 81 crops and a coin
    data = dataset(60)
    first, second = ([*data.warmup_batches(16, np.random.default_rng(k))] for k in (0, 1))
    for batches in (first, second):
        assert [len(index) for index, _ in batches] == [16, 16, 16, 12]
        assert torch.cat([index for index, _ in batches]).sort().values.tolist() == list(range(60))
    views, labels = data.warmup_views(*first[0])
    assert shown(views) == labels.tolist() == first[0][0].tolist() != second[0][0].tolist()


def test_evaluation_shows_all_images_in_order_as_they_are():
    """A tail that is dropped, or a shift by the padding, would change every accuracy."""
    images = random_images(50)
    data = DeviceImages(images, np.arange(50), (0.0,) * 3, (1 / 255,) * 3, True)
    for batch_size in (7, 50, 1000):
        batches = data.eval_batches(batch_size)
        x, labels = (torch.cat(column) for column in zip(*batches, strict=True))
        assert labels.tolist() == list(range(50)) and len(batches) == -(-50 // batch_size)
        np.testing.assert_array_equal(x.permute(0, 2, 3, 1).round(), images)
    np.testing.assert_array_equal(list(data.originals(np.array([3, 1]))), images[[3, 1]])


def test_strong_views_are_drawn_apart():
    """With --augment strong the weak views, their order or mixup would be drawn anew: no two runs could be compared
    step by step, or the strong views be those that the targets are found on."""
    images = random_images(40)
    weak, strong = (DeviceImages(images, np.arange(40), (0.0,) * 3, (1 / 255,) * 3, True, strong=on) for on in (0, 1))
    generators = [np.random.default_rng(3) for _ in range(2)]
    passes = [
        data.mixmatch_batches(half(40, 25), 10, rng) for data, rng in zip((weak, strong), generators, strict=True)
    ]
    assert generators[0].random() == generators[1].random() and passes[0].sizes == passes[1].sizes
    for batch, with_strong in zip(*passes, strict=True):
        *views, x3, x4, u3, u4 = strong.mixmatch_views(*with_strong)
        assert all(torch.equal(a, b) for a, b in zip(weak.mixmatch_views(*batch), views, strict=True))
        labeled, unlabeled, *_, crops, operations = with_strong
        index = torch.cat([labeled, labeled, unlabeled, unlabeled])
        cut = autoaugment.augment(crop_flip(strong.padded, index, crops, strong.pad), operations)
        shown = torch.cat([x3, x4, u3, u4]).permute(0, 2, 3, 1).round()
        torch.testing.assert_close(shown, cut.float())
        assert not torch.equal(crops, with_strong[2]) and not torch.equal(x3, x4)
