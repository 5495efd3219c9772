"""The Triton backend: `fastcnn.triton_kernels` behind the kernel contract (docs/internals.md).

Triton is imported when the first operator runs, so this module loads where Triton is not installed. CPU tensors are
served only by Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported): slow, for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastcnn.backends.derived import derived_for_streams

Pair = tuple[int, int]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = (
    "conv2d", "linear", "channel_affine", "batch_statistics", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d",
    "local_response_norm", "residual_add",
)  # fmt: skip
_OLDEST_CAPABILITY = (8, 0)  # bf16, TF32 and cp.async


@functools.lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why Triton kernels cannot run on this machine at all, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        common = _kernels("_common")
    except Exception as error:  # a broken installation of Triton may raise anything; the reason is handed on
        return f"triton cannot be imported: {error}"
    if common.is_interpreted() or torch.cuda.is_available():
        return None
    return "no CUDA device, and TRITON_INTERPRET=1 is not set"


def unsupported(operator: str, device: torch.device, dtype: torch.dtype, **facts: object) -> str | None:
    """Why this backend cannot run the case; None when it can."""
    if operator not in OPERATORS:
        return f"no Triton kernel for {operator}"
    if dtype not in DTYPES:
        return f"dtype {dtype}"
    if device.type not in ("cpu", "cuda"):
        return f"device {device.type}"
    reason = unavailable()
    if reason is not None:
        return reason
    if _kernels("_common").is_interpreted():
        return None
    if device.type == "cpu":
        return "device cpu (Triton runs on it only with TRITON_INTERPRET=1)"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is not None and capability < _OLDEST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, oldest supported is 8.0"
    return None


def conv2d(
    out: Tensor, input: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    input_scale: Tensor | None, input_shift: Tensor | None, input_relu: bool, activation: str,
    stride: Pair, padding: Pair, dilation: Pair, groups: int,
) -> None:  # fmt: skip
    _kernels("conv2d").conv2d(
        out, input, weight, scale, bias, residual, input_scale, input_shift, input_relu, activation,
        stride, padding, dilation, groups, prepared_weight=prepared_weight(weight, groups),
    )  # fmt: skip


def kernel_name(operator: str, *args: Any) -> str:
    """Which kernel serves a call of the contract."""
    if operator != "conv2d":
        return operator
    out, input, weight = args[:3]
    return f"conv2d {_kernels('conv2d').kernel_name(out, input, weight, *args[10:14])}"


def linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    _kernels("linear").linear(
        out, input, weight, bias, activation, prepared_weight=prepared_weight(weight, 1, "linear")
    )


def channel_affine(
    out: Tensor, input: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, activation: str,
    centre: Tensor | None = None,
) -> None:  # fmt: skip
    _kernels("channel_affine").channel_affine(out, input, scale, shift, residual, activation, centre)


def batch_statistics(mean: Tensor, var: Tensor, input: Tensor) -> None:
    _kernels("batch_statistics").batch_statistics(mean, var, input)


def max_pool2d(out: Tensor, input: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> None:
    _kernels("pool2d").max_pool2d(out, input, kernel, stride, padding, dilation)


def avg_pool2d(
    out: Tensor, input: Tensor, kernel: Pair, stride: Pair, padding: Pair, padding_end: Pair,
    count_include_pad: bool, divisor: int,
) -> None:  # fmt: skip
    _kernels("pool2d").avg_pool2d(out, input, kernel, stride, padding, padding_end, count_include_pad, divisor)


def adaptive_avg_pool2d(out: Tensor, input: Tensor) -> None:
    _kernels("pool2d").adaptive_avg_pool2d(out, input)


def local_response_norm(out: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float) -> None:
    _kernels("local_response_norm").local_response_norm(out, input, size, alpha, beta, k)


def residual_add(out: Tensor, input: Tensor, residual: Tensor, scale: float, activation: str) -> None:
    _kernels("residual_add").residual_add(out, input, residual, scale, activation)


def compilation(operator: str, *args: Any, config: object = None) -> Callable[[], object] | None:
    """What compiles a convolution's kernel without running it, in any thread; None for other operators."""
    if operator != "conv2d" or _kernels("_common").is_interpreted():
        return None
    out, input, weight, *rest = args
    plan = _kernels("conv2d").plan_conv2d(out, input, prepared_weight(weight, rest[-1]), *rest, config=config)
    compile: Callable[[], object] = plan.compilation(out.device)
    return compile


def prepared_weight(weight: Tensor, groups: int, operator: str = "conv2d") -> Tensor:
    """The weight as the kernels read it; made once for each state of a weight, or viewed where it lies so already."""
    kernels = _kernels(operator)
    geometry = (groups,) if operator == "conv2d" else ()
    if kernels.is_prepared(weight, *geometry):
        return kernels.prepare_weight(weight, *geometry)
    precision = _kernels("_common").conv_precision if operator == "conv2d" else _kernels("_common").matmul_precision
    key = (f"triton_{operator}", groups, precision(weight.dtype))
    return derived_for_streams(weight, key, lambda tensor: kernels.prepare_weight(tensor, *geometry))


def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f"fastcnn.triton_kernels.{module}")
