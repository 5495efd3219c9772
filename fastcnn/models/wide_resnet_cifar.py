"""Wide ResNet for CIFAR: Zagoruyko and Komodakis, "Wide Residual Networks" (arXiv:1605.07146), table 1.

A pre-activation ResNet of few, wide blocks with dropout between their convolutions, as in the authors' code.
"""

from __future__ import annotations

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
    PreActBasicBlock,
    bn_act,
    conv_act,
    set_stochastic_depth,
)

WIDE = "https://arxiv.org/abs/1605.07146"
CIFAR = (3, 32, 32)


class CifarWideResNet(nn.Module):
    """3x3 stem, three stages of n blocks with 16k, 32k, 64k channels, a last BN-ReLU, global average pool, linear.

    (N, in_channels, H, W) -> logits (N, num_classes). 32x32 gives stages of 32, 16 and 8 pixels. Where the channels
    change, BN-ReLU is shared with the shortcut, a 1x1 convolution without batch norm.

    Args:
        depth: 6n + 4.
        width: k, how many times wider than the CIFAR ResNet.
        num_classes: logits.
        dropout: between the two convolutions of a block; the paper's 0.3 where it is used.
        in_channels: the input's channels.
        stochastic_depth: the last block's survival probability, as in :class:`~fastcnn.models.ResNet`.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int = 10,
        *,
        dropout: float = 0.0,
        in_channels: int = 3,
        stochastic_depth: float | None = None,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 != 0:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, ...), is {depth}")
        count = (depth - 4) // 6
        self.conv1 = Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = self._stage(16, 16 * width, count, 1, dropout)
        self.layer2 = self._stage(16 * width, 32 * width, count, 2, dropout)
        self.layer3 = self._stage(32 * width, 64 * width, count, 2, dropout)
        self.bn_last = BatchNorm2d(64 * width)
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.fc = Linear(64 * width, num_classes)
        initialise_kaiming(self)
        set_stochastic_depth(self, stochastic_depth)

    @staticmethod
    def _stage(in_channels: int, channels: int, count: int, stride: int, dropout: float) -> nn.Sequential:
        kind = "branch" if in_channels == channels else "shared"
        first = PreActBasicBlock(in_channels, channels, stride, preactivation=kind, dropout=dropout)
        others = (PreActBasicBlock(channels, channels, dropout=dropout) for _ in range(count - 1))
        return nn.Sequential(first, *others)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 64 * width, ceil(H / 4), ceil(W / 4)), after the last BN-ReLU."""
        x = conv_act(channels_last(x), self.conv1, activation="none")
        x = channels_last(x)  # one input channel: nothing told the stem which layout was meant
        return bn_act(self.layer3(self.layer2(self.layer1(x))), self.bn_last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.forward_features(x))
        return self.fc(torch.flatten(x, 1))


@register(CIFAR, WIDE)
def wrn16_8_cifar(**kwargs: Any) -> CifarWideResNet:
    return CifarWideResNet(16, 8, **kwargs)


@register(CIFAR, WIDE)
def wrn40_4_cifar(**kwargs: Any) -> CifarWideResNet:
    return CifarWideResNet(40, 4, **kwargs)


@register(CIFAR, WIDE)
def wrn28_10_cifar(**kwargs: Any) -> CifarWideResNet:
    return CifarWideResNet(28, 10, **kwargs)
