"""What a rewritten graph calls: :mod:`fastcnn.nn.fusing` on the user's own modules, and the same on bare tensors.

A layer is given as the user's module or, where the user called a function (``F.conv2d(x, w, b)``), as a dictionary of
its arguments without the input. A graph does not know shapes and dtypes. What fastcnn's operators ask of them is
checked here in each call; a case they do not take (a residual that is broadcast, an addition in place of another dtype)
is computed as the user wrote it.

Common arguments: ``residual`` is added before ``activation``; ``writes`` says which operand an addition in place
(``+=``) was written into, ``"result"`` or ``"residual"``: it keeps that one's dtype and shape. ``out`` is where to
write, if the caller can do without a gradient. ``merged`` names a part of what :func:`fastcnn.graph.merging.pointwise`
has computed; where that is nothing, the call computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn import ops
from fastcnn.backends.derived import PLAIN_TENSORS, derived, operations_are_replaced
from fastcnn.nn import fusing
from fastcnn.nn._calls import uses_batch_statistics
from fastcnn.nn.fusing import Activation
from fastcnn.nn.modules import BatchNorm2d, Conv2d
from fastcnn.ops._registration import autocasts, records_gradient

Settings = dict[str, Any]  # of a function: its arguments by name, without the input
ConvLayer = nn.Conv2d | Settings
NormLayer = nn.BatchNorm2d | Settings
_GEOMETRY = ("stride", "padding", "dilation", "groups")


# ---- the calls -------------------------------------------------------------------------------------------------------


def conv_bn(
    x: Tensor,
    conv: ConvLayer,
    bn: NormLayer,
    *,
    residual: Any = None,
    writes: str | None = None,
    activation: Activation = "none",
    out: Tensor | None = None,
    merged: tuple[Sequence[Tensor] | None, int] = (None, 0),
) -> Tensor:
    """``act(bn(conv(x)) + residual)``."""
    parts, place = merged
    if parts is not None:
        return parts[place]
    if residual is not None and not _fits(residual, conv_shape(x, conv), x):
        y = conv_bn(x, conv, bn)
        return _add_and_act(y, residual, writes, activation, out)
    if not isinstance(conv, dict) and not isinstance(bn, dict):
        return fusing.conv_bn(x, conv, bn, residual=residual, activation=activation, out=out)
    name, filters, norm = fusing._fusable_name(activation), _filters(conv), _statistics(bn)
    if name is None or filters is None or norm is None or autocasts(x.device.type):
        return bn_act(conv_act(x, conv), bn, residual=residual, writes=writes, activation=activation, out=out)
    scale, shift = _folded(norm, filters["bias"])
    return ops.conv2d(x, **{**filters, "bias": shift}, scale=scale, residual=residual, activation=name, out=out)


def conv_act(
    x: Tensor,
    conv: ConvLayer,
    *,
    residual: Any = None,
    writes: str | None = None,
    activation: Activation = "none",
    out: Tensor | None = None,
    merged: tuple[Sequence[Tensor] | None, int] = (None, 0),
) -> Tensor:
    """``act(conv(x) + residual)``."""
    parts, place = merged
    if parts is not None:
        return parts[place]
    if residual is not None and not _fits(residual, conv_shape(x, conv), x):
        return _add_and_act(conv_act(x, conv), residual, writes, activation, out)
    if not isinstance(conv, dict):
        return fusing.conv_act(x, conv, residual=residual, activation=activation, out=out)
    name = fusing._fusable_name(activation)
    if name is None:
        return _add_and_act(ops.conv2d(x, **conv), residual, writes, activation, out)
    return ops.conv2d(x, **conv, residual=residual, activation=name, out=out)


def bn_act(
    x: Tensor,
    bn: NormLayer,
    *,
    residual: Any = None,
    writes: str | None = None,
    activation: Activation = "none",
    out: Tensor | None = None,
) -> Tensor:
    """``act(bn(x) + residual)``."""
    if residual is not None and not _fits(residual, x.shape, x, x.dtype):
        return _add_and_act(bn_act(x, bn), residual, writes, activation, out)
    if not isinstance(bn, dict):
        return fusing.bn_act(x, bn, residual=residual, activation=activation, out=out)
    name = fusing._fusable_name(activation)
    if name is None:
        return _add_and_act(ops.batch_norm(x, **bn), residual, writes, activation, out)
    return ops.batch_norm(x, **bn, residual=residual, activation=name, out=out)


def bn_act_conv(
    x: Tensor,
    bn: NormLayer,
    conv: ConvLayer,
    *,
    preactivation: Activation = "none",
    next_bn: NormLayer | None = None,
    residual: Any = None,
    writes: str | None = None,
    activation: Activation = "none",
    out: Tensor | None = None,
) -> Tensor:
    """``act(next_bn(conv(preactivation(bn(x)))) + residual)``: one call in eval mode."""
    if residual is not None and not _fits(residual, conv_shape(x, conv), x):
        y = bn_act_conv(x, bn, conv, preactivation=preactivation, next_bn=next_bn)
        return _add_and_act(y, residual, writes, activation, out)
    if not (isinstance(bn, dict) or isinstance(conv, dict) or isinstance(next_bn, dict)):
        return fusing.bn_act_conv(
            x, bn, conv, preactivation=preactivation, next_bn=next_bn, residual=residual, activation=activation, out=out
        )
    before, filters, norm = fusing._fusable_name(preactivation), _filters(conv), _statistics(bn)
    end: Settings = {"residual": residual, "writes": writes, "activation": activation, "out": out}
    # Autocast rounds the convolution's input, not the batch norm's.
    if before is None or filters is None or norm is None or x.dtype != fusing._dtype_of_convolution(x):
        y = bn_act(x, bn, activation=preactivation)
        return conv_act(y, conv, **end) if next_bn is None else conv_bn(y, conv, next_bn, **end)
    input_scale, input_shift = _folded(norm)
    given: Settings = {"input_scale": input_scale, "input_shift": input_shift, "input_activation": before}
    name, next_norm = fusing._fusable_name(activation), None if next_bn is None else _statistics(next_bn)
    if name is None or (next_bn is not None and next_norm is None):
        y = ops.conv2d(x, **filters, **given)
        return _add_and_act(y, residual, writes, activation, out) if next_bn is None else bn_act(y, next_bn, **end)
    if next_norm is not None:
        given["scale"], filters["bias"] = _folded(next_norm, filters["bias"])
    return ops.conv2d(x, **filters, **given, residual=residual, activation=name, out=out)


def linear_act(x: Tensor, linear: nn.Linear | Settings, *, activation: Activation = "none") -> Tensor:
    """``act(linear(x))``."""
    if not isinstance(linear, dict):
        return fusing.linear_act(x, linear, activation=activation)
    name = fusing._fusable_name(activation)
    if name is None:
        return _add_and_act(ops.linear(x, **linear), None, None, activation, None)
    return ops.linear(x, **linear, activation=name)


def add_act(
    x: Any, y: Any, *, writes: str | None = None, activation: Activation = "none", out: Tensor | None = None
) -> Any:  # fmt: skip
    """``act(x + y)``."""
    name = fusing._fusable_name(activation)
    tensors = isinstance(x, Tensor) and isinstance(y, Tensor)
    if name is None or fusing._is_watched() or not tensors or not _fits(y, x.shape, x, x.dtype):
        return _add_and_act(x, y, writes, activation, out)
    return ops.residual_add(x, y, activation=name, out=out)


def pool(x: Tensor, module: nn.Module, *, out: Tensor | None = None) -> Any:
    """A pooling or LRN module on fastcnn's operator; called as it is where it was given hooks or another class."""
    function = _POOLS.get(type(module))
    kind = type(module)
    if function is None or fusing._is_watched() or not fusing._is_plain(module, kind, kind):
        y = module(x)
        return y if out is None else out.copy_(y)
    return function(x, module, out)


def _max_pool(x: Tensor, m: Any, out: Tensor | None) -> Any:
    geometry = (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)
    return ops.max_pool2d(x, *geometry, out=out)


def _avg_pool(x: Tensor, m: Any, out: Tensor | None) -> Tensor:
    geometry = (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override)
    return ops.avg_pool2d(x, *geometry, out=out)


def _adaptive_pool(x: Tensor, m: Any, out: Tensor | None) -> Tensor:
    return ops.adaptive_avg_pool2d(x, m.output_size, out=out)


def _local_response_norm(x: Tensor, m: Any, out: Tensor | None) -> Tensor:
    return ops.local_response_norm(x, m.size, m.alpha, m.beta, m.k, out=out)


_POOLS: dict[type[nn.Module], Any] = {
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.LocalResponseNorm: _local_response_norm,
}


# ---- layers, however they were given ---------------------------------------------------------------------------------


def _filters(conv: ConvLayer) -> Settings | None:
    """A convolution's arguments for :func:`fastcnn.ops.conv2d`; None where calling the module would do more."""
    if isinstance(conv, dict):
        return {"bias": None, **conv}
    if fusing._is_watched() or conv.padding_mode != "zeros" or not fusing._is_plain(conv, nn.Conv2d, Conv2d):
        return None
    return {"weight": conv.weight, "bias": conv.bias, **{name: getattr(conv, name) for name in _GEOMETRY}}


def _statistics(bn: NormLayer) -> Settings | None:
    """A batch norm's tensors and eps; None where it uses its batch's statistics, or calling it would do more."""
    if isinstance(bn, dict):
        return None if bn.get("training", False) else bn
    if fusing._is_watched() or not fusing._is_plain(bn, nn.BatchNorm2d, BatchNorm2d) or uses_batch_statistics(bn):
        return None
    return {n: getattr(bn, n) for n in ("running_mean", "running_var", "weight", "bias", "eps")}


def _folded(bn: Settings, conv_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and shift, each (K,), of a batch norm in evaluation; kept until a tensor changes."""
    eps = bn.get("eps", 1e-5)
    given = (bn["running_mean"], bn["running_var"], bn.get("weight"), bn.get("bias"), conv_bias)

    def fold(
        mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, conv_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return ops.fold_batch_norm(mean, var, weight, bias, eps, conv_bias)

    def fold_for_keeping(*tensors: Any) -> tuple[Tensor, Tensor]:
        # In normal mode, so that a later call that records gradients can save the vectors.
        with torch.inference_mode(False), torch.no_grad():
            return fold(*tensors)

    plain = all(t is None or type(t) in PLAIN_TENSORS for t in given)
    if not plain or operations_are_replaced() or records_gradient(given):
        return fold(*given)
    return derived(given[0], ("functional_batch_norm", eps), fold_for_keeping, *given[1:])


# ---- what operators ask of a residual --------------------------------------------------------------------------------


def _add_and_act(y: Any, residual: Any, writes: str | None, activation: Activation, out: Tensor | None) -> Any:
    """As the user wrote it."""
    if residual is not None:
        y = y + residual if writes is None else y.add_(residual) if writes == "result" else residual.add_(y)
    return fusing._one_by_one(y, (), None, activation, out)


def _fits(residual: Any, shape: Any, like: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a residual is of the result's shape and dtype, so that it can be added in the epilogue."""
    if not isinstance(residual, Tensor) or residual.device != like.device:
        return False
    return residual.dtype == (dtype or fusing._dtype_of_convolution(like)) and residual.shape == shape


def conv_shape(x: Tensor, conv: ConvLayer) -> tuple[int, ...] | None:
    """(N, K, P, Q) of a convolution's result; None for an input that is not (N, C, H, W)."""
    if x.dim() != 4:
        return None
    weight: Tensor = conv["weight"] if isinstance(conv, dict) else conv.weight

    def setting(name: str, default: Any) -> Any:
        value = conv.get(name, default) if isinstance(conv, dict) else getattr(conv, name)
        return value if isinstance(value, str) else (value, value) if isinstance(value, int) else tuple(value) * 2

    stride, padding, dilation = setting("stride", 1), setting("padding", 0), setting("dilation", 1)
    sizes = []
    for i in range(2):
        size, extent = x.shape[2 + i], dilation[i] * (weight.shape[2 + i] - 1)
        if padding == "same":
            sizes.append(size)
        else:
            border = 0 if padding == "valid" else 2 * padding[i]
            sizes.append((size + border - extent - 1) // stride[i] + 1)
    return (x.shape[0], weight.shape[0], *sizes)
