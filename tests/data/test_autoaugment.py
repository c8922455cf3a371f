"""The policy for batches, beside torchvision's for one image."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from helpers import graph_emulator
from helpers.nets import NoSync
from scipy.stats import chi2_contingency, ks_2samp
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from dividemix.data import autoaugment

N, SIDE = 16, 32
STILL = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}


def sheared(image, slope):
    return TF.affine(image, **STILL | {"shear": [0.0, float(np.degrees(np.arctan(slope)))]}, center=[0, 0])


# By torchvision, for an image (3, H, W) and a magnitude
THEIRS = {
    "Identity": lambda image, m: image,
    "TranslateX": lambda image, m: TF.affine(image, **STILL | {"translate": [int(m), 0]}),
    "TranslateY": lambda image, m: TF.affine(image, **STILL | {"translate": [0, int(m)]}),
    "ShearY": sheared,
    "Rotate": TF.rotate,
    "Brightness": lambda image, m: TF.adjust_brightness(image, 1 + m),
    "Contrast": lambda image, m: TF.adjust_contrast(image, 1 + m),
    "Color": lambda image, m: TF.adjust_saturation(image, 1 + m),
    "Sharpness": lambda image, m: TF.adjust_sharpness(image, 1 + m),
    "Posterize": lambda image, m: TF.posterize(image, int(m)),
    "Solarize": lambda image, m: TF.solarize(image, m) if m else TF.invert(image),
    "AutoContrast": lambda image, m: TF.autocontrast(image),
    "Equalize": lambda image, m: TF.equalize(image),
}


def images(n=N, width=SIDE) -> torch.Tensor:
    """Random ones; the first has one colour, the second few values, the third a narrow range."""
    made = np.random.default_rng(0).integers(0, 256, (n, SIDE, width, 3), dtype=np.uint8)
    made[0], made[1], made[2] = 7, made[1] // 64 * 64, made[2] // 4 + 90
    return torch.from_numpy(made)


def draws(n=N, seed=0, width=SIDE) -> torch.Tensor:
    return torch.from_numpy(autoaugment.draw(np.random.default_rng(seed), n, SIDE, width))


@pytest.mark.parametrize("name", autoaugment.OPERATIONS)
def test_an_operation_is_torchvisions(name):
    """A shift the wrong way, a black that should be grey, or a mean over the batch: weaker training, and no error."""
    x, signs = images(width=28), (1, -1) if autoaugment.OPERATIONS.index(name) < autoaugment.SIGNED else (1,)
    magnitudes = autoaugment.magnitudes(SIDE, 28).get(name, np.zeros(1))
    if name == "ShearY":
        magnitudes = magnitudes[[7, 8]]  # the policy's; at others the source may be half-way between two pixels
    for magnitude in {float(sign * m) for m in magnitudes for sign in signs}:
        number = torch.full((N,), float(autoaugment.OPERATIONS.index(name)))
        result = autoaugment.operate(x, number, torch.full((N,), magnitude))
        expected = torch.stack([THEIRS[name](image.permute(2, 0, 1), magnitude).permute(1, 2, 0) for image in x])
        difference = (result.int() - expected.int()).abs()
        assert difference.max() <= (name in autoaugment.BLENDS)  # 1 level, by rounding
        assert result.dtype == torch.uint8 and result.shape == x.shape


def test_each_image_has_its_own_operations():
    """The operation or the magnitude of one image reaches another one, or all of a batch get the same."""
    x, drawn = images(), draws()
    together = autoaugment.augment(x, drawn)
    assert all(torch.equal(autoaugment.augment(x[i : i + 1], drawn[i : i + 1])[0], together[i]) for i in range(N))
    assert len(drawn.unique(dim=0)) > N / 2
    assert autoaugment.augment(x[:0], drawn[:0]).shape == (0, SIDE, SIDE, 3)  # no unlabeled image


def test_the_policy_is_torchvisions_image_by_image():
    """A probability, a level or a sign from another line of the table: a policy that nobody has published."""
    n, width = 400, 24
    x = images(n, width)
    result = autoaugment.augment(x, draws(n, 3, width))
    row, uniform, sign = autoaugment.choose(np.random.default_rng(3), n)
    agreeing = 0
    for i in range(n):
        policy = AutoAugment(AutoAugmentPolicy.CIFAR10)
        policy.get_params = lambda _, i=i: (int(row[i]), torch.from_numpy(uniform[i]), torch.from_numpy(sign[i]))
        difference = (result[i].int() - policy(x[i].permute(2, 0, 1)).permute(1, 2, 0).int()).abs()
        # A later operation may enlarge a level, and equalize the places of levels.
        agreeing += (difference > 20).float().mean() < 0.02
    assert {*row} == {*range(25)} and agreeing >= n - 1


def test_the_draws_are_torchvisions_in_distribution():
    """Else some operations would hardly occur, or most shifts go one way."""
    n = 10_000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [AutoAugment.get_params(25) for _ in range(n)]
    ours = autoaugment.choose(np.random.default_rng(0), n)
    row, uniform, sign = (np.array(column) for column in zip(*theirs, strict=True))
    for counts in ((np.bincount(a.ravel()), np.bincount(b.ravel())) for a, b in ((ours[0], row), (ours[2], sign))):
        assert chi2_contingency(counts).pvalue > 1e-4
    assert ks_2samp(ours[1].ravel(), uniform.ravel()).pvalue > 1e-4


def test_the_policy_waits_for_nothing_and_can_be_captured():
    """Else every step of a card waits for the host, or a captured one repeats the operations of its first batch."""
    x, inputs = images(), [images().clone(), draws(seed=1)]
    with NoSync():
        replay, output = graph_emulator.capture(lambda: autoaugment.augment(*inputs), None)
    for seed in (2, 3):
        inputs[0].copy_(x.flip(1)), inputs[1].copy_(draws(seed=seed))
        replay()
        assert torch.equal(output, autoaugment.augment(x.flip(1), draws(seed=seed)))
