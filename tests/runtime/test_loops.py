"""The loops over batches: what stops them, what they do without memory, and which layers draw."""

import numpy as np
import pytest
import torch
from helpers.nets import CPU, half, placed, same, small_net
from torch import nn

from dividemix import Diverged, DivideMixError, DivideMixWarning, engine
from dividemix.engine import MixMatch, Phase
from dividemix.runtime import Ranks, Runtime
from dividemix.runtime.loops import layers_draw_from, update
from dividemix.seeds import draws, seeded


def test_the_first_non_finite_step_stops_all_updates(tiny_images):
    """Else a run goes on with weights that turned NaN an hour ago, and nobody knows at which batch."""
    net = small_net()
    optimizer = Runtime(CPU).optimizer(net, 0.02, 5e-4)
    before = []

    def spoil(module, inputs, logits):
        before.append([tensor.detach().clone() for tensor in weights_and_momentum()])
        return logits * float("inf") if len(before) == 3 else logits

    def weights_and_momentum() -> list[torch.Tensor]:
        return [*net.parameters(), *(state["momentum_buffer"] for state in optimizer.state.values())]

    net.register_forward_hook(spoil)
    with pytest.raises(Diverged, match="batch 3 of 6"):
        engine.warmup_epoch(net, optimizer, tiny_images, MixMatch(3, batch_size=2), Phase())
    for tensor, at_third, at_second in zip(weights_and_momentum(), before[2], before[1], strict=True):
        assert torch.equal(tensor, at_third) and not torch.equal(tensor, at_second)


@pytest.mark.parametrize("bad_loss", [lambda w: (0 * w).sum().sqrt(), lambda w: w.sum() + torch.inf])
def test_a_bad_gradient_of_a_finite_loss_counts_and_so_does_the_reverse(bad_loss):
    """Else the weights are lost one step later, and the flag must stay set after it."""
    weight = nn.Linear(2, 1).weight
    optimizer = Runtime(CPU).optimizer(nn.ParameterList([weight]), lr=0.1, weight_decay=0.5)
    before = weight.detach().clone()
    for loss in (bad_loss(weight), weight.sum()):
        update(optimizer, loss)
        assert optimizer.found_inf == 1 and torch.equal(weight, before)


def test_the_update_is_the_papers_sgd_by_hand():
    """Nesterov, dampening, or no decay of BN and biases, as many codes have it, is another method."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = Runtime(CPU).optimizer(net, lr=0.1, weight_decay=0.5)
    expected = [p.detach().double().clone() for p in net.parameters()]
    velocity = [torch.zeros_like(p) for p in expected]
    for g in (1.0, -3.0, 0.25):
        update(optimizer, sum((g * p).sum() for p in net.parameters()))
        for p, v in zip(expected, velocity, strict=True):
            v.mul_(0.9).add_(g + 0.5 * p)
            p.sub_(0.1 * v)
    for p, value in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach().double(), value, rtol=1e-6, atol=1e-6)


class SmallMemory(nn.Module):
    """Runs out of memory over `room` images."""

    def __init__(self, net, room: int):
        super().__init__()
        self.net, self.room, self.tried = net, room, []

    def forward(self, x):
        self.tried.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return self.net(x)


def test_evaluation_adapts_to_the_memory(tiny_images):
    """A card that is too small for the evaluation batch loses the run at its first test."""
    small, data = SmallMemory(small_net(), room=6), placed(Runtime(CPU, eval_batch_size=100), tiny_images)
    with pytest.warns(DivideMixWarning, match="--eval_batch_size"):
        scores = engine.per_sample_loss(small, data)
    assert small.tried == [24, 12, 6, 6, 6, 6]
    torch.testing.assert_close(scores.loss, engine.per_sample_loss(small.net, tiny_images).loss)
    engine.per_sample_loss(small, data)
    assert small.tried[6:] == [6] * 4, "every epoch loses the time of the failed attempts"
    small.room = 0
    with pytest.warns(DivideMixWarning), pytest.raises(DivideMixError, match=r"evaluate 1 images.*--eval_batch_size"):
        engine.per_sample_loss(small, data)
    small.room, data.runtime = 2, Runtime(CPU, ranks=Ranks(0, 2))
    with pytest.raises(DivideMixError, match="evaluate 24 images"):  # the other rank would not halve its batches
        engine.per_sample_loss(small, data)


# ---- Layers that draw ----


def with_dropout(data, seed: int = 1) -> dict[str, torch.Tensor]:
    """Weights after a warm-up pass and a pass over a labeled set of a network with dropout."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 14 * 14, 3))

    net, peer = (seeded(5, k, build) for k in range(2))
    optimizer = data.runtime.optimizer(net, 0.01, 5e-4)
    mixmatch = MixMatch(num_class=3, batch_size=4, lambda_u=1, warm_up=1)
    engine.warmup_epoch(net, optimizer, data, mixmatch, Phase(1, draws(seed, "warmup")))
    engine.train_epoch(net, peer, optimizer, data, half(24), mixmatch, Phase(1, draws(seed, "train")))
    return net.state_dict()


def test_dropout_follows_from_the_phases_generator(tiny_images):
    """Else a continued run ends elsewhere than the uninterrupted one, or all ranks leave out the same places."""
    before = torch.get_rng_state()
    first = with_dropout(tiny_images)
    assert torch.equal(torch.get_rng_state(), before), "the global stream is not as it was"
    torch.rand(3)
    assert same(with_dropout(tiny_images), first)
    assert not torch.equal(with_dropout(tiny_images, seed=2)["3.weight"], first["3.weight"])
    drawn = []
    for rank in (0, 1):
        with layers_draw_from(draws(1, "train"), nn.Dropout(0.5), Runtime(CPU, ranks=Ranks(rank, 2))):
            drawn.append(torch.rand(3))
    assert not torch.equal(*drawn)


def test_networks_without_such_layers_draw_nothing():
    """Else all results of the paper's networks change."""
    rng = np.random.default_rng(1)
    for net in (small_net(), nn.Dropout(0.0)):  # a vision transformer has dropout of probability 0
        with layers_draw_from(rng, net, Runtime(CPU)):
            pass
    assert rng.random() == np.random.default_rng(1).random()
