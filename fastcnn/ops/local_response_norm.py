"""local_response_norm: AlexNet's normalisation across neighbouring channels (Krizhevsky et al. 2012, section 3.3).

y[c] = x[c] / (k + alpha / size * sum_{j = c - size // 2}^{c + (size - 1) // 2} x[j]^2) ^ beta
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn import backends
from fastcnn.ops._arguments import (
    require,
    require_floating,
    require_int,
    require_number,
    require_optional_tensors,
    require_tensor,
)
from fastcnn.ops._layout import empty_channels_last, in_layout, to_kernel_layout
from fastcnn.ops._registration import Operator


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.local_response_norm`.

    Args:
        input: (N, C, ...), three dimensions or more; fp32, bf16 or fp16 run on fastcnn's kernels (arithmetic in fp32).
        size: number of neighbouring channels.
        alpha, beta, k: the scale (divided by ``size``), the exponent and the additive constant.
        out: where to write: the input's shape and dtype, for example a channel slice of a larger channels-last
            tensor. No gradient can be recorded then.

    Returns:
        The input's shape, in the memory layout that PyTorch would choose; ``out`` if given.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """
    require_tensor(input, "input")
    if input.dim() < 3:
        raise ValueError(f"input must have three dimensions or more (N, C, ...), has shape {tuple(input.shape)}")
    require_optional_tensors(out=out)
    size = require_int(size, "size")
    for name, value in (("alpha", alpha), ("beta", beta), ("k", k)):
        require_number(value, name)
    if input.numel() == 0 and out is None:
        return input
    if not input.is_floating_point():
        require(out is None, "out needs a floating-point input")
        backends.note_reference("local_response_norm", input.device, f"dtype {input.dtype}")
        try:
            return F.local_response_norm(input, size, alpha, beta, k)
        except NotImplementedError as error:
            raise backends.not_implemented("local_response_norm", input.dtype, error) from error
    args = (size, float(alpha), float(beta), float(k))
    if input.dim() == 4:
        return OPERATOR(input, *args, out=out)
    with _without_cpu_autocast(input):
        result = OPERATOR(_as_images(input), *args, out=None if out is None else _out_as_images(out, input))
    return result.reshape(input.shape) if out is None else out


def _without_cpu_autocast(input: Tensor) -> contextlib.AbstractContextManager:
    """PyTorch averages (N, C, L) with avg_pool2d, which CPU autocast leaves alone, and all others with avg_pool3d."""
    if input.dim() == 3 and input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return torch.autocast("cpu", enabled=False)
    return contextlib.nullcontext()


def _as_images(tensor: Tensor) -> Tensor:
    """(N, C, ...) as (N, C, H, W): without a copy wherever PyTorch's own operator accepts the tensor."""
    if tensor.dim() == 3:
        return tensor.unsqueeze(-1)
    return tensor.reshape(*tensor.shape[:3], math.prod(tensor.shape[3:]))


def _out_as_images(out: Tensor, input: Tensor) -> Tensor:
    require_tensor(out, "out")
    require(out.shape == input.shape, f"out must have shape {tuple(input.shape)}, has {tuple(out.shape)}")
    images = _as_images(out)
    same = images.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    require(same, f"out must have trailing dimensions that can be merged, has strides {out.stride()}")
    return images


def _allocate(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    if input.dim() != 4:
        raise ValueError(f"input must have shape (N, C, H, W), has {tuple(input.shape)}")
    require(size >= 1, f"size must be at least 1, is {size}")
    require_floating(input, "input")
    return empty_channels_last(tuple(input.shape), input)


def _finish(out: Tensor, input: Tensor, *rest: object) -> Tensor:
    """PyTorch ends with an element-wise division: the result is dense, its dimensions ordered as the input's."""
    if input.is_contiguous():
        return in_layout(out, False)
    like_input = torch.empty_like(input)
    return out if like_input.stride() == out.stride() else like_input.copy_(out)


def _fill(out: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float) -> None:
    backends.run("local_response_norm", out.device, out.dtype, out, to_kernel_layout(input), size, alpha, beta, k)


def _channel_sums(values: Tensor, before: int, after: int) -> Tensor:
    """Each channel's sum over `before` channels before it to `after` channels after it."""
    padded = F.pad(values.unsqueeze(1), (0, 0, 0, 0, before, after))
    return F.avg_pool3d(padded, (before + after + 1, 1, 1), stride=1, divisor_override=1).squeeze(1)


def _backward(
    grad: Tensor, out: Tensor, needs: Sequence[bool], input: Tensor, size: int, alpha: float, beta: float, k: float
) -> list[Tensor | None]:
    """With d = k + alpha/size * (window sum of x^2), and the window mirrored for the sum over outputs:

    dx = g d^-beta - 2 alpha beta / size * x * (mirrored window sum of g x d^(-beta - 1))
    """
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    x, g = input.to(dtype), grad.to(dtype)
    before, after = size // 2, (size - 1) // 2
    d = k + alpha / size * _channel_sums(x * x, before, after)
    direct = g * d.pow(-beta)
    through_windows = _channel_sums(direct * x / d, after, before)
    return [(direct - 2 * alpha * beta / size * x * through_windows).to(input.dtype), *[None] * 4]


OPERATOR = Operator(
    "local_response_norm",
    "Tensor input, SymInt size, float alpha, float beta, float k",
    allocate=_allocate,
    finish=_finish,
    fill=_fill,
    backward=_backward,
    autocast=(0,),
    autocast_dtype=torch.float32,  # what PyTorch's sequence of operators ends in under autocast
)
