"""The CUDA C++ backend (csrc/cuda), present when the package was built with CUDA."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastcnn import _native
from fastcnn.backends.derived import derived
from fastcnn.triton_kernels.precision import convolutions_use_tf32, matrix_products_use_tf32

Pair = tuple[int, int]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=1)
def unavailable() -> str | None:
    info = _native.build_info()
    if not info["cuda"]:
        return f"built without CUDA kernels ({info['cuda_reason']})"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if not any(_runs_on(arch, capability) for arch in _native.cuda_architectures()):
        built = ", ".join(_native.cuda_architectures())
        return f"built for architectures {built}, the GPU is {capability[0]}{capability[1]}"
    return None


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on its own major version, from its minor version on; "a" code on exactly its own."""
    specific = architecture.endswith("a")
    number = int(architecture.rstrip("a"))
    major, minor = divmod(number, 10)
    if specific:
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def unsupported(operator: str, device: torch.device, dtype: torch.dtype, **facts: object) -> str | None:
    if device.type != "cuda":
        return f"device {device.type}"
    if dtype not in DTYPES:
        return f"dtype {dtype}"
    return unavailable()


def _krsc(weight: Tensor) -> Tensor:
    """The weight in (K, R, S, C/groups) order with exactly those strides (size-1 dimensions too)."""
    return weight.detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def conv2d(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_relu: bool,
    activation: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> None:
    _native.cuda_conv2d(
        out, input, derived(weight, "krsc", _krsc), scale, bias, residual, input_scale, input_shift, input_relu,
        activation == "relu", stride, padding, dilation, groups, convolutions_use_tf32(),
    )  # fmt: skip


def kernel_name(operator: str, *args: Any) -> str:
    """Which kernel serves a call of the contract."""
    if operator != "conv2d":
        return operator
    out, input, weight = args[:3]
    input_scale, input_shift, input_relu, _, stride, padding, dilation, groups = args[6:]
    prologue = input_scale is not None or input_shift is not None or input_relu
    name = _native.cuda_conv2d_kernel(
        out, input, derived(weight, "krsc", _krsc), prologue, stride, padding, dilation, groups, convolutions_use_tf32()
    )
    return f"conv2d {name}"


def linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    _native.cuda_linear(out, input, weight.detach(), bias, activation == "relu", matrix_products_use_tf32())


def channel_affine(
    out: Tensor, input: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, activation: str,
    centre: Tensor | None = None,
) -> None:  # fmt: skip
    _native.cuda_channel_affine(out, input, scale, shift, centre, residual, activation == "relu")


def batch_statistics(mean: Tensor, var: Tensor, input: Tensor) -> None:
    floats = (_native.cuda_batch_statistics_workspace(input) + 3) // 4
    workspace = torch.empty(floats, dtype=torch.float32, device=input.device)
    _native.cuda_batch_statistics(mean, var, input, workspace)


def max_pool2d(out: Tensor, input: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> None:
    _native.cuda_max_pool2d(out, input, kernel, stride, padding, dilation)


def avg_pool2d(
    out: Tensor, input: Tensor, kernel: Pair, stride: Pair, padding: Pair, padding_end: Pair, count_include_pad: bool,
    divisor: int,
) -> None:  # fmt: skip
    _native.cuda_avg_pool2d(out, input, kernel, stride, padding, padding_end, count_include_pad, divisor)


def adaptive_avg_pool2d(out: Tensor, input: Tensor) -> None:
    _native.cuda_adaptive_avg_pool2d(out, input)


def local_response_norm(out: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float) -> None:
    _native.cuda_local_response_norm(out, input, size, alpha, beta, k)


def residual_add(out: Tensor, input: Tensor, residual: Tensor, scale: float, activation: str) -> None:
    _native.cuda_residual_add(out, input, residual, scale, activation == "relu")
