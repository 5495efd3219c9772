"""R x S convolution as an implicit matrix product on NHWC, for filters with at least 16 channels per group.

    y[m, k] = act(sum_{r,s,c} pad(pro(x))[n, p*sh - ph + r*dh, q*sw - pw + s*dw, c] * w[k, r, s, c] * scale[k] + ...)

Layouts. x, y: NHWC with pixel strides; w: (K, R, S, C/g). m = (n, p, q) counts output pixels, M = N*P*Q.

Work. One program per BLOCK_M x BLOCK_N tile of y and group. The reduction runs over channel blocks, and for each over
the R*S filter taps, so that the taps re-read nearly the same pixels while they are in L2. The im2col matrix is never
stored: a tap moves every row's address by the same (r*dh*W + s*dw) * ld, so a step costs one scalar addition plus a
bounds test per row. What lies outside the image is masked to zero after the prologue, because the padding comes after
it. Operand tiles go through `num_stages` shared-memory buffers (cp.async), accumulators stay in registers (wgmma on
sm_90, mma.sync on sm_80).

Floor. 2*M*K*R*S*C/g FLOPs; N*H*W*C + M*K + K*R*S*C/g elements moved once. A 3x3 with C = K = 128 in bf16 does 576
FLOPs a byte: bound by the tensor cores.
"""

import triton.language as tl

from ._common import apply_prologue, block_indices, dot, kernel, store_tile, tile_of_program


@kernel
def implicit_gemm_kernel(
    out_ptr, input_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, input_scale_ptr, input_shift_ptr,
    rows, channels, filters, height, width, out_height, out_width,
    stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w,
    input_ld, out_ld, residual_ld,
    R: tl.constexpr, S: tl.constexpr, IN_ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr,
    HAS_PROLOGUE: tl.constexpr, INPUT_RELU: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Per group: `channels` and `input_ld` count IN_ALIGN elements; `filters`, `out_ld`, `residual_ld` OUT_ALIGN."""
    channels = channels * IN_ALIGN
    filters = filters * OUT_ALIGN
    input_ld = input_ld * IN_ALIGN
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
    c = tl.arange(0, BLOCK_K)
    weight_row = block_indices(tile_n, BLOCK_N, WIDE) + group * filters
    pixel = (n * height + h0) * width + w0
    input_tile = input_ptr + group * channels + (pixel * input_ld)[:, None] + c[None, :]
    weight_tile = weight_ptr + (weight_row * (R * S * channels))[None, :] + c[:, None]
    if WIDE:
        input_ld = input_ld.to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(channels, BLOCK_K) * (R * S)):
        start = step // (R * S) * BLOCK_K
        tap = step % (R * S)
        dh = tap // S * dilation_h
        dw = tap % S * dilation_w
        inside = row_mask & (h0 + dh >= 0) & (h0 + dh < height) & (w0 + dw >= 0) & (w0 + dw < width)
        c_mask = c < channels - start
        x_mask = inside[:, None] & c_mask[None, :]
        x = tl.load(input_tile + ((dh * width + dw) * input_ld + start), mask=x_mask, other=0.0)
        w = tl.load(weight_tile + (tap * channels + start), mask=k_mask[None, :] & c_mask[:, None], other=0.0)
        if HAS_PROLOGUE:
            x = apply_prologue(x, input_scale_ptr, input_shift_ptr, group * channels + start + c, c_mask, INPUT_RELU)
            x = tl.where(x_mask, x, 0.0)
        acc = dot(x, w, acc, PRECISION)

    store_tile(acc, out_ptr, residual_ptr, scale_ptr, bias_ptr, row, row_mask,
               group * filters + tile_n * BLOCK_N, (group + 1) * filters, out_ld * OUT_ALIGN, residual_ld * OUT_ALIGN,
               RELU)  # fmt: skip
