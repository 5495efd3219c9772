"""Linear layer: y[m, k] = act(sum_c x[m, c] * w[k, c] + bias[k]), as a 1x1 convolution over a 1-pixel-high image.

x: (M, C), y: (M, K) with row strides; w: (K, C), rows adjacent. Same kernel as a stride-1 1x1 convolution; see
conv2d_pointwise.py for how the work is split and its floor. With few rows (a classifier at inference) the weight is
the traffic: 2*M FLOPs per weight element, bound by memory below about 150 rows on an H100; narrow tiles (16, 32
columns) then spread the weight over all multiprocessors.

For TF32 products the weight is rounded to TF32 beforehand, as for convolutions: see `prepare_weight`.
"""

import torch

from ._common import Launch, alignment, ceil_div, is_wide, matmul_precision, round_to_tf32, row_stride
from .configs import Problem, Tile, candidates, device_facts, pick_tile
from .conv2d_pointwise import pointwise_kernel


def prepare_weight(weight: torch.Tensor) -> torch.Tensor:
    """The weight as the kernel reads it: itself, or for TF32 products a copy rounded to TF32."""
    return weight.detach() if is_prepared(weight) else round_to_tf32(weight.detach().contiguous())


def is_prepared(weight: torch.Tensor) -> bool:
    return matmul_precision(weight.dtype) != "tf32"


def linear(
    out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
    activation: str = "none", *, prepared_weight: torch.Tensor | None = None, config: Tile | None = None,
) -> None:  # fmt: skip
    """Fills `out`; arguments as in the kernel contract. `prepared_weight` saves a copy; `config` forces a tile."""
    prepared = prepare_weight(weight) if prepared_weight is None else prepared_weight
    plan_linear(out, input, prepared, bias, activation, config=config).run()


def linear_configs(out: torch.Tensor, input: torch.Tensor) -> tuple[Tile, ...]:
    """The tiles worth timing for this layer."""
    capability, _ = device_facts(input.device)
    return candidates(_problem(out, input), capability, input.dtype, matmul_precision(input.dtype))


def plan_linear(
    out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str,
    *, config: Tile | None = None, capability: int | None = None,
) -> Launch:  # fmt: skip
    own_capability, multiprocessors = device_facts(input.device)
    precision = matmul_precision(input.dtype)
    problem = _problem(out, input)
    tile = config or pick_tile(problem, capability or own_capability, multiprocessors, input.dtype, precision)
    weight = weight if row_stride(weight) == problem.depth else weight.contiguous()
    rows, input_ld, out_ld = problem.m, row_stride(input), row_stride(out)
    in_align, out_align = alignment(input_ld, problem.depth), alignment(out_ld, problem.n)
    arguments = dict(
        out_ptr=out, input_ptr=input, weight_ptr=weight, scale_ptr=None, bias_ptr=bias, residual_ptr=None,
        input_scale_ptr=None, input_shift_ptr=None,
        rows=rows, channels=problem.depth // in_align, filters=problem.n // out_align,
        height=1, width=rows, out_height=1, out_width=rows, stride_h=1, stride_w=1,
        input_ld=input_ld // in_align, out_ld=out_ld // out_align, residual_ld=0,
        IN_ALIGN=in_align, OUT_ALIGN=out_align, STRIDED=False, HAS_PROLOGUE=False, INPUT_RELU=False,
        RELU=activation == "relu", PRECISION=precision,
        WIDE=is_wide(rows * input_ld, rows * out_ld, weight.numel()),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
    )  # fmt: skip
    grid = (ceil_div(rows, tile.block_m) * ceil_div(problem.n, tile.block_n), 1)
    return Launch(pointwise_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def _problem(out: torch.Tensor, input: torch.Tensor) -> Problem:
    return Problem(m=input.shape[0], n=out.shape[1], taps=1, depth=input.shape[1])
