"""Local response normalisation across channels (AlexNet, section 3.3, in PyTorch's form).

    y[m, c] = x[m, c] / (k + alpha/size * sum_{j = c - size//2}^{c + (size-1)//2} x[m, j]^2)^beta, outside = 0

x, y: NHWC with pixel strides, m = (n, h, w).
Work. One program per BLOCK_M pixels x BLOCK_N channels. The `size` shifted reads of a pixel's channels overlap; the
first brings the line into L1, which serves the others. The power is exp2(-beta * log2 d); for beta = 3/4, the usual
value, it is rsqrt(d) * sqrt(rsqrt(d)), cheaper and a little more accurate.
Floor. One read of x, one write of y: bound by memory.
"""

import torch
import triton.language as tl

from ._common import Launch, alignment, block_indices, is_wide, kernel, pixel_count, pixel_stride
from ._elementwise import blocks, extent, grid


@kernel
def local_response_norm_kernel(
    out_ptr, input_ptr, rows, channels, out_ld, input_ld, alpha_over_size, beta, k,
    SIZE: tl.constexpr, THREE_QUARTERS: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Channel counts and pixel strides come in units of ALIGN elements."""
    channels = channels * ALIGN
    row = block_indices(tl.program_id(0), BLOCK_M, WIDE)[:, None]
    c = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    row_mask = row < rows
    base = input_ptr + row * (input_ld * ALIGN)
    x = tl.load(base + c, mask=row_mask & (c < channels), other=0.0).to(tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for shift in range(-(SIZE // 2), (SIZE - 1) // 2 + 1):
        j = c + shift
        neighbour = tl.load(base + j, mask=row_mask & (j >= 0) & (j < channels), other=0.0).to(tl.float32)
        squares += neighbour * neighbour
    denominator = k + alpha_over_size * squares
    if THREE_QUARTERS:
        root = tl.rsqrt(denominator)
        y = x * (root * tl.sqrt(root))
    else:
        y = x * tl.exp2(-beta * tl.log2(denominator))
    tl.store(out_ptr + row * (out_ld * ALIGN) + c, y.to(out_ptr.dtype.element_ty), mask=row_mask & (c < channels))


def local_response_norm(
    out: torch.Tensor, input: torch.Tensor, size: int, alpha: float, beta: float, k: float
) -> None:  # fmt: skip
    """Fills `out`; arguments as in the kernel contract."""
    plan_local_response_norm(out, input, size, alpha, beta, k).run()


def plan_local_response_norm(
    out: torch.Tensor, input: torch.Tensor, size: int, alpha: float, beta: float, k: float
) -> Launch:  # fmt: skip
    rows, channels = pixel_count(input), input.shape[1]
    out_ld, input_ld = pixel_stride(out), pixel_stride(input)
    align = alignment(channels, out_ld, input_ld)
    block_m, block_n = blocks(rows, channels, tile=2048)
    arguments = dict(
        out_ptr=out, input_ptr=input, rows=rows, channels=channels // align, out_ld=out_ld // align,
        input_ld=input_ld // align, alpha_over_size=alpha / size, beta=float(beta), k=float(k),
        SIZE=size, THREE_QUARTERS=beta == 0.75, ALIGN=align, WIDE=is_wide(extent(out, input)),
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return Launch(
        local_response_norm_kernel, grid(rows, channels, block_m, block_n), arguments, num_stages=1
    )  # fmt: skip
