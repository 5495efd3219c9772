"""The blocks and shortcuts of He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385).

Names of children and parameters are torchvision's. In eval mode every convolution is one call with batch norm, residual
addition and ReLU in its epilogue; in train mode it is a convolution and one batch norm with the rest fused in.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.nn.fusing import conv_bn
from fastcnn.nn.modules import BatchNorm2d, Conv2d
from fastcnn.nn.stochastic_depth import StochasticDepth


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> Conv2d:
    return Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> Conv2d:
    return Conv2d(in_channels, out_channels, 1, stride, bias=False)


class Projection(nn.Sequential):
    """A 1x1 convolution and batch norm as one call. Keys ``0`` and ``1``.

    (N, C, H, W) -> (N, K, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(conv1x1(in_channels, out_channels, stride), BatchNorm2d(out_channels))

    def forward(self, input: Tensor) -> Tensor:
        if len(self) != 2:
            return super().forward(input)
        conv, bn = self
        return conv_bn(input, conv, bn, activation="none")  # type: ignore[arg-type]


class ZeroPadShortcut(nn.Module):
    """Option A: every ``stride``-th pixel, with zero channels on both sides. No parameters.

    (N, C, H, W) -> (N, K, ceil(H / stride), ceil(W / stride)); of the K - C zero channels the first half goes in front.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"out_channels must be at least in_channels={in_channels}, is {out_channels}")
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride

    def forward(self, input: Tensor) -> Tensor:
        added = self.out_channels - self.in_channels
        pixels = input.permute(0, 2, 3, 1)[:, :: self.stride, :: self.stride]
        return F.pad(pixels, (added // 2, added - added // 2)).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


def make_shortcut(option: str | None, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """The paper's shortcut options; None stands for the identity (or, with option None, for no shortcut at all).

    ``"A"``: identity, zero-padded where channels grow. ``"B"``: identity, a projection where the size changes.
    ``"C"``: projections everywhere.
    """
    if option not in ("A", "B", "C", None):
        raise ValueError(f"shortcut must be 'A', 'B' or 'C', is {option!r}")
    same_size = stride == 1 and in_channels == out_channels
    if option is None or (same_size and option != "C"):
        return None
    return (ZeroPadShortcut if option == "A" else Projection)(in_channels, out_channels, stride)


class PlainBlock(nn.Module):
    """Two 3x3 convolutions without a shortcut: half of what the paper's plain networks are made of.

    (N, C, H, W) -> (N, planes, ceil(H / stride), ceil(W / stride)).
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(f"{type(self).__name__} has groups=1 and base_width=64, not {groups} and {base_width}")
        self.conv1 = conv3x3(in_channels, planes, stride)
        self.bn1 = BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = BatchNorm2d(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = conv_bn(x, self.conv1, self.bn1, activation=self.relu)
        return conv_bn(y, self.conv2, self.bn2, activation=self.relu)


class BasicBlock(StochasticDepth, PlainBlock):
    """Two 3x3 convolutions around an identity or ``downsample`` shortcut (figure 2; figure 5, left)."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        if self.is_dropped():
            return F.relu(shortcut)
        y = conv_bn(x, self.conv1, self.bn1, activation=self.relu)
        return conv_bn(y, self.conv2, self.bn2, residual=shortcut, branch_scale=self.branch_scale, activation=self.relu)


class Bottleneck(StochasticDepth, nn.Module):
    """1x1 to fewer channels, 3x3, 1x1 back to four times as many, around a shortcut (figure 5, right).

    (N, C, H, W) -> (N, 4 * planes, ceil(H / stride), ceil(W / stride)).

    Args:
        groups, base_width: ResNeXt's cardinality and width per group (arXiv:1611.05431); base_width 128 with one group
            makes Wide ResNet-50-2. The 3x3 has ``int(planes * base_width / 64) * groups`` channels.
        stride_in_1x1: stride in the first 1x1, as in the paper (v1), instead of the 3x3 (v1.5, torchvision).
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        *,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        width = int(planes * (base_width / 64)) * groups
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(in_channels, width, stride_1x1)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride_3x3, groups)
        self.bn2 = BatchNorm2d(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        if self.is_dropped():
            return F.relu(shortcut)
        y = conv_bn(x, self.conv1, self.bn1, activation=self.relu)
        y = conv_bn(y, self.conv2, self.bn2, activation=self.relu)
        return conv_bn(y, self.conv3, self.bn3, residual=shortcut, branch_scale=self.branch_scale, activation=self.relu)
