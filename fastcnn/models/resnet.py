"""ResNet for ImageNet: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), table 1.

Also what differs from it only in widths and groups: Wide ResNet-50-2 (Zagoruyko and Komodakis, arXiv:1605.07146) and
ResNeXt (Xie et al., arXiv:1611.05431); and the plain networks of figure 3, which have no shortcuts. State-dict keys and
initialisation are torchvision's.
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
    BasicBlock,
    BatchNorm2d,
    Bottleneck,
    Conv2d,
    Linear,
    MaxPool2d,
    PlainBlock,
    conv_bn,
    make_shortcut,
    set_stochastic_depth,
)

RESNET = "https://arxiv.org/abs/1512.03385"
WIDE = "https://arxiv.org/abs/1605.07146"
RESNEXT = "https://arxiv.org/abs/1611.05431"
IMAGENET = (3, 224, 224)


class ResNet(nn.Module):
    """7x7 stem, four stages of residual blocks with 64, 128, 256, 512 planes, global average pool, one linear layer.

    (N, in_channels, H, W) -> logits (N, num_classes). 224x224 gives stages of 56, 28, 14 and 7 pixels.

    Args:
        block: :class:`~fastcnn.nn.BasicBlock`, :class:`~fastcnn.nn.Bottleneck` or :class:`~fastcnn.nn.PlainBlock`.
        layers: blocks in each of the four stages.
        num_classes: logits.
        zero_init_residual: start each residual branch at zero.
        groups, width_per_group: ResNeXt's cardinality and width; 64 and 1 group are the ResNet's.
        in_channels: the input's channels.
        shortcut: the paper's option ``"A"`` (zero-padded identity), ``"B"`` (projection where the size changes) or
            ``"C"`` (projections everywhere); None for plain blocks.
        stride_in_1x1: bottlenecks stride in their first 1x1, as in the paper, instead of the 3x3 (torchvision's v1.5).
        stochastic_depth: the last block's survival probability p_L (arXiv:1603.09382); the l-th of L blocks has
            1 - (l / L)(1 - p_L). None: blocks are never left out.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck] | type[PlainBlock],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        *,
        in_channels: int = 3,
        shortcut: str | None = "B",
        stride_in_1x1: bool = False,
        stochastic_depth: float | None = None,
    ) -> None:
        super().__init__()
        self._block, self._shortcut, self._channels = block, shortcut, 64
        self._options: dict[str, Any] = {"groups": groups, "base_width": width_per_group}
        if stride_in_1x1:
            if block is not Bottleneck:
                raise ValueError(f"stride_in_1x1 is for Bottleneck blocks: {block.__name__} has no 1x1 convolution")
            self._options["stride_in_1x1"] = True
        self.conv1 = Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = MaxPool2d(3, 2, padding=1)
        self.layer1 = self._stage(64, layers[0], 1)
        self.layer2 = self._stage(128, layers[1], 2)
        self.layer3 = self._stage(256, layers[2], 2)
        self.layer4 = self._stage(512, layers[3], 2)
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.fc = Linear(512 * block.expansion, num_classes)
        initialise_kaiming(self, zero_init_residual=zero_init_residual)
        set_stochastic_depth(self, stochastic_depth)

    def _stage(self, planes: int, count: int, stride: int) -> nn.Sequential:
        """``count`` blocks, the first with ``stride``."""
        blocks = []
        for _ in range(count):
            out_channels = planes * self._block.expansion
            shortcut = make_shortcut(self._shortcut, self._channels, out_channels, stride)
            blocks.append(self._block(self._channels, planes, stride, shortcut, **self._options))
            self._channels, stride = out_channels, 1
        return nn.Sequential(*blocks)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 512 * expansion, ceil(H / 32), ceil(W / 32)), the last stage's output."""
        x = conv_bn(channels_last(x), self.conv1, self.bn1, activation=self.relu)
        x = self.maxpool(channels_last(x))  # one input channel: nothing told the stem which layout was meant
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.forward_features(x))
        return self.fc(torch.flatten(x, 1))


@register(IMAGENET, RESNET)
def resnet18(**kwargs: Any) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), **kwargs)


@register(IMAGENET, RESNET)
def resnet34(**kwargs: Any) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), **kwargs)


@register(IMAGENET, RESNET)
def resnet50(**kwargs: Any) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), **kwargs)


@register(IMAGENET, RESNET)
def resnet101(**kwargs: Any) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), **kwargs)


@register(IMAGENET, RESNET)
def resnet152(**kwargs: Any) -> ResNet:
    return ResNet(Bottleneck, (3, 8, 36, 3), **kwargs)


@register(IMAGENET, WIDE)
def wide_resnet50_2(**kwargs: Any) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), width_per_group=128, **kwargs)


@register(IMAGENET, WIDE)
def wide_resnet101_2(**kwargs: Any) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), width_per_group=128, **kwargs)


@register(IMAGENET, RESNEXT)
def resnext50_32x4d(**kwargs: Any) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4, **kwargs)


@register(IMAGENET, RESNEXT)
def resnext101_32x4d(**kwargs: Any) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=4, **kwargs)


@register(IMAGENET, RESNEXT)
def resnext101_32x8d(**kwargs: Any) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8, **kwargs)


@register(IMAGENET, RESNEXT)
def resnext101_64x4d(**kwargs: Any) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=64, width_per_group=4, **kwargs)


@register(IMAGENET, RESNET)
def plain18(**kwargs: Any) -> ResNet:
    """ResNet-18 without its shortcuts."""
    return ResNet(PlainBlock, (2, 2, 2, 2), shortcut=None, **kwargs)


@register(IMAGENET, RESNET)
def plain34(**kwargs: Any) -> ResNet:
    """ResNet-34 without its shortcuts (figure 3, middle)."""
    return ResNet(PlainBlock, (3, 4, 6, 3), shortcut=None, **kwargs)
