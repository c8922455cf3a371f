"""What holds for all tests, and the fixtures of several test files."""

import sys

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

# In this process `--precision auto` is fp32 on every CPU: what tests compare must not depend on the machine.
for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
    pytest.MonkeyPatch().setattr(torch.cpu, name, lambda: False)  # an error if torch has it no more


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips tests that themselves need what Windows lacks: named pipes, fork, SIGKILL, links without a privilege."""
    try:
        return (yield)
    except (AttributeError, ValueError, OSError) as error:
        lacks = ("'mkfifo'", "'SIGKILL'", "context for 'fork'", "WinError 1314")
        if sys.platform == "win32" and any(text in str(error) for text in lacks):
            pytest.skip(f"Windows: {error}")
        raise


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """A test's random weights are the same in every run and whatever ran before it: some nets are born dead."""
    torch.manual_seed(0)


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
