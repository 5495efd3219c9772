"""Grouped convolution with few channels a group on the CPU (``csrc/cpu/isa/conv2d_grouped.cpp``) against float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.instruction_sets import check_kernels_under
from support.layout import GuardedSlice, sliced
from torch import Tensor

from fastcnn import _native

Pair = tuple[int, int]


class Case(NamedTuple):
    group: int  # channels
    groups: int
    h: int
    w: int
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)  # top, left
    padding_end: Pair = (1, 1)
    dilation: Pair = (1, 1)
    filter: Pair = (3, 3)
    n: int = 1

    @property
    def c(self) -> int:
        return self.group * self.groups


CASES = [
    Case(1, 21, 9, 8),
    Case(1, 16, 30, 33, n=2),
    Case(2, 19, 7, 15, (2, 2)),
    Case(4, 8, 57, 56),  # several strips, the last one shorter
    Case(4, 5, 16, 29, (2, 2), (0, 1), (1, 0)),
    Case(8, 4, 14, 28, n=2),
    Case(8, 3, 31, 17, (2, 1)),
    Case(8, 2, 12, 13, (1, 2)),
    Case(8, 5, 13, 13, (3, 3)),
    Case(16, 3, 14, 14),
    Case(16, 2, 13, 29, (2, 2)),
    Case(4, 4, 9, 10, dilation=(2, 3), padding=(2, 3), padding_end=(2, 3)),
    Case(8, 2, 9, 10, dilation=(3, 1), padding=(3, 1), padding_end=(3, 1)),
    Case(2, 8, 11, 40, filter=(5, 5), padding=(2, 2), padding_end=(2, 2)),
    Case(4, 4, 6, 50, filter=(1, 9), padding=(0, 4), padding_end=(0, 4)),
    Case(8, 2, 5, 5, filter=(2, 4), padding=(0, 1), padding_end=(1, 2)),
    Case(4, 4, 2, 3, padding=(4, 5), padding_end=(3, 4)),  # windows that lie in the padding altogether
    Case(4, 4, 2, 1, padding=(1, 20), padding_end=(1, 0)),
    Case(4, 4, 3, 3, padding=(0, 0), padding_end=(0, 0)),  # a single output
    Case(8, 2, 300, 4),
]


def padded(x: Tensor, case: Case) -> Tensor:
    (top, left), (bottom, right) = case.padding, case.padding_end
    return F.pad(x, (left, right, top, bottom))


def check(case: Case, dtype: torch.dtype, full: bool, threads: int) -> Tensor:
    """One call into a poisoned slice: right everywhere, nothing written beside it. Gives its result."""
    generator = torch.Generator().manual_seed(case.c + case.h)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, w = draw(case.n, case.c, case.h, case.w).to(dtype), draw(case.c, case.group, *case.filter).to(dtype)
    vectors: list[Tensor | None] = [draw(case.c) for _ in range(4)] if full else [None] * 4
    scale, bias, input_scale, input_shift = vectors
    x = sliced(x) if full else x.contiguous(memory_format=torch.channels_last)

    def reference(dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
        def channel(v: Tensor) -> Tensor:
            return v.to(dtype).view(-1, 1, 1)

        y = x.to(dtype).contiguous()
        if input_scale is not None and input_shift is not None:
            y = F.relu(y * channel(input_scale) + channel(input_shift))
        y = F.conv2d(padded(y, case), w.to(dtype), None, case.stride, 0, case.dilation, case.groups)
        if scale is not None and bias is not None:
            y = y * channel(scale) + channel(bias)
        if residual is not None:
            y = F.relu(y + residual.to(dtype))
        return y

    shape = tuple(reference(torch.float32).shape)
    residual = sliced(draw(*shape).to(dtype)) if full else None
    out = GuardedSlice(shape, dtype)
    packed = _native.PackedConv2dWeight(w, case.groups)
    _native.cpu_conv2d(
        out.view, x, packed, scale, bias, residual, input_scale, input_shift, full, full, case.stride, case.padding,
        case.dilation, threads,
    )  # fmt: skip
    out.assert_guards_intact()
    assert_accurate(out.view, reference(torch.float32, residual).to(dtype), reference(torch.float64, residual))
    return out.view.clone()


@pytest.mark.parametrize("full", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case, dtype: torch.dtype, full: bool):
    results = [check(case, dtype, full, threads) for threads in (1, 2, 5)]
    assert all(torch.equal(results[0], other) for other in results[1:])


def check_kernels() -> None:
    """Everything once, for whichever instruction set is in use."""
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            for full in (False, True):
                check(case, dtype, full, threads=1 if full else 3)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_other_instruction_sets(isa: str):
    check_kernels_under(isa, __file__)
