"""Training steps that are captured as CUDA graphs."""

import numpy as np
import torch

from dividemix import engine
from dividemix.engine import MixMatch, Phase
from dividemix.runtime.device import Runtime
from helpers.nets import half
from PreResNet import ResNet18

SETTINGS = MixMatch(num_class=10, batch_size=4, lambda_u=8.0, warm_up=1)


def start(machine: Runtime):
    torch.manual_seed(0)
    nets = [machine.prepare(ResNet18(10, width=4)) for _ in range(2)]
    return nets, [machine.optimizer(net, 0.02, 5e-4) for net in nets]


def train(data, epochs, nets, optimizers):
    """Both nets in turn, for each of `epochs` a warm-up epoch and a divided one, the learning rate falling."""
    terms = []
    for epoch in epochs:
        engine.set_learning_rate(optimizers, 0.02 / (1 + epoch))
        for k in range(2):
            division, phase = (
                half(len(data), int(0.565 * len(data))),
                Phase(3 + epoch, np.random.default_rng([epoch, k])),
            )
            terms.append(engine.warmup_epoch(nets[k], optimizers[k], data, SETTINGS, phase))
            terms.append(engine.train_epoch(nets[k], nets[1 - k], optimizers[k], data, division, SETTINGS, phase))
    return terms


def state(nets, optimizers):
    return [part.state_dict() for part in (*nets, *optimizers)]
