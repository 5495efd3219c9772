"""The blocks of He et al., "Identity Mappings in Deep Residual Networks" (arXiv:1603.05027), figure 1 (b).

BN-ReLU comes before each convolution and nothing after the addition. In eval mode a batch norm and ReLU that one
convolution reads are its prologue, those between two convolutions the first one's epilogue, and the addition is the
last one's, as is the survival probability of stochastic depth.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastcnn.nn.blocks import conv1x1, conv3x3
from fastcnn.nn.fusing import bn_act, bn_act_conv, conv_act, conv_bn
from fastcnn.nn.modules import BatchNorm2d, Conv2d
from fastcnn.nn.stochastic_depth import StochasticDepth

PREACTIVATIONS = ("branch", "shared", "none")


class _PreActBlock(StochasticDepth, nn.Module):
    """What the two kinds of block share: the first BN-ReLU, and who reads it.

    ``preactivation``: ``"branch"``, the first convolution alone; ``"shared"``, the shortcut too (where the size
    changes); ``"none"``, there is none (the input is activated already). The shortcut is the identity, or a bare 1x1
    convolution (no batch norm) where the size changes.
    """

    conv1: Conv2d
    bn2: BatchNorm2d

    def __init__(self, in_channels: int, out_channels: int, stride: int, preactivation: str) -> None:
        super().__init__()
        if preactivation not in PREACTIVATIONS:
            raise ValueError(f"preactivation must be one of {', '.join(PREACTIVATIONS)}, is {preactivation!r}")
        self.preactivation, self.stride = preactivation, stride
        self.bn1 = None if preactivation == "none" else BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        same_size = stride == 1 and in_channels == out_channels
        self.downsample = None if same_size else conv1x1(in_channels, out_channels, stride)

    def _shortcut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The shortcut, and what it reads: ``x``, or a shared ``relu(bn1(x))``."""
        if self.bn1 is not None and self.preactivation == "shared":
            x = bn_act(x, self.bn1, activation=self.relu)
        return x if self.downsample is None else conv_act(x, self.downsample, activation="none"), x

    def _begin(self, x: Tensor) -> Tensor:
        """The branch as far as ``relu(bn2(conv1(.)))``, of what the shortcut reads."""
        if self.bn1 is not None and self.preactivation == "branch":
            return bn_act_conv(
                x, self.bn1, self.conv1, preactivation=self.relu, next_bn=self.bn2, activation=self.relu
            )  # fmt: skip
        return conv_bn(x, self.conv1, self.bn2, activation=self.relu)


class PreActBasicBlock(_PreActBlock):
    """BN-ReLU-3x3-BN-ReLU-3x3 around a shortcut.

    (N, C, H, W) -> (N, planes, ceil(H / stride), ceil(W / stride)).

    Args:
        preactivation: who reads the first BN-ReLU: ``"branch"``, ``"shared"`` or ``"none"``.
        dropout: between the convolutions (Zagoruyko and Komodakis, arXiv:1605.07146, section 2.4).
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        *,
        preactivation: str = "branch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_channels, planes, stride, preactivation)
        self.conv1 = conv3x3(in_channels, planes, stride)
        self.bn2 = BatchNorm2d(planes)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.conv2 = conv3x3(planes, planes)

    def forward(self, x: Tensor) -> Tensor:
        shortcut, x = self._shortcut(x)
        if self.is_dropped():
            return shortcut
        y = self._begin(x)
        if self.dropout is not None:
            y = self.dropout(y)
        return conv_act(y, self.conv2, residual=shortcut, branch_scale=self.branch_scale, activation="none")


class PreActBottleneck(_PreActBlock):
    """BN-ReLU-1x1-BN-ReLU-3x3-BN-ReLU-1x1 around a shortcut.

    (N, C, H, W) -> (N, 4 * planes, ceil(H / stride), ceil(W / stride)).

    Args:
        preactivation: who reads the first BN-ReLU: ``"branch"``, ``"shared"`` or ``"none"``.
        stride_in_1x1: stride in the first 1x1 (the paper's CIFAR networks) instead of the 3x3.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        *,
        preactivation: str = "branch",
        stride_in_1x1: bool = False,
    ) -> None:
        out_channels = planes * self.expansion
        super().__init__(in_channels, out_channels, stride, preactivation)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(in_channels, planes, stride_1x1)
        self.bn2 = BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride_3x3)
        self.bn3 = BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut, x = self._shortcut(x)
        if self.is_dropped():
            return shortcut
        y = conv_bn(self._begin(x), self.conv2, self.bn3, activation=self.relu)
        return conv_act(y, self.conv3, residual=shortcut, branch_scale=self.branch_scale, activation="none")
