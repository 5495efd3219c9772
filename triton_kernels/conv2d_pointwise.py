"""1x1 convolution and linear layer as a matrix product.

    y[m, k] = act(sum_c pro(x[pixel(m), c]) * w[k, c] * scale[k] + bias[k] + residual[m, k]),  m = (n, p, q)

Layouts. x and y: NHWC rows of C and K channels with pixel strides; w: (K, C/g), rows adjacent. With stride 1, pixel(m)
is m: the four dimensions collapse to a matrix. With a larger stride the row addresses are computed once per program, so
that no gather pass over the input is needed.

Work. One program per BLOCK_M x BLOCK_N tile of y and group, strips of GROUP_M tile rows (L2). The mainloop streams
BLOCK_K channels a step through `num_stages` shared-memory buffers (cp.async); accumulators stay in registers (wgmma on
sm_90, mma.sync on sm_80). A prologue passes the input tile through registers between shared memory and the dot.

Floor. 2*M*K*C/g FLOPs; (M*C + M*K + K*C/g) elements moved once. Bound by memory below about 300 FLOPs a byte on an
H100: for C = K = 256 in bf16 that is 128 FLOPs a byte, so most 1x1 layers should run at the speed of memory.
"""

import triton.language as tl

from ._common import apply_prologue, block_indices, dot, kernel, store_tile, tile_of_program


@kernel
def pointwise_kernel(
    out_ptr, input_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, input_scale_ptr, input_shift_ptr,
    rows, channels, filters, height, width, out_height, out_width, stride_h, stride_w,
    input_ld, out_ld, residual_ld,
    IN_ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr, STRIDED: tl.constexpr,
    HAS_PROLOGUE: tl.constexpr, INPUT_RELU: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Per group: `channels` and `input_ld` count IN_ALIGN elements; `filters`, `out_ld`, `residual_ld` OUT_ALIGN."""
    channels = channels * IN_ALIGN
    filters = filters * OUT_ALIGN
    group = tl.program_id(1)
    tile_m, tile_n = tile_of_program(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(filters, BLOCK_N), GROUP_M)
    row = block_indices(tile_m, BLOCK_M, WIDE)
    row_mask = row < rows
    pixel = row
    if STRIDED:
        q = row % out_width
        p = (row // out_width) % out_height
        n = row // (out_width * out_height)
        pixel = (n * height + p * stride_h) * width + q * stride_w
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_mask = k < filters
    c = tl.arange(0, BLOCK_K)
    weight_row = block_indices(tile_n, BLOCK_N, WIDE) + group * filters
    input_tile = input_ptr + group * channels + (pixel * (input_ld * IN_ALIGN))[:, None] + c[None, :]
    weight_tile = weight_ptr + (weight_row * channels)[None, :] + c[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, channels, BLOCK_K):
        c_mask = c < channels - start
        x = tl.load(input_tile + start, mask=row_mask[:, None] & c_mask[None, :], other=0.0)
        w = tl.load(weight_tile + start, mask=k_mask[None, :] & c_mask[:, None], other=0.0)
        if HAS_PROLOGUE:
            x = apply_prologue(x, input_scale_ptr, input_shift_ptr, group * channels + start + c, c_mask, INPUT_RELU)
        acc = dot(x, w, acc, PRECISION)

    store_tile(acc, out_ptr, residual_ptr, scale_ptr, bias_ptr, row, row_mask,
               group * filters + tile_n * BLOCK_N, (group + 1) * filters, out_ld * OUT_ALIGN, residual_ld * OUT_ALIGN,
               RELU)  # fmt: skip
