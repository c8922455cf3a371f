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
    """Published DivideMix checkpoints would not load, or be another network: the textbook pre-activation net has the
    same keys but another shortcut; so has an Inception with another scale, BN eps (alone: off by 0.6 % of the largest
    logit), padding or last ReLU."""
    net = {"preresnet18": golden_resnet, "inceptionresnetv2": golden_inception}[name]
    expected = json.loads((GOLDEN / f"{name}_keys.json").read_text())
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == expected
    x = torch.from_numpy(np.random.RandomState(1).standard_normal(shape).astype(np.float32))
    golden = np.load(GOLDEN / f"{name}.npz")["logits"]
    with torch.no_grad():
        np.testing.assert_allclose(net(x).numpy(), golden, rtol=0, atol=tolerance * np.abs(golden).max())


@pytest.mark.parametrize("size", [(75, 75), (75, 140)])
def test_inception_takes_images_of_75_px_and_up_with_a_float32_head(golden_inception, size):
    """A head tied to 299x299 would fail on small crops after the data has been loaded. Logits rounded to bf16 have
    three digits: too few for the losses that the mixture is fitted to."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = golden_inception(torch.randn(1, 3, *size))
    assert logits.shape == (1, 50) and logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_every_depth_takes_square_inputs_of_16_and_up_with_a_float32_head(depth):
    """An image size that needs another head would fail after the data has been loaded."""
    net = getattr(PreResNet, f"ResNet{depth}")(7, width=4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for size in (16, 33):
            logits = net(torch.randn(2, 3, size, size))
            assert logits.shape == (2, 7) and logits.dtype == torch.float32


@pytest.mark.parametrize(("build", "parameters"), [(PreResNet.ResNet34, 21_282_122), (PreResNet.ResNet50, 23_520_842)])
def test_parameter_counts(build, parameters):
    """A missing layer in the nets that have no golden file: these are the well-known counts of the CIFAR ResNets."""
    with torch.device("meta"):
        assert sum(p.numel() for p in build(10).parameters()) == parameters


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


def test_width_scales_every_stage():
    """A `width` that leaves one stage wide would make the small net slow for nothing."""
    net = PreResNet.ResNet18(10, width=16)
    assert [net.conv1.out_channels, net.linear.in_features] == [16, 128]


def test_a_training_step_reaches_every_parameter_and_draws_nothing():
    """A branch that is built but not used would load and save, and never learn. Dropout, which the paper's ImageNet net
    has, would make net's own guesses noisier than the authors'."""
    net, x = InceptionResNetV2(5), torch.randn(2, 3, 107, 107)
    logits = net(x)
    logits.logsumexp(1).sum().backward()
    with torch.no_grad():
        assert torch.equal(net(x), logits)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # BN takes away what block8's bias, with no ReLU between, adds to a whole map: zero up to rounding.
        assert parameter.grad.any() or name == "block8.conv2d.bias", name
