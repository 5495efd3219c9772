"""conv2d_max_pool2d: a network's first convolution and the max pooling behind it, as one operator.

    y = max_pool2d(act(conv(x, w) * scale[k] + bias[k]))

Where one kernel does both, the convolution's output, the largest tensor of a ResNet, is never written. Elsewhere the
two operators run one after the other. The result is theirs in either case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn import backends
from fastcnn.ops import _strides
from fastcnn.ops._arguments import (
    IntOrPair,
    kernel_vector,
    pair,
    renamed,
    require_activation,
    require_int,
    require_optional_tensors,
    require_tensor,
)
from fastcnn.ops._layout import empty_channels_last, in_layout, is_channels_last, pixel_stride, to_kernel_layout
from fastcnn.ops._registration import Operator, records_gradient
from fastcnn.ops.conv2d import conv2d, operator_arguments
from fastcnn.ops.conv2d import fill as fill_convolution
from fastcnn.ops.conv2d import output_shape as convolution_shape
from fastcnn.ops.pool2d import fill_max, max_pool2d, window
from fastcnn.ops.pool2d import output_shape as pooled_shape

# Operator arguments, in schema order: of conv2d, and of max_pool2d. padding is (top, left, bottom, right).
SIGNATURE = (
    "Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, "
    "SymInt groups, Tensor? scale, str activation, SymInt[2] kernel_size, SymInt[2] pool_stride, "
    "SymInt[2] pool_padding, SymInt[2] pool_dilation, bool ceil_mode"
)
# max_pool2d's arguments in this operator's words.
_POOLING = {
    "stride": "pool_stride", "padding": "pool_padding", "dilation": "pool_dilation", "input": "convolution's output",
}  # fmt: skip

_LARGEST = 2**30  # that kernels take


def conv2d_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    kernel_size: IntOrPair,
    pool_stride: IntOrPair | None = None,
    pool_padding: IntOrPair = 0,
    pool_dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    scale: Tensor | None = None,
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """``max_pool2d(conv2d(input, weight, bias, ..., scale=scale, activation=activation), kernel_size, ...)``.

    One kernel on an H100 for what first layers are: bf16 or fp16, at most 4 dense input channels, filters up to 11x11,
    more than 32 of them and a multiple of 8, no groups or dilation, then 3x3 windows with stride 2 and padding 0 or 1.
    Elsewhere, and where a gradient is recorded, it is the two operators.

    Args:
        input: (N, C, H, W).
        weight, bias, stride, padding, dilation, groups, scale, activation: as in :func:`fastcnn.ops.conv2d`.
        kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode: as in :func:`fastcnn.ops.max_pool2d`.
        out: where to write: the output's shape and dtype. No gradient can be recorded then.

    Returns:
        (N, K, P, Q), in the memory layout that PyTorch would choose; ``out`` if given.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """
    require_tensor(input, "input")
    require_tensor(weight, "weight")
    require_optional_tensors(bias=bias, scale=scale, out=out)
    require_activation(activation)
    groups = require_int(groups, "groups")
    if input.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"input and weight must have 4 dimensions, have shapes {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    try:
        kernel, pool_stride, pool_padding = window(kernel_size, pool_stride, pool_padding)
        pool_dilation = pair(pool_dilation, "dilation")
    except (TypeError, ValueError) as error:
        raise renamed(error, _POOLING) from error
    for name, values in (("kernel_size", kernel), ("pool_stride", pool_stride), ("pool_dilation", pool_dilation)):
        if max(values) > _LARGEST:
            raise ValueError(f"{name} must not exceed 2^30, is {values}")
    # On the CPU no kernel does both, and graphs know what the two are.
    if out is None and (input.device.type == "cpu" or records_gradient((input, weight, bias, scale))):
        between = conv2d(input, weight, bias, stride, padding, dilation, groups, scale=scale, activation=activation)
        try:
            return max_pool2d(between, kernel, pool_stride, pool_padding, pool_dilation, ceil_mode)  # type: ignore[return-value]
        except (TypeError, ValueError) as error:
            raise renamed(error, _POOLING) from error
    convolution = operator_arguments(
        input, weight, bias, stride, padding, dilation, groups, scale, None, activation, None, None, "none"
    )
    return OPERATOR(
        *convolution[:8], activation, kernel, pool_stride, pool_padding, pool_dilation, bool(ceil_mode), out=out
    )


class _Split(NamedTuple):
    """The operator's arguments as the two operators take them."""

    convolution: tuple[Any, ...]
    pooling: tuple[Any, ...]

    @classmethod
    def of(cls, *args: Any) -> _Split:
        return cls((*args[:8], None, args[8], None, None, False), args[9:])

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the convolution's output, and of the pooling's; the arguments are checked."""
        between = convolution_shape(*self.convolution)
        try:
            return between, pooled_shape(between, *self.pooling)
        except (TypeError, ValueError) as error:
            raise renamed(error, _POOLING) from error


def _allocate(input: Tensor, *rest: Any) -> Tensor:
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, is {input.dtype}")
    return empty_channels_last(_Split.of(input, *rest).shapes()[1], input)


def _finish(out: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    if is_channels_last(input):
        return out
    between = _Split.of(input, weight, *rest).shapes()[0]
    strides = _strides.of_convolution(between, input.shape, input.stride(), weight)
    return in_layout(out, _strides.is_channels_last(between, strides))


def _fill(out: Tensor, *args: Any) -> None:
    split = _Split.of(*args)
    between = split.shapes()[0]
    arguments, facts = _contract(out, between, *args)
    if _is_summed(args) and _is_one_kernel(out.device, out.dtype, arguments, facts):
        backends.run("conv2d_max_pool2d", out.device, out.dtype, *arguments, **facts)
        return
    values = empty_channels_last(between, args[0])
    fill_convolution(values, *split.convolution, fresh=True)
    fill_max(out, values, *split.pooling)


def _is_summed(args: Sequence[Any]) -> bool:
    """Whether there is an input and a weight to sum over."""
    return args[0].numel() > 0 and args[1].numel() > 0


def _is_one_kernel(device: torch.device, dtype: torch.dtype, arguments: tuple[Any, ...], facts: dict[str, Any]) -> bool:
    """Whether the backend that serves a call has one kernel for it."""
    return backends.resolve("conv2d_max_pool2d", device, dtype, arguments, facts)[0] != "reference"


def _contract(
    out: Tensor,
    between: Sequence[int],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: Tensor | None,
    activation: str,
    kernel: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    pool_dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the kernel contract's function takes, and the facts about it."""
    input = to_kernel_layout(input)
    pooling = (tuple(kernel), tuple(pool_stride), tuple(pool_padding), tuple(pool_dilation))
    arguments = (
        out, input, weight, kernel_vector(scale), kernel_vector(bias), activation, tuple(stride), tuple(padding[:2]),
        tuple(dilation), groups, tuple(between[2:]), *pooling,
    )  # fmt: skip
    pixel = pixel_stride(out)
    return arguments, {
        "weight": tuple(weight.shape),
        "stride": tuple(stride),
        "dilation": tuple(dilation),
        "groups": groups,
        "pooling": pooling,
        "dense": pixel_stride(input) == input.shape[1],
        "aligned": pixel is not None and out.data_ptr() % 16 == 0 and pixel * out.element_size() % 16 == 0,
    }


OPERATOR = Operator(
    "conv2d_max_pool2d",
    SIGNATURE,
    allocate=_allocate,
    finish=_finish,
    fill=_fill,
    backward=None,
    autocast=(0, 1),
)
