"""Batch norm for several batches in one forward pass, each with its own statistics."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d for several batches in one call; `Runtime.prepare` changes only the class of a network's layers.

    While `groups` (see `grouped`) is above 1, the rows are that many batches of one size, one after the other. In train
    mode each is normalised by its own statistics, and the running statistics are updated batch by batch, in order: up
    to rounding the same as that many calls.
    """

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.groups == 1:
            return super().forward(x)
        return torch.cat([nn.BatchNorm2d.forward(self, batch) for batch in x.chunk(self.groups)])


@contextlib.contextmanager
def grouped(net: nn.Module, groups: int) -> Iterator[None]:
    """Within the block, each call of `net` takes `groups` batches of one size."""
    layers = [module for module in net.modules() if isinstance(module, GroupedBatchNorm2d)]
    for layer in layers:
        layer.groups = groups
    try:
        yield
    finally:
        for layer in layers:
            layer.groups = 1


def can_merge(net: nn.Module) -> bool:
    """Whether every layer that mixes the rows of a batch in train mode is a `GroupedBatchNorm2d`."""
    across = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    return all(isinstance(module, GroupedBatchNorm2d) for module in net.modules() if isinstance(module, across))
