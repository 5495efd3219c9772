"""Per-channel affine map: y[m, c] = act((x[m, c] - centre[c]) * scale[c] + shift[c] + residual[m, c]); batch norm.

x, y, residual: NHWC with pixel strides, m = (n, h, w); scale, shift, centre: fp32 (C,). Arithmetic in fp32.
Work. One program per BLOCK_M pixels x BLOCK_N channels; the vectors are read once per program and kept in registers.
Floor. One read of x (and residual), one write of y; 2 FLOPs a value: bound by memory. In place (y is x) is allowed.
"""

import torch
import triton.language as tl

from ._common import Launch, alignment, block_indices, is_wide, kernel, pixel_count, pixel_stride, store_tile
from ._elementwise import blocks, extent, grid


@kernel
def channel_affine_kernel(
    out_ptr, input_ptr, scale_ptr, shift_ptr, centre_ptr, residual_ptr, rows, channels, out_ld, input_ld, residual_ld,
    RELU: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Channel counts and pixel strides come in units of ALIGN elements."""
    row = block_indices(tl.program_id(0), BLOCK_M, WIDE)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    mask = row_mask[:, None] & (c < channels * ALIGN)[None, :]
    x = tl.load(input_ptr + (row * (input_ld * ALIGN))[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if centre_ptr is not None:
        x = x - tl.load(centre_ptr + c, mask=c < channels * ALIGN, other=0.0)[None, :]
    store_tile(x, out_ptr, residual_ptr, scale_ptr, shift_ptr, row, row_mask,
               tl.program_id(1) * BLOCK_N, channels * ALIGN, out_ld * ALIGN, residual_ld * ALIGN, RELU)  # fmt: skip


def channel_affine(
    out: torch.Tensor, input: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None,
    residual: torch.Tensor | None = None, activation: str = "none", centre: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Fills `out`; arguments as in the kernel contract."""
    plan_channel_affine(out, input, scale, shift, residual, activation, centre).run()


def plan_channel_affine(
    out: torch.Tensor, input: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None,
    residual: torch.Tensor | None, activation: str, centre: torch.Tensor | None = None,
) -> Launch:  # fmt: skip
    rows, channels = pixel_count(input), input.shape[1]
    out_ld, input_ld = pixel_stride(out), pixel_stride(input)
    residual_ld = 0 if residual is None else pixel_stride(residual)
    align = alignment(channels, out_ld, input_ld, residual_ld)
    block_m, block_n = blocks(rows, channels)
    arguments = dict(
        out_ptr=out, input_ptr=input, scale_ptr=scale, shift_ptr=shift, centre_ptr=centre,
        residual_ptr=residual, rows=rows, channels=channels // align, out_ld=out_ld // align,
        input_ld=input_ld // align, residual_ld=residual_ld // align, RELU=activation == "relu", ALIGN=align,
        WIDE=is_wide(extent(out, input, residual)), BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return Launch(channel_affine_kernel, grid(rows, channels, block_m, block_n), arguments, num_stages=1)
