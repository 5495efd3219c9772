"""conv2d_1x1_pair: a bottleneck's 1x1 expansion with residual and ReLU, and the next block's 1x1 reduction with ReLU.

    wide   = relu(conv(input, expand_weight) * expand_scale + expand_bias + residual)
    narrow = relu(conv(wide, reduce_weight) * reduce_scale + reduce_bias)

On a Hopper GPU one kernel computes both (csrc/cuda/conv2d_1x1_pair.cu), so that ``wide``, the largest tensor of the two
blocks, is not read again. Everywhere else, and where gradients are recorded, these are two calls of conv2d. So they are
under an interceptor, whose calls have one output each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastcnn import _native, backends
from fastcnn.ops._arguments import kernel_vector, renamed, require_optional_tensors, require_tensor
from fastcnn.ops._layout import overlaps_itself, pixel_stride, to_kernel_layout
from fastcnn.ops._registration import _AUTOCAST_KEYS, LIBRARY, autocasts, records_gradient
from fastcnn.ops.conv2d import OPERATOR

NAME = "conv2d_1x1_pair"
SIGNATURE = (
    "Tensor input, Tensor residual, Tensor expand_weight, Tensor? expand_scale, Tensor? expand_bias, "
    "Tensor reduce_weight, Tensor? reduce_scale, Tensor? reduce_bias"
)

Outputs = tuple[Tensor, Tensor]


def conv2d_1x1_pair(
    input: Tensor,
    residual: Tensor,
    expand_weight: Tensor,
    reduce_weight: Tensor,
    *,
    expand_scale: Tensor | None = None,
    expand_bias: Tensor | None = None,
    reduce_scale: Tensor | None = None,
    reduce_bias: Tensor | None = None,
    out: Outputs | None = None,
) -> Outputs:
    """Two 1x1 convolutions with ReLU, the second of the first one's result; both results are returned.

    ``wide = relu(conv(input, expand_weight) * expand_scale + expand_bias + residual)`` and
    ``narrow = relu(conv(wide, reduce_weight) * reduce_scale + reduce_bias)``: what :func:`fastcnn.ops.conv2d` gives in
    two calls, the second from ``wide`` as it was rounded to its dtype.

    Args:
        input: (N, C, H, W); fp32, bf16 or fp16 run on fastcnn's kernels.
        residual: (N, J, H, W), in the input's dtype.
        expand_weight: (J, C, 1, 1), in the input's dtype.
        reduce_weight: (K, J, 1, 1), in the input's dtype.
        expand_scale, expand_bias: (J,), in the input's dtype or fp32.
        reduce_scale, reduce_bias: (K,), in the input's dtype or fp32.
        out: where to write ``wide`` and ``narrow``. No gradient can be recorded then.

    Returns:
        ``wide`` (N, J, H, W) and ``narrow`` (N, K, H, W), each in the memory layout that PyTorch would choose.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, device or dtype; the message names it.
    """
    required = {"input": input, "residual": residual, "expand_weight": expand_weight, "reduce_weight": reduce_weight}
    for name, tensor in required.items():
        require_tensor(tensor, name)
    require_optional_tensors(
        expand_scale=expand_scale, expand_bias=expand_bias, reduce_scale=reduce_scale, reduce_bias=reduce_bias
    )
    args = (
        input, residual, expand_weight, expand_scale, expand_bias, reduce_weight, reduce_scale, reduce_bias
    )  # fmt: skip
    if out is None:
        # On the CPU no kernel does both, and graphs know what the two are.
        if input.device.type == "cpu" or torch._C._are_functorch_transforms_active():
            _require_weights(*args)
            return _two_calls(*args)
        return FUNCTIONAL(*args)
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(f"out must be two tensors, for wide and narrow, is {type(out).__name__}")
    wide, narrow = out
    require_tensor(wide, "out[0]")
    require_tensor(narrow, "out[1]")
    INTO(wide, narrow, *args)
    return wide, narrow


def _expansion(
    input: Tensor, residual: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    """The first convolution, as conv2d's operator takes it."""
    return (input, weight, bias, (1, 1), (0, 0, 0, 0), (1, 1), 1, scale, residual, "relu", None, None, False)


def _reduction(wide: Tensor, *args: Any) -> tuple[Any, ...]:
    """The second one, of the first one's result."""
    weight, scale, bias = args[5:]
    return (wide, weight, bias, (1, 1), (0, 0, 0, 0), (1, 1), 1, scale, None, "relu", None, None, False)


def _two_calls(*args: Any) -> Outputs:
    return _one_by_one(OPERATOR, *args)


def _one_by_one(convolution: Callable[..., Tensor], *args: Any) -> Outputs:
    """A function of conv2d's arguments for the first convolution, then for the second. Errors name our arguments."""
    try:
        wide = convolution(*_expansion(*args))
    except (ValueError, TypeError) as error:
        raise renamed(error, _FIRST_NAMES) from error
    try:
        return wide, convolution(*_reduction(wide, *args))
    except (ValueError, TypeError) as error:
        raise renamed(error, _SECOND_NAMES) from error


def _require_weights(input: Tensor, residual: Tensor, expand_weight: Tensor, *rest: Any) -> None:
    reduce_weight = rest[2]
    if input.dim() != 4:
        raise ValueError(f"input must have shape (N, C, H, W), has {tuple(input.shape)}")
    for weight, name, filters, channels in (
        (expand_weight, "expand_weight", "J", input.shape[1]),
        (reduce_weight, "reduce_weight", "K", expand_weight.shape[0] if expand_weight.dim() == 4 else "J"),
    ):
        if weight.dim() != 4 or tuple(weight.shape[2:]) != (1, 1) or weight.shape[1] != channels:
            raise ValueError(f"{name} must have shape ({filters}, {channels}, 1, 1), has {tuple(weight.shape)}")


_FIRST_NAMES = {"weight": "expand_weight", "scale": "expand_scale", "bias": "expand_bias"}
_SECOND_NAMES = {"weight": "reduce_weight", "scale": "reduce_scale", "bias": "reduce_bias"}


def _allocate(*args: Any) -> Outputs:
    """Checks the arguments; both outputs, empty and in channels-last memory. Runs on fake tensors too."""
    _require_weights(*args)
    return _one_by_one(OPERATOR.allocate, *args)


def _finish(wide: Tensor, narrow: Tensor, *args: Any) -> Outputs:
    wide = OPERATOR.finish(wide, *_expansion(*args))
    return wide, OPERATOR.finish(narrow, *_reduction(wide, *args))


def _fill(wide: Tensor, narrow: Tensor, *args: Any) -> None:
    """Into outputs that kernels can write and that overlap nothing."""
    if wide.numel() == 0:
        return
    input, residual, expand_weight, expand_scale, expand_bias, reduce_weight, reduce_scale, reduce_bias = args
    if input.numel() > 0 and backends.current_choice()[0] in (None, "cuda") and not backends.is_intercepted():
        cuda = backends.backend_module("cuda")
        if cuda.unsupported(NAME, input.device, input.dtype) is None:
            arguments = (
                wide, narrow, to_kernel_layout(input), to_kernel_layout(residual), expand_weight,
                kernel_vector(expand_scale), kernel_vector(expand_bias), reduce_weight, kernel_vector(reduce_scale),
                kernel_vector(reduce_bias),
            )  # fmt: skip
            if cuda.conv2d_1x1_pair_unsupported(*arguments) is None:
                cuda.conv2d_1x1_pair(*arguments)
                return
    OPERATOR.fill(wide, *_expansion(*args))
    OPERATOR.fill(narrow, *_reduction(wide, *args))


# ---- registration ------------------------------------------------------------------------------------------------


def _run(*args: Any) -> Outputs:
    wide, narrow = _allocate(*args)
    _fill(wide, narrow, *args)
    return _finish(wide, narrow, *args)


def _fake(*args: Any) -> Outputs:
    return _finish(*_allocate(*args), *args)


def _run_into(wide: Tensor, narrow: Tensor, *args: Any) -> None:
    expected = _allocate(*args)
    _check_outputs((wide, narrow), expected)
    inputs = tuple(a for a in args if isinstance(a, Tensor))
    targets = []
    for given, empty, other in ((wide, expected[0], narrow), (narrow, expected[1], wide)):
        if pixel_stride(given) is None and overlaps_itself(given):
            raise ValueError(
                f"{NAME}: out must not overlap itself, has shape {tuple(given.shape)} and strides {given.stride()}"
            )
        as_it_lies = pixel_stride(given) is not None and not _native.may_overlap(given, (*inputs, other))
        targets.append(given if as_it_lies else empty)
    _fill(targets[0], targets[1], *args)
    for given, filled in ((wide, targets[0]), (narrow, targets[1])):
        if filled is not given:
            given.copy_(filled)
        if not given.is_inference():
            torch.autograd.graph.increment_version(given)


def _fake_into(wide: Tensor, narrow: Tensor, *args: Any) -> None:
    _check_outputs((wide, narrow), _allocate(*args))


def _check_outputs(given: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (tensor, like) in enumerate(zip(given, expected, strict=True)):
        if tensor.shape != like.shape:
            raise ValueError(f"{NAME}: out[{i}] must have shape {tuple(like.shape)}, has {tuple(tensor.shape)}")
        if tensor.dtype != like.dtype or tensor.device != like.device:
            raise ValueError(
                f"{NAME}: out[{i}] must be {like.dtype} on {like.device}, is {tensor.dtype} on {tensor.device}"
            )


def _run_autograd(*args: Any) -> Outputs:
    if records_gradient(args) or forward_ad._current_level >= 0:
        _require_weights(*args)
        return _two_calls(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return FUNCTIONAL(*args)


def _run_into_autograd(wide: Tensor, narrow: Tensor, *args: Any) -> None:
    if records_gradient((wide, narrow, *args)) or forward_ad._current_level >= 0:
        raise RuntimeError(f"{NAME}: out= does not support automatic differentiation, but an argument requires grad")
    with torch._C._AutoDispatchBelowAutograd():
        INTO(wide, narrow, *args)


def _autocast_kernel(device_type: str) -> Any:
    def kernel(*args: Any) -> Outputs:
        if autocasts(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            args = tuple(
                a.to(dtype) if i in _CAST and a.is_floating_point() and a.dtype != torch.float64 else a
                for i, a in enumerate(args)
            )
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return FUNCTIONAL(*args)

    return kernel


_CAST = (0, 1, 2, 5)  # input, residual and weights

LIBRARY.define(f"{NAME}({SIGNATURE}) -> (Tensor, Tensor)")
LIBRARY.define(f"{NAME}_into(Tensor(a!) wide, Tensor(b!) narrow, {SIGNATURE}) -> ()")
FUNCTIONAL = torch.ops.fastcnn.conv2d_1x1_pair.default
INTO = torch.ops.fastcnn.conv2d_1x1_pair_into.default
for _key in ("CPU", "CUDA"):
    LIBRARY.impl(NAME, _run, _key)
    LIBRARY.impl(f"{NAME}_into", _run_into, _key)
torch.library.register_fake(f"fastcnn::{NAME}", _fake, lib=LIBRARY)
torch.library.register_fake(f"fastcnn::{NAME}_into", _fake_into, lib=LIBRARY)
LIBRARY.impl(NAME, _run_autograd, "Autograd")
LIBRARY.impl(f"{NAME}_into", _run_into_autograd, "Autograd")
LIBRARY.impl(NAME, _autocast_kernel("cpu"), "AutocastCPU")
LIBRARY.impl(NAME, _autocast_kernel("cuda"), "AutocastCUDA")
