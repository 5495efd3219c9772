"""Depthwise convolution: one input channel per group, on the vector units.

    y[m, k] = act(sum_{r,s} pad(pro(x))[.., k // MULTIPLIER] * w[k, r, s] * scale[k] + bias[k] + residual[m, k])

Layouts. x, y: NHWC with pixel strides; w: (R, S, K), the filters of a tap adjacent, so that a thread reads those of its
channels at once. MULTIPLIER = K/g filters per channel.

Work. One program per BLOCK_M output pixels x BLOCK_N output channels; a thread holds 8 neighbouring channels (16
bytes) of a few pixels. A dot would multiply 15 zeros for every product, so products are plain FMAs. Windows of
neighbouring pixels overlap R*S-fold; the program's pixels are consecutive, so the overlap along a row is served by
L1.

Floor. 2*M*K*R*S FLOPs; N*H*W*C + M*K elements. A 3x3 does 18 FLOPs for 4 bytes in bf16: bound by memory.
"""

import triton.language as tl

from ._common import apply_prologue, block_indices, kernel, store_tile


@kernel
def depthwise_kernel(
    out_ptr, input_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, input_scale_ptr, input_shift_ptr,
    rows, filters, height, width, out_height, out_width,
    stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w,
    input_ld, out_ld, residual_ld,
    R: tl.constexpr, S: tl.constexpr, MULTIPLIER: tl.constexpr, IN_ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr,
    HAS_PROLOGUE: tl.constexpr, INPUT_RELU: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """`input_ld` counts IN_ALIGN elements; `filters` (all of them), `out_ld` and `residual_ld` count OUT_ALIGN."""
    filters = filters * OUT_ALIGN
    input_ld = input_ld * IN_ALIGN
    row = block_indices(tl.program_id(0), BLOCK_M, WIDE)
    row_mask = row < rows
    q = row % out_width
    p = (row // out_width) % out_height
    n = row // (out_width * out_height)
    h0 = p * stride_h - pad_top
    w0 = q * stride_w - pad_left
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_mask = k < filters
    c = k
    if MULTIPLIER != 1:
        c = k // MULTIPLIER
    input_tile = input_ptr + (((n * height + h0) * width + w0) * input_ld)[:, None] + c[None, :]
    if WIDE:
        input_ld = input_ld.to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tap in tl.range(0, R * S, loop_unroll_factor=UNROLL):
        dh = tap // S * dilation_h
        dw = tap % S * dilation_w
        inside = row_mask & (h0 + dh >= 0) & (h0 + dh < height) & (w0 + dw >= 0) & (w0 + dw < width)
        x_mask = inside[:, None] & k_mask[None, :]
        x = tl.load(input_tile + (dh * width + dw) * input_ld, mask=x_mask, other=0.0)
        w = tl.load(weight_ptr + tap * filters + k, mask=k_mask, other=0.0)
        if HAS_PROLOGUE:
            x = apply_prologue(x, input_scale_ptr, input_shift_ptr, c, k_mask, INPUT_RELU)
            x = tl.where(x_mask, x, 0.0)
        acc += x.to(tl.float32) * w.to(tl.float32)[None, :]

    store_tile(acc, out_ptr, residual_ptr, scale_ptr, bias_ptr, row, row_mask,
               tl.program_id(1) * BLOCK_N, filters, out_ld * OUT_ALIGN, residual_ld * OUT_ALIGN, RELU)  # fmt: skip
