"""The cuDNN backend: cuDNN's own fused convolutions, as far as PyTorch exposes them.

    relu(conv(x, w * scale) + bias)               torch.cudnn_convolution_relu
    relu(conv(x, w * scale) + bias + residual)    torch.cudnn_convolution_add_relu
    conv(x, w * scale) + bias                     cuDNN's convolution, the bias added in place

The scale is multiplied into a copy of the weight, which is kept while both live unchanged, and rounded to its dtype:
one rounding, where the reference rounds the sums before it scales them. The fused calls return a tensor of their own.
Where the operator has just made `out` (`fresh`, docs/internals.md), `out` takes over that memory, else it is copied.

`torch.backends.cudnn.benchmark`, `.deterministic` and TF32 hold as for PyTorch's own convolutions. The variant
"benchmark" (`cudnn:benchmark`, for the tuner) lets cuDNN's algorithms be timed whatever the setting. PyTorch runs the
fused calls without regard to `deterministic`, so under it, and where cuDNN has no engine for the fused form, the same
is computed by the convolution and in-place operations behind it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.backends.derived import derived
from fastcnn.triton_kernels.precision import convolutions_use_tf32

Pair = tuple[int, int]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REPLACES_OUTPUT = frozenset({"conv2d"})
_DEVICE = "cuda"
_LARGEST = 2**31 - 1  # elements of a tensor that cuDNN's fused calls address

logger = logging.getLogger("fastcnn")


@functools.lru_cache(maxsize=1)
def unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "no NVIDIA GPU"
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    if not torch.backends.cudnn.is_available():
        return "this PyTorch has no cuDNN"
    return None


def unsupported(operator: str, device: torch.device, dtype: torch.dtype, **facts: object) -> str | None:
    if operator != "conv2d":
        return f"no cuDNN call for {operator}"
    if device.type != _DEVICE:
        return f"device {device.type}"
    if dtype not in DTYPES:
        return f"dtype {dtype}"
    if facts.get("prologue"):
        return "an affine map or ReLU on the input"
    if facts.get("residual") and facts.get("activation") != "relu":
        return "a residual without ReLU behind it"
    if not facts.get("symmetric", True):
        return "padding that differs at the two ends"
    if not torch.backends.cudnn.enabled:
        return "torch.backends.cudnn.enabled is False"
    return unavailable()


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
    *,
    fresh: bool = False,
) -> None:
    weight, bias = _folded(weight, scale, bias, zeros=activation == "relu")
    geometry = (stride, padding, dilation, groups)
    if activation != "relu":
        _convolution_into(out, input, weight, bias, *geometry)
        return
    nbytes = out.untyped_storage().nbytes()
    if fresh:  # the result will take its place: let it have this very memory
        out.untyped_storage().resize_(0)
    result = _fused(out, input, weight, bias, residual, *geometry)
    if not fresh:
        out.copy_(result)
    elif result.stride() == out.stride():
        out.set_(result)  # type: ignore[call-overload]
    else:  # strides of size-1 dimensions
        out.untyped_storage().resize_(nbytes)
        out.copy_(result)


# ---- algorithms by their times ---------------------------------------------------------------------------------------


def variants(operator: str, *args: object) -> list[str]:
    return ["benchmark"] if operator == "conv2d" and not torch.backends.cudnn.benchmark else []


def variant(name: str) -> ModuleType:
    """This backend where algorithms are timed at the first call of a form, as `torch.backends.cudnn.benchmark` does."""
    if name != "benchmark":
        raise ValueError(f"the cudnn backend has the variant 'benchmark', not {name!r}")
    return _Benchmarking()  # type: ignore[return-value]


class _Benchmarking:
    REPLACES_OUTPUT = REPLACES_OUTPUT

    def conv2d(self, *args: Any, fresh: bool = False) -> None:
        before = torch._C._get_cudnn_benchmark()
        torch._C._set_cudnn_benchmark(True)  # as the flag is set, which PyTorch can forbid
        try:
            conv2d(*args, fresh=fresh)
        finally:
            torch._C._set_cudnn_benchmark(before)

    def unsupported(self, operator: str, device: torch.device, dtype: torch.dtype, **facts: object) -> str | None:
        return unsupported(operator, device, dtype, **facts)


# ---- the folded weight ---------------------------------------------------------------------------------------------


def _folded(
    weight: Tensor, scale: Tensor | None, bias: Tensor | None, *, zeros: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """weight * scale in channels-last memory, and the bias in its dtype: made once for each state of these tensors.

    ``zeros``: a bias of zeros where there is none, which PyTorch would make in every fused call.
    """
    if scale is not None or not weight.is_contiguous(memory_format=torch.channels_last):
        weight = _kept(weight, "cudnn_conv2d", _fold, scale)
    if bias is not None:
        if bias.dtype != weight.dtype:
            bias = _kept(bias, ("cudnn_bias", weight.dtype), lambda vector: vector.detach().to(weight.dtype))
    elif zeros:
        bias = _kept(weight, "cudnn_zeros", lambda w: torch.zeros(w.shape[0], dtype=w.dtype, device=w.device))
    return weight, bias


def _fold(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    folded = torch.empty_like(weight, memory_format=torch.channels_last, requires_grad=False)
    if scale is None:
        return folded.copy_(weight.detach())
    return folded.copy_(weight.detach() * scale.detach().view(-1, 1, 1, 1))  # in fp32, the scale's dtype; rounded once


class _Kept(NamedTuple):
    """A value, the stream that makes it, and when it is made there."""

    value: Tensor
    stream: int
    made: torch.cuda.Event


class _CapturingError(Exception):
    """A value would have to be made while a CUDA graph is being captured."""


def _kept(tensor: Tensor, key: Hashable, make: Callable[..., Tensor], *others: Tensor | None) -> Tensor:
    """``make(tensor, *others)``, once for each state of these tensors, for every stream.

    Another stream than the one that made it waits for it there, not the CPU here: a scale that a graph computes anew in
    each call would make every call wait. Memory made during the capture of a CUDA graph belongs to the graph: then the
    value is not kept, and every replay makes it anew.
    """
    if not tensor.is_cuda:
        return derived(tensor, key, make, *others)
    index = tensor.get_device()
    stream = torch._C._cuda_getCurrentRawStream(index)

    def prepare(*tensors: Tensor | None) -> _Kept:
        if torch.cuda.is_current_stream_capturing():
            raise _CapturingError
        value = make(*tensors)
        made = torch.cuda.Event()
        made.record(torch.cuda.current_stream(index))
        return _Kept(value, stream, made)

    try:
        kept = derived(tensor, key, prepare, *others)
    except _CapturingError:
        return make(tensor, *others)
    # (What exists when a capture begins was made before: torch.cuda.graph waits for the device first.)
    if kept.stream != stream and not torch.cuda.is_current_stream_capturing():
        current = torch.cuda.current_stream(index)
        current.wait_event(kept.made)
        kept.value.record_stream(current)
    return kept.value


# ---- the convolution -----------------------------------------------------------------------------------------------

# Forms for which cuDNN has no fused engine, as it said when asked.
_without_engine: set[tuple[object, ...]] = set()
_NO_ENGINE = ("unable to find an engine", "valid cudnn algorithm", "status_not_supported", "status_bad_param")


def _is_deterministic() -> bool:
    return torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()


def _fused(
    out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Pair,
    padding: Pair, dilation: Pair, groups: int,
) -> Tensor:  # fmt: skip
    """relu(conv(input, weight) + bias + residual) in a tensor of its own. ``out`` tells the sizes."""
    geometry = (stride, padding, dilation, groups)
    if _is_deterministic() or max(out.numel(), input.numel()) > _LARGEST:
        return _separately(input, weight, bias, residual, *geometry)
    if _without_engine:
        form = (input.shape, weight.shape, input.dtype, residual is None, convolutions_use_tf32(), geometry)
        if form in _without_engine:
            return _separately(input, weight, bias, residual, *geometry)
    try:
        if residual is None:
            return torch.cudnn_convolution_relu(input, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(input, weight, residual, 1.0, bias, *geometry)
    except RuntimeError as error:
        if not any(text in str(error).lower() for text in _NO_ENGINE):
            raise
    form = (input.shape, weight.shape, input.dtype, residual is None, convolutions_use_tf32(), geometry)
    _without_engine.add(form)
    logger.info("conv2d: cuDNN has no fused engine for %s: its epilogue runs as separate calls", form)
    return _separately(input, weight, bias, residual, *geometry)


def _separately(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Pair, padding: Pair,
    dilation: Pair, groups: int,
) -> Tensor:  # fmt: skip
    result = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        result += residual
    return F.relu_(result)


def _convolution_into(
    out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair,
    groups: int,
) -> None:  # fmt: skip
    """conv(input, weight) + bias into ``out``; what is a slice of wider memory is written as the bias is added."""
    dense = out.is_contiguous(memory_format=torch.channels_last)
    if not dense or max(out.numel(), input.numel()) > _LARGEST:
        sums = F.conv2d(input, weight, None, stride, padding, dilation, groups)
        if bias is None:
            out.copy_(sums)
        else:
            torch.add(sums, bias.view(-1, 1, 1), out=out)
        return
    # cuDNN's own entry: F.conv2d prefers other kernels for some forms, and has no out=.
    torch.cudnn_convolution(
        input.contiguous(memory_format=torch.channels_last), weight, padding, stride, dilation, groups,
        torch.backends.cudnn.benchmark, _is_deterministic(), convolutions_use_tf32(), out=out,
    )  # fmt: skip
    if bias is not None:
        out.add_(bias.view(-1, 1, 1))
