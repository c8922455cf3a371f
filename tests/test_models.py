"""The CIFAR networks: published checkpoints load, and give the published outputs."""

import json

import numpy as np
import pytest
import torch
from helpers.nets import GOLDEN, golden_weights

import PreResNet


def test_golden_keys_and_shapes():
    """Published DivideMix checkpoints would not load."""
    expected = json.loads((GOLDEN / "preresnet18_keys.json").read_text())
    assert {key: list(value.shape) for key, value in PreResNet.ResNet18(10).state_dict().items()} == expected


def test_golden_logits():
    """The textbook pre-activation net has the same keys but another shortcut, and other outputs."""
    net = golden_weights(PreResNet.ResNet18(10), 0).eval()
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((4, 3, 32, 32)).astype(np.float32))
    golden = np.load(GOLDEN / "preresnet18.npz")["logits"]
    with torch.no_grad():
        np.testing.assert_allclose(net(x).numpy(), golden, atol=1e-3 * np.abs(golden).max())


@pytest.mark.parametrize(
    "build", [PreResNet.ResNet18, PreResNet.ResNet34, PreResNet.ResNet50, PreResNet.ResNet101, PreResNet.ResNet152]
)
@pytest.mark.parametrize("size", [16, 33])
def test_every_depth_takes_square_inputs_of_16_and_up(build, size):
    """An image size that needs another head would fail after the data has been loaded."""
    net = build(7, width=4)
    assert net(torch.randn(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(("build", "parameters"), [(PreResNet.ResNet34, 21_282_122), (PreResNet.ResNet50, 23_520_842)])
def test_parameter_counts(build, parameters):
    """A missing layer in the nets that have no golden file: these are the well-known counts of the CIFAR ResNets."""
    assert sum(p.numel() for p in build(10).parameters()) == parameters


def test_initialisation_is_pytorchs_default():
    """A Kaiming or zero-gamma extra moves the early epochs, and with them the first division."""
    torch.manual_seed(0)
    net = PreResNet.ResNet18(10)
    bound = 1 / np.sqrt(64 * 9)
    weight = net.layer1[0].conv1.weight
    assert weight.abs().max() <= bound
    assert weight.std() > 0.9 * bound / np.sqrt(3)
    assert all(bool((m.weight == 1).all()) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_width_scales_every_stage():
    """A `width` that leaves one stage wide would make the small net slow for nothing."""
    net = PreResNet.ResNet18(10, width=16)
    assert [net.conv1.out_channels, net.linear.in_features] == [16, 128]


def test_head_is_float32_under_autocast():
    """Logits rounded to bf16 have three digits: too few for the losses that the mixture is fitted to."""
    with torch.autocast("cpu", torch.bfloat16):
        assert PreResNet.ResNet18(10, width=8)(torch.randn(2, 3, 32, 32)).dtype == torch.float32
