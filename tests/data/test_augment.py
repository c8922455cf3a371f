"""Batched crop and flip against torchvision's own, image by image."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from scipy.stats import chisquare

from dividemix.data.device import PAD, centre, crop_flip, draw_crops, pad_images, to_float


def random_images(n=8, size=32):
    return torch.from_numpy(np.random.default_rng(0).integers(1, 256, (n, size, size, 3), dtype=np.uint8))


def test_crop_and_flip_equal_torchvision_for_the_same_draws():
    """A crop that is shifted, wraps around, or flips before it crops, trains on images that torchvision would not
    give."""
    images = random_images()
    rng = np.random.default_rng(1)
    index = torch.from_numpy(rng.integers(0, len(images), 64))
    crops = torch.from_numpy(draw_crops(rng, 64, flip=True))
    views = crop_flip(pad_images(images), index, crops)
    for view, i, (top, left, flip) in zip(views, index, crops.tolist(), strict=True):
        expected = TF.crop(TF.pad(images[i].permute(2, 0, 1), [PAD] * 4), top, left, 32, 32)
        expected = TF.horizontal_flip(expected) if flip else expected
        torch.testing.assert_close(view.permute(2, 0, 1), expected)


def test_draws_are_uniform_and_independent_per_image():
    """Offsets that miss an edge, a coin that is not fair, or one draw for a whole batch, weaken the augmentation."""
    crops = draw_crops(np.random.default_rng(0), 20_000, flip=True)
    for column, values in zip(crops.T, (9, 9, 2), strict=True):
        counts = np.bincount(column, minlength=values)
        assert len(counts) == values
        assert chisquare(counts).pvalue > 1e-4
    correlation = np.corrcoef(crops.T.astype(float))
    assert np.abs(correlation - np.eye(3)).max() < 0.03
    assert np.abs(np.corrcoef(crops[:-1, 0], crops[1:, 0])[0, 1]) < 0.03


def test_no_flip_where_it_changes_the_label():
    """A mirrored 2 is no digit."""
    assert (draw_crops(np.random.default_rng(0), 1000, flip=False)[:, 2] == 0).all()


def test_padding_is_black_before_normalisation():
    """Grey padding (zero after normalisation) is not what the paper's transforms do."""
    images = random_images(1)
    corner = crop_flip(pad_images(images), torch.tensor([0]), torch.tensor([[0, 0, 0]], dtype=torch.uint8))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.2, 0.1])
    torch.testing.assert_close(to_float(corner, mean, std)[0, :, 0, 0], -mean / std)


def test_evaluation_sees_the_images_as_they_are():
    """An off-by-one in the padding would shift every test image."""
    images = random_images()
    torch.testing.assert_close(centre(pad_images(images)), images)


def test_normalisation_equals_torchvision():
    """Mean and std mixed up, or applied to 0..255, still train, only worse."""
    images = random_images()
    mean, std = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
    expected = TF.normalize(images.permute(0, 3, 1, 2).float() / 255, mean, std)
    result = to_float(images, torch.tensor(mean), torch.tensor(std))
    torch.testing.assert_close(result, expected)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (0, 5, 7, 3), (3, 1, 1, 3)])
def test_normalisation_is_the_plain_formula_to_the_bit(shape):
    """The fast form would move every result that was measured with the plain one."""
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, (mean, std) = images.clone(), torch.tensor([[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]])
    found = to_float(images, mean, std)
    assert torch.equal(found, ((images.to(torch.float32) / 255 - mean) / std).permute(0, 3, 1, 2))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
