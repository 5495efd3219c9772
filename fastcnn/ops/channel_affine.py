"""channel_affine: a scale and a shift for each channel, what batch norm is once its statistics are fixed.

y = act(x * scale[c] + shift[c] + residual)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastcnn import backends
from fastcnn.backends.reference import per_channel
from fastcnn.ops import _strides
from fastcnn.ops._arguments import (
    kernel_vector,
    require_activation,
    require_floating,
    require_optional_tensors,
    require_residual,
    require_tensor,
    require_vector,
)
from fastcnn.ops._layout import empty_channels_last, is_channels_last, lies_alike, to_kernel_layout
from fastcnn.ops._registration import Operator, Unread

SIGNATURE = "Tensor input, Tensor? scale, Tensor? shift, Tensor? residual, str activation"


def channel_affine(
    input: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """``act(input * scale[c] + shift[c] + residual)`` in one pass: batch norm with fixed statistics and what follows.

    Args:
        input: (N, C, ...); fp32, bf16 or fp16 run on fastcnn's kernels.
        scale, shift: (C,), in the input's dtype or fp32; None for 1 and 0.
        residual: the input's shape and dtype, added before the activation.
        activation: ``"none"`` or ``"relu"``.
        out: where to write: the input's shape and dtype; may be ``input`` or ``residual`` itself. No gradient can be
            recorded then.

    Returns:
        The input's shape, in the memory layout of PyTorch's batch_norm; ``out`` if given.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, device or dtype; the message names it.
    """
    require_tensor(input, "input")
    require_optional_tensors(scale=scale, shift=shift, residual=residual, out=out)
    require_activation(activation)
    return over_channels(
        lambda x, r, y: OPERATOR(x, scale, shift, r, activation, out=y), input, residual=residual, out=out
    )


def over_channels(
    function: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    input: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """``function(input, residual, out)`` on 4-D views of (N, C, ...) tensors; the result has the input's shape."""
    if input.dim() == 4:
        return function(input, residual, out)
    if input.dim() < 2:
        raise ValueError(f"input must have shape (N, C, ...), has {tuple(input.shape)}")
    require_residual(residual, input.shape, input)
    if out is not None and out.shape != input.shape:
        raise ValueError(f"out must have shape {tuple(input.shape)}, has {tuple(out.shape)}")
    if out is not None:
        try:
            view = out.view(_shape_4d(out))
        except RuntimeError as error:
            raise ValueError(
                f"out must keep its dimensions after channels together, has strides {out.stride()}"
            ) from error
        function(
            input.reshape(_shape_4d(input)), None if residual is None else residual.reshape(_shape_4d(input)), view
        )
        return out
    channels_last_3d = input.dim() == 5 and input.is_contiguous(memory_format=torch.channels_last_3d)
    if not channels_last_3d:
        input = input.contiguous()
    result = function(
        input.reshape(_shape_4d(input)), None if residual is None else residual.reshape(_shape_4d(input)), None
    )
    return result.view(input.shape)


def _shape_4d(tensor: Tensor) -> tuple[int, int, int, int]:
    """(N, C, L, 1): the dimensions after the channels as one."""
    length = 1
    for size in tensor.shape[2:]:
        length = length * size
    return (tensor.shape[0], tensor.shape[1], length, 1)


def allocate(
    input: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    require_activation(activation)
    if input.dim() != 4:
        raise ValueError(f"input must have shape (N, C, H, W), has {tuple(input.shape)}")
    require_floating(input, "input")
    require_vector(scale, "scale", input.shape[1], input)
    require_vector(shift, "shift", input.shape[1], input)
    require_residual(residual, input.shape, input)
    return empty_channels_last(input.shape, input)


def finish(out: Tensor, input: Tensor, residual: Tensor | None) -> Tensor:
    """The result in the layout of PyTorch's batch norm, and of its sum with a residual."""
    if is_channels_last(input) and (residual is None or lies_alike(out, residual)):  # the common case
        return out
    strides = _strides.of_batch_norm(out.shape, input.stride())
    if residual is not None:
        strides = _strides.elementwise(out.shape, strides, residual.stride())
    return _strides.in_strides(out, strides)


def _finish(
    out: Tensor, input: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    return finish(out, input, residual)


def fill(
    out: Tensor,
    input: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str,
    centre: Tensor | None = None,
) -> None:
    """``centre``, which batch norm in training takes off the input first, is no argument of the operator."""
    backends.run(
        "channel_affine",
        out.device,
        out.dtype,
        out,
        to_kernel_layout(input),
        kernel_vector(scale),
        kernel_vector(shift),
        None if residual is None else to_kernel_layout(residual),
        activation,
        kernel_vector(centre),
    )


def _backward(
    grad: Tensor,
    out: Tensor | None,
    needs: Sequence[bool],
    input: Tensor,
    scale: Tensor | None,
    shift: Unread | None,
    residual: Unread | None,
    activation: str,
) -> list[Tensor | None]:
    grads: list[Tensor | None] = [None] * 5
    if activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    if needs[0]:
        grads[0] = grad if scale is None else grad * per_channel(scale, grad)
    if scale is not None and needs[1]:
        grads[1] = _sum_to_channels(grad * input, scale)
    if shift is not None and needs[2]:
        grads[2] = _sum_to_channels(grad, shift)
    if residual is not None and needs[3]:
        grads[3] = grad
    return grads


def _sum_to_channels(values: Tensor, like: Tensor | Unread) -> Tensor:
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return values.sum((0, 2, 3), dtype=wide).to(like.dtype)


OPERATOR = Operator(
    "channel_affine",
    SIGNATURE,
    allocate=allocate,
    finish=_finish,
    fill=fill,
    backward=_backward,
    unread=(2, 3),
    in_place=True,
)
