"""Grouped convolution with fewer than 16 channels and 16 filters per group: groups packed into one block-diagonal dot.

    y[m, k] = act(scale[k] * sum_{r,s} sum_{c in group(k)} pad(pro(x))[.., c] * w[k, r, s, c] + bias[k] + res[m, k])

Layouts. x, y: NHWC with pixel strides; w: (K, R, S, C/g).

Work. One program takes BLOCK_M output pixels and PACK = 16 // (C/g) neighbouring groups, whose channels are adjacent
in memory: one 32-byte (16-bit types) or 64-byte (fp32) read per pixel and tap, where a group alone would read C/g
elements. Per tap one dot of BLOCK_M x 16 by 16 x BLOCK_N, the right operand zero except in its diagonal blocks.

Waste. The dot does 16 * BLOCK_N products per pixel and tap for PACK * (C/g) * (K/g) that are needed: 4 for 4 channels
and 4 filters per group (ResNeXt 32x4d), 2 for 8 and 8. One group per dot would waste 16 and 4. 16 is the least that a
dot reduces over, so no packing wastes less; tensor cores are more than 10 times as fast as the vector units on these
types.

Floor. 2*M*K*R*S*C/g FLOPs; N*H*W*C + M*K elements: bound by memory for every such layer.
"""

import triton.language as tl

from ._common import apply_prologue, block_indices, dot, kernel, store_tile


@kernel
def packed_groups_kernel(
    out_ptr, input_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, input_scale_ptr, input_shift_ptr,
    rows, channels, filters, height, width, out_height, out_width,
    stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w,
    input_ld, out_ld, residual_ld,
    R: tl.constexpr, S: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PACK: tl.constexpr,
    IN_ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr,
    HAS_PROLOGUE: tl.constexpr, INPUT_RELU: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """C and K are per group; `channels`, `input_ld` (in IN_ALIGN) and `filters`, `out_ld` (in OUT_ALIGN) are totals."""
    channels = channels * IN_ALIGN
    filters = filters * OUT_ALIGN
    input_ld = input_ld * IN_ALIGN
    row = block_indices(tl.program_id(0), BLOCK_M, WIDE)
    row_mask = row < rows
    q = row % out_width
    p = (row // out_width) % out_height
    n = row // (out_width * out_height)
    h0 = p * stride_h - pad_top
    w0 = q * stride_w - pad_left
    pack = tl.program_id(1)
    c_in_pack = tl.arange(0, BLOCK_K)
    k_in_pack = tl.arange(0, BLOCK_N)
    c = pack * (PACK * C) + c_in_pack
    k = pack * (PACK * K) + k_in_pack
    c_mask = (c_in_pack < PACK * C) & (c < channels)
    k_mask = (k_in_pack < PACK * K) & (k < filters)
    same_group = (c_in_pack // C)[:, None] == (k_in_pack // K)[None, :]
    w_mask = same_group & c_mask[:, None] & k_mask[None, :]
    input_tile = input_ptr + (((n * height + h0) * width + w0) * input_ld)[:, None] + c[None, :]
    weight_tile = weight_ptr + (k * (R * S * C))[None, :] + (c_in_pack % C)[:, None]
    if WIDE:
        input_ld = input_ld.to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tap in range(0, R * S):
        dh = tap // S * dilation_h
        dw = tap % S * dilation_w
        inside = row_mask & (h0 + dh >= 0) & (h0 + dh < height) & (w0 + dw >= 0) & (w0 + dw < width)
        x_mask = inside[:, None] & c_mask[None, :]
        x = tl.load(input_tile + (dh * width + dw) * input_ld, mask=x_mask, other=0.0)
        w = tl.load(weight_tile + tap * C, mask=w_mask, other=0.0)
        if HAS_PROLOGUE:
            x = apply_prologue(x, input_scale_ptr, input_shift_ptr, c, c_mask, INPUT_RELU)
            x = tl.where(x_mask, x, 0.0)
        acc = dot(x, w, acc, PRECISION)

    store_tile(acc, out_ptr, residual_ptr, scale_ptr, bias_ptr, row, row_mask,
               pack * (PACK * K), tl.minimum((pack + 1) * (PACK * K), filters),
               out_ld * OUT_ALIGN, residual_ld * OUT_ALIGN, RELU)  # fmt: skip
