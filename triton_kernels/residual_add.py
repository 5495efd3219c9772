"""Residual connection: y = act(x * scale + residual), scale a number (1, or a survival probability).

x, y, residual: NHWC with pixel strides. Arithmetic in fp32. y may be x or residual.
Work. Dense tensors are one long row cut into 4096-value programs; slices of wider tensors are walked as BLOCK_M
pixels x BLOCK_N channels (see _elementwise.py).
Floor. Two reads, one write, 2 FLOPs a value: bound by memory.
"""

import math

import torch
import triton.language as tl

from ._common import Launch, alignment, block_indices, is_wide, kernel, pixel_count, pixel_stride, relu
from ._elementwise import TILE, blocks, extent, grid, is_dense


@kernel
def residual_add_kernel(
    out_ptr, input_ptr, residual_ptr, scale, rows, columns, out_ld, input_ld, residual_ld,
    RELU: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`columns` and pixel strides come in units of ALIGN elements."""
    if WIDE:
        columns = columns.to(tl.int64)
    columns = columns * ALIGN
    tiles_n = tl.cdiv(columns, BLOCK_N)
    row = block_indices(tl.program_id(0) // tiles_n, BLOCK_M, WIDE)[:, None]
    column = block_indices(tl.program_id(0) % tiles_n, BLOCK_N, WIDE)[None, :]
    mask = (row < rows) & (column < columns)
    x = tl.load(input_ptr + row * (input_ld * ALIGN) + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(residual_ptr + row * (residual_ld * ALIGN) + column, mask=mask, other=0.0).to(tl.float32)
    y = x * scale + y
    if RELU:
        y = relu(y)
    tl.store(out_ptr + row * (out_ld * ALIGN) + column, y.to(out_ptr.dtype.element_ty), mask=mask)


def residual_add(
    out: torch.Tensor, input: torch.Tensor, residual: torch.Tensor, scale: float = 1.0, activation: str = "none"
) -> None:  # fmt: skip
    """Fills `out`; arguments as in the kernel contract."""
    plan_residual_add(out, input, residual, scale, activation).run()


def plan_residual_add(
    out: torch.Tensor, input: torch.Tensor, residual: torch.Tensor, scale: float, activation: str
) -> Launch:  # fmt: skip
    rows, columns = pixel_count(input), input.shape[1]
    strides = [pixel_stride(tensor) for tensor in (out, input, residual)]
    if is_dense(out, input, residual):
        rows, columns, strides = 1, rows * columns, [0, 0, 0]
    align = alignment(columns, *strides)
    block_m, block_n = (1, TILE) if rows == 1 else blocks(rows, columns)
    arguments = dict(
        out_ptr=out, input_ptr=input, residual_ptr=residual, scale=float(scale), rows=rows, columns=columns // align,
        out_ld=strides[0] // align, input_ld=strides[1] // align, residual_ld=strides[2] // align,
        RELU=activation == "relu", ALIGN=align, WIDE=is_wide(extent(out, input, residual)),
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    # One grid axis for both: either may be long, and the second axis of a grid stops at 65535 programs.
    return Launch(residual_add_kernel, (math.prod(grid(rows, columns, block_m, block_n)),), arguments, num_stages=1)
