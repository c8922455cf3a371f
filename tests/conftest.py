"""Shared by the tests: the weights of the golden files, and a tiny device data set."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from dividemix.data import DeviceImages

# No timing decides a test, and every machine tries the same examples.
settings.register_profile("dividemix", deadline=None, derandomize=True)
settings.load_profile("dividemix")

GOLDEN = Path(__file__).parent / "data"


def golden_weights(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fill a network by the golden files' rule: numpy draws in the order of the sorted state-dict keys."""
    rs = np.random.RandomState(seed)
    state = net.state_dict()
    for key in sorted(state):
        if key.endswith("num_batches_tracked"):
            continue
        value = state[key]
        z = rs.standard_normal(value.numel()).reshape(value.shape)
        if key.endswith("running_var"):
            z = 1 + 0.1 * np.abs(z)
        elif value.ndim > 1:
            z = z * np.sqrt(2 / np.prod(value.shape[1:]))
        elif key.endswith("weight"):
            z = 1 + 0.1 * z
        else:
            z = 0.1 * z
        value.copy_(torch.from_numpy(z.astype(np.float32)))
    return net


@pytest.fixture
def tiny_images() -> DeviceImages:
    """24 random 16x16 images of 3 classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    return DeviceImages(images, np.arange(24) % 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), flip=True)
