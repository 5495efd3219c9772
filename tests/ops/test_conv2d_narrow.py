"""Direct convolution into few output channels, and of one or two output pixels, against float64."""

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


def slice_of(shape: torch.Size, before: int, behind: int) -> tuple[Tensor, Tensor]:
    """A buffer of NaN and a channel slice of it."""
    n, k, p, q = shape
    wide = torch.full((n, before + k + behind, p, q), float("nan")).contiguous(memory_format=torch.channels_last)
    return wide, wide[:, before : before + k]


GEOMETRIES = [
    # filter, stride, padding, height, width
    ((5, 5), (1, 1), (0, 0), 32, 32),  # LeNet-5
    ((3, 3), (1, 1), (1, 1), 15, 30),
    ((7, 7), (2, 2), (3, 3), 61, 57),
    ((1, 3), (1, 1), (0, 1), 3, 17),
    ((3, 1), (3, 2), (1, 0), 40, 29),
    ((5, 3), (2, 1), (4, 2), 16, 14),
    ((3, 3), (1, 1), (0, 0), 3, 16),  # one output row
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("in_channels", [1, 2, 3])
@pytest.mark.parametrize("channels", range(1, 10))
def test_few_output_channels(channels: int, in_channels: int, geometry) -> None:
    filter, stride, padding, h, w = geometry
    x, weight = random(2, in_channels, h, w, seed=1), random(channels, in_channels, *filter, seed=2)
    scale, bias = random(channels, seed=3), random(channels, seed=4)
    plain = F.conv2d(x, weight, None, stride, padding)
    _, out = slice_of(plain.shape, 0, 0)

    def whole(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        sums = F.conv2d(x, weight, None, stride, padding)
        return torch.relu(sums * scale[:, None, None] + bias[:, None, None])

    result = ops.conv2d(x, weight, bias, stride, padding, scale=scale, activation="relu", out=out)
    wide = whole(x.double(), weight.double(), scale.double(), bias.double())
    assert_accurate(result, whole(x, weight, scale, bias), wide)
    # Into a slice every channel has a lane of its own: the same sums in the same order.
    buffer, part = slice_of(plain.shape, 3, 5)
    ops.conv2d(x, weight, bias, stride, padding, scale=scale, activation="relu", out=part)
    assert torch.equal(part, result)
    assert buffer[:, :3].isnan().all()
    assert buffer[:, 3 + channels :].isnan().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    before = torch.get_num_threads()
    x, weight = random(9, 1, 32, 32, seed=1), random(6, 1, 5, 5, seed=2)
    alone = torch.cat([ops.conv2d(image, weight) for image in x.split(1)])
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ops.conv2d(x, weight), alone)
    finally:
        torch.set_num_threads(before)


def test_nan_stays_where_the_filter_meets_it() -> None:
    x, weight = random(1, 1, 32, 32, seed=1), random(6, 1, 5, 5, seed=2)
    x[0, 0, 9, 11] = float("nan")
    out = ops.conv2d(x, weight, activation="relu")
    assert torch.equal(out.isnan(), F.conv2d(x, weight).isnan())


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("channels", [16, 97, 112, 113, 120, 128, 136, 144, 145, 260])
def test_one_or_two_output_pixels(channels: int, images: int) -> None:
    """Four column blocks at once, and what is left of them."""
    x, weight, bias = random(images, 16, 5, 5, seed=1), random(channels, 16, 5, 5, seed=2), random(channels, seed=3)
    residual = random(images, channels, 1, 1, seed=4)
    result = ops.conv2d(x, weight, bias, residual=residual, activation="relu")
    plain = torch.relu(F.conv2d(x, weight, bias) + residual)
    wide = torch.relu(F.conv2d(x.double(), weight.double(), bias.double()) + residual.double())
    assert_accurate(result, plain, wide)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_other_instruction_sets(isa: str) -> None:
    run_tests_under(isa, __file__, "not instruction")
