"""The C++ backend: fastcnn's own CPU kernels (csrc/cpu)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastcnn import _native
from fastcnn.backends.derived import derived

Pair = tuple[int, int]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    return None


def unsupported(operator: str, device: torch.device, dtype: torch.dtype, **facts: object) -> str | None:
    if device.type != "cpu":
        return f"device {device.type}"
    if dtype not in DTYPES:
        return f"dtype {dtype}"
    return None


def _widened(*tensors: Tensor | None) -> list[Tensor | None]:
    """fp16 tensors as fp32: the CPU kernels have no fp16 storage of their own."""
    return [None if t is None else t.float() for t in tensors]


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
    if out.dtype == torch.float16:
        wide = torch.empty_like(out, dtype=torch.float32, memory_format=torch.channels_last)
        wide_input, wide_residual = _widened(input, residual)
        assert wide_input is not None
        packed = derived(
            weight, ("cpu_conv2d", groups), lambda w: _native.PackedConv2dWeight(w.detach().float(), groups)
        )
        _conv2d(
            wide, wide_input, packed, scale, bias, wide_residual, input_scale, input_shift, input_relu, activation,
            stride, padding, dilation,
        )  # fmt: skip
        out.copy_(wide)
        return
    packed = derived(weight, ("cpu_conv2d", groups), lambda w: _native.PackedConv2dWeight(w.detach(), groups))
    _conv2d(
        out, input, packed, scale, bias, residual, input_scale, input_shift, input_relu, activation, stride, padding,
        dilation,
    )  # fmt: skip


def _conv2d(
    out: Tensor,
    input: Tensor,
    packed: _native.PackedConv2dWeight,
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
) -> None:
    _native.cpu_conv2d(
        out, input, packed, scale, bias, residual, input_scale, input_shift, input_relu, activation == "relu",
        stride, padding, dilation, torch.get_num_threads(),
    )  # fmt: skip


def linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    relu, threads = activation == "relu", torch.get_num_threads()
    if out.dtype == torch.float16:
        wide = torch.empty_like(out, dtype=torch.float32)
        wide_weight = derived(weight, "cpu_linear", lambda w: w.detach().float().contiguous())
        _native.cpu_linear(wide, input.float(), wide_weight, bias, relu, threads)
        out.copy_(wide)
        return
    _native.cpu_linear(out, input, weight, bias, relu, threads)


def channel_affine(
    out: Tensor,
    input: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    _channel_affine(out, input, scale, shift, residual, activation, 1.0)


def residual_add(out: Tensor, input: Tensor, residual: Tensor, scale: float, activation: str) -> None:
    _channel_affine(out, input, None, None, residual, activation, scale)


def _channel_affine(
    out: Tensor,
    input: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str,
    factor: float,
) -> None:
    relu, threads = activation == "relu", torch.get_num_threads()
    if out.dtype == torch.float16:
        wide = input.float()
        (wide_residual,) = _widened(residual)
        _native.cpu_channel_affine(wide, wide, scale, shift, wide_residual, relu, factor, threads)
        out.copy_(wide)
        return
    _native.cpu_channel_affine(out, input, scale, shift, residual, relu, factor, threads)


def batch_statistics(mean: Tensor, var: Tensor, input: Tensor) -> None:
    if input.dtype == torch.float16:
        input = input.float()
    _native.cpu_batch_statistics(mean, var, input, torch.get_num_threads())


def _storable(kernel: Callable[..., None], out: Tensor, input: Tensor, *args: object) -> None:
    """kernel(out, input, *args, threads), by way of fp32 copies where the storage is fp16."""
    threads = torch.get_num_threads()
    if out.dtype == torch.float16:
        wide = torch.empty_like(out, dtype=torch.float32, memory_format=torch.channels_last)
        kernel(wide, input.to(torch.float32, memory_format=torch.channels_last), *args, threads)
        out.copy_(wide)
        return
    kernel(out, input, *args, threads)


def max_pool2d(out: Tensor, input: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> None:
    _storable(_native.cpu_max_pool2d, out, input, kernel, stride, padding, dilation)


def avg_pool2d(
    out: Tensor,
    input: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    padding_end: Pair,
    count_include_pad: bool,
    divisor: int,
) -> None:
    _storable(
        _native.cpu_avg_pool2d, out, input, kernel, stride, padding, padding_end, count_include_pad, divisor
    )  # fmt: skip


def adaptive_avg_pool2d(out: Tensor, input: Tensor) -> None:
    _storable(_native.cpu_adaptive_avg_pool2d, out, input)


def local_response_norm(out: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float) -> None:
    _storable(_native.cpu_local_response_norm, out, input, size, alpha, beta, k)
