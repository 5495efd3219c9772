"""The layers of LeNet-5 that nothing else has (LeCun et al. 1998, section II.B), and the tables they are built from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcnn import ops
from fastcnn.backends.derived import derived, operations_are_replaced

# Table I: which of the six maps of S2 each of the sixteen maps of C3 reads.
C3_TABLE = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)  # fmt: skip

# The digits on 7x12 pixels, in the manner of figure 3: F6's targets. A line is one row of all ten digits.
_DIGITS = """
....... ....... ....... ....... ....... ....... ....... ....... ....... .......
..###.. ...##.. .#####. ######. .....## ####### ..####. ####### .#####. .####..
.##.##. ..###.. ##...## .....## ....### ##..... .##.... .....## ##...## ##..##.
##...## .####.. .....## .....## ...#.## ##..... ##..... .....## ##...## ##...##
##...## ...##.. .....## ....##. ..##.## #####.. ##..... ....##. .##.##. ##...##
##...## ...##.. ....##. ..###.. .##..## ....##. #####.. ....##. ..###.. ##..###
##...## ...##.. ...##.. ....##. ##...## .....## ##..##. ...##.. .##.##. .###.##
##...## ...##.. ..##... .....## ####### .....## ##...## ...##.. ##...## .....##
##...## ...##.. .##.... .....## .....## .....## ##...## ..##... ##...## .....##
.##.##. ...##.. ##..... ##..##. .....## ##..##. .##.##. ..##... ##...## ....##.
..###.. .###### ####### .####.. .....## .####.. ..###.. ..##... .#####. .####..
....... ....... ....... ....... ....... ....... ....... ....... ....... .......
"""


def digit_codes() -> Tensor:
    """(10, 84): +1 where a digit's bitmap is inked, -1 elsewhere, row by row."""
    rows = [line.split() for line in _DIGITS.split("\n") if line]
    digits = ["".join(row[digit] for row in rows) for digit in range(10)]
    return torch.tensor([[1.0 if pixel == "#" else -1.0 for pixel in bitmap] for bitmap in digits], device="cpu")


def random_codes(num_classes: int, length: int) -> Tensor:
    """(num_classes, length) of +1 and -1, always the same: the paper's alternative to bitmaps."""
    generator = torch.Generator().manual_seed(1998)
    return torch.randint(0, 2, (num_classes, length), generator=generator, device="cpu") * 2.0 - 1.0


class ScaledTanh(nn.Module):
    """The paper's squashing function: ``1.7159 tanh(2 x / 3)``, which maps +1 and -1 to themselves (appendix A)."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(input * (2 / 3)) * 1.7159


class Subsampling(nn.Module):
    """The sum over 2x2 pixels, times a trainable coefficient, plus a trainable bias, one of each a channel.

    (N, C, H, W) -> (N, C, H // 2, W // 2).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, input: Tensor) -> Tensor:
        sums = ops.avg_pool2d(input, 2, divisor_override=1)
        return ops.channel_affine(sums, self.weight, self.bias)


class TableConv2d(nn.Module):
    """A convolution whose output maps each read some of the input's maps only.

    (N, C, H, W) -> (N, len(table), P, Q), by a dense convolution in which the other filters are zero. ``weight`` holds
    the filters that exist, (connections, kernel_size, kernel_size), in the table's order.

    Args:
        in_channels: C.
        table: for each output map the input maps that it reads.
        kernel_size: height and width of the filters.
    """

    def __init__(self, in_channels: int, table: Sequence[Sequence[int]], kernel_size: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, len(table), kernel_size
        self.table = tuple(tuple(inputs) for inputs in table)
        self.weight = nn.Parameter(torch.empty(sum(map(len, self.table)), kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(len(table)))

    def _dense(self, weight: Tensor) -> Tensor:
        connections = [(row, column) for row, inputs in enumerate(self.table) for column in inputs]
        rows, columns = torch.tensor(connections, device=weight.device).unbind(1)
        dense = weight.new_zeros(self.out_channels, self.in_channels, self.kernel_size, self.kernel_size)
        return dense.index_put((rows, columns), weight)

    def dense_weight(self) -> Tensor:
        """(len(table), C, kernel_size, kernel_size), kept until ``weight`` changes where no gradient is recorded."""
        weight = self.weight
        records = torch.is_grad_enabled() and weight.requires_grad
        if records or operations_are_replaced() or type(weight) is not nn.Parameter:
            return self._dense(weight)

        def make(weight: Tensor) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                return self._dense(weight)

        return derived(weight, ("table_conv2d", self.table), make)

    def forward(self, input: Tensor) -> Tensor:
        return ops.conv2d(input, self.dense_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {len(self.weight)} filters"


class RadialBasis(nn.Module):
    """Euclidean radial basis functions: minus the squared distances to fixed codes. (N, F) -> (N, num_classes).

    The paper's output is the distance itself, the class with the smallest one wins. With the sign turned these are
    logits: cross entropy on them is the paper's criterion (equation 9, without its constant).
    """

    codes: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)

    def forward(self, input: Tensor) -> Tensor:
        return -(input.unsqueeze(1) - self.codes).square().sum(-1)
