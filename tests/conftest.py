"""What holds for all tests, and the fixtures of several test files."""

import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import settings

from dividemix.data.device import DeviceImages

# No timing decides a test, and every machine tries the same examples.
settings.register_profile("dividemix", deadline=None, derandomize=True)
settings.load_profile("dividemix")

# The nets of the tests are so small that a second thread costs more than it gives: ten times more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """A test's random weights are the same in every run and whatever ran before it: some nets are born dead."""
    torch.manual_seed(0)


@pytest.fixture
def start_method():
    """Sets how processes are started: a patched function is there in forked ones alone."""
    before = multiprocessing.get_start_method(allow_none=True)
    yield lambda method: multiprocessing.set_start_method(method, force=True)
    multiprocessing.set_start_method(before, force=True)


@pytest.fixture
def tiny_images() -> DeviceImages:
    """24 random 16x16 images of 3 classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    return DeviceImages(images, np.arange(24) % 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), flip=True)


@pytest.fixture
def no_figures(monkeypatch):
    """The end of a run without its report, which takes seconds."""
    monkeypatch.setattr("dividemix.report.report.draw", lambda *_: [])
