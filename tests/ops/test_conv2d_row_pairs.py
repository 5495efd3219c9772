"""Direct convolution into one vector of channels: two output rows at a time have the bits of one row at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.instruction_sets import run_tests_under
from support.plain_sums import plain_sums as plain_sums
from support.plain_sums import random
from torch import Tensor

from fastcnn import ops

GEOMETRIES = [
    # filter, stride, padding, height, width
    ((5, 5), (1, 1), (0, 0), 14, 14),  # LeNet-5's second layer, read in place
    ((5, 5), (1, 1), (0, 0), 15, 47),  # several parts of a row, an odd number of rows
    ((3, 3), (1, 1), (1, 1), 13, 30),
    ((5, 3), (2, 1), (4, 2), 17, 14),
    ((7, 7), (2, 2), (3, 3), 45, 61),
    ((2, 5), (1, 2), (0, 1), 9, 40),
    ((3, 3), (3, 1), (1, 1), 19, 24),  # rows that share nothing
    ((3, 3), (1, 1), (0, 0), 3, 16),  # a single row
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("in_channels", "channels"), [(6, 16), (1, 9), (3, 13), (5, 40), (2, 3), (4, 70)])
def test_two_rows_at_a_time(in_channels: int, channels: int, geometry, dtype: torch.dtype) -> None:
    filter, stride, padding, h, w = geometry
    x = random(2, in_channels, h, w, seed=1).to(dtype)
    weight, bias = random(channels, in_channels, *filter, seed=2).to(dtype), random(channels, seed=3)
    shape = F.conv2d(x.float(), weight.float(), None, stride, padding).shape
    residual = random(*shape, seed=4).to(dtype)
    result = ops.conv2d(x, weight, bias, stride, padding, residual=residual, activation="relu")

    def whole(to: torch.dtype) -> Tensor:
        sums = F.conv2d(x.to(to), weight.to(to), bias.to(to), stride, padding)
        return torch.relu(sums + residual.to(to))

    assert_accurate(result, whole(torch.float32).to(dtype), whole(torch.float64))
    padded = F.pad(x, (0, 0, padding[0], padding[0]))
    for p in range(shape[2]):
        rows = padded[:, :, p * stride[0] : p * stride[0] + filter[0]].contiguous(memory_format=torch.channels_last)
        added = residual[:, :, p : p + 1].contiguous(memory_format=torch.channels_last)
        alone = ops.conv2d(rows, weight, bias, stride, (0, padding[1]), residual=added, activation="relu")
        assert torch.equal(result[:, :, p : p + 1], alone)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    before = torch.get_num_threads()
    x, weight = random(9, 6, 29, 33, seed=1), random(16, 6, 5, 5, seed=2)
    alone = torch.cat([ops.conv2d(image, weight, padding=1) for image in x.split(1)])
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ops.conv2d(x, weight, padding=1), alone)
    finally:
        torch.set_num_threads(before)


def test_what_lies_behind_the_input_is_not_read() -> None:
    x, weight = random(1, 6, 14, 14, seed=1), random(16, 6, 5, 5, seed=2)
    buffer = torch.full((3, 6, 14, 14), float("nan")).contiguous(memory_format=torch.channels_last)
    buffer[1:2] = x
    assert torch.equal(ops.conv2d(buffer[1:2], weight), ops.conv2d(x, weight))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_other_instruction_sets(isa: str) -> None:
    run_tests_under(isa, __file__, "not instruction")
