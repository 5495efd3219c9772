"""Pooling over H and W: max_pool2d, avg_pool2d, adaptive_avg_pool2d and global_avg_pool2d."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn import backends
from fastcnn.ops._arguments import (
    IntOrPair,
    Pair,
    pair,
    require,
    require_addressable,
    require_at_least,
    require_int,
    require_optional_tensors,
    require_tensor,
)
from fastcnn.ops._layout import empty_channels_last, in_layout, is_channels_last, to_kernel_layout
from fastcnn.ops._registration import Operator

aten = torch.ops.aten


def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`torch.nn.functional.max_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); fp32, bf16 or fp16 run on fastcnn's kernels. Channels-last memory, also a
            channel slice of a wider tensor, is read in place; other layouts are converted.
        kernel_size, stride, padding, dilation, ceil_mode: as in PyTorch; stride None means kernel_size.
        return_indices: also return where each maximum was; computed by PyTorch's own operator.
        out: where to write: the output's shape and dtype, for example a channel slice of a larger channels-last
            tensor. No gradient can be recorded then.

    Returns:
        (N, C, P, Q), in the memory layout that PyTorch would choose; ``out`` if given.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """
    require_tensor(input, "input")
    require_optional_tensors(out=out)
    kernel, stride, padding = window(kernel_size, stride, padding)
    dilation = pair(dilation, "dilation")
    if return_indices:
        require(out is None, "out cannot be given together with return_indices=True")
        backends.note_reference("max_pool2d", input.device, "return_indices=True")
        return F.max_pool2d(input, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    return _run(MAX, input, (kernel, stride, padding, dilation, ceil_mode), out)


def avg_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.avg_pool2d`. ``input``, ``out``, result and errors as in :func:`max_pool2d`."""
    require_tensor(input, "input")
    require_optional_tensors(out=out)
    kernel, stride, padding = window(kernel_size, stride, padding)
    if divisor_override is not None:
        divisor_override = require_int(divisor_override, "divisor_override")
    return _run(AVERAGE, input, (kernel, stride, padding, ceil_mode, count_include_pad, divisor_override), out)


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None], *, out: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.adaptive_avg_pool2d`. ``input``, ``out``, result and errors as in :func:`max_pool2d`.

    Output pixel i averages rows ``floor(i * H / P)`` to ``ceil((i + 1) * H / P)``; None in ``output_size`` keeps a
    dimension's size.
    """
    require_tensor(input, "input")
    require_optional_tensors(out=out)
    _require_dimensions(input, 3, 4)
    if not isinstance(output_size, Sequence):
        return _run(ADAPTIVE, input, (pair(output_size, "output_size"),), out)
    if isinstance(output_size, str) or len(output_size) != 2:
        raise ValueError(f"output_size must be an int or two ints, is {output_size!r}")
    size = pair([input.shape[i - 2] if v is None else v for i, v in enumerate(output_size)], "output_size")
    return _run(ADAPTIVE, input, (size,), out)


def global_avg_pool2d(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The mean over H and W, as (N, C, 1, 1): ``adaptive_avg_pool2d(input, 1)``."""
    return adaptive_avg_pool2d(input, 1, out=out)


# ---- arguments -----------------------------------------------------------------------------------------------------


def window(kernel_size: IntOrPair, stride: IntOrPair | None, padding: IntOrPair) -> tuple[Pair, Pair, Pair]:
    kernel = pair(kernel_size, "kernel_size")
    if stride is None or (isinstance(stride, Sequence) and len(stride) == 0):
        stride = kernel
    return kernel, pair(stride, "stride"), pair(padding, "padding")


def _run(operator: Operator, input: Tensor, args: tuple, out: Tensor | None) -> Tensor:
    if input.dim() != 3:
        return operator(input, *args, out=out)
    # PyTorch returns contiguous memory for (C, H, W), whatever the input's layout.
    grown = operator(input.contiguous().unsqueeze(0), *args, out=None if out is None else out.unsqueeze(0))
    return grown.squeeze(0) if out is None else out


def _require_dimensions(input: Tensor, *allowed: int) -> None:
    if input.dim() not in allowed:
        raise ValueError(f"input must have shape (N, C, H, W) or (C, H, W), has {tuple(input.shape)}")


def output_shape(
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[int, int, int, int]:
    """(N, C, P, Q) for an input of a shape: how often the window fits into it with its padding; with ceil_mode also
    where it starts inside.
    """
    if len(shape) != 4:
        raise ValueError(f"input must have shape (N, C, H, W) or (C, H, W), has {tuple(shape)}")
    if any(size == 0 for size in shape[1:]):
        raise ValueError(f"input must not be empty but for N, has shape {tuple(shape)}")
    require_at_least(kernel, 1, "kernel_size")
    require_at_least(stride, 1, "stride")
    require_at_least(padding, 0, "padding")
    require_at_least(dilation, 1, "dilation")
    if any(padding[i] > kernel[i] // 2 for i in (0, 1)):
        raise ValueError(f"padding must be at most half of kernel_size {tuple(kernel)}, is {tuple(padding)}")
    sizes = []
    for i in (0, 1):
        size = shape[2 + i]
        room = size + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1
        count = (room + (stride[i] - 1 if ceil_mode else 0)) // stride[i] + 1
        if ceil_mode and (count - 1) * stride[i] >= size + padding[i]:
            count -= 1
        if count < 1:
            raise ValueError(
                f"kernel_size {tuple(kernel)} with dilation {tuple(dilation)} is larger than the padded input "
                f"{tuple(shape[2:])} + 2 * {tuple(padding)}"
            )
        sizes.append(count)
    return shape[0], shape[1], sizes[0], sizes[1]


def _finish(out: Tensor, input: Tensor, *rest: object) -> Tensor:
    return in_layout(out, is_channels_last(input))


# ---- maximum -------------------------------------------------------------------------------------------------------


def _allocate_max(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    if input.dtype == torch.bool or input.is_complex():
        raise TypeError(f"input must be floating point or integer, is {input.dtype}")
    return empty_channels_last(output_shape(input.shape, kernel, stride, padding, dilation, ceil_mode), input)


def fill_max(
    out: Tensor,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> None:
    backends.run(
        "max_pool2d", out.device, out.dtype, out, to_kernel_layout(input), tuple(kernel), tuple(stride), tuple(padding),
        tuple(dilation),
    )  # fmt: skip


def _backward_max(
    grad: Tensor,
    out: Tensor,
    needs: Sequence[bool],
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[Tensor | None]:
    window = (kernel, stride, padding, dilation, ceil_mode)
    input = input.detach()
    indices = aten.max_pool2d_with_indices(input, *window)[1]
    if ceil_mode and max(dilation) > 1:
        # A dilated window can step over the whole image; PyTorch's index then points outside.
        inside = indices < input.shape[2] * input.shape[3]
        grad, indices = grad * inside, indices * inside
    return [aten.max_pool2d_with_indices_backward(grad, input, *window, indices), *[None] * 5]


MAX = Operator(
    "max_pool2d",
    "Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool ceil_mode",
    allocate=_allocate_max,
    finish=_finish,
    fill=fill_max,
    backward=_backward_max,
)

# ---- average -------------------------------------------------------------------------------------------------------


def _allocate_average(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    if not input.is_floating_point() and input.dtype != torch.int64:
        raise TypeError(f"input must be floating point or int64, is {input.dtype}")
    require(divisor_override is None or divisor_override != 0, "divisor_override must not be 0")
    return empty_channels_last(output_shape(input.shape, kernel, stride, padding, (1, 1), ceil_mode), input)


def _fill_average(
    out: Tensor,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> None:
    backends.run(
        "avg_pool2d", out.device, out.dtype, out, to_kernel_layout(input), tuple(kernel), tuple(stride), tuple(padding),
        tuple(padding), count_include_pad, divisor_override or 0,
    )  # fmt: skip


def _backward_average(
    grad: Tensor, out: Tensor, needs: Sequence[bool], input: Tensor, *window: object
) -> list[Tensor | None]:
    return [aten.avg_pool2d_backward(grad, input, *window), *[None] * 6]


AVERAGE = Operator(
    "avg_pool2d",
    "Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, bool ceil_mode, "
    "bool count_include_pad, SymInt? divisor_override",
    allocate=_allocate_average,
    finish=_finish,
    fill=_fill_average,
    backward=_backward_average,
)

# ---- adaptive average ----------------------------------------------------------------------------------------------


def _allocate_adaptive(input: Tensor, output_size: Sequence[int]) -> Tensor:
    _require_dimensions(input, 4)
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, is {input.dtype}")
    require_at_least(output_size, 0, "output_size")
    global_mean = tuple(output_size) == (1, 1)  # PyTorch's answer to an empty image is NaN there, an error elsewhere
    if not global_mean and any(size == 0 for size in input.shape[2:]):
        raise ValueError(f"input must not be empty but for N and C, has shape {tuple(input.shape)}")
    shape = (*input.shape[:2], *output_size)
    require_addressable(shape, "output_size", tuple(output_size))
    return empty_channels_last(shape, input)


def _fill_adaptive(out: Tensor, input: Tensor, output_size: Sequence[int]) -> None:
    if input.numel() == 0:
        out.fill_(float("nan"))
        return
    backends.run("adaptive_avg_pool2d", out.device, out.dtype, out, to_kernel_layout(input))


def _backward_adaptive(
    grad: Tensor, out: Tensor, needs: Sequence[bool], input: Tensor, output_size: Sequence[int]
) -> list[Tensor | None]:
    if tuple(output_size) == (1, 1):
        return [(grad / (input.shape[2] * input.shape[3])).expand_as(input), None]
    return [aten._adaptive_avg_pool2d_backward(grad, input), None]


ADAPTIVE = Operator(
    "adaptive_avg_pool2d",
    "Tensor input, SymInt[2] output_size",
    allocate=_allocate_adaptive,
    finish=_finish,
    fill=_fill_adaptive,
    backward=_backward_adaptive,
)
