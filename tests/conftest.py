"""Shared by the tests: the weights of the golden files, and a tiny device data set."""

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from dividemix import engine
from dividemix.codivide import Division, normalise
from dividemix.data.device import DeviceImages
from dividemix.engine import PhaseTerms
from dividemix.run import options
from dividemix.runtime.device import Runtime

# No timing decides a test, and every machine tries the same examples.
settings.register_profile("dividemix", deadline=None, derandomize=True)
settings.load_profile("dividemix")

GOLDEN = Path(__file__).parent / "data"


@pytest.fixture
def start_method():
    """Sets how processes are started: a patched function is there in forked ones alone."""
    before = multiprocessing.get_start_method(allow_none=True)
    yield lambda method: multiprocessing.set_start_method(method, force=True)
    multiprocessing.set_start_method(before, force=True)


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


def placed(machine: Runtime, images: DeviceImages) -> DeviceImages:
    """The same data set on another runtime."""
    raw, labels = images.padded[:, 4:-4, 4:-4].contiguous().cpu().numpy(), images.labels.cpu().numpy().copy()
    return DeviceImages(raw, labels, images.mean.tolist(), images.std.tolist(), images.flip, machine)


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


# Flags of the scripts for large images, the same: a net of width 4 on crops of 16 pixels. Later flags win.
SMALL_NET = ["--arch", "preresnet18", "--width", "4", "--image_size", "16", "--batch_size", "8"]
SMALL_NET += ["--device", "cpu", "--precision", "fp32"]


def end_of(script, argv: list[str], monkeypatch) -> int:
    """The exit status of a script's main, in this process; what it prints is as in a process of its own."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `command_line` sets it
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        options.command_line(lambda _: script.main(argv))
    return ended.value.code


def read_records(folder) -> list[dict]:
    """metrics.jsonl; NaN and Infinity, which are no JSON, are an error."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} in metrics.jsonl")

    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def snapshot(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def same(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in state.items())


def note_phases(monkeypatch, script) -> list[dict]:
    """From now on the script trains nothing: every call of warmup_epoch and train_epoch is noted instead, with the
    net's state, its peer, data and division, the method's settings, the phase, and the optimizer's settings."""
    calls: list[dict] = []

    def note(kind: str, net, optimizer, **given) -> PhaseTerms:
        [group] = optimizer.param_groups
        assert {*map(id, group["params"])} == {*map(id, net.parameters())}, "another net's optimizer"
        settings = {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
        calls.append({"kind": kind, "net": net, "state": snapshot(net), **settings, **given})
        return PhaseTerms(1.0, 1.0, 0.0, 0.0)

    def warmup(net, optimizer, data, mixmatch, phase):
        return note("warmup", net, optimizer, data=data, mixmatch=mixmatch, phase=phase)

    def train(net, peer, optimizer, data, division, mixmatch, phase):
        given = {"peer": peer, "data": data, "division": division, "mixmatch": mixmatch, "phase": phase}
        return note("train", net, optimizer, **given)

    monkeypatch.setattr(script, "warmup_epoch", warmup)
    monkeypatch.setattr(script, "train_epoch", train)
    return calls


def reference_logits(net, paths, resize: int, crop: int, mean: tuple, std: tuple) -> torch.Tensor:
    """A network's answers to image files as torchvision would prepare them: by other code than the project's."""
    from torchvision import transforms as T

    prepare = T.Compose([T.Resize(resize), T.CenterCrop(crop), T.ToTensor(), T.Normalize(mean, std)])
    with torch.no_grad():
        return net.eval()(torch.stack([prepare(Image.open(path).convert("RGB")) for path in paths]))


def half(n, labeled=None):
    """A division of n samples: `labeled` (default: the first half) with clean probability 0.9."""
    mask = np.zeros(n, bool)
    mask[: n // 2 if labeled is None else labeled] = True
    p = np.where(mask, 0.9, 0.1)
    return Division(p, mask, p.astype(np.float32), np.array([0.1, 0.9]), np.ones(2), np.ones(2) / 2, 0.5, None)


def note_co_division(monkeypatch, script) -> list[dict]:
    """From now on the script's scores and training of divided epochs are noted, with the networks as they are then, in
    the form that `assert_co_divided` takes. -> the notes, to which more are added as it runs"""
    events: list[dict] = []
    loss, train = engine.per_sample_loss, script.train_epoch

    def spy_loss(net, data, phase):
        scored = loss(net, data, phase)
        events.append({"what": "score", "net": snapshot(net), "loss": normalise(scored.loss.numpy())})
        return scored

    def spy_train(net, peer, optimizer, data, division, mixmatch, phase):
        about = {"what": "train", "net": snapshot(net), "peer": snapshot(peer), "loss": division.loss}
        terms = train(net, peer, optimizer, data, division, mixmatch, phase)
        events.append({**about, "after": snapshot(net)})
        return terms

    monkeypatch.setattr(engine, "per_sample_loss", spy_loss)
    monkeypatch.setattr(script, "train_epoch", spy_train)
    return events


def assert_co_divided(net2, net1, first, second) -> None:
    """Of one epoch, noted: both networks' scores, then both networks' training. Each learns from the other's division
    and with the other, as it is then, as its peer."""
    assert same(first["net"], net1["net"]) and same(second["net"], net2["net"])
    assert same(first["peer"], net2["net"]), "net 1's peer is not net 2"
    assert same(second["peer"], first["after"]) and not same(first["after"], first["net"]), "a stale peer"
    assert np.abs(net1["loss"] - net2["loss"]).max() > 1e-3  # the two divisions can be told apart
    for trained, divided in ((first, net2), (second, net1)):
        np.testing.assert_allclose(trained["loss"], divided["loss"], rtol=1e-5, atol=1e-6)


@pytest.fixture
def no_figures(monkeypatch):
    """The end of a run without its report, which takes seconds."""
    monkeypatch.setattr("dividemix.report.report.draw", lambda *_: [])
