"""linear: a fully connected layer with its activation.

y = act(x @ w.T + bias)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn import backends
from fastcnn.ops._arguments import (
    kernel_vector,
    require_activation,
    require_optional_tensors,
    require_same_place,
    require_tensor,
    require_vector,
)
from fastcnn.ops._registration import Operator, Unread

SIGNATURE = "Tensor input, Tensor weight, Tensor? bias, str activation"


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.linear` with the activation fused into it.

    Args:
        input: (..., C); fp32, bf16 or fp16 run on fastcnn's kernels.
        weight: (K, C) in the input's dtype, read where it lies; or (C,), for a result without the last dimension.
        bias: (K,), or a scalar for a 1-D weight; in the input's dtype or fp32.
        activation: ``"none"`` or ``"relu"``.
        out: where to write: the output's shape and dtype. No gradient can be recorded then.

    Returns:
        (..., K), contiguous; ``out`` if given.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, device or dtype; the message names it.
    """
    require_tensor(input, "input")
    require_tensor(weight, "weight")
    require_optional_tensors(bias=bias, out=out)
    require_activation(activation)
    if weight.dim() == 1:
        if bias is not None and bias.numel() != 1:
            raise ValueError(f"bias must be a scalar for a 1-D weight, has shape {tuple(bias.shape)}")
        row = OPERATOR(
            input, weight.unsqueeze(0), None if bias is None else bias.reshape(1), activation,
            out=None if out is None else out.unsqueeze(-1),
        )  # fmt: skip
        return row.squeeze(-1) if out is None else out
    return OPERATOR(input, weight, bias, activation, out=out)


def _allocate(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    require_activation(activation)
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (K, C) or (C,), has {tuple(weight.shape)}")
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input must have {weight.shape[1]} features in its last dimension, as weight {tuple(weight.shape)} has; "
            f"it has shape {tuple(input.shape)}"
        )
    require_same_place(weight, "weight", input)
    require_vector(bias, "bias", weight.shape[0], input)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _fill(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    out_features, in_features = weight.shape
    count = math.prod(input.shape[:-1])
    rows = out.view(count, out_features)
    arguments = (rows, _rows(input.reshape(count, in_features)), _rows(weight), kernel_vector(bias), activation)
    if in_features == 0:  # nothing to sum: only the epilogue is left
        backends.backend_module("reference").linear(*arguments)
    else:
        backends.run("linear", out.device, out.dtype, *arguments)


def _rows(matrix: Tensor) -> Tensor:
    """The matrix itself when the values of each row are adjacent and no two rows share any, else a copy."""
    rows, columns = matrix.shape
    adjacent = columns == 1 or matrix.stride(1) == 1
    return matrix if adjacent and (rows == 1 or matrix.stride(0) >= columns) else matrix.contiguous()


def _backward(
    grad: Tensor,
    out: Tensor | None,
    needs: Sequence[bool],
    input: Tensor,
    weight: Tensor,
    bias: Unread | None,
    activation: str,
) -> list[Tensor | None]:
    grads: list[Tensor | None] = [None] * 4
    if activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    if needs[0]:
        grads[0] = grad.matmul(weight)
    count = math.prod(input.shape[:-1])
    rows = grad.reshape(count, weight.shape[0])
    if needs[1]:
        grads[1] = rows.t().mm(input.reshape(count, weight.shape[1]))
    if bias is not None and needs[2]:
        wide = torch.float64 if bias.dtype == torch.float64 else torch.float32
        grads[2] = rows.sum(0, dtype=wide).to(bias.dtype)
    return grads


OPERATOR = Operator(
    "linear",
    SIGNATURE,
    allocate=_allocate,
    finish=lambda out, *args: out,
    fill=_fill,
    backward=_backward,
    unread=(2,),
    autocast=(0, 1),
    writable=lambda out: (
        out.is_contiguous() or (out.dim() == 2 and out.stride(1) == 1 and out.stride(0) >= out.shape[1])
    ),
)
