"""Tiling of the element-wise operators: NHWC tensors as matrices of pixels x channels, or as one long row.

Tensors whose pixels all adjoin (pixel stride = C) need no pixel index: they are one row of N*H*W*C values, moved 16
bytes at a time whatever C is. Slices of wider tensors keep their rows: a program then takes BLOCK_M pixels x BLOCK_N
channels.
"""

import torch

from ._common import ceil_div, next_power_of_two, pixel_count, pixel_stride

TILE = 4096  # elements a program handles: 8 vectors of 16 bytes for each of 128 threads at 2 bytes an element


def is_dense(*tensors: torch.Tensor | None) -> bool:
    return all(tensor is None or pixel_stride(tensor) == tensor.shape[1] for tensor in tensors)


def extent(*tensors: torch.Tensor | None) -> int:
    """The span in elements of the widest tensor."""
    return max(pixel_count(tensor) * pixel_stride(tensor) for tensor in tensors if tensor is not None)


def blocks(rows: int, columns: int, tile: int = TILE, most_columns: int = 256) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N): whole pixels where they fit, and as many of them as fill the tile."""
    block_n = min(most_columns, next_power_of_two(columns))
    block_m = min(tile // block_n, next_power_of_two(rows))
    return block_m, block_n


def grid(rows: int, columns: int, block_m: int, block_n: int) -> tuple[int, int]:
    return ceil_div(rows, block_m), ceil_div(columns, block_n)
