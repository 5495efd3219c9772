"""Pooling on NHWC: maximum, average, adaptive average.

    max:      y[n, p, q, c] = max_{r,s} x[n, p*sh - ph + r*dh, q*sw - pw + s*dw, c], outside = -inf; NaN wins
    average:  y[n, p, q, c] = sum_{r,s} x[n, p*sh - ph + r, q*sw - pw + s, c] / d, outside = 0
    adaptive: y[n, p, q, c] = mean of x over rows floor(p*H/P) .. ceil((p+1)*H/P) and columns likewise

x, y: NHWC with pixel strides. The divisor d is given, or the size of the window: cut at the padded image's end where
padding counts, at the image's own edges where it does not.

Work. Max and average: one program per BLOCK_M output pixels x BLOCK_N channels, the running result in registers;
windows overlap along a row of pixels and are served by L1. Adaptive: one program per output pixel and channel block;
its lanes share the window and add up at the end, so that global pooling (one output pixel) still has many loads in
flight.

Floor. One read of x, one write of y: bound by memory.
"""

import torch
import triton
import triton.language as tl

from ._common import (
    Launch,
    alignment,
    block_indices,
    ceil_div,
    is_wide,
    kernel,
    next_power_of_two,
    pixel_count,
    pixel_stride,
    unroll_factor,
)  # fmt: skip
from ._elementwise import blocks, extent, grid

_POOL_TILE = 2048


@triton.jit
def window_origin(row, out_height, out_width, stride_h, stride_w, pad_top, pad_left):
    """(n, h0, w0) of output pixels `row`: the image and the first input row and column of the window."""
    q = row % out_width
    p = (row // out_width) % out_height
    return row // (out_width * out_height), p * stride_h - pad_top, q * stride_w - pad_left


@kernel
def max_pool2d_kernel(
    out_ptr, input_ptr, rows, channels, height, width, out_height, out_width,
    stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, out_ld, input_ld,
    R: tl.constexpr, S: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Channel counts and pixel strides come in units of ALIGN elements, here and below."""
    row = block_indices(tl.program_id(0), BLOCK_M, WIDE)
    row_mask = row < rows
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_mask = c < channels * ALIGN
    n, h0, w0 = window_origin(row, out_height, out_width, stride_h, stride_w, pad_top, pad_left)
    largest = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)
    for tap in tl.range(0, R * S, loop_unroll_factor=UNROLL):
        h = h0 + tap // S * dilation_h
        w = w0 + tap % S * dilation_w
        inside = row_mask & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        pixel = (n * height + h) * width + w
        x = tl.load(input_ptr + (pixel * (input_ld * ALIGN))[:, None] + c[None, :],
                    mask=inside[:, None] & c_mask[None, :], other=float("-inf"))  # fmt: skip
        largest = tl.maximum(largest, x.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + (row * (out_ld * ALIGN))[:, None] + c[None, :], largest.to(out_ptr.dtype.element_ty),
             mask=row_mask[:, None] & c_mask[None, :])  # fmt: skip


@kernel
def avg_pool2d_kernel(
    out_ptr, input_ptr, rows, channels, height, width, out_height, out_width,
    stride_h, stride_w, pad_top, pad_left, padded_end_h, padded_end_w, divisor, out_ld, input_ld,
    R: tl.constexpr, S: tl.constexpr, COUNT_PADDING: tl.constexpr, HAS_DIVISOR: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """padded_end_h = H + padding below: where a window is cut when padding counts."""
    row = block_indices(tl.program_id(0), BLOCK_M, WIDE)
    row_mask = row < rows
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_mask = c < channels * ALIGN
    n, h0, w0 = window_origin(row, out_height, out_width, stride_h, stride_w, pad_top, pad_left)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tap in tl.range(0, R * S, loop_unroll_factor=UNROLL):
        h = h0 + tap // S
        w = w0 + tap % S
        inside = row_mask & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        pixel = (n * height + h) * width + w
        x = tl.load(input_ptr + (pixel * (input_ld * ALIGN))[:, None] + c[None, :],
                    mask=inside[:, None] & c_mask[None, :], other=0.0)  # fmt: skip
        total += x.to(tl.float32)
    if HAS_DIVISOR:
        total = total / divisor
    else:
        if COUNT_PADDING:
            size_h = tl.minimum(h0 + R, padded_end_h) - h0
            size_w = tl.minimum(w0 + S, padded_end_w) - w0
        else:
            size_h = tl.minimum(h0 + R, height) - tl.maximum(h0, 0)
            size_w = tl.minimum(w0 + S, width) - tl.maximum(w0, 0)
        total = total / (size_h * size_w).to(tl.float32)[:, None]
    tl.store(out_ptr + (row * (out_ld * ALIGN))[:, None] + c[None, :], total.to(out_ptr.dtype.element_ty),
             mask=row_mask[:, None] & c_mask[None, :])  # fmt: skip


@kernel
def adaptive_avg_pool2d_kernel(
    out_ptr, input_ptr, channels, height, width, out_height, out_width, out_ld, input_ld,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Lanes along BLOCK_M take every BLOCK_M-th pixel of the window."""
    row = tl.program_id(0)
    q = row % out_width
    p = (row // out_width) % out_height
    n = row // (out_width * out_height)
    if WIDE:
        row = row.to(tl.int64)
        n = n.to(tl.int64)
    h0 = p * height // out_height
    w0 = q * width // out_width
    size_h = tl.cdiv((p + 1) * height, out_height) - h0
    size_w = tl.cdiv((q + 1) * width, out_width) - w0
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_mask = c < channels * ALIGN
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, size_h * size_w, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M)
        pixel = (n * height + h0 + j // size_w) * width + w0 + j % size_w
        x = tl.load(input_ptr + (pixel * (input_ld * ALIGN))[:, None] + c[None, :],
                    mask=(j < size_h * size_w)[:, None] & c_mask[None, :], other=0.0)  # fmt: skip
        total += x.to(tl.float32)
    mean = tl.sum(total, axis=0) / (size_h * size_w).to(tl.float32)
    tl.store(out_ptr + row * (out_ld * ALIGN) + c, mean.to(out_ptr.dtype.element_ty), mask=c_mask)


def max_pool2d(
    out: torch.Tensor, input: torch.Tensor, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int],
) -> None:  # fmt: skip
    """Fills `out`; arguments as in the kernel contract."""
    plan_max_pool2d(out, input, kernel, stride, padding, dilation).run()


def avg_pool2d(
    out: torch.Tensor, input: torch.Tensor, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], padding_end: tuple[int, int], count_include_pad: bool, divisor: int,
) -> None:  # fmt: skip
    """Fills `out`; arguments as in the kernel contract."""
    plan_avg_pool2d(out, input, kernel, stride, padding, padding_end, count_include_pad, divisor).run()


def adaptive_avg_pool2d(out: torch.Tensor, input: torch.Tensor) -> None:
    """Fills `out`; arguments as in the kernel contract."""
    plan_adaptive_avg_pool2d(out, input).run()


def plan_max_pool2d(
    out: torch.Tensor, input: torch.Tensor, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int],
) -> Launch:  # fmt: skip
    arguments = _window_arguments(out, input, kernel, stride, padding)
    arguments |= dict(dilation_h=dilation[0], dilation_w=dilation[1])
    return _window_launch(max_pool2d_kernel, arguments, out)


def plan_avg_pool2d(
    out: torch.Tensor, input: torch.Tensor, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], padding_end: tuple[int, int], count_include_pad: bool, divisor: int,
) -> Launch:  # fmt: skip
    arguments = _window_arguments(out, input, kernel, stride, padding)
    arguments |= dict(
        padded_end_h=input.shape[2] + padding_end[0], padded_end_w=input.shape[3] + padding_end[1],
        divisor=float(divisor or 1), HAS_DIVISOR=bool(divisor), COUNT_PADDING=bool(count_include_pad),
    )  # fmt: skip
    return _window_launch(avg_pool2d_kernel, arguments, out)


def plan_adaptive_avg_pool2d(out: torch.Tensor, input: torch.Tensor) -> Launch:
    arguments = _common_arguments(out, input)
    window = ceil_div(input.shape[2], out.shape[2]) * ceil_div(input.shape[3], out.shape[3])
    block_n = min(64, next_power_of_two(input.shape[1]))
    block_m = min(next_power_of_two(window), _POOL_TILE // block_n, 64)
    arguments |= dict(BLOCK_M=block_m, BLOCK_N=block_n)
    launch_grid = (pixel_count(out), ceil_div(input.shape[1], block_n))
    return Launch(adaptive_avg_pool2d_kernel, launch_grid, arguments, num_stages=1)


def _common_arguments(out: torch.Tensor, input: torch.Tensor) -> dict:
    channels, out_ld, input_ld = input.shape[1], pixel_stride(out), pixel_stride(input)
    align = alignment(channels, out_ld, input_ld)
    return dict(
        out_ptr=out, input_ptr=input, channels=channels // align, out_ld=out_ld // align, input_ld=input_ld // align,
        height=input.shape[2], width=input.shape[3], out_height=out.shape[2], out_width=out.shape[3],
        ALIGN=align, WIDE=is_wide(extent(out, input)),
    )  # fmt: skip


def _window_arguments(
    out: torch.Tensor, input: torch.Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> dict:  # fmt: skip
    block_m, block_n = blocks(pixel_count(out), out.shape[1], tile=_POOL_TILE, most_columns=64)
    return _common_arguments(out, input) | dict(
        rows=pixel_count(out), R=kernel[0], S=kernel[1], stride_h=stride[0], stride_w=stride[1],
        pad_top=padding[0], pad_left=padding[1], BLOCK_M=block_m, BLOCK_N=block_n,
        UNROLL=unroll_factor(kernel[0] * kernel[1]),
    )  # fmt: skip


def _window_launch(function, arguments: dict, out: torch.Tensor) -> Launch:
    across = grid(arguments["rows"], out.shape[1], arguments["BLOCK_M"], arguments["BLOCK_N"])
    return Launch(function, across, arguments, num_stages=2)
