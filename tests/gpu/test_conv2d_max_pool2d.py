"""A first convolution with the max pooling behind it, in one kernel on a GPU: the two kernels' bits, and float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support import gpu_record
from support.accuracy import assert_accurate
from support.gpu import BF16, FP16, Precision, Random
from support.layout import GUARD, GuardedSlice

from fastcnn import ops


@dataclass(frozen=True)
class Case:
    name: str
    image: tuple[int, int, int]  # N, H, W
    filters: int = 64
    size: int = 7
    stride: int = 2
    padding: int = 3
    pool_padding: int = 1
    ceil_mode: bool = False
    precision: Precision = BF16
    channels: int = 3
    relu: bool = True

    def __str__(self) -> str:
        return f"{self.name}-{self.precision}"


SMALL = [
    Case("batch 1", (1, 224, 224)),
    Case("batch 3", (3, 224, 224), precision=FP16),
    Case("googlenet", (2, 224, 224), pool_padding=0, ceil_mode=True),
    Case("alexnet", (2, 224, 224), size=11, stride=4, padding=2, pool_padding=0),
    Case("odd", (2, 73, 61), precision=FP16),
    Case("one window", (2, 3, 2)),
    Case("strips", (1, 20, 261), 96, size=3, stride=1, padding=1),
    Case("part of a block", (2, 33, 40), 136, size=5, padding=2, channels=1, relu=False, precision=FP16),
    Case("four channels", (2, 50, 44), 40, size=3, stride=3, padding=0, channels=4, relu=False),
]
LARGE = [Case("batch 32", (32, 224, 224)), Case("batch 256", (256, 224, 224))]


def cases(backend: str) -> list[Case]:
    return SMALL if backend == "cuda" else []


def large_cases(backend: str) -> list[Case]:
    return LARGE if backend == "cuda" else []


def operands(case: Case, device: torch.device) -> tuple[torch.Tensor, ...]:
    random, dtype = Random(case, device), case.precision.dtype
    n, h, w = case.image
    x = random(n, case.channels, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = random(case.filters, case.channels, case.size, case.size, dtype=dtype)
    return x, weight, random(case.filters), random.factors(case.filters)


def ran_in_one_kernel(request: pytest.FixtureRequest, case: Case) -> bool:
    entry = f"cuda|conv2d_max_pool2d|{case.precision}"
    return (gpu_record.PROPERTY, entry) in request.node.user_properties


@pytest.mark.cases.with_args(cases)
def test_against_the_two_kernels_and_float64(backend, device, case: Case, request: pytest.FixtureRequest) -> None:
    x, weight, bias, scale = operands(case, device)
    x[-1, 0, 1, 1] = float("nan")
    activation = "relu" if case.relu else "none"
    convolution = (weight, bias, case.stride, case.padding)
    window = {"kernel_size": 3, "pool_stride": 2, "pool_padding": case.pool_padding, "ceil_mode": case.ceil_mode}
    with torch.no_grad():
        between = ops.conv2d(x, *convolution, scale=scale, activation=activation)
        expected = ops.max_pool2d(between, 3, 2, case.pool_padding, 1, case.ceil_mode)
        out = GuardedSlice(tuple(expected.shape), x.dtype, device, before=8, after=16)
        ops.conv2d_max_pool2d(x, *convolution, scale=scale, activation=activation, **window, out=out.view)
        ours, again = (
            ops.conv2d_max_pool2d(x, *convolution, scale=scale, activation=activation, **window) for _ in range(2)
        )
    assert ran_in_one_kernel(request, case)
    out.assert_guards_intact()
    assert not (out.view == GUARD).any()
    for result in (out.view, ours, again):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert ours.stride() == expected.stride()

    def formula(to: torch.dtype) -> torch.Tensor:
        y = F.conv2d(x.to(to), weight.to(to), None, case.stride, case.padding)
        y = y * scale.to(to).view(-1, 1, 1) + bias.to(to).view(-1, 1, 1)
        return F.max_pool2d(F.relu(y) if case.relu else y, 3, 2, case.pool_padding, 1, case.ceil_mode)

    reference, exact = formula(x.dtype), formula(torch.float64)
    assert torch.equal(ours.isnan(), exact.isnan())
    assert_accurate(ours.nan_to_num(0), reference.nan_to_num(0), exact.nan_to_num(0))


@pytest.mark.cases.with_args(large_cases)
def test_whole_batches(backend, device, case: Case, request: pytest.FixtureRequest) -> None:
    if device.type == "cpu":
        pytest.skip("too large for a rehearsal")
    x, weight, bias, scale = operands(case, device)
    with torch.no_grad():
        between = ops.conv2d(x, weight, bias, 2, 3, scale=scale, activation="relu")
        expected = ops.max_pool2d(between, 3, 2, 1)
        ours = ops.conv2d_max_pool2d(
            x, weight, bias, 2, 3, scale=scale, activation="relu", kernel_size=3, pool_stride=2, pool_padding=1
        )
    assert ran_in_one_kernel(request, case)
    assert torch.equal(ours, expected)
