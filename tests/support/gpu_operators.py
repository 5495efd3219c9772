"""Every operator as one small call and its formula in plain PyTorch, for tests that treat all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn import ops
from support.gpu import Random


class MemoryBound(NamedTuple):
    ours: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # (x, vector of channels, residual, out)
    theirs: Callable[[Tensor, Tensor, Tensor], Tensor]
    smallest: int  # height and width


def channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype).view(-1, 1, 1)


def local_response_norm(x: Tensor) -> Tensor:
    wide = x.float() if x.device.type == "cpu" and x.dtype != torch.float64 else x  # no 16-bit types there
    return F.local_response_norm(wide, 5, 1e-2, 0.75, 2.0).to(x.dtype)


MEMORY_BOUND = {
    "channel_affine": MemoryBound(
        lambda x, v, r, out: ops.channel_affine(x, v, v, residual=r, activation="relu", out=out),
        lambda x, v, r: F.relu(x * channel(v, x) + channel(v, x) + r),
        1,
    ),
    "residual_add": MemoryBound(
        lambda x, v, r, out: ops.residual_add(x, r, scale=0.75, out=out), lambda x, v, r: F.relu(x * 0.75 + r), 1
    ),
    "max_pool": MemoryBound(
        lambda x, v, r, out: ops.max_pool2d(x, 3, 2, 1, out=out), lambda x, v, r: F.max_pool2d(x, 3, 2, 1), 1
    ),
    "max_pool_ceil": MemoryBound(
        lambda x, v, r, out: ops.max_pool2d(x, 3, 2, ceil_mode=True, out=out),
        lambda x, v, r: F.max_pool2d(x, 3, 2, ceil_mode=True),
        3,
    ),
    "avg_pool": MemoryBound(
        lambda x, v, r, out: ops.avg_pool2d(x, 3, 2, 1, True, False, out=out),
        lambda x, v, r: F.avg_pool2d(x, 3, 2, 1, True, False),
        3,
    ),
    "adaptive_avg_pool": MemoryBound(
        lambda x, v, r, out: ops.adaptive_avg_pool2d(x, (3, 2), out=out),
        lambda x, v, r: F.adaptive_avg_pool2d(x, (3, 2)),
        1,
    ),
    "local_response_norm": MemoryBound(
        lambda x, v, r, out: ops.local_response_norm(x, 5, 1e-2, 0.75, 2.0, out=out),
        lambda x, v, r: local_response_norm(x),
        1,
    ),
}

# x (N, 16, H, W) -> a result; `p` holds the other operands, drawn once by `operands`.
Operands = dict[str, Tensor]


class Operator(NamedTuple):
    ours: Callable[[Tensor, Operands], Tensor]
    theirs: Callable[[Tensor, Operands], Tensor]


CHANNELS = 16
SHAPE = (4, CHANNELS, 14, 14)


def operands(device: torch.device, dtype: torch.dtype) -> Operands:
    random = Random("operands", device)
    return {
        "weight": random(24, CHANNELS, 3, 3, dtype=dtype), "grouped": random(CHANNELS, 4, 3, 3, dtype=dtype),
        "depthwise": random(CHANNELS, 1, 3, 3, dtype=dtype), "pointwise": random(40, CHANNELS, 1, 1, dtype=dtype),
        "matrix": random(10, CHANNELS, dtype=dtype), "vector": random(CHANNELS),
        "residual": random(*SHAPE, dtype=dtype),
    }  # fmt: skip


def _statistics(x: Tensor, p: Operands) -> Tensor:
    return torch.cat(list(ops.batch_statistics(x)))


def _statistics_of_torch(x: Tensor, p: Operands) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return torch.cat([mean, var])


def _memory_bound(entry: MemoryBound) -> Operator:
    return Operator(
        lambda x, p: entry.ours(x, p["vector"], p["residual"], None),
        lambda x, p: entry.theirs(x, p["vector"].to(x.dtype), p["residual"]),
    )


OPERATORS = {
    "conv2d": Operator(
        lambda x, p: ops.conv2d(x, p["weight"], padding=1, activation="relu"),
        lambda x, p: F.relu(F.conv2d(x, p["weight"], padding=1)),
    ),
    "conv2d_pointwise": Operator(
        lambda x, p: ops.conv2d(x, p["pointwise"], input_scale=p["vector"], input_activation="relu"),
        lambda x, p: F.conv2d(F.relu(x * channel(p["vector"], x)), p["pointwise"]),
    ),
    "conv2d_grouped": Operator(
        lambda x, p: ops.conv2d(x, p["grouped"], padding=1, groups=4, residual=p["residual"]),
        lambda x, p: F.conv2d(x, p["grouped"], padding=1, groups=4) + p["residual"],
    ),
    "conv2d_depthwise": Operator(
        lambda x, p: ops.conv2d(x, p["depthwise"], padding=1, groups=CHANNELS, scale=p["vector"]),
        lambda x, p: F.conv2d(x, p["depthwise"], padding=1, groups=CHANNELS) * channel(p["vector"], x),
    ),
    "linear": Operator(
        lambda x, p: ops.linear(x[:, :, 0, 0], p["matrix"], activation="relu"),
        lambda x, p: F.relu(F.linear(x[:, :, 0, 0], p["matrix"])),
    ),
    "batch_statistics": Operator(_statistics, _statistics_of_torch),
    **{name: _memory_bound(entry) for name, entry in MEMORY_BOUND.items()},
}
