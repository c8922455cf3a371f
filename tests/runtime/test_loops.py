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


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_update_is_the_papers_sgd_by_hand(precision):
    """Nesterov, dampening, no decay of BN and biases, as many codes have it, or a scaled gradient is another method."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = Runtime(CPU, precision).optimizer(net, lr=0.1, weight_decay=0.5)
    expected = [p.detach().double().clone() for p in net.parameters()]
    velocity = [torch.zeros_like(p) for p in expected]
    for g in (1.0, -3.0, 0.25):
        update(optimizer, sum((g * p).sum() for p in net.parameters()))
        for p, v in zip(expected, velocity, strict=True):
            v.mul_(0.9).add_(g + 0.5 * p)
            p.sub_(0.1 * v)
    for p, value in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach().double(), value, rtol=1e-6, atol=1e-6)


# ---- The scale of the loss in fp16 ----


def fp16_weight(scale: float) -> tuple[nn.Parameter, torch.optim.SGD]:
    weight = nn.Parameter(torch.ones(2))
    optimizer = Runtime(CPU, "fp16").optimizer(nn.ParameterList([weight]), lr=0.125, weight_decay=0.0)
    optimizer.grad_scale.fill_(scale)
    return weight, optimizer


def test_a_gradient_that_overflows_halves_the_scale_until_it_does_not():
    """Else one large batch ends a run of two days, or a scale that is too small for ever rounds gradients to 0."""
    weight, optimizer = fp16_weight(2.0**17)
    for power in (16, 15, 14):  # half of the largest number of fp16 is 2^15
        update(optimizer, 2 * weight.half().float().sum())
        assert optimizer.grad_scale == 2**power and optimizer.found_inf == 0 and (weight == 1).all()
    optimizer.param_groups[0]["growth"].fill_(1998)
    for value, power in ((0.75, 14), (0.275, 15)):  # momentum 0.9
        update(optimizer, 2 * weight.half().float().sum())
        torch.testing.assert_close(weight.detach(), torch.full((2,), value))
        assert optimizer.grad_scale == 2**power
    assert optimizer.param_groups[0]["growth"] == 0


@pytest.mark.parametrize(
    ("bad_loss", "updates"),
    [(lambda w: (0 * w).sum().sqrt(), 4), (lambda w: w.sum() + torch.inf, 1), (lambda w: w.sum() * torch.nan, 1)],
)
def test_what_no_scale_mends_stops_all_updates(bad_loss, updates):
    """Else a run whose gradients are NaN for good goes on until its last epoch with weights that never change."""
    weight, optimizer = fp16_weight(8.0)
    for k in range(1, updates + 1):
        update(optimizer, bad_loss(weight))
        assert optimizer.found_inf == (k == updates)
    update(optimizer, weight.sum())
    assert optimizer.found_inf == 1 and (weight == 1).all()


@pytest.mark.parametrize("scale", [2.0**12, 2.0**30])
def test_a_run_in_fp16_learns_whatever_its_first_scale(tiny_images, scale):
    """Overflows at the beginning cost a few updates, and no more."""
    runtime, losses = Runtime(CPU, "fp16"), []
    net, data = runtime.prepare(small_net()), placed(runtime, tiny_images)
    optimizer = runtime.optimizer(net, 0.1, 0.0)
    optimizer.grad_scale.fill_(scale)
    for epoch in range(12):
        losses.append(engine.warmup_epoch(net, optimizer, data, MixMatch(3, batch_size=2), Phase(epoch)).loss)
    assert 2**12 <= optimizer.grad_scale < 2**26
    assert all(torch.isfinite(value).all() for value in net.state_dict().values())
    assert losses[-1] < 0.5 * losses[0]


def test_a_forward_pass_beyond_fp16_is_an_error_that_names_the_precision(tiny_images):
    """No scale of the loss mends it, and BN's statistics are then not finite: the network would be lost unnoticed."""
    runtime = Runtime(CPU, "fp16")
    net = runtime.prepare(small_net())
    with torch.no_grad():
        net[1].weight.fill_(1e6)
    optimizer = runtime.optimizer(net, 0.02, 5e-4)
    with pytest.raises(Diverged, match=r"batch 1 of 6.*--precision fp32"):
        engine.warmup_epoch(net, optimizer, placed(runtime, tiny_images), MixMatch(3, batch_size=2), Phase())


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
