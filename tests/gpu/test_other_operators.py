"""The operators beside conv2d on a GPU, against float64 and PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.layout import GuardedSlice, sliced
from torch import Tensor

from fastcnn import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (1, 17, 13, 11), (3, 64, 14, 14), (2, 96, 27, 27), (1, 2048, 7, 7)]


def channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype).view(-1, 1, 1)


def affine(x: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return F.relu(x * channel(v, x) + channel(v, x) + r)


# name -> (ours(x, vector, residual, out), PyTorch's(x, vector, residual), smallest height and width)
OPERATORS = {
    "channel_affine": (
        lambda x, v, r, out: ops.channel_affine(x, v, v, residual=r, activation="relu", out=out),
        affine,
        1,
    ),
    "residual_add": (
        lambda x, v, r, out: ops.residual_add(x, r, scale=0.75, out=out),
        lambda x, v, r: F.relu(x * 0.75 + r),
        1,
    ),
    "max_pool": (
        lambda x, v, r, out: ops.max_pool2d(x, 3, 2, 1, out=out),
        lambda x, v, r: F.max_pool2d(x, 3, 2, 1),
        1,
    ),
    "max_pool_ceil": (
        lambda x, v, r, out: ops.max_pool2d(x, 3, 2, ceil_mode=True, out=out),
        lambda x, v, r: F.max_pool2d(x, 3, 2, ceil_mode=True),
        3,
    ),
    "avg_pool": (
        lambda x, v, r, out: ops.avg_pool2d(x, 3, 2, 1, True, False, out=out),
        lambda x, v, r: F.avg_pool2d(x, 3, 2, 1, True, False),
        3,
    ),
    "adaptive_avg_pool": (
        lambda x, v, r, out: ops.adaptive_avg_pool2d(x, (3, 2), out=out),
        lambda x, v, r: F.adaptive_avg_pool2d(x, (3, 2)),
        1,
    ),
    "local_response_norm": (
        lambda x, v, r, out: ops.local_response_norm(x, 5, 1e-2, 0.75, 2.0, out=out),
        lambda x, v, r: F.local_response_norm(x, 5, 1e-2, 0.75, 2.0),
        1,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_memory_bound(backend, device, operator: str, shape: tuple, dtype: torch.dtype):
    ours, theirs, smallest = OPERATORS[operator]
    if min(shape[2:]) < smallest:
        pytest.skip("input smaller than the window")
    x, residual = (torch.randn(shape).to(device, dtype) for _ in range(2))
    vector = torch.randn(shape[1], device=device)
    exact = theirs(x.double(), vector.double(), residual.double())
    reference = theirs(x, vector, residual)
    out = GuardedSlice(tuple(exact.shape), dtype, device)
    with torch.no_grad():
        ours(sliced(x), vector, sliced(residual), out.view)
        assert_accurate(out.view.cpu(), reference.cpu(), exact.cpu())
        out.assert_guards_intact()
        dense = ours(x.contiguous(memory_format=torch.channels_last), vector, residual, None)
        assert_accurate(dense.cpu(), reference.cpu(), exact.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 7, 5), (1, 4096, 1000), (3, 130, 17), (64, 512, 1000), (129, 100, 257)], ids=str)
def test_linear(backend, device, tf32, sizes: tuple[int, int, int], dtype: torch.dtype):
    if tf32 and dtype != torch.float32:
        pytest.skip("TF32 concerns fp32 only")
    m, c, k = sizes
    x, w, bias = (torch.randn(s).to(device, dtype) for s in ((m, c), (k, c), (k,)))
    exact = F.relu(F.linear(x.double(), w.double(), bias.double()))
    with torch.no_grad():
        ours = ops.linear(x, w, bias, activation="relu")
    assert_accurate(ours.cpu(), F.relu(F.linear(x, w, bias)).cpu(), exact.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 17, 13, 11), (8, 64, 56, 56), (4, 2048, 7, 7)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_batch_statistics(backend, device, shape: tuple, dtype: torch.dtype, mean: float):
    x = (torch.randn(shape) + mean).to(device, dtype)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    reference_var, reference_mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    ours_mean, ours_var = ops.batch_statistics(x.contiguous(memory_format=torch.channels_last))
    assert_accurate(ours_mean.cpu(), reference_mean.cpu(), exact_mean.cpu())
    assert_accurate(ours_var.cpu(), reference_var.cpu(), exact_var.cpu())


def test_max_pool_and_relu_let_nan_through(backend, device):
    x = torch.randn(1, 8, 6, 6, device=device)
    x[0, 3, 2, 2] = float("nan")
    pooled = ops.max_pool2d(x, 3, 1, 1)
    assert torch.equal(pooled.isnan(), F.max_pool2d(x, 3, 1, 1).isnan())
    assert ops.residual_add(x, x)[0, 3, 2, 2].isnan()
