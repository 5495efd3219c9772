"""The memory-bound operators: residual addition, batch norm, pooling, local response norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from candidates import backend_names, dtypes
from torch import Tensor

import fastcnn
from fastcnn import ops


class Problem(NamedTuple):
    shape: tuple[int, int, int]  # C, H, W
    ours: Callable[[Tensor, Tensor], Tensor]
    pytorch: Callable[[Tensor, Tensor], Tensor]
    passes: float  # tensors of the input's size that must be read or written


PROBLEMS = {
    "residual_add_relu": Problem(
        (256, 56, 56), lambda x, v: ops.residual_add(x, x), lambda x, v: F.relu(x + x, inplace=True), 3
    ),
    "batch_norm_relu": Problem(
        (256, 56, 56),
        lambda x, v: ops.batch_norm(x, v, v, v, v, activation="relu"),
        lambda x, v: F.relu(F.batch_norm(x, v, v, v, v), inplace=True),
        2,
    ),
    "max_pool_stem": Problem(
        (64, 112, 112), lambda x, v: ops.max_pool2d(x, 3, 2, 1), lambda x, v: F.max_pool2d(x, 3, 2, 1), 1.25
    ),
    "avg_pool_transition": Problem(
        (256, 28, 28), lambda x, v: ops.avg_pool2d(x, 2), lambda x, v: F.avg_pool2d(x, 2), 1.25
    ),
    "global_avg_pool": Problem(
        (2048, 7, 7), lambda x, v: ops.adaptive_avg_pool2d(x, 1), lambda x, v: F.adaptive_avg_pool2d(x, 1), 1
    ),
    "local_response_norm": Problem(
        (96, 27, 27), lambda x, v: ops.local_response_norm(x, 5), lambda x, v: F.local_response_norm(x, 5), 2
    ),
}


@pytest.mark.parametrize("candidate", ["pytorch", *backend_names()])
@pytest.mark.parametrize("dtype", dtypes(), ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_memory_bound(measure, benchmark, device, problem: str, dtype: torch.dtype, candidate: str):
    shape, ours, pytorch, passes = PROBLEMS[problem]
    batch = 64 if device.type == "cuda" else 1
    benchmark.group = f"{problem} n{batch} {dtype}"
    x = torch.randn(batch, *shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    vector = torch.rand(shape[0], device=device, dtype=dtype)
    call = pytorch if candidate == "pytorch" else ours
    with fastcnn.use_backend(None if candidate == "pytorch" else candidate):
        measure(lambda: call(x, vector), bytes=passes * x.numel() * x.element_size(), items=batch)
