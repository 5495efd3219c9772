"""The inception modules of Szegedy et al., "Going Deeper with Convolutions" (arXiv:1409.4842), figure 2.

Names of children and parameters are torchvision's. In eval mode every branch writes straight into its channels of the
block's output, so that concatenation costs nothing, and the 1x1 convolutions of the block's input run as one.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fastcnn import ops
from fastcnn.nn.fusing import _is_plain, conv_act, conv_bn
from fastcnn.nn.merging import Unit, can_merge, merged_pointwise, writes_in_place
from fastcnn.nn.modules import BatchNorm2d, Conv2d, MaxPool2d


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm with eps 1e-3, ReLU: (N, C, H, W) -> (N, K, P, Q). Keys ``conv``, ``bn``."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = BatchNorm2d(out_channels, eps=0.001)

    @property
    def unit(self) -> Unit:
        return self.conv, self.bn

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return conv_bn(x, self.conv, self.bn, out=out)


class ConvReLU(nn.Module):
    """Convolution with bias, ReLU: (N, C, H, W) -> (N, K, P, Q). Key ``conv``."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, kernel_size, stride, padding)

    @property
    def unit(self) -> Unit:
        return self.conv, None

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return conv_act(x, self.conv, out=out)


ConvBlock = type[ConvBNReLU] | type[ConvReLU]


def _is_block(module: nn.Module | None) -> bool:
    return type(module) is ConvBNReLU or type(module) is ConvReLU


def _is_as_built(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs what this file wrote: it was neither replaced nor given hooks."""
    return isinstance(module, nn.Module) and _is_plain(module, kind, kind)


class Inception(nn.Module):
    """Figure 2(b): 1x1; 1x1 to fewer channels, 3x3; 1x1 to fewer channels, 5x5; 3x3 max pool, 1x1; concatenated.

    (N, in_channels, H, W) -> (N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W). In eval mode the output is a channel slice
    of a channels-last buffer that also holds the reduced channels.

    Args:
        ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj: channels, in the order of the paper's table 1.
        conv_block: :class:`ConvReLU` as in the paper or :class:`ConvBNReLU`.
        kernel_size: of the third branch: 5, but 3 in torchvision's network.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        conv_block: ConvBlock = ConvReLU,
        *,
        kernel_size: int = 5,
    ) -> None:
        super().__init__()
        self.branch1 = conv_block(in_channels, ch1x1, 1)
        self.branch2 = nn.Sequential(conv_block(in_channels, ch3x3red, 1), conv_block(ch3x3red, ch3x3, 3, padding=1))
        self.branch3 = nn.Sequential(
            conv_block(in_channels, ch5x5red, 1),
            conv_block(ch5x5red, ch5x5, kernel_size, padding=kernel_size // 2),
        )
        self.branch4 = nn.Sequential(
            MaxPool2d(3, stride=1, padding=1, ceil_mode=True), conv_block(in_channels, pool_proj, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if writes_in_place(x, tuple(self.parameters()) if torch.is_grad_enabled() else ()) and self._can_merge():
            return self._merged(x)
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)

    def _can_merge(self) -> bool:
        chains = (self.branch2, self.branch3, self.branch4)
        if not all(_is_as_built(chain, nn.Sequential) and len(chain) == 2 for chain in chains):
            return False
        first = (self.branch1, self.branch2[0], self.branch3[0])
        last = (self.branch2[1], self.branch3[1], self.branch4[1])
        return (
            all(_is_block(block) and _is_as_built(block, type(block)) for block in first)
            and all(_is_block(block) for block in last)
            and can_merge([block.unit for block in first])  # type: ignore[misc]
        )

    def _merged(self, x: Tensor) -> Tensor:
        """One buffer for [3x3 reduced | 5x5 reduced | branch 1 | branch 2 | branch 3 | branch 4]: all but the reduced
        channels are the output, and the first three are neighbours, as one convolution writes them.
        """
        (reduce3, conv3), (reduce5, conv5), (pool, project) = self.branch2, self.branch3, self.branch4
        blocks = cast("list[ConvBNReLU | ConvReLU]", [reduce3, reduce5, self.branch1, conv3, conv5, project])
        n, _, h, w = x.shape
        widths = [block.conv.weight.shape[0] for block in blocks]
        buffer = torch.empty((n, sum(widths), h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        reduced3, reduced5, _, out3, out5, projected = buffer.split(widths, 1)  # type: ignore[no-untyped-call]
        merged_pointwise(x, [block.unit for block in blocks[:3]], out=buffer[:, : sum(widths[:3])])
        conv3(reduced3, out=out3)
        conv5(reduced5, out=out5)
        project(pool(x), out=projected)
        return buffer[:, sum(widths[:2]) :]


class InceptionNaive(nn.Module):
    """Figure 2(a): 1x1, 3x3, 5x5 and a 3x3 max pool of the same input, concatenated.

    (N, in_channels, H, W) -> (N, ch1x1 + ch3x3 + ch5x5 + in_channels, H, W): the pool keeps all channels, so that the
    network grows with every module, which is why the paper goes on to :class:`Inception`.
    """

    def __init__(self, in_channels: int, ch1x1: int, ch3x3: int, ch5x5: int, conv_block: ConvBlock = ConvReLU) -> None:
        super().__init__()
        self.branch1 = conv_block(in_channels, ch1x1, 1)
        self.branch2 = conv_block(in_channels, ch3x3, 3, padding=1)
        self.branch3 = conv_block(in_channels, ch5x5, 5, padding=2)
        self.branch4 = MaxPool2d(3, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        convs = (self.branch1, self.branch2, self.branch3)
        if not (
            writes_in_place(x, tuple(self.parameters()) if torch.is_grad_enabled() else ())
            and all(_is_block(block) for block in convs)
            and _is_as_built(self.branch4, MaxPool2d)
        ):
            return torch.cat([*(block(x) for block in convs), self.branch4(x)], 1)
        n, channels, h, w = x.shape
        widths = [*(block.conv.weight.shape[0] for block in convs), channels]
        out = torch.empty((n, sum(widths), h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        *slices, pooled = out.split(widths, 1)  # type: ignore[no-untyped-call]
        for block, part in zip(convs, slices, strict=True):
            block(x, out=part)
        ops.max_pool2d(x, 3, 1, 1, out=pooled)
        return out
