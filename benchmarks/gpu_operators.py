"""Memory-bound operators at the sizes of networks: fastcnn's and PyTorch's, and the bytes that each has to move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_problems import Call, channels_last, on_backend
from torch import Tensor

from fastcnn import ops


@dataclass
class Operator:
    """One set of tensors of one operator."""

    bytes: int
    flops: int
    ours: Callable[[], Tensor]  # on the backend in force
    pytorch: Callable[[], Tensor]
    exact: Callable[[], Tensor]  # in fp32 or wider
    out: Tensor | None = None  # what ``ours`` writes into

    def calls(self, names: tuple[str, ...]) -> dict[str, Call]:
        return {"pytorch": self.pytorch} | {name: on_backend(name, self.ours) for name in names}


def size_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _operator(
    reference: Callable[..., Tensor], ours: Callable[..., Any], inputs: tuple[Tensor, ...], flops: int = 0
) -> Operator:
    """``reference`` in bf16 and in fp32, and ``ours`` with an ``out``, of the same inputs."""
    out = torch.empty_like(reference(*inputs))
    return Operator(
        size_of(out, *inputs), flops, lambda: ours(*inputs, out=out), lambda: reference(*inputs),
        lambda: reference(*(t.float() for t in inputs)), out,
    )  # fmt: skip


def channel_affine(batch: int, size: int, device: torch.device) -> Operator:
    """Batch norm with running statistics and ReLU, as before DenseNet's first transition."""
    x = channels_last(batch, 256, size, size, device=device)
    mean, var, weight, bias = (torch.rand(256, device=device) + 0.5 for _ in range(4))
    scale = weight / torch.sqrt(var + 1e-5)
    shift = bias - mean * scale
    out = torch.empty_like(x)

    def reference(x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, mean, var, weight, bias))

    def ours() -> Tensor:
        return ops.channel_affine(x, scale, shift, activation="relu", out=out)

    return Operator(2 * size_of(x), 0, ours, lambda: reference(x), lambda: reference(x.float()), out)


def residual_add(batch: int, size: int, device: torch.device) -> Operator:
    x, residual = (channels_last(batch, 256, size, size, device=device) for _ in range(2))
    return _operator(lambda x, r: F.relu(x + r), ops.residual_add, (x, residual))


def max_pool2d(batch: int, size: int, device: torch.device) -> Operator:
    """Behind a stem: 3x3, stride 2."""
    return _operator(
        lambda x: F.max_pool2d(x, 3, 2, 1), lambda x, out: ops.max_pool2d(x, 3, 2, 1, out=out),
        (channels_last(batch, 64, 2 * size, 2 * size, device=device),),
    )  # fmt: skip


def conv2d_max_pool2d(batch: int, size: int, device: torch.device) -> Operator:
    """A ResNet's beginning: 7x7 to 64 channels, ReLU, and the max pooling; where no kernel does both, the two."""
    x = channels_last(batch, 3, 4 * size, 4 * size, device=device)
    weight = channels_last(64, 3, 7, 7, device=device) * 147**-0.5
    # A parameter, whose conversion to fp32 is kept.
    bias = torch.nn.Parameter(torch.randn(64, device=device, dtype=torch.bfloat16), requires_grad=False)
    return _operator(
        lambda x, weight, bias: F.max_pool2d(F.relu(F.conv2d(x, weight, bias, 2, 3)), 3, 2, 1),
        lambda x, weight, bias, out: ops.conv2d_max_pool2d(
            x, weight, bias, 2, 3, kernel_size=3, pool_stride=2, pool_padding=1, activation="relu", out=out
        ),
        (x, weight, bias), 2 * batch * (2 * size) ** 2 * 64 * 147,
    )  # fmt: skip


def avg_pool2d(batch: int, size: int, device: torch.device) -> Operator:
    """DenseNet's transition: 2x2, stride 2."""
    return _operator(
        lambda x: F.avg_pool2d(x, 2), lambda x, out: ops.avg_pool2d(x, 2, out=out),
        (channels_last(batch, 128, size, size, device=device),),
    )  # fmt: skip


def adaptive_avg_pool2d(batch: int, size: int, device: torch.device) -> Operator:
    """The end of a ResNet: 7x7 to 1x1."""
    return _operator(
        lambda x: F.adaptive_avg_pool2d(x, 1), lambda x, out: ops.adaptive_avg_pool2d(x, 1, out=out),
        (channels_last(batch, 2048, max(1, size // 8), max(1, size // 8), device=device),),
    )  # fmt: skip


def local_response_norm(batch: int, size: int, device: torch.device) -> Operator:
    """GoogLeNet's as published: 5 channels wide. PyTorch has it in bf16 on a GPU only."""
    return _operator(
        lambda x: F.local_response_norm(x if x.is_cuda else x.float(), 5).to(x.dtype),
        lambda x, out: ops.local_response_norm(x, 5, out=out),
        (channels_last(batch, 64, size, size, device=device),),
    )  # fmt: skip


def batch_statistics(batch: int, size: int, device: torch.device) -> Operator:
    """Mean and variance of a batch, of batch norm in training; PyTorch's by its own kernel for that (GPU)."""
    x = channels_last(batch, 64, 2 * size, 2 * size, device=device)

    def stacked(x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return torch.stack((mean, var))

    def pytorch() -> Tensor:
        if not x.is_cuda:
            return stacked(x.float())
        mean, inverse = torch.batch_norm_stats(x, 0.0)
        return torch.stack((mean, inverse.pow(-2)))

    return Operator(size_of(x), 0, lambda: torch.stack(ops.batch_statistics(x)), pytorch, lambda: stacked(x.double()))


def linear(batch: int, size: int, device: torch.device) -> Operator:
    """A ResNet's classifier, 2048 to 1000."""
    x = torch.randn(batch, 2048, device=device, dtype=torch.bfloat16)
    weight = torch.randn(1000, 2048, device=device, dtype=torch.bfloat16) * 2048**-0.5
    bias = torch.randn(1000, device=device, dtype=torch.bfloat16)
    return _operator(F.linear, ops.linear, (x, weight, bias), 2 * batch * 2048 * 1000)


OPERATORS: dict[str, Callable[[int, int, torch.device], Operator]] = {
    make.__name__: make
    for make in (
        channel_affine, residual_add, max_pool2d, conv2d_max_pool2d, avg_pool2d, adaptive_avg_pool2d,
        local_response_norm, batch_statistics, linear,
    )
}  # fmt: skip


def launch_triton_operator(name: str, batch: int, size: int) -> None:
    """What an operator launches through Triton, on tensors without memory: a job for AheadCompiler."""
    from fastcnn.backends import triton

    def nhwc(c: int, side: int) -> Tensor:
        shape = (batch, c, side, side)
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)

    def matrix(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def floats(count: int) -> Tensor:
        return matrix(count, dtype=torch.float32)

    half, last = size // 2, max(1, size // 8)
    large = nhwc(256, size)
    launches: dict[str, Callable[[], None]] = {
        "channel_affine": lambda: triton.channel_affine(large, large, floats(256), floats(256), None, "relu"),
        "residual_add": lambda: triton.residual_add(large, large, large, 1.0, "relu"),
        "max_pool2d": lambda: triton.max_pool2d(nhwc(64, size), nhwc(64, 2 * size), (3, 3), (2, 2), (1, 1), (1, 1)),
        "conv2d_max_pool2d": lambda: _launch_triton_pair(nhwc(64, size), nhwc(64, 2 * size), nhwc(3, 4 * size)),
        "avg_pool2d": lambda: triton.avg_pool2d(
            nhwc(128, half), nhwc(128, size), (2, 2), (2, 2), (0, 0), (0, 0), True, 0
        ),
        "adaptive_avg_pool2d": lambda: triton.adaptive_avg_pool2d(nhwc(2048, 1), nhwc(2048, last)),
        "local_response_norm": lambda: triton.local_response_norm(nhwc(64, size), nhwc(64, size), 5, 1e-4, 0.75, 1.0),
        "batch_statistics": lambda: triton.batch_statistics(floats(64), floats(64), nhwc(64, 2 * size)),
        "linear": lambda: triton.linear(
            matrix(batch, 1000), matrix(batch, 2048), matrix(1000, 2048), floats(1000), "none"
        ),
    }
    launches[name]()


def _launch_triton_pair(out: Tensor, between: Tensor, x: Tensor) -> None:
    from fastcnn.backends import triton

    weight = torch.empty((64, 3, 7, 7), dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    bias = torch.empty(64, dtype=torch.float32, device="meta")
    triton.conv2d(between, x, weight, None, bias, None, None, None, False, "relu", (2, 2), (3, 3), (1, 1), 1)
    triton.max_pool2d(out, between, (3, 3), (2, 2), (1, 1), (1, 1))
