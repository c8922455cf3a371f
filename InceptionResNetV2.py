"""The WebVision network: `InceptionResNetV2(num_classes)`, trained from scratch on 50 classes in the paper.

Szegedy, Ioffe, Vanhoucke, Alemi, "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
AAAI 2017 (arXiv 1602.07261). It is the version of the published checkpoints, with their state-dict keys and shapes,
and not the one in the paper's figures: the stem is that of Inception-v3, closed by one Inception block (mixed_5b);
there are 10, 20 and 10 residual blocks on 320, 1088 and 2080 channels; the last of them is neither scaled down nor
followed by a ReLU. No dropout before the classifier, PyTorch's default initialisation throughout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBN(nn.Module):
    """Convolution, BN, ReLU. Stride 1 keeps the size unless `valid`; stride 2 is never padded."""

    def __init__(self, in_planes: int, planes: int, size: int | tuple[int, int], stride: int = 1, valid: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(in_planes, planes, size, stride, "valid" if valid or stride > 1 else "same", bias=False)
        self.bn = nn.BatchNorm2d(planes, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """branch0(x), branch1(x), ... side by side: their channels concatenated in this order."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.num_branches = len(branches)
        for i, branch in enumerate(branches):
            self.add_module(f"branch{i}", branch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, f"branch{i}")(x) for i in range(self.num_branches)], dim=1)


class Residual(Branches):
    """relu(x + scale * conv2d(branches)): a 1x1 convolution without BN brings the branches' planes back to those of x.
    The scale keeps the residual stream stable (the paper's section 3.3)."""

    def __init__(self, *branches: nn.Module, planes: tuple[int, int], scale: float, relu: bool = True):
        super().__init__(*branches)
        self.conv2d = nn.Conv2d(*planes, kernel_size=1)
        self.scale, self.relu = scale, relu

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.scale * self.conv2d(super().forward(x))
        return F.relu(out) if self.relu else out


# ---------------------------------------------------------------------------------------------------------------------
# The blocks, with their sizes at 299x299


def mixed_5b() -> Branches:  # (B, 192, 35, 35) -> (B, 320, 35, 35)
    return Branches(
        ConvBN(192, 96, 1),
        nn.Sequential(ConvBN(192, 48, 1), ConvBN(48, 64, 5)),
        nn.Sequential(ConvBN(192, 64, 1), ConvBN(64, 96, 3), ConvBN(96, 96, 3)),
        nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), ConvBN(192, 64, 1)),
    )


def block_35() -> Residual:  # (B, 320, 35, 35), Inception-ResNet-A
    first = ConvBN(320, 32, 1)
    second = nn.Sequential(ConvBN(320, 32, 1), ConvBN(32, 32, 3))
    third = nn.Sequential(ConvBN(320, 32, 1), ConvBN(32, 48, 3), ConvBN(48, 64, 3))
    return Residual(first, second, third, planes=(128, 320), scale=0.17)


def mixed_6a() -> Branches:  # (B, 320, 35, 35) -> (B, 1088, 17, 17), Reduction-A
    return Branches(
        ConvBN(320, 384, 3, stride=2),
        nn.Sequential(ConvBN(320, 256, 1), ConvBN(256, 256, 3), ConvBN(256, 384, 3, stride=2)),
        nn.MaxPool2d(3, stride=2),
    )


def block_17() -> Residual:  # (B, 1088, 17, 17), Inception-ResNet-B
    first = ConvBN(1088, 192, 1)
    second = nn.Sequential(ConvBN(1088, 128, 1), ConvBN(128, 160, (1, 7)), ConvBN(160, 192, (7, 1)))
    return Residual(first, second, planes=(384, 1088), scale=0.10)


def mixed_7a() -> Branches:  # (B, 1088, 17, 17) -> (B, 2080, 8, 8), Reduction-B
    return Branches(
        nn.Sequential(ConvBN(1088, 256, 1), ConvBN(256, 384, 3, stride=2)),
        nn.Sequential(ConvBN(1088, 256, 1), ConvBN(256, 288, 3, stride=2)),
        nn.Sequential(ConvBN(1088, 256, 1), ConvBN(256, 288, 3), ConvBN(288, 320, 3, stride=2)),
        nn.MaxPool2d(3, stride=2),
    )


def block_8(scale: float = 0.20, relu: bool = True) -> Residual:  # (B, 2080, 8, 8), Inception-ResNet-C
    first = ConvBN(2080, 192, 1)
    second = nn.Sequential(ConvBN(2080, 192, 1), ConvBN(192, 224, (1, 3)), ConvBN(224, 256, (3, 1)))
    return Residual(first, second, planes=(448, 2080), scale=scale, relu=relu)


# ---------------------------------------------------------------------------------------------------------------------


class InceptionResNetV2(nn.Module):
    """Images (B, 3, H, W), H and W >= 75 (299 in the paper) -> logits (B, num_classes), float32 under autocast too: the
    head is computed in float32. Below 107 px the last maps are a single pixel: training then needs B >= 2."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv2d_1a = ConvBN(3, 32, 3, stride=2)
        self.conv2d_2a = ConvBN(32, 32, 3, valid=True)
        self.conv2d_2b = ConvBN(32, 64, 3)
        self.conv2d_3b = ConvBN(64, 80, 1)
        self.conv2d_4a = ConvBN(80, 192, 3, valid=True)
        self.mixed_5b = mixed_5b()
        self.repeat = nn.Sequential(*[block_35() for _ in range(10)])
        self.mixed_6a = mixed_6a()
        self.repeat_1 = nn.Sequential(*[block_17() for _ in range(20)])
        self.mixed_7a = mixed_7a()
        self.repeat_2 = nn.Sequential(*[block_8() for _ in range(9)])
        self.block8 = block_8(scale=1.0, relu=False)
        self.conv2d_7b = ConvBN(2080, 1536, 1)
        self.last_linear = nn.Linear(1536, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # sizes at 299x299
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)  # (B, 64, 73, 73)
        x = self.conv2d_4a(self.conv2d_3b(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)  # (B, 192, 35, 35)
        x = self.repeat(self.mixed_5b(x))  # (B, 320, 35, 35)
        x = self.repeat_1(self.mixed_6a(x))  # (B, 1088, 17, 17)
        x = self.block8(self.repeat_2(self.mixed_7a(x)))  # (B, 2080, 8, 8)
        x = self.conv2d_7b(x)  # (B, 1536, 8, 8)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float().mean(dim=(2, 3))  # the paper's 8x8 average pool, at 299x299
            return self.last_linear(x)
