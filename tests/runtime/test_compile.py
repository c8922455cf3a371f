"""torch.compile around the networks: on a CPU, where no run uses it, so that it is tested everywhere."""

import functools
import shutil

import numpy as np
import pytest
import torch
from helpers.nets import SETTINGS, half, placed

from dividemix import engine
from dividemix.engine import Phase
from dividemix.runtime.device import Runtime
from PreResNet import ResNet18

CPU = torch.device("cpu")


def phases(machine: Runtime, data, epochs: int = 2):
    """Both nets through all phases. -> their states and the terms."""
    torch.manual_seed(0)
    nets = [machine.prepare(ResNet18(3, width=8)) for _ in range(2)]  # 8: Inductor takes channels_last
    optimizers, data = [machine.optimizer(net, 0.02, 5e-4) for net in nets], placed(machine, data)
    terms = []
    for epoch in range(epochs):
        for k, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            phase = Phase(3, np.random.default_rng([epoch, k]))
            engine.per_sample_loss(net, data)
            terms.append(engine.warmup_epoch(net, optimizer, data, SETTINGS, phase))
            terms.append(engine.train_epoch(net, nets[1 - k], optimizer, data, half(24), SETTINGS, phase))
        engine.test(nets, {"test": data})
    return nets, terms


@pytest.fixture(autouse=True)
def clean():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_two_nets_and_partial_batches_share_five_compilations(monkeypatch, tiny_images):
    """A compilation for each net, epoch or partial batch: a minute each on a card, and past torch's limit it silently
    goes eager. Five are due: a warm-up step, guesses, the peer's guesses, a training step, an evaluation batch. What
    they compute is what eager computes."""
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    machine = Runtime(CPU, merge=True, compile=True, eval_batch_size=16)
    nets, terms = phases(machine, tiny_images)
    assert machine.compile and len(compiled) == 5
    eager_nets, eager_terms = phases(Runtime(CPU, merge=True, eval_batch_size=16), tiny_images)
    assert np.allclose(terms, eager_terms, rtol=1e-4)
    for net, eager in zip(nets, eager_nets, strict=True):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(value, eager.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inductors_kernels_train_as_eager_ones(tiny_images, precision):
    """Fused kernels, their backward and the BN statistics they update, two nets in turn: anything that they share or
    leave out would train another method."""
    machine = Runtime(CPU, precision, merge=True, compile=True, eval_batch_size=16)
    nets, terms = phases(machine, tiny_images, epochs=1)
    assert machine.compile
    eager_nets, eager_terms = phases(Runtime(CPU, "fp32"), tiny_images, epochs=1)
    assert np.allclose(terms, eager_terms, rtol=1e-3 if precision == "fp32" else 0.05, atol=0.01)
    for net, eager in zip(nets, eager_nets, strict=True):
        for (name, ours), theirs in zip(net.named_buffers(), eager.buffers(), strict=True):
            if name.endswith("num_batches_tracked"):
                assert ours == theirs
            elif precision == "fp32":
                torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3, msg=name)
