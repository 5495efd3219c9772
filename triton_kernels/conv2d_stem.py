"""Convolution of few input channels (the 3-channel stem): filter taps and channels form one reduction.

    y[m, k] = act(scale[k] * sum_j pad(pro(x))[pixel(m, j)] * w[k, j] + bias[k] + residual[m, k]),
    j = (r*S + s)*C/g + c

Layouts. x, y: NHWC with pixel strides; w: (K, R*S*C/g), which is the (K, R, S, C/g) weight seen as a matrix.

Work. One program per BLOCK_M x BLOCK_N tile of y and group. A dot reduces over at least 16 values; with 3 channels a
tap by tap loop would multiply 13 zeros for 3 products. Flattened, a 7x7x3 stem reduces over 147 values in five blocks
of 32: 1.09 products done for each one needed instead of 5.3. The price is a gather: every value computes its own (r,
s, c) and bounds test, R, S and C/g being constants so that divisions become multiplications. The gather reads 2 or 4
bytes at a time from L1, where the R*S-fold overlap of neighbouring windows is served.

Floor. 2*M*K*R*S*C/g FLOPs; the output dominates the traffic: M*K elements (64 channels out for 3 in).
"""

import triton.language as tl

from ._common import apply_prologue, block_indices, dot, kernel, store_tile, tile_of_program


@kernel
def stem_kernel(
    out_ptr, input_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, input_scale_ptr, input_shift_ptr,
    rows, filters, height, width, out_height, out_width,
    stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w,
    input_ld, out_ld, residual_ld,
    R: tl.constexpr, S: tl.constexpr, C: tl.constexpr, OUT_ALIGN: tl.constexpr,
    HAS_PROLOGUE: tl.constexpr, INPUT_RELU: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """`filters`, `out_ld` and `residual_ld` count OUT_ALIGN elements; C and `filters` are per group."""
    filters = filters * OUT_ALIGN
    group = tl.program_id(1)
    tile_m, tile_n = tile_of_program(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(filters, BLOCK_N), GROUP_M)
    row = block_indices(tile_m, BLOCK_M, WIDE)
    row_mask = row < rows
    q = row % out_width
    p = (row // out_width) % out_height
    n = row // (out_width * out_height)
    h0 = p * stride_h - pad_top
    w0 = q * stride_w - pad_left
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_mask = k < filters
    input_tile = input_ptr + group * C + (((n * height + h0) * width + w0) * input_ld)[:, None]
    weight_tile = weight_ptr + ((group * filters + k) * (R * S * C))[None, :]
    if WIDE:
        input_ld = input_ld.to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, R * S * C, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        j_mask = j < R * S * C
        c = j % C
        dh = j // (S * C) * dilation_h
        dw = j // C % S * dilation_w
        h = h0[:, None] + dh[None, :]
        w = w0[:, None] + dw[None, :]
        x_mask = (row_mask[:, None] & j_mask[None, :]) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        x = tl.load(input_tile + ((dh * width + dw) * input_ld + c)[None, :], mask=x_mask, other=0.0)
        filter_tile = tl.load(weight_tile + j[:, None], mask=k_mask[None, :] & j_mask[:, None], other=0.0)
        if HAS_PROLOGUE:
            x = apply_prologue(x, input_scale_ptr, input_shift_ptr, group * C + c, j_mask, INPUT_RELU)
            x = tl.where(x_mask, x, 0.0)
        acc = dot(x, filter_tile, acc, PRECISION)

    store_tile(acc, out_ptr, residual_ptr, scale_ptr, bias_ptr, row, row_mask,
               group * filters + tile_n * BLOCK_N, (group + 1) * filters, out_ld * OUT_ALIGN, residual_ld * OUT_ALIGN,
               RELU)  # fmt: skip
