"""Training steps that are captured as CUDA graphs."""

import numpy as np
import torch

from dividemix import engine
from dividemix.data.device import DeviceImages
from dividemix.engine import MixMatch, Phase
from dividemix.runtime.device import Runtime, set_learning_rate
from helpers.data import colour_digits
from helpers.nets import half
from PreResNet import ResNet18

SETTINGS = MixMatch(num_class=10, batch_size=4, lambda_u=8.0, warm_up=1)


def digits(n: int, runtime: Runtime | None = None, strong: bool = False) -> DeviceImages:
    """n digits of 16x16 pixels."""
    images, labels = colour_digits(n)
    return DeviceImages(images[:, ::2, ::2].copy(), labels, (0.5,) * 3, (0.25,) * 3, True, runtime, strong=strong)


def start(runtime: Runtime, build=lambda: ResNet18(10, width=4)):
    torch.manual_seed(0)
    nets = [runtime.prepare(build()) for _ in range(2)]
    return nets, [runtime.optimizer(net, 0.02, 5e-4) for net in nets]


def train(data, epochs, nets, optimizers):
    """Both nets in turn, for each of `epochs` a warm-up epoch and a divided one, the learning rate falling."""
    terms, division = [], half(len(data), int(0.565 * len(data)))
    for epoch in epochs:
        set_learning_rate(optimizers, 0.02 / (1 + epoch))
        for k in range(2):
            phase = Phase(3 + epoch, np.random.default_rng([epoch, k]))
            terms.append(engine.warmup_epoch(nets[k], optimizers[k], data, SETTINGS, phase))
            terms.append(engine.train_epoch(nets[k], nets[1 - k], optimizers[k], data, division, SETTINGS, phase))
    return terms


def state(nets, optimizers):
    """All of it, with learning rates as tensors, as captured steps have them."""
    states = [trained.state_dict() for trained in (*nets, *optimizers)]
    for saved in states[len(nets) :]:
        for group in saved["param_groups"]:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
    return states
