"""The networks of the CIFAR and WebVision experiments: published checkpoints load, and give the published outputs."""

import json

import numpy as np
import pytest
import torch
from helpers.nets import GOLDEN, golden_weights
from torch import nn

import PreResNet
from InceptionResNetV2 import InceptionResNetV2


@pytest.fixture(scope="module")
def golden_inception() -> nn.Module:
    """50 classes, the golden weights, eval mode."""
    return golden_weights(InceptionResNetV2(50), 0).eval()


@pytest.fixture(scope="module")
def golden_resnet() -> nn.Module:
    return golden_weights(PreResNet.ResNet18(10), 0).eval()


@pytest.mark.parametrize(
    ("name", "shape", "tolerance"),
    [("preresnet18", (4, 3, 32, 32), 1e-3), ("inceptionresnetv2", (2, 3, 299, 299), 1e-4)],
)
def test_golden_keys_shapes_and_logits(golden_resnet, golden_inception, name, shape, tolerance):
    """Published checkpoints would not load, or be another network: same keys, another shortcut, scale or eps."""
    net = {"preresnet18": golden_resnet, "inceptionresnetv2": golden_inception}[name]
    expected = json.loads((GOLDEN / f"{name}_keys.json").read_text())
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == expected
    x = torch.from_numpy(np.random.RandomState(1).standard_normal(shape).astype(np.float32))
    golden = np.load(GOLDEN / f"{name}.npz")["logits"]
    with torch.no_grad():
        np.testing.assert_allclose(net(x).numpy(), golden, rtol=0, atol=tolerance * np.abs(golden).max())


@pytest.mark.parametrize(("name", "size"), [("inception", (75, 140)), ("resnet", (33, 33))])
def test_images_of_other_sizes_are_taken_with_a_float32_head(golden_inception, golden_resnet, name, size):
    """Else small crops fail after the data has been loaded, or losses have the three digits of bf16."""
    net = {"inception": golden_inception, "resnet": golden_resnet}[name]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = net(torch.randn(1, 3, *size))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize(("build", "parameters"), [(PreResNet.ResNet34, 21_282_122), (PreResNet.ResNet50, 23_520_842)])
def test_parameter_counts(build, parameters):
    """A missing layer in the nets that have no golden file: these are the well-known counts of the CIFAR ResNets."""
    with torch.device("meta"):
        assert sum(p.numel() for p in build(10).parameters()) == parameters
        assert build(10, width=16).linear.in_features == build(10).linear.in_features / 4


@pytest.mark.parametrize("build", [lambda: PreResNet.ResNet18(10, width=16), lambda: InceptionResNetV2(5)])
def test_initialisation_is_pytorchs_default(build):
    """A Kaiming, truncated-normal or zero-gamma extra moves the warm-up, and with it the first division."""
    for name, module in build().named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
            assert module.momentum == 0.1, name
        elif isinstance(module, nn.Conv2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5  # uniform in +-bound, the bias too
            assert module.weight.abs().max() <= bound, name
            assert module.weight.std() > 0.9 * bound / np.sqrt(3), name
            assert module.bias is None or 0 < module.bias.abs().max() <= bound, name


def test_inception_draws_nothing():
    """Dropout, which the paper's ImageNet net has, would make net's guesses noisier than the authors'."""
    net, x = InceptionResNetV2(5), torch.randn(2, 3, 107, 107)
    with torch.no_grad():
        assert torch.equal(net(x), net(x))
