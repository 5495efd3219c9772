"""ZFNet: Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks" (arXiv:1311.2901), figure 3.

AlexNet with a finer first layer: 7x7 filters with stride 2 instead of 11x11 with stride 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.models._common import channels_last
from fastcnn.models._registry import register
from fastcnn.nn import Conv2d, Linear, LocalResponseNorm, MaxPool2d, conv_act, linear_act

PAPER = "https://arxiv.org/abs/1311.2901"


class ZFNet(nn.Module):
    """Five convolutions, three of them followed by pooling, and three linear layers.

    (N, in_channels, 224, 224) -> logits (N, num_classes), by way of 110, 55, 26, 13 and 6 pixels. Pooling counts
    partial windows at the border (ceil mode), as figure 3's sizes demand.

    Args:
        num_classes: logits.
        dropout: before the second and third linear layer, in train mode.
        in_channels: the input's channels.
        hidden: width of the hidden linear layers.
    """

    def __init__(
        self, num_classes: int = 1000, dropout: float = 0.5, *, in_channels: int = 3, hidden: int = 4096
    ) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, 96, 7, 2, padding=1)
        self.pool1 = MaxPool2d(3, 2, ceil_mode=True)
        self.norm1 = LocalResponseNorm(5)
        self.conv2 = Conv2d(96, 256, 5, 2)
        self.pool2 = MaxPool2d(3, 2, ceil_mode=True)
        self.norm2 = LocalResponseNorm(5)
        self.conv3 = Conv2d(256, 384, 3, padding=1)
        self.conv4 = Conv2d(384, 384, 3, padding=1)
        self.conv5 = Conv2d(384, 256, 3, padding=1)
        self.pool5 = MaxPool2d(3, 2, ceil_mode=True)
        self.fc6 = Linear(256 * 6 * 6, hidden)
        self.drop6 = nn.Dropout(dropout)
        self.fc7 = Linear(hidden, hidden)
        self.drop7 = nn.Dropout(dropout)
        self.fc8 = Linear(hidden, num_classes)
        self.relu = nn.ReLU(inplace=True)
        self._initialise()

    def _initialise(self) -> None:
        """Section 3.1: weights of size 1e-2, biases 0."""
        if self.conv1.weight.is_meta:  # nothing to initialise
            return
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, 224, 224) -> (N, 256, 6, 6), the last pooling's output."""
        x = conv_act(channels_last(x), self.conv1, activation=self.relu)
        x = self.norm1(self.pool1(x))
        x = conv_act(x, self.conv2, activation=self.relu)
        x = self.norm2(self.pool2(x))
        x = conv_act(x, self.conv3, activation=self.relu)
        x = conv_act(x, self.conv4, activation=self.relu)
        x = conv_act(x, self.conv5, activation=self.relu)
        return self.pool5(x)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.forward_features(x), 1)
        if x.shape[1] != self.fc6.in_features:
            raise ValueError(
                f"input must have 224x224 pixels: its last volume has {x.shape[1]} values, not 256 * 6 * 6"
            )
        x = self.drop6(linear_act(x, self.fc6, activation=self.relu))
        x = self.drop7(linear_act(x, self.fc7, activation=self.relu))
        return self.fc8(x)


@register((3, 224, 224), PAPER)
def zfnet(**kwargs: Any) -> ZFNet:
    return ZFNet(**kwargs)
