"""The CUDA C++ backend (csrc/cuda), present when the package was built with CUDA."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastcnn import _native
from fastcnn.backends.derived import derived_for_streams
from fastcnn.triton_kernels.precision import convolutions_use_tf32, matrix_products_use_tf32

Pair = tuple[int, int]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=1)
def unavailable() -> str | None:
    info = _native.build_info()
    if not info["cuda"]:
        return f"built without CUDA kernels ({info['cuda_reason']})"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if not any(_runs_on(arch, capability) for arch in _native.cuda_architectures()):
        built = ", ".join(_native.cuda_architectures())
        return f"built for architectures {built}, the GPU is {capability[0]}{capability[1]}"
    return None


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on its own major version, from its minor version on; "a" code on exactly its own."""
    specific = architecture.endswith("a")
    number = int(architecture.rstrip("a"))
    major, minor = divmod(number, 10)
    if specific:
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def unsupported(operator: str, device: torch.device, dtype: torch.dtype, **facts: object) -> str | None:
    if device.type != "cuda":
        return f"device {device.type}"
    if dtype not in DTYPES:
        return f"dtype {dtype}"
    reason = unavailable()
    if reason is None and operator == "conv2d_max_pool2d":
        reason = no_stem_pool(device, dtype, **facts)  # type: ignore[arg-type]
    return reason


def no_stem_pool(
    device: torch.device,
    dtype: torch.dtype,
    *,
    weight: Sequence[int],
    stride: Pair,
    dilation: Pair,
    groups: int,
    pooling: tuple[Pair, Pair, Pair, Pair],
    dense: bool = True,
    aligned: bool = True,
) -> str | None:
    """Why csrc/cuda/conv2d_stem_pool.cu does not serve a convolution with max pooling."""
    if dtype.itemsize != 2:
        return f"dtype {dtype}"
    if torch.cuda.get_device_capability(device) != (9, 0) or "90a" not in _native.cuda_architectures():
        return "no wgmma"
    filters, channels, height, width = weight
    if groups != 1 or tuple(dilation) != (1, 1) or channels > 4 or not dense:
        return "a convolution with groups, dilation, more than 4 input channels or something between pixels"
    if max(height, width) > 11 or max(stride) > 4:
        return "filters above 11x11, or strides above 4"
    if filters <= 32 or filters % 8 != 0 or not aligned:
        return "too few filters, or no whole vectors of them"
    kernel, pool_stride, padding, pool_dilation = pooling
    if (kernel, pool_stride, pool_dilation) != ((3, 3), (2, 2), (1, 1)) or max(padding) > 1:
        return "windows other than 3x3 with stride 2"
    return None


def _krsc(weight: Tensor) -> Tensor:
    """The weight in (K, R, S, C/groups) order with exactly those strides (size-1 dimensions too)."""
    return weight.detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


_BLOCK = 64  # channels and filters of a group that the Hopper kernel multiplies


def _packs_groups(weight: Tensor, groups: int) -> bool:
    """Whether groups of few channels are better multiplied as groups of 64, whose weights between groups are zero."""
    channels = weight.shape[1]
    return (
        groups > 1
        and weight.dtype in (torch.bfloat16, torch.float16)
        and 4 <= channels < _BLOCK  # from a sixteenth of the products on they are useful
        and weight.shape[0] == channels * groups
        and _BLOCK % channels == 0
        and weight.shape[0] % _BLOCK == 0
        and torch.cuda.get_device_capability(weight.device) == (9, 0)
        and "90a" in _native.cuda_architectures()
    )


def _pack_groups(weight: Tensor) -> Tensor:
    """(K, C/g, R, S) as (K, 64, R, S): a filter's own channels in their place among the block's 64, zeros elsewhere."""
    filters, channels, height, width = weight.shape
    per_block = _BLOCK // channels
    packed = weight.new_zeros(filters // _BLOCK, per_block, channels, height, width, per_block, channels)
    groups = weight.detach().reshape(-1, per_block, channels, channels, height, width)
    for group in range(per_block):
        packed[:, group, :, :, :, group] = groups[:, group].permute(0, 1, 3, 4, 2)
    return packed.reshape(filters, height, width, _BLOCK).permute(0, 3, 1, 2)


def _prepared(weight: Tensor, groups: int, kernel: str = "") -> tuple[Tensor, int]:
    """The weight as a kernel reads it, and its number of groups."""
    if kernel != "grouped" and _packs_groups(weight, groups):
        return derived_for_streams(weight, "packed groups", _pack_groups), weight.shape[0] // _BLOCK
    return _packed(weight), groups


def _kernels(*args: Any) -> list[str]:
    """The kernels that could serve a conv2d call, the one that csrc/cuda chooses by its rule first."""
    out, input, weight, _, _, residual, input_scale, input_shift, input_relu = args[:9]
    stride, padding, dilation, groups = args[10:]
    prologue = input_scale is not None or input_shift is not None or input_relu
    weight, groups = _prepared(weight, groups)
    return _native.cuda_conv2d_kernels(
        out, input, weight, residual, prologue, stride, padding, dilation, groups, convolutions_use_tf32()
    )


def variants(operator: str, *args: Any) -> list[str]:
    """The kernels that could serve a call, besides the one that csrc/cuda chooses by its rule."""
    return _kernels(*args)[1:] if operator == "conv2d" else []


def variant(kernel: str) -> ModuleType:
    """This backend with one of :func:`variants` forced on conv2d."""
    return _OneKernel(kernel)  # type: ignore[return-value]


class _OneKernel:
    def __init__(self, kernel: str) -> None:
        self.conv2d = functools.partial(conv2d, kernel=kernel)
        self._kernel = kernel

    def kernel_name(self, operator: str, *args: Any) -> str:
        return f"{operator} {self._kernel}"

    def unsupported(self, operator: str, device: torch.device, dtype: torch.dtype, **facts: object) -> str | None:
        return unsupported(operator, device, dtype, **facts) if operator == "conv2d" else f"no variant of {operator}"


def conv2d(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_relu: bool,
    activation: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kernel: str = "",
) -> None:
    weight, groups = _prepared(weight, groups, kernel)
    _native.cuda_conv2d(
        out, input, weight, scale, bias, residual, input_scale, input_shift, input_relu,
        activation == "relu", stride, padding, dilation, groups,
        input.dtype == torch.float32 and convolutions_use_tf32(), kernel,
    )  # fmt: skip


def conv2d_max_pool2d(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    *pooling: Pair,
) -> None:
    weight = derived_for_streams(weight, "krsc", _krsc)
    _native.cuda_conv2d_max_pool2d(
        out, input, weight, scale, bias, activation == "relu", stride, padding, dilation, groups, *pooling
    )


def conv2d_1x1_pair(
    wide: Tensor,
    narrow: Tensor,
    input: Tensor,
    residual: Tensor,
    expand_weight: Tensor,
    expand_scale: Tensor | None,
    expand_bias: Tensor | None,
    reduce_weight: Tensor,
    reduce_scale: Tensor | None,
    reduce_bias: Tensor | None,
) -> None:
    """``wide = relu(conv(input, expand) + residual)`` and ``narrow = relu(conv(wide, reduce))``, 1x1, in one kernel.

    No function of the kernel contract: it has two outputs. What it serves, :func:`conv2d_1x1_pair_unsupported` says.
    """
    _native.cuda_conv2d_1x1_pair(
        wide, narrow, input, residual, _packed(expand_weight), expand_scale, expand_bias, _packed(reduce_weight),
        reduce_scale, reduce_bias,
    )  # fmt: skip


def conv2d_1x1_pair_unsupported(
    wide: Tensor,
    narrow: Tensor,
    input: Tensor,
    residual: Tensor,
    expand_weight: Tensor,
    expand_scale: Tensor | None,
    expand_bias: Tensor | None,
    reduce_weight: Tensor,
    reduce_scale: Tensor | None,
    reduce_bias: Tensor | None,
) -> str | None:
    """Why :func:`conv2d_1x1_pair` cannot serve these arguments, or None when it can."""
    reason = unsupported("conv2d_1x1_pair", input.device, input.dtype)
    if reason is not None:
        return reason
    return (
        _native.cuda_conv2d_1x1_pair_unsupported(
            wide, narrow, input, residual, _packed(expand_weight), expand_scale, expand_bias, _packed(reduce_weight),
            reduce_scale, reduce_bias,
        )
        or None
    )  # fmt: skip


def conv2d_1x1_pair_weights(device: torch.device, dtype: torch.dtype, channels: tuple[int, int, int]) -> str:
    """Where the kernel would have weights for so many channels of input, wide and narrow: "resident" in shared memory,
    "streamed" from L2, or "" where it cannot serve them.
    """
    if dtype.itemsize != 2 or unsupported("conv2d_1x1_pair", device, dtype) is not None:
        return ""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _native.cuda_conv2d_1x1_pair_weights(*channels, index)


def _packed(weight: Tensor) -> Tensor:
    return derived_for_streams(weight, "krsc", _krsc)


def kernel_name(operator: str, *args: Any) -> str:
    """Which kernel serves a call of the contract."""
    return f"conv2d {_kernels(*args)[0]}" if operator == "conv2d" else operator


def linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    _native.cuda_linear(out, input, weight.detach(), bias, activation == "relu", matrix_products_use_tf32())


def channel_affine(
    out: Tensor, input: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, activation: str,
    centre: Tensor | None = None,
) -> None:  # fmt: skip
    _native.cuda_channel_affine(out, input, scale, shift, centre, residual, activation == "relu")


def batch_statistics(mean: Tensor, var: Tensor, input: Tensor) -> None:
    floats = (_native.cuda_batch_statistics_workspace(input) + 3) // 4
    workspace = torch.empty(floats, dtype=torch.float32, device=input.device)
    _native.cuda_batch_statistics(mean, var, input, workspace)


def max_pool2d(out: Tensor, input: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> None:
    _native.cuda_max_pool2d(out, input, kernel, stride, padding, dilation)


def avg_pool2d(
    out: Tensor, input: Tensor, kernel: Pair, stride: Pair, padding: Pair, padding_end: Pair, count_include_pad: bool,
    divisor: int,
) -> None:  # fmt: skip
    _native.cuda_avg_pool2d(out, input, kernel, stride, padding, padding_end, count_include_pad, divisor)


def adaptive_avg_pool2d(out: Tensor, input: Tensor) -> None:
    _native.cuda_adaptive_avg_pool2d(out, input)


def local_response_norm(out: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float) -> None:
    _native.cuda_local_response_norm(out, input, size, alpha, beta, k)


def residual_add(out: Tensor, input: Tensor, residual: Tensor, scale: float, activation: str) -> None:
    _native.cuda_residual_add(out, input, residual, scale, activation == "relu")
