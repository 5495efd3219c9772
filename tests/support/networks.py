"""Small networks of fastcnn's operators, for tests of what works on whole networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcnn import ops


class Conv(nn.Conv2d):
    """A convolution with ReLU on fastcnn's operator."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, activation="relu"
        )


class Block(nn.Module):
    """Two convolutions with a residual, called by function: only their weights tell them apart."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = ops.conv2d(x, self.conv1.weight, self.conv1.bias, 1, 1, activation="relu")
        return ops.conv2d(y, self.conv2.weight, self.conv2.bias, residual=x, activation="relu")


def small_network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """(N, 3, 16, 16) -> (N, 10), four convolutions."""
    torch.manual_seed(0)
    return nn.Sequential(
        Conv(3, 16, 3, padding=1), Block(16), Conv(16, 24, 3, 2, 1), nn.Flatten(), nn.Linear(24 * 8 * 8, 10)
    ).to(dtype)  # fmt: skip


def small_input(dtype: torch.dtype = torch.float32, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
