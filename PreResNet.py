"""The CIFAR networks: `ResNet18(num_classes)` is the PreAct ResNet-18 of the paper's experiments.

It differs from the textbook network: the stem ends with BN and ReLU, every shortcut (identity or a 1x1 convolution
alone) starts from relu(bn1(x)) and not from x, and no BN follows the last block. State-dict keys and shapes are those
of published checkpoints. `width`: the channels of the first stage (64 in the paper; 16 trains on a laptop).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)


def projection(in_planes: int, planes: int, stride: int, *layers: nn.Module) -> nn.Sequential:
    """The shortcut: a 1x1 convolution where the shape changes, then `layers` (a BN in the post-activation blocks); else
    the identity."""
    if stride == 1 and in_planes == planes:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False), *layers)


class PreActBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = conv3x3(in_planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.shortcut = projection(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(x))
        out = self.conv1(x)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + self.shortcut(x)  # from the activated x, also where the shortcut is the identity


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(in_planes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = projection(in_planes, planes, stride, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        out_planes = self.expansion * planes
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_planes, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.shortcut = projection(in_planes, out_planes, stride, nn.BatchNorm2d(out_planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


Block = PreActBlock | BasicBlock | Bottleneck


class ResNet(nn.Module):
    """Images (B, 3, S, S), S >= 16 -> logits (B, num_classes), float32 under autocast too: the head is computed in
    float32."""

    def __init__(self, block: type[Block], num_blocks: list[int], num_classes: int = 10, width: int = 64):
        super().__init__()
        self.in_planes = width
        self.conv1 = conv3x3(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(block, width, num_blocks[0], stride=1)
        self.layer2 = self._stage(block, 2 * width, num_blocks[1], stride=2)
        self.layer3 = self._stage(block, 4 * width, num_blocks[2], stride=2)
        self.layer4 = self._stage(block, 8 * width, num_blocks[3], stride=2)
        self.linear = nn.Linear(8 * width * block.expansion, num_classes)

    def _stage(self, block: type[Block], planes: int, blocks: int, stride: int) -> nn.Sequential:
        layers = []
        for block_stride in [stride] + [1] * (blocks - 1):
            layers.append(block(self.in_planes, planes, block_stride))
            self.in_planes = planes * block.expansion
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        with torch.autocast(x.device.type, enabled=False):
            x = x.float().mean(dim=(2, 3))  # the paper's 4x4 average pool, at 32x32
            return self.linear(x)


def ResNet18(num_classes: int = 10, width: int = 64) -> ResNet:
    return ResNet(PreActBlock, [2, 2, 2, 2], num_classes, width)


def ResNet34(num_classes: int = 10, width: int = 64) -> ResNet:
    return ResNet(BasicBlock, [3, 4, 6, 3], num_classes, width)


def ResNet50(num_classes: int = 10, width: int = 64) -> ResNet:
    return ResNet(Bottleneck, [3, 4, 6, 3], num_classes, width)
