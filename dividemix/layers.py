"""The same layers, arranged for speed: `Runtime.prepare` exchanges them in a network by class alone.

Parameters, buffers and state-dict keys stay those of nn.BatchNorm2d and nn.Conv2d, and the values do up to rounding.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

SMALL_MAP = 16  # output pixels up to which a product of matrices beats oneDNN's bf16 convolution (RESULTS.md)


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that can take several batches in one call.

    While `groups` (see `grouped`) is above 1, the rows are that many batches of one size, one after the other. In train
    mode each is normalised by its own statistics, and the running statistics are updated batch after batch, in order:
    what that many calls would have computed.
    """

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.groups == 1:
            return super().forward(x)
        return torch.cat([nn.BatchNorm2d.forward(self, batch) for batch in x.chunk(self.groups)])


@contextlib.contextmanager
def grouped(net: nn.Module, groups: int) -> Iterator[None]:
    """Within the block, `net` takes `groups` batches of one size in each call."""
    layers = [module for module in net.modules() if isinstance(module, GroupedBatchNorm2d)]
    for layer in layers:
        layer.groups = groups
    try:
        yield
    finally:
        for layer in layers:
            layer.groups = 1


def can_merge(net: nn.Module) -> bool:
    """Whether every layer that looks across a batch's rows in train mode is a `GroupedBatchNorm2d`."""
    across = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    return all(isinstance(module, GroupedBatchNorm2d) for module in net.modules() if isinstance(module, across))


class SmallMapConv2d(nn.Conv2d):
    """3x3 nn.Conv2d for a CPU in bf16: where the output has few pixels, the convolution is one product of matrices.

    There oneDNN reaches a tenth of the processor's bf16 rate, worst in the gradient of the weights.
    """

    @staticmethod
    def replaces(layer: nn.Module) -> bool:
        """Whether `layer` is a convolution that this class computes: 3x3, padded by 1, no bias, groups or dilation."""
        return (
            type(layer) is nn.Conv2d
            and (layer.kernel_size, layer.padding, layer.dilation) == ((3, 3), (1, 1), (1, 1))
            and (layer.groups, layer.bias, layer.padding_mode) == (1, None, "zeros")
            and layer.stride in ((1, 1), (2, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        stride = self.stride[0]
        pixels = -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
        if pixels > SMALL_MAP or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return MatrixConvolution.apply(x.bfloat16(), self.weight.bfloat16(), stride)


class MatrixConvolution(torch.autograd.Function):
    """3x3 convolution, padding 1, as patches @ weight: x (B, C, H, W), weight (O, C, 3, 3) -> (B, O, h, w)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        patches, size = unfold(x, stride)
        ctx.save_for_backward(patches, weight)
        ctx.stride, ctx.shape = stride, x.shape
        return to_map(patches @ weight.permute(2, 3, 1, 0).flatten(0, 2), size)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        patches, weight = ctx.saved_tensors
        channels = weight.shape[1]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            if ctx.stride == 1:  # itself a convolution: of the gradient, with the weight turned around
                rows, size = unfold(grad, 1)
                grad_x = to_map(rows @ weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2), size)
            else:
                grad_x = nn.grad.conv2d_input(ctx.shape, weight, grad, stride=ctx.stride, padding=1)
        if ctx.needs_input_grad[1]:
            rows = grad.permute(0, 2, 3, 1).flatten(0, 2)  # (B * h * w, O)
            grad_weight = (rows.T @ patches).unflatten(1, (3, 3, channels)).permute(0, 3, 1, 2)
        return grad_x, grad_weight, None


def unfold(x: Tensor, stride: int) -> tuple[Tensor, tuple[int, int, int]]:
    """The 3x3 patch around each output pixel of x (B, C, H, W): (B * h * w, 9 * C) with the channels last, and
    (B, h, w)."""
    padded = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, H + 2, W + 2, C)
    patches = padded.unfold(1, 3, stride).unfold(2, 3, stride).permute(0, 1, 2, 4, 5, 3)  # (B, h, w, 3, 3, C)
    return patches.reshape(-1, 9 * x.shape[1]), tuple(patches.shape[:3])


def to_map(rows: Tensor, size: tuple[int, int, int]) -> Tensor:
    """(B * h * w, C) -> (B, C, h, w), channels_last in memory."""
    return rows.unflatten(0, size).permute(0, 3, 1, 2)
