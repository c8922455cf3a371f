"""Shared by the tests: the weights of the golden files, and a tiny device data set."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from dividemix.codivide import Division
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


# ---------------------------------------------------------------------------------------------------------------------
# Running a training script, tiny

ROOT = Path(__file__).resolve().parent.parent

# The nets of the tests are so small that a second thread costs more than it gives: ten times more on a busy machine.
torch.set_num_threads(1)


def run_script(*arguments: str, cwd: Path, script: str = "Train_cifar.py") -> subprocess.CompletedProcess:
    """The real script as a user starts it, from another folder than its own, on the CPU and without a terminal."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def tiny(out_dir: Path, *flags: str) -> list[str]:
    """Flags of a run of a second: 48 digits, a net of width 4 on the CPU, one warm-up epoch. Later flags win."""
    data = ["--dataset", "digits", "--limit_train", "48", "--batch_size", "16"]
    size = ["--width", "4", "--warm_up", "1", "--num_epochs", "2", "--device", "cpu", "--precision", "fp32"]
    return [*data, *size, "--out_dir", str(out_dir), *flags]


def half(n, labeled=None):
    """A division of n samples: `labeled` (default: the first half) with clean probability 0.9."""
    mask = np.zeros(n, bool)
    mask[: n // 2 if labeled is None else labeled] = True
    p = np.where(mask, 0.9, 0.1)
    return Division(p, mask, p.astype(np.float32), np.array([0.1, 0.9]), np.ones(2), np.ones(2) / 2, 0.5, None)
