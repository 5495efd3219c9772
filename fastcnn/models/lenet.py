"""LeNet-5: LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition" (1998), figure 2.

``lenet5_1998`` is the paper's. ``lenet5`` is what the name means today: dense connections, max pooling, ReLU, a linear
output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.models._common import channels_last
from fastcnn.models._lenet_parts import (
    C3_TABLE,
    RadialBasis,
    ScaledTanh,
    Subsampling,
    TableConv2d,
    digit_codes,
    random_codes,
)
from fastcnn.models._registry import register
from fastcnn.nn import Conv2d, Linear, MaxPool2d, conv_act, linear_act

PAPER = "http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf"
DIGITS = (1, 32, 32)


class LeNet5(nn.Module):
    """Two convolutions with pooling, a third that sees all that is left, two linear layers.

    (N, in_channels, 32, 32) -> logits (N, num_classes), by way of 28, 14, 10, 5 and 1 pixels.

    Args:
        num_classes: logits.
        dropout: before the last layer, in train mode.
        in_channels: the input's channels.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.0, *, in_channels: int = 1) -> None:
        super().__init__()
        self.c1 = Conv2d(in_channels, 6, 5)
        self.s2 = MaxPool2d(2)
        self.c3 = Conv2d(6, 16, 5)
        self.s4 = MaxPool2d(2)
        self.c5 = Conv2d(16, 120, 5)
        self.f6 = Linear(120, 84)
        self.dropout = nn.Dropout(dropout)
        self.output = Linear(84, num_classes)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.s2(conv_act(channels_last(x), self.c1, activation=self.relu))
        x = self.s4(conv_act(x, self.c3, activation=self.relu))
        x = _single_pixel(conv_act(x, self.c5, activation=self.relu))
        return self.output(self.dropout(linear_act(x, self.f6, activation=self.relu)))


class LeNet5Of1998(nn.Module):
    """The paper's: C3 reads its input by a table, subsampling is trained, outputs are distances to fixed codes.

    (N, in_channels, 32, 32) -> minus the squared distances (N, num_classes): the largest wins, as with logits. The
    paper scales pixels to -0.1 (background) and 1.175 (ink).

    Args:
        num_classes: 10 for bitmaps of the digits as codes; else random codes.
        dropout: before the output, in train mode.
        in_channels: the input's channels.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.0, *, in_channels: int = 1) -> None:
        super().__init__()
        self.c1 = Conv2d(in_channels, 6, 5)
        self.s2 = Subsampling(6)
        self.c3 = TableConv2d(6, C3_TABLE, 5)
        self.s4 = Subsampling(16)
        self.c5 = Conv2d(16, 120, 5)
        self.f6 = Linear(120, 84)
        self.squash = ScaledTanh()
        self.dropout = nn.Dropout(dropout)
        codes = digit_codes() if num_classes == 10 else random_codes(num_classes, 84)
        self.output = RadialBasis(codes.to(self.f6.weight.device))
        self._initialise()

    def _initialise(self) -> None:
        """Appendix A: uniform in +-2.4 / fan-in; biases 0."""
        if self.f6.weight.is_meta:  # nothing to initialise
            return
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                bound = 2.4 / module.weight[0].numel()
                nn.init.uniform_(module.weight, -bound, bound)
            elif isinstance(module, Subsampling):
                nn.init.uniform_(module.weight, -2.4 / 4, 2.4 / 4)
            elif isinstance(module, TableConv2d):
                fan_ins = [len(inputs) * module.kernel_size**2 for inputs in module.table for _ in inputs]
                for filter, fan_in in zip(module.weight, fan_ins, strict=True):
                    nn.init.uniform_(filter, -2.4 / fan_in, 2.4 / fan_in)
            if isinstance(module, (nn.Conv2d, nn.Linear, Subsampling, TableConv2d)):
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squash(self.s2(self.squash(self.c1(channels_last(x)))))
        x = self.squash(self.s4(self.squash(self.c3(x))))
        x = _single_pixel(self.squash(self.c5(x)))
        return self.output(self.dropout(self.squash(self.f6(x))))


def _single_pixel(x: Tensor) -> Tensor:
    """(N, C, 1, 1) -> (N, C)."""
    if x.shape[2:] != (1, 1):
        raise ValueError(f"input must have 32x32 pixels: C5 gives {tuple(x.shape[2:])} pixels, not one")
    return torch.flatten(x, 1)


@register(DIGITS, PAPER)
def lenet5(**kwargs: Any) -> LeNet5:
    return LeNet5(**kwargs)


@register(DIGITS, PAPER)
def lenet5_1998(**kwargs: Any) -> LeNet5Of1998:
    """The paper's, with its 60,000 trainable parameters."""
    return LeNet5Of1998(**kwargs)
