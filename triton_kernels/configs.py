"""Tile configurations per GPU generation: the candidates a tuner may try, and a static choice that needs no GPU.

The tables below are meant to be read. `share` is the fraction of the tensor-core (or, for ieee, FMA) rate that an SM
full of such tiles is expected to reach; it ranks tiles when tuning has not run. The shares are estimates from
arithmetic intensity (a tile of bm x bn moves bm + bn operand values for bm * bn products), not measurements.

`pick_tile` is deterministic: same shape, dtype and generation, same tile.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ._common import ceil_div, next_power_of_two


@dataclass(frozen=True)
class Tile:
    """A program computes block_m output pixels x block_n output channels, block_k products at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    share: float = 0.5
    group_m: int = 8

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages}"


@dataclass(frozen=True)
class Generation:
    """What the choice of a tile depends on. Shared memory is what one program may use, in bytes."""

    capability: int
    multiprocessors: int
    shared_memory: int


GENERATIONS = {
    90: Generation(90, 132, 227 * 1024),  # H100, H200
    80: Generation(80, 108, 163 * 1024),  # A100
    86: Generation(86, 84, 99 * 1024),  # GA10x, Ada (8.9), and everything not listed
}

# Products of 16-bit values: fp16, bf16. sm_90: wgmma wants 4 or 8 warps and block_m >= 64.
_HALF = {
    #        bm   bn   bk  warps stages share
    90: (
        Tile(128, 256, 64, 8, 3, 1.00),
        Tile(128, 128, 64, 8, 4, 0.85),
        Tile(128, 64, 64, 4, 4, 0.65),
        Tile(64, 128, 64, 4, 4, 0.65),
        Tile(64, 64, 64, 4, 4, 0.50),
        Tile(128, 32, 64, 4, 4, 0.40),
        Tile(64, 32, 64, 4, 5, 0.30),
        Tile(64, 16, 64, 4, 5, 0.16),
    ),
    80: (
        Tile(128, 256, 32, 8, 3, 1.00),
        Tile(128, 128, 32, 8, 4, 0.90),
        Tile(128, 64, 32, 4, 4, 0.75),
        Tile(64, 128, 32, 4, 4, 0.75),
        Tile(64, 64, 64, 4, 3, 0.60),
        Tile(128, 32, 32, 4, 4, 0.45),
        Tile(64, 32, 64, 4, 4, 0.35),
        Tile(32, 32, 64, 4, 4, 0.22),
        Tile(64, 16, 64, 4, 4, 0.18),
    ),
    86: (
        Tile(128, 128, 32, 4, 3, 0.95),
        Tile(128, 64, 32, 4, 3, 0.80),
        Tile(64, 128, 32, 4, 3, 0.80),
        Tile(64, 64, 32, 4, 4, 0.65),
        Tile(128, 32, 32, 4, 3, 0.45),
        Tile(64, 32, 32, 4, 4, 0.35),
        Tile(32, 32, 32, 4, 4, 0.22),
        Tile(64, 16, 32, 4, 4, 0.18),
    ),
}

# fp32 through TF32 tensor cores: operands are twice as wide, so the reduction block is half as deep.
_TF32 = {
    90: (
        Tile(128, 128, 32, 8, 4, 1.00),
        Tile(128, 64, 32, 4, 4, 0.75),
        Tile(64, 128, 32, 4, 4, 0.75),
        Tile(64, 64, 32, 4, 4, 0.60),
        Tile(128, 32, 32, 4, 4, 0.45),
        Tile(64, 32, 32, 4, 5, 0.35),
        Tile(64, 16, 32, 4, 5, 0.20),
    ),
    80: (
        Tile(128, 128, 16, 8, 4, 1.00),
        Tile(128, 64, 32, 4, 3, 0.80),
        Tile(64, 128, 32, 4, 3, 0.80),
        Tile(64, 64, 32, 4, 4, 0.65),
        Tile(128, 32, 32, 4, 4, 0.45),
        Tile(64, 32, 32, 4, 4, 0.35),
        Tile(64, 16, 32, 4, 4, 0.20),
    ),
    86: (
        Tile(128, 64, 16, 4, 3, 0.90),
        Tile(64, 64, 32, 4, 3, 0.75),
        Tile(128, 32, 32, 4, 3, 0.50),
        Tile(64, 32, 32, 4, 3, 0.40),
        Tile(64, 16, 32, 4, 3, 0.22),
    ),
}

# fp32 in full precision: ordinary FMAs with the operands in registers, so tiles stay small.
_IEEE = (
    Tile(64, 64, 16, 8, 3, 1.00),
    Tile(64, 32, 16, 4, 3, 0.80),
    Tile(32, 32, 16, 4, 3, 0.55),
    Tile(64, 16, 16, 4, 3, 0.45),
)

# Stems: every gathered value needs an address and a bounds test, so a thread gathers at most 16 of them a step.
_STEM = (
    Tile(128, 64, 16, 8, 2, 0.50),
    Tile(64, 64, 32, 8, 2, 0.50),
    Tile(64, 64, 16, 4, 2, 0.45),
    Tile(128, 32, 16, 4, 2, 0.40),
    Tile(64, 32, 32, 4, 2, 0.35),
    Tile(64, 16, 32, 4, 2, 0.20),
)


def tiles(capability: int, dtype: torch.dtype, precision: str, gathers: bool = False) -> tuple[Tile, ...]:
    """The shipped tiles for matrix-product kernels, best for large problems first; `gathers`: for the stem kernel."""
    if dtype == torch.float32 and precision == "ieee":
        return _IEEE
    if gathers:
        return _STEM
    table = _TF32 if dtype == torch.float32 else _HALF
    return table[generation(capability).capability]


def generation(capability: int) -> Generation:
    """The nearest listed generation that does not promise more shared memory than the GPU has."""
    if capability in (80, 87):
        return GENERATIONS[80]
    # Datacentre Blackwell (10.x) has Hopper's shared memory; consumer Blackwell (12.x) has Ada's.
    return GENERATIONS[90] if 90 <= capability < 120 else GENERATIONS[86]


@lru_cache(maxsize=64)
def _device_facts(device_type: str, index: int | None) -> tuple[int, int]:
    if device_type != "cuda":
        return 90, GENERATIONS[90].multiprocessors  # interpreter mode: plan as for Hopper
    properties = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def device_facts(device: torch.device) -> tuple[int, int]:
    """(compute capability as major*10 + minor, number of multiprocessors)."""
    return _device_facts(device.type, device.index)


@dataclass(frozen=True)
class Problem:
    """A convolution as a batch of matrix products: per group (m x reduction) @ (reduction x n).

    The reduction is `taps` pieces of `depth` channels (R*S pieces of C/g; one piece of R*S*C/g for a stem).
    `gathers`: the stem kernel computes it, which needs registers for addresses as well.
    """

    m: int
    n: int
    taps: int
    depth: int
    groups: int = 1
    gathers: bool = False


# What a reduction block costs relative to 64: shallower blocks synchronise more often per product.
_DEPTH_PENALTY = {64: 1.0, 32: 1.05, 16: 1.2}


def fit(tile: Tile, problem: Problem) -> Tile:
    """The tile with its reduction block cut to the problem, so that less of a dot is padding."""
    depths = [depth for depth in _DEPTH_PENALTY if depth <= tile.block_k]
    block_k = min(depths, key=lambda depth: ceil_div(problem.depth, depth) * depth * _DEPTH_PENALTY[depth])
    return replace(tile, block_k=block_k)


def candidates(problem: Problem, capability: int, dtype: torch.dtype, precision: str) -> tuple[Tile, ...]:
    """Every shipped tile no wider than the problem, fitted, without duplicates: what a tuner should time."""
    widest = max(16, next_power_of_two(problem.n))
    shipped = tiles(capability, dtype, precision, problem.gathers)
    return tuple(dict.fromkeys(fit(tile, problem) for tile in shipped if tile.block_n <= widest))


@lru_cache(maxsize=4096)
def pick_tile(
    problem: Problem, capability: int, multiprocessors: int, dtype: torch.dtype, precision: str
) -> Tile:  # fmt: skip
    """The candidate with the smallest estimated time; the earlier one in the table when two are equal."""
    choices = candidates(problem, capability, dtype, precision)
    return min(choices, key=lambda tile: estimated_cost(tile, problem, multiprocessors))


def estimated_cost(tile: Tile, problem: Problem, multiprocessors: int) -> float:
    """Time in units of one multiply-accumulate at full rate on one SM: rounds of tiles times the cost of a tile."""
    count = ceil_div(problem.m, tile.block_m) * ceil_div(problem.n, tile.block_n) * problem.groups
    steps = problem.taps * ceil_div(problem.depth, tile.block_k)
    area = tile.block_m * tile.block_n
    # A step cannot be quicker than its synchronisation; filling the pipeline and storing the tile cost as well.
    step = max(area * tile.block_k / tile.share, 128 * 64 * 32)
    overhead = 4 * step + 48 * area
    return ceil_div(count, multiprocessors) * (steps * step + overhead)
