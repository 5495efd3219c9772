"""Strides of results: PyTorch's, for operands in any memory, with and without dimensions of size 1."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn import ops
from fastcnn.ops import _strides

SHAPES = [*itertools.product((1, 2), (1, 3), (1, 3), (1, 2)), (0, 3, 2, 2)]
DTYPES = [torch.float32, torch.bfloat16]


def _sliced(t: Tensor) -> Tensor:
    return torch.cat([t, t], 1)[:, : t.shape[1]]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "slice": _sliced,
    "channels_last slice": lambda t: torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last)[
        :, : t.shape[1]
    ],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "width outermost": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "every other": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "expanded batch": lambda t: t[:1].expand(t.shape) if t.shape[0] else t,
    "expanded image": lambda t: t[:, :, :1, :1].expand(t.shape) if t.shape[2] else t,
    "expanded channels": lambda t: t[:, :1].expand(t.shape),
}


def operands(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for shape in SHAPES:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for name, layout in LAYOUTS.items():
            yield f"{name} {shape}", layout(values)


def residuals(like: Tensor) -> Iterator[tuple[str, Tensor]]:
    values = torch.zeros(like.shape, dtype=like.dtype)
    for name, layout in LAYOUTS.items():
        yield name, layout(values)


def _permuted(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Strides of all orders of the dimensions, with a gap after any or none, and of all expansions."""
    rank, found = len(shape), set()
    for order in itertools.permutations(range(rank)):
        for wider in (None, *range(rank)):
            memory = torch.empty([shape[dim] + 2 * (dim == wider) for dim in order], device="meta")
            whole = memory.permute([order.index(dim) for dim in range(rank)])
            found.add(whole[tuple(slice(size) for size in shape)].stride())
    for kept in itertools.product((False, True), repeat=rank):
        one = torch.empty([size if keep else 1 for size, keep in zip(shape, kept, strict=True)], device="meta")
        found.add(one.expand(shape).stride())
    return found


@pytest.mark.parametrize("shape", [*SHAPES, (3,), (2, 1), (2, 3, 2), (1, 3, 1)], ids=str)
def test_the_rule_for_sums(shape: tuple[int, ...]) -> None:
    """Of every pair of layouts, where there are few; else of each with a part of them."""
    layouts = sorted(_permuted(shape))
    made = {strides: torch.empty_strided(shape, strides) for strides in layouts}
    step = 1 + len(layouts) // 24
    for i, first in enumerate(layouts):
        assert torch.relu(made[first]).stride() == _strides.elementwise(shape, first), first
        for second in layouts[i % step :: step]:
            expected = (made[first] + made[second]).stride()
            assert _strides.elementwise(shape, first, second) == expected, (first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_batch_norm(training: bool, dtype: torch.dtype) -> None:
    for name, x in operands(dtype):
        channels = x.shape[1]
        if training and x.numel() <= channels:
            continue
        vectors = [torch.rand(channels) + 0.5 for _ in range(4)]
        plain = F.batch_norm(x, *vectors, training)
        for activation in ("none", "relu"):  # the activation in place
            ours = ops.batch_norm(x, *vectors, training, activation=activation)
            assert ours.stride() == plain.stride(), name
            for other, residual in residuals(plain):
                ours = ops.batch_norm(x, *vectors, training, residual=residual, activation=activation)
                assert ours.stride() == (plain + residual).stride(), (name, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", [1, 3])
@pytest.mark.parametrize("size", [1, 3])
def test_convolution(size: int, filters: int, dtype: torch.dtype) -> None:
    for name, x in operands(dtype):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            weight = torch.randn(filters, x.shape[1], size, size).to(dtype).contiguous(memory_format=memory_format)
            plain = F.conv2d(x, weight, None, 1, size // 2)
            assert ops.conv2d(x, weight, None, 1, size // 2, activation="relu").stride() == plain.stride(), name
            for other, residual in residuals(plain):
                ours = ops.conv2d(x, weight, None, 1, size // 2, residual=residual)
                assert ours.stride() == (plain + residual).stride(), (name, other, memory_format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_others(dtype: torch.dtype) -> None:
    for name, x in operands(dtype):
        for other, residual in residuals(x):
            ours = ops.residual_add(x, residual, activation="relu")
            assert ours.stride() == (x + residual).stride(), (name, other)
        assert ops.max_pool2d(x, 3, 1, 1).stride() == F.max_pool2d(x, 3, 1, 1).stride(), name
        assert ops.avg_pool2d(x, 2, 2, 1).stride() == F.avg_pool2d(x, 2, 2, 1).stride(), name
        assert ops.adaptive_avg_pool2d(x, (1, 2)).stride() == F.adaptive_avg_pool2d(x, (1, 2)).stride(), name
        if dtype == torch.float32 and x.numel():  # PyTorch has it in no other dtype on the CPU
            assert ops.local_response_norm(x, 3).stride() == F.local_response_norm(x, 3).stride(), name


def test_what_is_given_other_strides() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert _strides.in_strides(x, x.stride()) is x
    copied = _strides.in_strides(x, _strides.channels_last(x.shape))
    assert torch.equal(copied, x)
    assert copied.stride() == x.contiguous(memory_format=torch.channels_last).stride()
    pixels = x[:, :, :1, :1].contiguous()
    other = _strides.in_strides(pixels, (3, 1, 3, 3))
    assert torch.equal(other, pixels)
    assert other.stride() == (3, 1, 3, 3)
    assert other.data_ptr() != pixels.data_ptr()
