"""Per-channel mean and biased variance over N, H, W: batch norm in train mode.

    mean[c] = sum_m x[m, c] / M,   var[c] = sum_m (x[m, c] - mean[c])^2 / M,   M = N*H*W

x: NHWC with a pixel stride; mean, var: fp32 (C,).

Work, in two launches without atomics, so that the result does not depend on the order in which programs run:
1. Program (i, j) walks chunk i of the pixels for channel block j. Each of its BLOCK_M x BLOCK_N lanes runs Welford's
   update (mean += (x - mean) / n; m2 += (x - old mean) * (x - new mean)) in registers, on values from which the
   channel's first one was taken, so that a mean much larger than the deviation costs no digits. The lanes of a
   channel are then merged (Chan et al.): m2 = sum m2_i + sum n_i (mean_i - mean)^2. Written: one (mean, m2) per chunk
   and channel.
2. One program per few channels merges the chunks in the same way.

Floor. One read of x, about 6 FLOPs a value: bound by memory.
"""

import torch
import triton
import triton.language as tl

from ._common import Launch, alignment, block_indices, ceil_div, is_wide, kernel, pixel_count, pixel_stride
from ._elementwise import blocks, extent
from .configs import device_facts

_MOST_CHUNKS = 512  # stage 2 holds this many partial results for each channel in registers
_MERGE_BLOCK = 8


@triton.jit
def merge(mean, m2, count):
    """Statistics of the union of the samples along axis 0: (mean, m2) from each one's mean, m2 and size."""
    total = tl.sum(count, axis=0)
    united = tl.sum(mean * count, axis=0) / total
    deviation = mean - united[None, :]
    return united, tl.sum(m2 + count * deviation * deviation, axis=0)


@triton.jit
def channel_origin(input_ptr, c, c_mask):
    """Each channel's first value, from which all its values are measured; 0 where it is not finite."""
    first = tl.load(input_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
    return tl.where(tl.abs(first) < float("inf"), first, 0.0)


@kernel
def chunk_statistics_kernel(
    mean_ptr, m2_ptr, input_ptr, rows, channels, input_ld, tiles_per_chunk,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stage 1: (chunks, channels) means, relative to the origin, and m2. `channels`, `input_ld` in units of ALIGN."""
    channels = channels * ALIGN
    chunk = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_mask = c < channels
    origin = channel_origin(input_ptr, c, c_mask)[None, :]
    mean = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    count = tl.zeros((BLOCK_M, 1), dtype=tl.float32)
    for tile in range(chunk * tiles_per_chunk, (chunk + 1) * tiles_per_chunk):
        row = block_indices(tile, BLOCK_M, WIDE)[:, None]
        valid = row < rows
        x = tl.load(input_ptr + row * (input_ld * ALIGN) + c[None, :], mask=valid & c_mask[None, :], other=0.0)
        x = x.to(tl.float32) - origin
        count += tl.where(valid, 1.0, 0.0)
        delta = tl.where(valid, x - mean, 0.0)
        mean += delta * (1.0 / tl.maximum(count, 1.0))
        m2 += delta * (x - mean)
    mean, m2 = merge(mean, m2, count)
    place = chunk.to(tl.int64) * channels + c
    tl.store(mean_ptr + place, mean, mask=c_mask)
    tl.store(m2_ptr + place, m2, mask=c_mask)


@kernel
def merge_statistics_kernel(
    out_mean_ptr, out_var_ptr, mean_ptr, m2_ptr, input_ptr, rows, channels, chunks, rows_per_chunk,
    CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stage 2: a column of partial results per channel. CHUNKS is a power of two, at least `chunks`."""
    chunk = tl.arange(0, CHUNKS)[:, None]
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_mask = c < channels
    mask = (chunk < chunks) & c_mask[None, :]
    place = chunk.to(tl.int64) * channels + c[None, :]
    before = chunk.to(tl.int64) * rows_per_chunk
    count = tl.minimum(tl.maximum(rows - before, 0), rows_per_chunk).to(tl.float32)
    mean = tl.load(mean_ptr + place, mask=mask, other=0.0)
    mean, m2 = merge(mean, tl.load(m2_ptr + place, mask=mask, other=0.0), count)
    tl.store(out_mean_ptr + c, mean + channel_origin(input_ptr, c, c_mask), mask=c_mask)
    tl.store(out_var_ptr + c, m2 / rows, mask=c_mask)


def batch_statistics(mean: torch.Tensor, var: torch.Tensor, input: torch.Tensor) -> None:
    """Fills `mean` and `var`; arguments as in the kernel contract."""
    for launch in plan_batch_statistics(mean, var, input):
        launch.run()


def plan_batch_statistics(mean: torch.Tensor, var: torch.Tensor, input: torch.Tensor) -> tuple[Launch, Launch]:
    """The two launches, in order. Partial results live in two (chunks, C) fp32 tensors allocated here."""
    rows, channels, ld = pixel_count(input), input.shape[1], pixel_stride(input)
    align = alignment(channels, ld)
    block_m, block_n = blocks(rows, channels, tile=2048, most_columns=64)
    tiles, columns = ceil_div(rows, block_m), ceil_div(channels, block_n)
    # Four programs a multiprocessor, each with at least four tiles to walk.
    _, multiprocessors = device_facts(input.device)
    wanted = min(max(1, 4 * multiprocessors // columns), ceil_div(tiles, 4), _MOST_CHUNKS)
    tiles_per_chunk = ceil_div(tiles, wanted)
    chunks = ceil_div(tiles, tiles_per_chunk)
    partial_mean, partial_m2 = torch.empty((2, chunks, channels), dtype=torch.float32, device=input.device)
    first = dict(
        mean_ptr=partial_mean, m2_ptr=partial_m2, input_ptr=input, rows=rows, channels=channels // align,
        input_ld=ld // align, tiles_per_chunk=tiles_per_chunk, ALIGN=align, WIDE=is_wide(extent(input)),
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    second = dict(
        out_mean_ptr=mean, out_var_ptr=var, mean_ptr=partial_mean, m2_ptr=partial_m2, input_ptr=input,
        rows=rows, channels=channels,
        chunks=chunks, rows_per_chunk=tiles_per_chunk * block_m,
        CHUNKS=triton.next_power_of_2(chunks), BLOCK_N=_MERGE_BLOCK,
    )  # fmt: skip
    return (
        Launch(chunk_statistics_kernel, (chunks, columns), first, num_stages=3),
        Launch(merge_statistics_kernel, (ceil_div(channels, _MERGE_BLOCK),), second, num_stages=1),
    )
