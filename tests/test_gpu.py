"""On a CUDA card (`make gpu`): the reference is the same there, nothing synchronises, and a run continues exactly."""

import numpy as np
import pytest
import torch
from conftest import golden_weights, half
from test_engine import golden_step, train_arguments
from test_run import assert_equal, last_state, train

from dividemix import engine
from dividemix.data import DeviceImages
from dividemix.runtime import start
from PreResNet import ResNet18

pytestmark = pytest.mark.gpu


@pytest.fixture
def machine():
    return start("cuda", precision="fp32")


@pytest.mark.parametrize(
    ("name", "num_class", "lr", "weight_decay", "unlabeled_loss"),
    [("cifar", 10, 0.02, 5e-4, True), ("webvision", 50, 0.01, 5e-4, False), ("clothing1M", 14, 0.002, 1e-3, False)],
)
def test_golden_step(machine, name, num_class, lr, weight_decay, unlabeled_loss):
    """TF32, or another order of the forwards, on the machine that results are made on."""
    golden, net, terms = golden_step(name, num_class, lr, weight_decay, machine, unlabeled_loss=unlabeled_loss)
    assert terms.loss.item() == pytest.approx(golden["loss"][0], rel=1e-4)
    for key, norm in zip(golden["keys"], golden["param_norm"], strict=True):
        assert net.state_dict()[key].double().norm().item() == pytest.approx(norm, rel=2e-4, abs=1e-12)


def test_no_host_sync_in_a_step(tiny_images):
    """A single sync in a step makes the card wait for Python 391 times an epoch."""
    machine = start("cuda", precision="bf16")
    net, peer = (machine.prepare(golden_weights(ResNet18(3, width=8), seed)) for seed in (2, 3))
    optimizer = machine.optimizer(net, 0.02, 5e-4)
    data = on_card(tiny_images, machine.device)
    batch = data.mixmatch_batches(half(24), 4, np.random.default_rng(0))[0]
    lam, index = torch.tensor(0.7, device=machine.device), torch.randperm(16).to(machine.device)
    arguments = {"lam": lam, "index": index, "T": 0.5, "lambda_u": lam, "num_class": 3, "forward": machine.forward}
    engine.mixmatch_step(net, peer, optimizer, *data.mixmatch_views(*batch), **arguments)  # first-call set-up may sync
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.mixmatch_step(net, peer, optimizer, *data.mixmatch_views(*batch), **arguments)
        x, labels = data.warmup_views(batch[0], batch[2][: len(batch[0])])
        engine.warmup_step(net, optimizer, x, labels, conf_penalty=True, forward=machine.forward)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_epoch_on_the_card_draws_what_the_cpu_draws(tiny_images, machine):
    """Draws that depend on the device would make a result of one machine impossible to check on another."""
    losses = []
    for runtime, data in (
        (start("cpu", precision="fp32"), tiny_images),
        (machine, on_card(tiny_images, machine.device)),
    ):
        net, peer = (runtime.prepare(golden_weights(ResNet18(3, width=8), seed)) for seed in (2, 3))
        optimizer = runtime.optimizer(net, 1e-3, 5e-4)
        losses.append(engine.train_epoch(net, peer, optimizer, data, half(24), **train_arguments()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_interrupted_equals_uninterrupted(tmp_path):
    """The promise for one GPU model with --deterministic."""
    cuda = ("--device", "cuda", "--deterministic")
    train(tmp_path / "straight", 3, *cuda)
    for epochs in (1, 2, 3):
        train(tmp_path / "stopped", epochs, *cuda)
    assert_equal(last_state(tmp_path / "straight"), last_state(tmp_path / "stopped"))


def on_card(images: DeviceImages, device: torch.device) -> DeviceImages:
    """The same data set on the card."""
    raw = images.padded[:, 4:-4, 4:-4].contiguous().numpy()
    return DeviceImages(raw, images.labels.numpy(), images.mean.tolist(), images.std.tolist(), images.flip, device)
