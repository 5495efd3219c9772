"""Pre-activation ResNet: He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks" (arXiv:1603.05027).

Batch norm and ReLU come before each convolution, so that the shortcut carries the sum on unchanged. For ImageNet as in
fb.resnet.torch, for CIFAR as in the authors' resnet-1k-layers. In evaluation the batch norm and ReLU before a
convolution are its prologue, those after it part of its epilogue: a block whose shortcut is the identity is nothing but
its convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.models._common import channels_last, initialise_kaiming
from fastcnn.models._registry import register
from fastcnn.nn import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Linear,
    MaxPool2d,
    PreActBasicBlock,
    PreActBottleneck,
    bn_act,
    conv_act,
    conv_bn,
    set_stochastic_depth,
)

PRERESNET = "https://arxiv.org/abs/1603.05027"
IMAGENET = (3, 224, 224)
CIFAR = (3, 32, 32)


class PreResNet(nn.Module):
    """7x7 stem with BN, ReLU and pool, four stages, a last BN-ReLU, global average pool, one linear layer.

    (N, in_channels, H, W) -> logits (N, num_classes). The stem has activated what the first block reads, which
    therefore has no pre-activation; the first blocks of the other stages share theirs with the shortcut.

    Args:
        block: :class:`~fastcnn.nn.PreActBasicBlock` or :class:`~fastcnn.nn.PreActBottleneck`.
        layers: blocks in each of the four stages.
        num_classes: logits.
        in_channels: the input's channels.
        stochastic_depth: the last block's survival probability, as in :class:`~fastcnn.models.ResNet`.
    """

    def __init__(
        self,
        block: type[PreActBasicBlock] | type[PreActBottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        stochastic_depth: float | None = None,
    ) -> None:
        super().__init__()
        self._channels = 64
        self.conv1 = Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = MaxPool2d(3, 2, padding=1)
        self.layer1 = self._stage(block, 64, layers[0], 1, first="none")
        self.layer2 = self._stage(block, 128, layers[1], 2)
        self.layer3 = self._stage(block, 256, layers[2], 2)
        self.layer4 = self._stage(block, 512, layers[3], 2)
        self.bn_last = BatchNorm2d(self._channels)
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.fc = Linear(self._channels, num_classes)
        initialise_kaiming(self)
        set_stochastic_depth(self, stochastic_depth)

    def _stage(
        self,
        block: type[PreActBasicBlock] | type[PreActBottleneck],
        planes: int,
        count: int,
        stride: int,
        first: str = "shared",
    ) -> nn.Sequential:
        """``count`` blocks, the first with ``stride`` and its own kind of pre-activation."""
        blocks: list[nn.Module] = []
        for i in range(count):
            kind = first if i == 0 else "branch"
            blocks.append(block(self._channels, planes, stride if i == 0 else 1, preactivation=kind))
            self._channels = planes * block.expansion
        return nn.Sequential(*blocks)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 512 * expansion, ceil(H / 32), ceil(W / 32)), after the last BN-ReLU."""
        x = conv_bn(channels_last(x), self.conv1, self.bn1, activation=self.relu)
        x = self.maxpool(channels_last(x))  # one input channel: nothing told the stem which layout was meant
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return bn_act(x, self.bn_last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.forward_features(x))
        return self.fc(torch.flatten(x, 1))


class CifarPreResNet(nn.Module):
    """3x3 stem without BN, three stages of n bottlenecks with 64, 128, 256 channels, a last BN-ReLU, one linear layer.

    (N, in_channels, H, W) -> logits (N, num_classes). Bottlenecks stride in their first 1x1, and the first of each
    stage shares its pre-activation with the shortcut.

    Args:
        depth: 9n + 2 weighted layers.
        num_classes: logits.
        in_channels: the input's channels.
        stochastic_depth: the last block's survival probability, as in :class:`~fastcnn.models.ResNet`.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, *, in_channels: int = 3, stochastic_depth: float | None = None
    ) -> None:
        super().__init__()
        if depth < 11 or (depth - 2) % 9 != 0:
            raise ValueError(f"depth must be 9n + 2 (11, 20, 29, ...), is {depth}")
        count = (depth - 2) // 9
        self.conv1 = Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = self._stage(16, 16, count, 1)
        self.layer2 = self._stage(64, 32, count, 2)
        self.layer3 = self._stage(128, 64, count, 2)
        self.bn_last = BatchNorm2d(256)
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.fc = Linear(256, num_classes)
        initialise_kaiming(self)
        set_stochastic_depth(self, stochastic_depth)

    @staticmethod
    def _stage(in_channels: int, planes: int, count: int, stride: int) -> nn.Sequential:
        first = PreActBottleneck(in_channels, planes, stride, preactivation="shared", stride_in_1x1=True)
        return nn.Sequential(first, *(PreActBottleneck(4 * planes, planes) for _ in range(count - 1)))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 256, ceil(H / 4), ceil(W / 4)), after the last BN-ReLU."""
        x = conv_act(channels_last(x), self.conv1, activation="none")
        x = channels_last(x)  # one input channel: nothing told the stem which layout was meant
        return bn_act(self.layer3(self.layer2(self.layer1(x))), self.bn_last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.forward_features(x))
        return self.fc(torch.flatten(x, 1))


@register(IMAGENET, PRERESNET)
def preresnet18(**kwargs: Any) -> PreResNet:
    return PreResNet(PreActBasicBlock, (2, 2, 2, 2), **kwargs)


@register(IMAGENET, PRERESNET)
def preresnet34(**kwargs: Any) -> PreResNet:
    return PreResNet(PreActBasicBlock, (3, 4, 6, 3), **kwargs)


@register(IMAGENET, PRERESNET)
def preresnet50(**kwargs: Any) -> PreResNet:
    return PreResNet(PreActBottleneck, (3, 4, 6, 3), **kwargs)


@register(IMAGENET, PRERESNET)
def preresnet101(**kwargs: Any) -> PreResNet:
    return PreResNet(PreActBottleneck, (3, 4, 23, 3), **kwargs)


@register(IMAGENET, PRERESNET)
def preresnet152(**kwargs: Any) -> PreResNet:
    return PreResNet(PreActBottleneck, (3, 8, 36, 3), **kwargs)


@register(IMAGENET, PRERESNET)
def preresnet200(**kwargs: Any) -> PreResNet:
    return PreResNet(PreActBottleneck, (3, 24, 36, 3), **kwargs)


@register(CIFAR, PRERESNET)
def preresnet164_cifar(**kwargs: Any) -> CifarPreResNet:
    return CifarPreResNet(164, **kwargs)


@register(CIFAR, PRERESNET)
def preresnet1001_cifar(**kwargs: Any) -> CifarPreResNet:
    return CifarPreResNet(1001, **kwargs)
