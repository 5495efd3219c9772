"""What a rewritten graph calls: :mod:`fastcnn.nn.fusing` on the user's own modules, and the same on bare tensors.

A graph does not know shapes and dtypes. What fastcnn's operators ask of them is checked here in each call; a case they
do not take (a residual that is broadcast, an addition in place of another dtype) is computed as the user wrote it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcnn import ops
from fastcnn.backends.derived import derived, operations_are_replaced
from fastcnn.nn import fusing
from fastcnn.nn._calls import _PLAIN_TENSORS
from fastcnn.nn.fusing import Activation
from fastcnn.nn.modules import AdaptiveAvgPool2d, AvgPool2d, LocalResponseNorm, MaxPool2d
from fastcnn.ops._registration import autocasts, records_gradient

_POOLS: dict[type[nn.Module], Any] = {
    nn.MaxPool2d: MaxPool2d.forward,
    nn.AvgPool2d: AvgPool2d.forward,
    nn.AdaptiveAvgPool2d: AdaptiveAvgPool2d.forward,
    nn.LocalResponseNorm: LocalResponseNorm.forward,
}


# ---- on the user's modules -------------------------------------------------------------------------------------------


def conv_bn(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    *,
    residual: Any = None,
    in_place: bool = False,
    activation: Activation = "none",
) -> Tensor:
    """``act(bn(conv(x)) + residual)``; ``in_place``: the addition was written ``+=``, which keeps the dtype."""
    if residual is None or _fits(residual, _conv_shape(x, conv.weight, conv), x):
        return fusing.conv_bn(x, conv, bn, residual=residual, activation=activation)
    return _add_and_act(fusing.conv_bn(x, conv, bn, activation="none"), residual, in_place, activation)


def conv_act(
    x: Tensor, conv: nn.Conv2d, *, residual: Any = None, in_place: bool = False, activation: Activation = "none"
) -> Tensor:
    """``act(conv(x) + residual)``."""
    if residual is None or _fits(residual, _conv_shape(x, conv.weight, conv), x):
        return fusing.conv_act(x, conv, residual=residual, activation=activation)
    return _add_and_act(fusing.conv_act(x, conv, activation="none"), residual, in_place, activation)


def bn_act(
    x: Tensor, bn: nn.BatchNorm2d, *, residual: Any = None, in_place: bool = False, activation: Activation = "none"
) -> Tensor:
    """``act(bn(x) + residual)``."""
    if residual is None or _fits(residual, x.shape, x):
        return fusing.bn_act(x, bn, residual=residual, activation=activation)
    return _add_and_act(fusing.bn_act(x, bn, activation="none"), residual, in_place, activation)


def bn_act_conv(
    x: Tensor,
    bn: nn.BatchNorm2d,
    conv: nn.Conv2d,
    *,
    preactivation: Activation = "none",
    next_bn: nn.BatchNorm2d | None = None,
    residual: Any = None,
    in_place: bool = False,
    activation: Activation = "none",
) -> Tensor:
    """``act(next_bn(conv(preactivation(bn(x)))) + residual)``: one call in eval mode."""
    if residual is None or _fits(residual, _conv_shape(x, conv.weight, conv), x):
        return fusing.bn_act_conv(
            x, bn, conv, preactivation=preactivation, next_bn=next_bn, residual=residual, activation=activation
        )
    y = fusing.bn_act_conv(x, bn, conv, preactivation=preactivation, next_bn=next_bn)
    return _add_and_act(y, residual, in_place, activation)


def linear_act(x: Tensor, linear: nn.Linear, *, activation: Activation = "none") -> Tensor:
    """``act(linear(x))``."""
    return fusing.linear_act(x, linear, activation=activation)


def pool(x: Tensor, module: nn.Module) -> Any:
    """A pooling or LRN module on fastcnn's operator; called as it is where it was given hooks or another class."""
    forward = _POOLS.get(type(module))
    kind = type(module)
    if forward is None or fusing._is_watched() or not fusing._is_plain(module, kind, kind):
        return module(x)
    return forward(module, x)


def add_act(x: Any, y: Any, *, activation: Activation = "none") -> Any:
    """``act(x + y)``."""
    name = fusing._fusable_name(activation)
    tensors = isinstance(x, Tensor) and isinstance(y, Tensor)
    if name is None or fusing._is_watched() or not tensors or x.dtype != y.dtype or not _fits(y, x.shape, x):
        return fusing._one_by_one(x + y, (), None, activation, None)
    return ops.residual_add(x, y, activation=name)


# ---- on bare tensors: torch.nn.functional's arguments ----------------------------------------------------------------


def functional_conv_bn(
    conv: dict[str, Any],
    bn: dict[str, Any],
    *,
    residual: Any = None,
    in_place: bool = False,
    activation: Activation = "none",
) -> Tensor:
    """``act(batch_norm(conv2d(**conv), **bn) + residual)``, folded where running statistics are used."""
    training = bn.get("training", False)
    x, weight, conv_bias = conv["input"], conv["weight"], conv.get("bias")
    name = fusing._fusable_name(activation)
    fits = residual is None or (_fits(residual, _conv_shape(x, weight, conv), x) and residual.dtype == x.dtype)
    if training or name is None or not fits or autocasts(x.device.type):
        y = ops.batch_norm(ops.conv2d(**conv), **bn)
        return _add_and_act(y, residual, in_place, activation)
    geometry = {key: conv[key] for key in ("stride", "padding", "dilation", "groups") if key in conv}
    scale, shift = _folded(bn, conv_bias)
    return ops.conv2d(x, weight, shift, scale=scale, residual=residual, activation=name, **geometry)


def _folded(bn: dict[str, Any], conv_bias: Tensor | None) -> tuple[Tensor, Tensor]:
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

    plain = all(t is None or type(t) in _PLAIN_TENSORS for t in given)
    if not plain or operations_are_replaced() or records_gradient(given):
        return fold(*given)
    return derived(given[0], ("functional_batch_norm", eps), fold_for_keeping, *given[1:])


def functional_conv_act(
    conv: dict[str, Any], *, residual: Any = None, in_place: bool = False, activation: Activation = "none"
) -> Tensor:
    """``act(conv2d(**conv) + residual)``."""
    x = conv["input"]
    name = fusing._fusable_name(activation)
    fits = residual is None or (
        _fits(residual, _conv_shape(x, conv["weight"], conv), x) and residual.dtype == fusing._dtype_of_convolution(x)
    )
    if name is None or not fits:
        return _add_and_act(ops.conv2d(**conv), residual, in_place, activation)
    return ops.conv2d(**conv, residual=residual, activation=name)


def functional_bn_act(
    bn: dict[str, Any], *, residual: Any = None, in_place: bool = False, activation: Activation = "none"
) -> Tensor:
    """``act(batch_norm(**bn) + residual)``."""
    x = bn["input"]
    name = fusing._fusable_name(activation)
    fits = residual is None or (_fits(residual, x.shape, x) and residual.dtype == x.dtype)
    if name is None or not fits:
        return _add_and_act(ops.batch_norm(**bn), residual, in_place, activation)
    return ops.batch_norm(**bn, residual=residual, activation=name)


def functional_linear_act(linear: dict[str, Any], *, activation: Activation = "none") -> Tensor:
    """``act(linear(**linear))``."""
    name = fusing._fusable_name(activation)
    if name is None:
        return fusing._one_by_one(ops.linear(**linear), (), None, activation, None)
    return ops.linear(**linear, activation=name)


# ---- what operators ask of a residual --------------------------------------------------------------------------------


def _add_and_act(y: Tensor, residual: Any, in_place: bool, activation: Activation) -> Tensor:
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    return fusing._one_by_one(y, (), None, activation, None)


def _fits(residual: Any, shape: Any, like: Tensor) -> bool:
    """Whether a residual is of the result's shape and dtype, so that it can be added in the epilogue."""
    if not isinstance(residual, Tensor) or residual.device != like.device:
        return False
    return residual.dtype == fusing._dtype_of_convolution(like) and residual.shape == shape


def _conv_shape(x: Tensor, weight: Tensor, settings: nn.Conv2d | dict[str, Any]) -> tuple[int, ...] | None:
    """(N, K, P, Q) of a convolution's result; None for an input that is not (N, C, H, W)."""
    if x.dim() != 4:
        return None

    def setting(name: str, default: Any) -> Any:
        value = settings.get(name, default) if isinstance(settings, dict) else getattr(settings, name)
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
