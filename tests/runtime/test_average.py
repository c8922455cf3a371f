"""Averages of weights (`--ema`), beside the training that they must not change."""

import copy

import numpy as np
import pytest
import torch
from helpers import captured, graph_emulator
from helpers.captured import digits, state, train
from helpers.nets import CPU, small_net, snapshot
from helpers.runs import assert_equal

from dividemix import engine
from dividemix.runtime import Average, Runtime


def test_an_average_is_the_formula_and_stands_apart():
    """Else something other than an average is tested and shipped, or the trained network gets its weights."""
    net = small_net()
    average, expected = Average(net, 0.5), {name: value.numpy().copy() for name, value in snapshot(net).items()}
    for step in range(20):
        with torch.no_grad():
            for tensor in (*net.parameters(), net[1].running_mean, net[4].running_var):
                tensor.add_(torch.rand(tensor.shape))
        before = snapshot(net)
        average.update()
        assert_equal(snapshot(net), before)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in before.items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value.numpy()
    for name, value in average.net.state_dict().items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)
    assert average.steps == 20 and not average.net.training
    assert not any(parameter.requires_grad for parameter in average.net.parameters())


@pytest.mark.parametrize("graph", [False, True])
def test_training_is_the_same_with_averages(monkeypatch, graph):
    """--ema would be another method; in a captured step, one whose average stands still or counts a step twice."""
    graph_emulator.install(monkeypatch)
    states, averages = [], []
    for averaged in (True, False):
        runtime = Runtime(CPU, graph=graph)
        nets, optimizers = captured.start(runtime, lambda: small_net(10))
        if averaged:
            runtime.averages = {net: Average(net, 0.9) for net in nets}
            averages = [runtime.averages[net] for net in nets]
        train(digits(39, runtime), [0, 1], nets, optimizers)
        states.append(copy.deepcopy(state(nets, optimizers)))
    assert_equal(*states)
    assert [average.steps for average in averages] == [2 * (5 + 6)] * 2  # batches of 8 in warm-up, then of 4
    assert runtime.averages == {} and runtime.averaged(nets) == nets


def test_averages_are_tested_beside_the_networks(tiny_images):
    """The accuracy of what is shipped would be that of other weights."""
    nets = [small_net(), small_net()]
    record = engine.test(nets, {"test": tiny_images})
    assert "test_acc_ema" not in record
    others = [small_net(), small_net()]
    tiny_images.runtime.averages = {net: Average(other, 0.9) for net, other in zip(nets, others, strict=True)}
    try:
        assert engine.test(nets, {"test": tiny_images}) == record | {
            "test_acc_ema": engine.top_k_accuracy(others, tiny_images)[1][0]
        }
    finally:
        tiny_images.runtime.averages = {}
