"""2-D convolution with prologue and epilogue: chooses one of five kernels and its tile.

    y = act(conv(pro(x), w) * scale[k] + bias[k] + residual),  pro(x) = input_act(x * input_scale[c] + input_shift[c]),
    zero padding added after pro

| kernel          | takes                                          | products done for each one needed            |
|-----------------|------------------------------------------------|----------------------------------------------|
| `pointwise`     | 1x1, no padding, any stride; C/g >= 16 or g=1  | 1                                            |
| `implicit_gemm` | any filter, C/g >= 16                          | 1                                            |
| `stem`          | any filter, C/g < 16; one group or K/g >= 16   | round_up(R*S*C/g, BLOCK_K) / (R*S*C/g)       |
| `packed_groups` | any filter, C/g < 16 and K/g < 16, groups > 1  | 16 * BLOCK_N / (PACK * C/g * K/g)            |
| `depthwise`     | any filter, C/g = 1 and K/g < 16               | 1 (on the vector units)                      |

PACK = 16 // (C/g) groups share a dot. Edge tiles and channel counts that a block does not divide come on top.

Weights are (K, C/g, R, S) tensors; kernels read them as (K, R, S, C/g) or, depthwise, (R, S, K): see `prepare_weight`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ._common import (
    Launch,
    alignment,
    ceil_div,
    conv_precision,
    is_wide,
    next_power_of_two,
    pixel_count,
    pixel_stride,
    round_to_tf32,
    unroll_factor,
)  # fmt: skip
from .configs import Problem, Tile, candidates, device_facts, pick_tile
from .conv2d_depthwise import depthwise_kernel
from .conv2d_implicit_gemm import implicit_gemm_kernel
from .conv2d_packed_groups import packed_groups_kernel
from .conv2d_pointwise import pointwise_kernel
from .conv2d_stem import stem_kernel

_MIN_DOT = 16  # the least rows, columns and depth of tl.dot


@dataclass(frozen=True)
class Geometry:
    """The sizes of one convolution; C and K are per group."""

    N: int
    H: int
    W: int
    P: int
    Q: int
    R: int
    S: int
    C: int
    K: int
    groups: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def rows(self) -> int:
        return self.N * self.P * self.Q

    @property
    def kernel_name(self) -> str:
        """Which of the kernels in the table above computes it."""
        few_channels, few_filters = self.C < _MIN_DOT, self.K < _MIN_DOT
        if _is_depthwise(self.C, self.K):
            return "depthwise"
        if self._reads_one_pixel_inside and (not few_channels or self.groups == 1):
            return "pointwise"
        if not few_channels:
            return "implicit_gemm"
        return "packed_groups" if self.groups > 1 and few_filters else "stem"

    @property
    def _reads_one_pixel_inside(self) -> bool:
        last = (self.P - 1) * self.stride[0], (self.Q - 1) * self.stride[1]
        return self.R == self.S == 1 and self.padding == (0, 0) and last[0] < self.H and last[1] < self.W

    @property
    def problem(self) -> Problem:
        """The matrix product that the tile is chosen for."""
        if self.kernel_name == "stem":
            return Problem(self.rows, self.K, 1, self.R * self.S * self.C, self.groups, gathers=True)
        return Problem(self.rows, self.K, self.R * self.S, self.C, self.groups)


def prepare_weight(weight: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """(K, C/g, R, S) as the kernels read it: shape (K, R, S, C/g), contiguous, or for the depthwise kernel K fastest.

    A view of the same memory when `is_prepared`. For TF32 products the values are rounded to it as well.
    """
    if _is_depthwise(weight.shape[1], weight.shape[0] // groups):
        return weight.detach().permute(2, 3, 1, 0).contiguous().permute(3, 0, 1, 2)
    prepared = weight.detach().permute(0, 2, 3, 1).contiguous()
    return round_to_tf32(prepared) if _rounds(weight) else prepared


def is_prepared(weight: torch.Tensor, groups: int = 1) -> bool:
    """Whether the weight lies in memory as the kernels read it already: channels-last or 1x1, and nothing to round."""
    depthwise = _is_depthwise(weight.shape[1], weight.shape[0] // groups)
    return not depthwise and not _rounds(weight) and weight.permute(0, 2, 3, 1).is_contiguous()


def _rounds(weight: torch.Tensor) -> bool:
    """Whether the weight is multiplied in TF32."""
    return conv_precision(weight.dtype) == "tf32"


def _is_depthwise(channels: int, filters: int) -> bool:
    """Whether a group of these sizes is better off on the vector units."""
    return channels == 1 and filters < _MIN_DOT


def conv2d(
    out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor,
    scale: torch.Tensor | None = None, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None, input_shift: torch.Tensor | None = None, input_relu: bool = False,
    activation: str = "none", stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1), groups: int = 1,
    *, prepared_weight: torch.Tensor | None = None, config: Tile | None = None,
) -> None:  # fmt: skip
    """Fills `out`; arguments as in the kernel contract. `prepared_weight` saves a copy; `config` forces a tile."""
    prepared = prepare_weight(weight, groups) if prepared_weight is None else prepared_weight
    plan_conv2d(
        out, input, prepared, scale, bias, residual, input_scale, input_shift, input_relu, activation,
        stride, padding, dilation, groups, config=config,
    ).run()  # fmt: skip


def conv2d_configs(
    out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0), dilation: tuple[int, int] = (1, 1), groups: int = 1,
) -> tuple[Tile, ...]:  # fmt: skip
    """The tiles worth timing for this convolution (each valid for `config=`), the static choice first."""
    geometry = _geometry(out, input, (weight.shape[2], weight.shape[3]), stride, padding, dilation, groups)
    capability, _ = device_facts(input.device)
    chosen = _static_tile(geometry, input, capability)
    if geometry.kernel_name == "depthwise":
        others = tuple(replace(chosen, block_m=block_m) for block_m in (16, 32, 64))
    elif geometry.kernel_name == "packed_groups":
        others = tuple(replace(chosen, block_m=block_m) for block_m in (64, 128, 256))
    else:
        others = candidates(geometry.problem, capability, input.dtype, conv_precision(input.dtype))
    return tuple(dict.fromkeys((chosen, *others)))


def kernel_name(
    out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], groups: int,
) -> str:  # fmt: skip
    """Which of the kernels in the table above serves the convolution."""
    return _geometry(out, input, tuple(weight.shape[2:]), stride, padding, dilation, groups).kernel_name


def plan_conv2d(
    out: torch.Tensor, input: torch.Tensor, prepared: torch.Tensor,
    scale: torch.Tensor | None, bias: torch.Tensor | None, residual: torch.Tensor | None,
    input_scale: torch.Tensor | None, input_shift: torch.Tensor | None, input_relu: bool, activation: str,
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int,
    *, config: Tile | None = None, capability: int | None = None,
) -> Launch:  # fmt: skip
    """The launch that computes it; `prepared` as by `prepare_weight`. `capability` plans for a GPU that is not here."""
    geometry = _geometry(out, input, tuple(prepared.shape[1:3]), stride, padding, dilation, groups)
    tile = config or _static_tile(geometry, input, capability)
    arguments: dict[str, Any] = dict(
        out_ptr=out, input_ptr=input, weight_ptr=prepared, scale_ptr=scale, bias_ptr=bias, residual_ptr=residual,
        input_scale_ptr=input_scale, input_shift_ptr=input_shift,
        rows=geometry.rows, height=geometry.H, width=geometry.W, out_height=geometry.P, out_width=geometry.Q,
        stride_h=stride[0], stride_w=stride[1],
        HAS_PROLOGUE=input_scale is not None or input_shift is not None or input_relu,
        INPUT_RELU=bool(input_relu), RELU=activation == "relu", WIDE=_is_wide(out, input, prepared, residual),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
    )  # fmt: skip
    if geometry.kernel_name != "pointwise":
        arguments |= dict(
            pad_top=padding[0], pad_left=padding[1], dilation_h=dilation[0], dilation_w=dilation[1],
            R=geometry.R, S=geometry.S,
        )  # fmt: skip
    if geometry.kernel_name != "depthwise":
        arguments |= dict(PRECISION=conv_precision(input.dtype), BLOCK_K=tile.block_k)
    finish = {
        "pointwise": _plan_dense, "implicit_gemm": _plan_dense, "stem": _plan_stem,
        "packed_groups": _plan_packed_groups, "depthwise": _plan_depthwise,
    }[geometry.kernel_name]  # fmt: skip
    return finish(geometry, tile, arguments)


def _plan_dense(geometry: Geometry, tile: Tile, arguments: dict[str, Any]) -> Launch:
    arguments |= _aligned_input(arguments, channels=geometry.C) | _aligned_output(arguments, filters=geometry.K)
    arguments["GROUP_M"] = tile.group_m
    kernel = implicit_gemm_kernel
    if geometry.kernel_name == "pointwise":
        kernel = pointwise_kernel
        arguments["STRIDED"] = (geometry.P, geometry.Q) != (geometry.H, geometry.W)
    return Launch(kernel, _tile_grid(geometry, tile), arguments, tile.num_warps, tile.num_stages)


def _plan_stem(geometry: Geometry, tile: Tile, arguments: dict[str, Any]) -> Launch:
    arguments |= _aligned_output(arguments, filters=geometry.K)
    arguments |= dict(input_ld=pixel_stride(arguments["input_ptr"]), C=geometry.C, GROUP_M=tile.group_m)
    return Launch(stem_kernel, _tile_grid(geometry, tile), arguments, tile.num_warps, tile.num_stages)


def _plan_packed_groups(geometry: Geometry, tile: Tile, arguments: dict[str, Any]) -> Launch:
    pack = _MIN_DOT // geometry.C
    arguments |= _aligned_input(arguments, channels=geometry.C * geometry.groups, also=pack * geometry.C)
    arguments |= _aligned_output(arguments, filters=geometry.K * geometry.groups)
    arguments |= dict(C=geometry.C, K=geometry.K, PACK=pack)
    grid = (ceil_div(geometry.rows, tile.block_m), ceil_div(geometry.groups, pack))
    return Launch(packed_groups_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def _plan_depthwise(geometry: Geometry, tile: Tile, arguments: dict[str, Any]) -> Launch:
    filters = geometry.K * geometry.groups
    arguments |= _aligned_input(arguments, channels=geometry.groups) | _aligned_output(arguments, filters=filters)
    del arguments["channels"]
    arguments |= dict(MULTIPLIER=geometry.K, UNROLL=unroll_factor(geometry.R * geometry.S))
    grid = (ceil_div(geometry.rows, tile.block_m), ceil_div(filters, tile.block_n))
    return Launch(depthwise_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def _aligned_input(arguments: dict[str, Any], channels: int, also: int = 0) -> dict[str, int]:
    ld = pixel_stride(arguments["input_ptr"])
    align = alignment(ld, channels, also)
    return dict(input_ld=ld // align, channels=channels // align, IN_ALIGN=align)


def _aligned_output(arguments: dict[str, Any], filters: int) -> dict[str, int]:
    residual = arguments["residual_ptr"]
    out_ld = pixel_stride(arguments["out_ptr"])
    residual_ld = 0 if residual is None else pixel_stride(residual)
    align = alignment(out_ld, residual_ld, filters)
    return dict(out_ld=out_ld // align, residual_ld=residual_ld // align, filters=filters // align, OUT_ALIGN=align)


def _tile_grid(geometry: Geometry, tile: Tile) -> tuple[int, int]:
    return ceil_div(geometry.rows, tile.block_m) * ceil_div(geometry.K, tile.block_n), geometry.groups


def _static_tile(geometry: Geometry, input: torch.Tensor, capability: int | None) -> Tile:
    own_capability, multiprocessors = device_facts(input.device)
    if geometry.kernel_name == "depthwise":
        filters = geometry.K * geometry.groups
        block_n = min(64, next_power_of_two(filters))
        return Tile(max(16, 1024 // block_n), block_n, 1, 4, 1)
    if geometry.kernel_name == "packed_groups":
        block_n = max(_MIN_DOT, next_power_of_two(_MIN_DOT // geometry.C * geometry.K))
        return Tile(128 if block_n <= 32 else 64, block_n, _MIN_DOT, 4, 3)
    precision = conv_precision(input.dtype)
    return pick_tile(geometry.problem, capability or own_capability, multiprocessors, input.dtype, precision)


def _geometry(
    out: torch.Tensor, input: torch.Tensor, filter_size: tuple[int, ...], stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], groups: int,
) -> Geometry:  # fmt: skip
    n, c, h, w = input.shape
    _, k, p, q = out.shape
    return Geometry(
        n, h, w, p, q, filter_size[0], filter_size[1], c // groups, k // groups, groups,
        tuple(stride), tuple(padding), tuple(dilation),
    )  # fmt: skip


def _is_wide(out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> bool:
    activations = [tensor for tensor in (out, input, residual) if tensor is not None]
    return is_wide(weight.numel(), *(pixel_count(tensor) * pixel_stride(tensor) for tensor in activations))
