"""The reference for fp32 where PyTorch's settings allow TF32: what multiplying in TF32 costs, whoever does it.

``torch.backends.cudnn.allow_tf32`` permits rounding operands to TF32; it does not demand it. cuDNN and cuBLAS choose
for each shape, and for odd channel counts often keep to exact fp32, three digits more precise. Held to such a result,
every kernel that does what the setting allows would be wrong. So the reference is the less precise of PyTorch's result
and of this emulation: operands rounded to TF32 (10 bits after the point, to nearest, half away from zero), products and
sums in float64, one rounding to fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn.backends import Call, backend_module
from fastcnn.backends.reference import prologue
from fastcnn.triton_kernels.precision import convolutions_use_tf32, matrix_products_use_tf32

_DROPPED_BITS = 13  # fp32 has 23 bits after the point


def round_to_tf32(values: Tensor) -> Tensor:
    """fp32 values with TF32's precision, to nearest, half away from zero; NaN and infinities as they are."""
    half, mask = 1 << (_DROPPED_BITS - 1), ~((1 << _DROPPED_BITS) - 1)
    nearest = ((values.contiguous().view(torch.int32) + half) & mask).view(torch.float32).view(values.shape)
    return torch.where(values.isfinite(), nearest, values)


def may_use_tf32(call: Call) -> bool:
    """Whether PyTorch's settings let a GPU multiply this call's fp32 operands as TF32."""
    if call.device.type != "cuda" or call.dtype != torch.float32:
        return False
    if call.operator == "conv2d":
        return convolutions_use_tf32()
    return call.operator == "linear" and matrix_products_use_tf32()


def fill_in_tf32(call: Call) -> None:
    """Compute a conv2d or linear call as the emulation above does, into its own output."""
    out, input, weight, *rest = call.args
    assert isinstance(out, Tensor) and isinstance(input, Tensor) and isinstance(weight, Tensor)  # noqa: PT018
    if call.operator == "conv2d":
        scale, bias, residual, input_scale, input_shift, input_relu, *geometry = rest
        input = prologue(input, input_scale, input_shift, bool(input_relu))  # type: ignore[arg-type]
        rest = [scale, bias, residual, None, None, False, *geometry]
    wide = [a.double().contiguous() if isinstance(a, Tensor) else a for a in rest]
    result = torch.empty_like(out, dtype=torch.float64)
    operands = (round_to_tf32(input).double(), round_to_tf32(weight.detach()).double())
    getattr(backend_module("reference"), call.operator)(result, *operands, *wide)
    out.copy_(result)


def less_precise(exact: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The one of two results that is further from the float64 result."""
    distances = [(result.double() - exact).norm().nan_to_num(nan=float("inf")).item() for result in (one, other)]
    return one if distances[0] >= distances[1] else other
