"""ResNeXt for CIFAR: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks" (arXiv:1611.05431).

Section 5.3: the bottlenecks of :mod:`fastcnn.models.resnet` with grouped 3x3 convolutions, in three stages.
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
    Bottleneck,
    Conv2d,
    Linear,
    conv_bn,
    make_shortcut,
    set_stochastic_depth,
)

RESNEXT = "https://arxiv.org/abs/1611.05431"
CIFAR = (3, 32, 32)


class CifarResNeXt(nn.Module):
    """3x3 stem, three stages of n bottlenecks with 256, 512, 1024 channels, global average pool, one linear layer.

    (N, in_channels, H, W) -> logits (N, num_classes). 32x32 gives stages of 32, 16 and 8 pixels.

    Args:
        depth: 9n + 2 weighted layers.
        cardinality: groups of the 3x3 convolutions.
        base_width: channels of a group in the first stage.
        num_classes: logits.
        in_channels: the input's channels.
        stochastic_depth: the last block's survival probability, as in :class:`~fastcnn.models.ResNet`.
    """

    def __init__(
        self,
        depth: int = 29,
        cardinality: int = 8,
        base_width: int = 64,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        stochastic_depth: float | None = None,
    ) -> None:
        super().__init__()
        if depth < 11 or (depth - 2) % 9 != 0:
            raise ValueError(f"depth must be 9n + 2 (11, 20, 29, ...), is {depth}")
        count = (depth - 2) // 9
        self._cardinality, self._base_width, self._channels = cardinality, base_width, 64
        self.conv1 = Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(64, count, 1)
        self.layer2 = self._stage(128, count, 2)
        self.layer3 = self._stage(256, count, 2)
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.fc = Linear(1024, num_classes)
        initialise_kaiming(self)
        set_stochastic_depth(self, stochastic_depth)

    def _stage(self, planes: int, count: int, stride: int) -> nn.Sequential:
        """``count`` blocks, the first with ``stride``."""
        blocks = []
        for _ in range(count):
            shortcut = make_shortcut("B", self._channels, 4 * planes, stride)
            blocks.append(Bottleneck(self._channels, planes, stride, shortcut, self._cardinality, self._base_width))
            self._channels, stride = 4 * planes, 1
        return nn.Sequential(*blocks)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 1024, ceil(H / 4), ceil(W / 4)), the last stage's output."""
        x = conv_bn(channels_last(x), self.conv1, self.bn1, activation=self.relu)
        x = channels_last(x)  # one input channel: nothing told the stem which layout was meant
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.forward_features(x))
        return self.fc(torch.flatten(x, 1))


@register(CIFAR, RESNEXT)
def resnext29_8x64d_cifar(**kwargs: Any) -> CifarResNeXt:
    return CifarResNeXt(29, 8, 64, **kwargs)


@register(CIFAR, RESNEXT)
def resnext29_16x64d_cifar(**kwargs: Any) -> CifarResNeXt:
    return CifarResNeXt(29, 16, 64, **kwargs)
