"""ResNet for CIFAR-10: He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), section 4.2.

State-dict keys are those of the common CIFAR checkpoints (akamaster/pytorch_resnet_cifar10): the last layer is called
``linear``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.models._common import channels_last, initialise_kaiming
from fastcnn.models._registry import register
from fastcnn.nn import (
    AdaptiveAvgPool2d,
    BasicBlock,
    BatchNorm2d,
    Conv2d,
    Linear,
    PlainBlock,
    conv_bn,
    make_shortcut,
    set_stochastic_depth,
)

STOCHASTIC_DEPTH = "https://arxiv.org/abs/1603.09382"
RESNET = "https://arxiv.org/abs/1512.03385"
CIFAR = (3, 32, 32)


class CifarResNet(nn.Module):
    """3x3 stem, three stages of n basic blocks with 16, 32, 64 channels, global average pool, one linear layer.

    (N, in_channels, H, W) -> logits (N, num_classes). 32x32 gives stages of 32, 16 and 8 pixels.

    Args:
        depth: 6n + 2 weighted layers.
        num_classes: logits.
        zero_init_residual: start each residual branch at zero.
        block: :class:`~fastcnn.nn.BasicBlock`, or :class:`~fastcnn.nn.PlainBlock` with ``shortcut=None``.
        in_channels: the input's channels.
        shortcut: ``"A"`` as in the paper (every second pixel, zero channels on both sides), ``"B"`` or ``"C"``
            (projections where the size changes, everywhere).
        stochastic_depth: the last block's survival probability p_L (arXiv:1603.09382); the l-th of L blocks has
            1 - (l / L)(1 - p_L). None: blocks are never left out.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        zero_init_residual: bool = False,
        *,
        block: type[BasicBlock] | type[PlainBlock] = BasicBlock,
        in_channels: int = 3,
        shortcut: str | None = "A",
        stochastic_depth: float | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6 != 0:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), is {depth}")
        count = (depth - 2) // 6
        self._block, self._shortcut, self._channels = block, shortcut, 16
        self.conv1 = Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, count, 1)
        self.layer2 = self._stage(32, count, 2)
        self.layer3 = self._stage(64, count, 2)
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.linear = Linear(64, num_classes)
        initialise_kaiming(self, zero_init_residual=zero_init_residual)
        set_stochastic_depth(self, stochastic_depth)

    def _stage(self, channels: int, count: int, stride: int) -> nn.Sequential:
        """``count`` blocks, the first with ``stride``."""
        blocks = []
        for _ in range(count):
            shortcut = make_shortcut(self._shortcut, self._channels, channels, stride)
            blocks.append(self._block(self._channels, channels, stride, shortcut))
            self._channels, stride = channels, 1
        return nn.Sequential(*blocks)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 64, ceil(H / 4), ceil(W / 4)), the last stage's output."""
        x = conv_bn(channels_last(x), self.conv1, self.bn1, activation=self.relu)
        x = channels_last(x)  # one input channel: nothing told the stem which layout was meant
        return self.layer3(self.layer2(self.layer1(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.forward_features(x))
        return self.linear(torch.flatten(x, 1))


@register(CIFAR, RESNET)
def resnet20_cifar(**kwargs: Any) -> CifarResNet:
    return CifarResNet(20, **kwargs)


@register(CIFAR, RESNET)
def resnet32_cifar(**kwargs: Any) -> CifarResNet:
    return CifarResNet(32, **kwargs)


@register(CIFAR, RESNET)
def resnet44_cifar(**kwargs: Any) -> CifarResNet:
    return CifarResNet(44, **kwargs)


@register(CIFAR, RESNET)
def resnet56_cifar(**kwargs: Any) -> CifarResNet:
    return CifarResNet(56, **kwargs)


@register(CIFAR, RESNET)
def resnet110_cifar(**kwargs: Any) -> CifarResNet:
    return CifarResNet(110, **kwargs)


@register(CIFAR, RESNET)
def resnet1202_cifar(**kwargs: Any) -> CifarResNet:
    return CifarResNet(1202, **kwargs)


@register(CIFAR, STOCHASTIC_DEPTH)
def resnet110_sd_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-110 trained with stochastic depth, p_L = 0.5: Huang et al., 2016, section 4."""
    return CifarResNet(110, **{"stochastic_depth": 0.5, **kwargs})


@register(CIFAR, STOCHASTIC_DEPTH)
def resnet1202_sd_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-1202 trained with stochastic depth, p_L = 0.5."""
    return CifarResNet(1202, **{"stochastic_depth": 0.5, **kwargs})


@register(CIFAR, RESNET)
def plain20_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-20 without its shortcuts (figure 6, left)."""
    return CifarResNet(20, block=PlainBlock, shortcut=None, **kwargs)


@register(CIFAR, RESNET)
def plain56_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-56 without its shortcuts (figure 6, left): deeper than plain20, and worse."""
    return CifarResNet(56, block=PlainBlock, shortcut=None, **kwargs)
