"""The WebVision network: published checkpoints load, and give the published outputs."""

import json

import numpy as np
import pytest
import torch
from helpers.nets import GOLDEN, golden_weights
from torch import nn

from InceptionResNetV2 import InceptionResNetV2


@pytest.fixture(scope="module")
def golden_net() -> nn.Module:
    """50 classes, the golden weights, eval mode."""
    return golden_weights(InceptionResNetV2(50), 0).eval()


@pytest.fixture
def fresh_net() -> nn.Module:
    """5 classes, as training would start it."""
    torch.manual_seed(0)
    return InceptionResNetV2(5)


def test_golden_keys_and_shapes(golden_net):
    """Published DivideMix checkpoints would not load."""
    expected = json.loads((GOLDEN / "inceptionresnetv2_keys.json").read_text())
    assert {key: list(value.shape) for key, value in golden_net.state_dict().items()} == expected


def test_golden_logits(golden_net):
    """Another scale, BN eps, padding or last ReLU has the same keys and other outputs (a wrong eps alone: off by 0.6 %
    of the largest logit): a published checkpoint would load and be another network."""
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((2, 3, 299, 299)).astype(np.float32))
    golden = np.load(GOLDEN / "inceptionresnetv2.npz")["logits"]
    with torch.no_grad():
        np.testing.assert_allclose(golden_net(x).numpy(), golden, rtol=0, atol=1e-4 * np.abs(golden).max())


@pytest.mark.parametrize("size", [(75, 75), (75, 140), (96, 96)])
def test_takes_images_of_75_px_and_up(golden_net, size):
    """A head tied to 299x299 would fail on small crops after the data has been loaded."""
    with torch.no_grad():
        assert golden_net(torch.randn(1, 3, *size)).shape == (1, 50)


def test_head_is_float32_under_autocast(golden_net):
    """Logits rounded to bf16 have three digits: too few for the losses that the mixture is fitted to."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = golden_net(torch.randn(1, 3, 75, 75))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_a_step_reaches_every_parameter(fresh_net):
    """A branch that is built but not used would load and save, and never learn."""
    fresh_net(torch.randn(4, 3, 107, 107)).logsumexp(1).sum().backward()
    for name, parameter in fresh_net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # BN takes away what block8's bias, with no ReLU between, adds to a whole map: zero up to rounding.
        assert parameter.grad.any() or name == "block8.conv2d.bias", name


def test_training_forward_is_deterministic(fresh_net):
    """Dropout, which the paper's ImageNet net has, would make net's own guesses noisier than the authors'."""
    x = torch.randn(2, 3, 107, 107)
    with torch.no_grad():
        assert torch.equal(fresh_net(x), fresh_net(x))


def test_initialisation_is_pytorchs_default(fresh_net):
    """A Kaiming, truncated-normal or zero-gamma extra moves the warm-up, and with it the first division."""
    for name, module in fresh_net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
            assert (module.eps, module.momentum) == (1e-3, 0.1), name
        elif isinstance(module, nn.Conv2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5  # uniform in +-bound, the bias too
            assert module.weight.abs().max() <= bound, name
            assert module.weight.std() > 0.9 * bound / np.sqrt(3), name
            assert module.bias is None or 0 < module.bias.abs().max() <= bound, name
