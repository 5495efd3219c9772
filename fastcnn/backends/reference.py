"""The reference backend: PyTorch's own operators (cuDNN on a GPU, ATen and oneDNN on a CPU), one after the other.

It defines what every kernel must compute, and serves the cases that no kernel covers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def unavailable() -> str | None:
    return None


def unsupported(operator: str, device: torch.device, dtype: torch.dtype, **facts: object) -> str | None:
    return None


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """A 1-D vector shaped to broadcast over the channels of an (N, C, ...) tensor, in that tensor's dtype."""
    return vector.to(like.dtype).view(-1, *[1] * (like.dim() - 2))


def prologue(input: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool) -> Tensor:
    if scale is not None:
        input = input * per_channel(scale, input)
    if shift is not None:
        input = input + per_channel(shift, input)
    return F.relu(input) if relu else input


def epilogue(
    sums: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    if scale is not None:
        sums = sums * per_channel(scale, sums)
    if bias is not None:
        sums = sums + per_channel(bias, sums)
    if residual is not None:
        sums = sums + residual
    return F.relu(sums) if activation == "relu" else sums


def padded_to_fill(input: Tensor, weight: Tensor, out: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """The input with explicit zero borders, sized so that an unpadded convolution gives exactly ``out``'s size."""
    ends = []
    for i in (0, 1):
        reached = (out.shape[2 + i] - 1) * stride[i] + (weight.shape[2 + i] - 1) * dilation[i] + 1
        ends.append(reached - input.shape[2 + i] - padding[i])
    return F.pad(input, (padding[1], ends[1], padding[0], ends[0]))


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
    input = prologue(input, input_scale, input_shift, input_relu)
    input = padded_to_fill(input, weight, out, stride, padding, dilation)
    # The plain bias goes where PyTorch puts it, so that the reference is PyTorch's own result to the last bit.
    fused_bias = bias.to(input.dtype) if bias is not None and scale is None else None
    sums = F.conv2d(input, weight, fused_bias, stride, 0, dilation, groups)
    out.copy_(epilogue(sums, scale, None if fused_bias is not None else bias, residual, activation))


def linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    sums = F.linear(input, weight, None if bias is None else bias.to(input.dtype))
    out.copy_(F.relu(sums) if activation == "relu" else sums)


def channel_affine(
    out: Tensor,
    input: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str,
    centre: Tensor | None = None,
) -> None:
    # In fp32 or wider, as PyTorch's batch norm computes.
    wide = input if input.dtype == torch.float64 else input.float()
    if centre is not None:
        wide = wide - per_channel(centre, wide)
    out.copy_(epilogue(wide, scale, shift, residual, activation))


def batch_statistics(mean: Tensor, var: Tensor, input: Tensor) -> None:
    wide = input if input.dtype == torch.float64 else input.float()
    batch_var, batch_mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    mean.copy_(batch_mean)
    var.copy_(batch_var)


def residual_add(out: Tensor, input: Tensor, residual: Tensor, scale: float, activation: str) -> None:
    sums = torch.add(residual, input, alpha=scale)
    out.copy_(F.relu(sums) if activation == "relu" else sums)


def _overhangs(out: Tensor, input: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> bool:
    """Whether out's size is ceil_mode's: larger than the count of windows that lie in the padded input."""
    return any(
        out.shape[2 + i] > (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )


def max_pool2d(out: Tensor, input: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> None:
    ceil_mode = _overhangs(out, input, kernel, stride, padding, dilation)
    out.copy_(F.max_pool2d(input, kernel, stride, padding, dilation, ceil_mode))


def conv2d_max_pool2d(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    size: Pair,
    kernel: Pair,
    pool_stride: Pair,
    pool_padding: Pair,
    pool_dilation: Pair,
) -> None:
    between = torch.empty(
        (out.shape[0], out.shape[1], *size), dtype=out.dtype, device=out.device, memory_format=torch.channels_last
    )
    conv2d(
        between, input, weight, scale, bias, None, None, None, False, activation, stride, padding, dilation, groups
    )  # fmt: skip
    max_pool2d(out, between, kernel, pool_stride, pool_padding, pool_dilation)


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
    if padding_end == padding:
        ceil_mode = _overhangs(out, input, kernel, stride, padding, (1, 1))
        out.copy_(F.avg_pool2d(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor or None))
        return
    # Different padding at the two ends: window sums of the explicitly padded input, over window sizes.
    ends = [(out.shape[2 + i] - 1) * stride[i] + kernel[i] - input.shape[2 + i] - padding[i] for i in (0, 1)]
    padded = F.pad(input, (padding[1], ends[1], padding[0], ends[0]))
    sums = F.avg_pool2d(padded, kernel, stride, divisor_override=1)
    if divisor == 0:
        counts = []
        for i in (0, 1):
            size = input.shape[2 + i]
            first = torch.arange(out.shape[2 + i], device=out.device) * stride[i] - padding[i]
            last = (first + kernel[i]).clamp(max=size + padding_end[i] if count_include_pad else size)
            counts.append(last - (first if count_include_pad else first.clamp(min=0)))
        out.copy_(sums / (counts[0][:, None] * counts[1]))
    else:
        out.copy_(sums / divisor)


def adaptive_avg_pool2d(out: Tensor, input: Tensor) -> None:
    out.copy_(F.adaptive_avg_pool2d(input, (out.shape[2], out.shape[3])))


def local_response_norm(out: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float) -> None:
    if input.device.type == "cpu" and input.dtype in (torch.bfloat16, torch.float16):
        input = input.float()  # PyTorch has no avg_pool3d for these on a CPU
    out.copy_(F.local_response_norm(input, size, alpha, beta, k))
