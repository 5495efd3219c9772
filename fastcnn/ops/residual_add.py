"""residual_add: the end of a residual block.

y = act(scale * x + residual)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn import backends
from fastcnn.ops import _strides
from fastcnn.ops._arguments import (
    require_activation,
    require_floating,
    require_number,
    require_optional_tensors,
    require_residual,
    require_tensor,
)
from fastcnn.ops._layout import empty_channels_last, pixel_stride, to_kernel_layout
from fastcnn.ops._registration import Operator, Unread

SIGNATURE = "Tensor input, Tensor residual, float scale, str activation"


def residual_add(
    input: Tensor,
    residual: Tensor,
    *,
    scale: float = 1.0,
    activation: str = "relu",
    out: Tensor | None = None,
) -> Tensor:
    """``act(scale * input + residual)``, what ends the block of a residual network (He et al., 2016) in one pass.

    Args:
        input: any shape; fp32, bf16 or fp16 run on fastcnn's kernels.
        residual: the input's shape. Of two dtypes the result has the wider one, as PyTorch's ``+`` gives it.
        scale: multiplies the input: 1, or a survival probability (stochastic depth, Huang et al., 2016).
        activation: ``"relu"`` or ``"none"``.
        out: where to write: the output's shape and dtype; may be ``input`` or ``residual`` itself. No gradient can be
            recorded then.

    Returns:
        The input's shape, in the memory layout that PyTorch's ``input + residual`` would have; ``out`` if given.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, device or dtype; the message names it.
    """
    require_tensor(input, "input")
    require_tensor(residual, "residual")
    require_optional_tensors(out=out)
    require_number(scale, "scale")
    require_activation(activation)
    if residual.dtype != input.dtype:
        # Before they are promoted, so that the message names the one that is wrong.
        for tensor, name in ((input, "input"), (residual, "residual")):
            if tensor.is_floating_point() or tensor.is_complex():
                require_floating(tensor, name)
        dtype = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(dtype), residual.to(dtype)
    return OPERATOR(input, residual, scale, activation, out=out)


def _allocate(input: Tensor, residual: Tensor, scale: float, activation: str) -> Tensor:
    require_activation(activation)
    require_residual(residual, input.shape, input)
    require_floating(input, "input")
    if input.is_contiguous() and residual.is_contiguous():
        return torch.empty(input.shape, dtype=input.dtype, device=input.device)
    strides = _strides.elementwise(input.shape, input.stride(), residual.stride())
    return torch.empty_strided(input.shape, strides, dtype=input.dtype, device=input.device)


def _fill(out: Tensor, input: Tensor, residual: Tensor, scale: float, activation: str) -> None:
    if pixel_stride(out) is not None:
        views = [out, to_kernel_layout(input), to_kernel_layout(residual)]
    elif out.is_contiguous():
        views = [_innermost_as_channels(t) for t in (out, input.contiguous(), residual.contiguous())]
    else:
        temporary = empty_channels_last(out.shape, out) if out.dim() == 4 else torch.empty_like(out.contiguous())
        _fill(temporary, input, residual, scale, activation)
        out.copy_(temporary)
        return
    backends.run("residual_add", out.device, out.dtype, *views, scale, activation)


def _innermost_as_channels(tensor: Tensor) -> Tensor:
    """Contiguous memory as the channels-last tensor that it also is: no value knows its channel here."""
    if tensor.dim() == 4:
        return tensor.permute(0, 3, 1, 2)
    return tensor.view(-1, tensor.shape[-1] if tensor.dim() > 0 else 1, 1, 1)


def _backward(
    grad: Tensor,
    out: Tensor | None,
    needs: Sequence[bool],
    input: Unread,
    residual: Unread,
    scale: float,
    activation: str,
) -> list[Tensor | None]:
    if activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    return [(grad if scale == 1 else grad * scale) if needs[0] else None, grad if needs[1] else None, None, None]


OPERATOR = Operator(
    "residual_add",
    SIGNATURE,
    allocate=_allocate,
    finish=lambda out, *args: out,
    fill=_fill,
    backward=_backward,
    unread=(0, 1),
    writable=lambda out: True,
    in_place=True,
)
