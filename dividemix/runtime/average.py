"""Averages of weights over training steps (`--ema`)."""

import copy

import torch
from torch import nn


class Average:
    """An exponential average of the weights and BN statistics of `net`, a network of its own, in eval mode. The first
    weights of `net` are its first value. It is on the same device and changes nothing in `net`.

    decay: how much of the average stays at a step; less in the first steps, as in TensorFlow's
    ExponentialMovingAverage: min(decay, (1 + steps) / (10 + steps)). steps: those that are in it.
    """

    def __init__(self, net: nn.Module, decay: float):
        self.net, self.decay, self.steps = copy.deepcopy(net).requires_grad_(False).eval(), decay, 0
        self._averaged, self._latest = (
            [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
            for module in (self.net, net)
        )

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step. This runs beside a captured step, whose weights keep their place, and waits
        for nothing."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._averaged, self._latest, 1 - decay)
        self.steps += 1
