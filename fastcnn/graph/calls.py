"""What a rewritten graph calls: :mod:`fastcnn.nn.fusing` on the user's own modules, and the same on bare tensors.

A layer is given as the user's module or, where the user called a function (``F.conv2d(x, w, b)``), as a dictionary of
its arguments without the input. A graph does not know shapes and dtypes. What fastcnn's operators ask of them is
checked here in each call; a case they do not take (a residual that is broadcast, an addition in place of another dtype)
is computed as the user wrote it.

Common arguments: ``residual`` is added before ``activation``; ``residual_first`` says that it was the left operand.
``writes`` says which operand an addition in place (``+=``) was written into, ``"result"`` or ``"residual"``: it keeps
that one's dtype, shape and layout. ``in_place``: so was the activation, which is no module. ``out`` is where to write,
if the caller can do without a gradient. ``merged`` names a part of what :func:`fastcnn.graph.merging.pointwise` has
computed; where that is nothing, the call computes it.

Results have the strides that the layers would give one after the other (:mod:`fastcnn.ops._strides`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn import ops
from fastcnn.backends.derived import PLAIN_TENSORS, derived, operations_are_replaced
from fastcnn.nn import fusing
from fastcnn.nn._calls import uses_batch_statistics
from fastcnn.nn.fusing import Activation
from fastcnn.nn.modules import BatchNorm2d, Conv2d
from fastcnn.ops import _strides
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
    residual_first: bool = False,
    writes: str | None = None,
    activation: Activation = "none",
    in_place: bool = False,
    out: Tensor | None = None,
    merged: tuple[Sequence[Tensor] | None, int] = (None, 0),
) -> Tensor:
    """``act(bn(conv(x)) + residual)``."""
    parts, place = merged
    if parts is not None:
        return parts[place]
    end = _End(residual, residual_first, writes, activation, in_place, out)
    name = fusing._fusable_name(activation)
    if name is None or (residual is not None and not _fits(residual, conv_shape(x, conv), x)):
        return end.after(conv_bn(x, conv, bn))
    if not isinstance(conv, dict) and not isinstance(bn, dict):
        y = fusing.conv_bn(x, conv, bn, residual=residual, activation=activation, out=out)
    else:
        filters, norm = _filters(conv), _statistics(bn)
        if filters is None or norm is None or autocasts(x.device.type):
            return bn_act(conv_act(x, conv), bn, **end.arguments())
        scale, shift = _folded(norm, filters["bias"])
        y = ops.conv2d(x, **{**filters, "bias": shift}, scale=scale, residual=residual, activation=name, out=out)
    return y if end.leaves_no_doubt(y, normalised=True) else end.laid_out(y, lambda: _convolved(y, x, conv, bn))


def conv_act(
    x: Tensor,
    conv: ConvLayer,
    *,
    residual: Any = None,
    residual_first: bool = False,
    writes: str | None = None,
    activation: Activation = "none",
    in_place: bool = False,
    out: Tensor | None = None,
    merged: tuple[Sequence[Tensor] | None, int] = (None, 0),
) -> Tensor:
    """``act(conv(x) + residual)``."""
    parts, place = merged
    if parts is not None:
        return parts[place]
    end = _End(residual, residual_first, writes, activation, in_place, out)
    name = fusing._fusable_name(activation)
    if name is None or (residual is not None and not _fits(residual, conv_shape(x, conv), x)):
        return end.after(conv_act(x, conv))
    if isinstance(conv, dict):
        y = ops.conv2d(x, **conv, residual=residual, activation=name, out=out)
    else:
        y = fusing.conv_act(x, conv, residual=residual, activation=activation, out=out)
    return y if end.leaves_no_doubt(y) else end.laid_out(y, lambda: _convolved(y, x, conv))


def bn_act(
    x: Tensor,
    bn: NormLayer,
    *,
    residual: Any = None,
    residual_first: bool = False,
    writes: str | None = None,
    activation: Activation = "none",
    in_place: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """``act(bn(x) + residual)``."""
    end = _End(residual, residual_first, writes, activation, in_place, out)
    name = fusing._fusable_name(activation)
    if name is None or (residual is not None and not (x.dim() == 4 and _fits(residual, x.shape, x, x.dtype))):
        return end.after(bn_act(x, bn))
    if isinstance(bn, dict):
        y = ops.batch_norm(x, **bn, residual=residual, activation=name, out=out)
    else:
        y = fusing.bn_act(x, bn, residual=residual, activation=activation, out=out)
    return y if end.leaves_no_doubt(y) else end.laid_out(y, lambda: _normalised(x.shape, x.stride(), bn))


def bn_act_conv(
    x: Tensor,
    bn: NormLayer,
    conv: ConvLayer,
    *,
    preactivation: Activation = "none",
    preactivation_in_place: bool = False,
    next_bn: NormLayer | None = None,
    residual: Any = None,
    residual_first: bool = False,
    writes: str | None = None,
    activation: Activation = "none",
    in_place: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """``act(next_bn(conv(preactivation(bn(x)))) + residual)``: one call in eval mode."""
    end = _End(residual, residual_first, writes, activation, in_place, out)
    before, name = fusing._fusable_name(preactivation), fusing._fusable_name(activation)
    if name is None or (residual is not None and not _fits(residual, conv_shape(x, conv), x)):
        first: Settings = {"preactivation": preactivation, "preactivation_in_place": preactivation_in_place}
        return end.after(bn_act_conv(x, bn, conv, next_bn=next_bn, **first))
    # Of an image that is contiguous and channels-last at once, the ReLU decides which of them the convolution sees.
    together = before is not None and not _strides.is_ambiguous(x.shape)
    normalised = next_bn is not None
    if together and not (isinstance(bn, dict) or isinstance(conv, dict) or isinstance(next_bn, dict)):
        y = fusing.bn_act_conv(
            x, bn, conv, preactivation=preactivation, next_bn=next_bn, residual=residual, activation=activation, out=out
        )
        return y if end.leaves_no_doubt(y, normalised) else end.laid_out(y, lambda: _convolved(y, x, conv, next_bn))
    filters, norm = _filters(conv), _statistics(bn)
    # Autocast rounds the convolution's input, not the batch norm's.
    if not together or filters is None or norm is None or x.dtype != fusing._dtype_of_convolution(x):
        y = bn_act(x, bn, activation=preactivation, in_place=preactivation_in_place)
        if next_bn is None:
            return conv_act(y, conv, **end.arguments())
        return conv_bn(y, conv, next_bn, **end.arguments())
    input_scale, input_shift = _folded(norm)
    given: Settings = {"input_scale": input_scale, "input_shift": input_shift, "input_activation": before}
    next_norm = None if next_bn is None else _statistics(next_bn)
    if next_bn is not None and next_norm is None:
        return bn_act(ops.conv2d(x, **filters, **given), next_bn, **end.arguments())
    if next_norm is not None:
        given["scale"], filters["bias"] = _folded(next_norm, filters["bias"])
    y = ops.conv2d(x, **filters, **given, residual=residual, activation=name, out=out)
    return y if end.leaves_no_doubt(y, normalised) else end.laid_out(y, lambda: _convolved(y, x, conv, next_bn))


def linear_act(
    x: Tensor, linear: nn.Linear | Settings, *, activation: Activation = "none", in_place: bool = False
) -> Tensor:
    """``act(linear(x))``."""
    if not isinstance(linear, dict):
        return fusing.linear_act(x, linear, activation=activation)
    name = fusing._fusable_name(activation)
    if name is None:
        return _End(activation=activation).after(ops.linear(x, **linear))
    return ops.linear(x, **linear, activation=name)


def add_act(
    x: Any,
    y: Any,
    *,
    writes: str | None = None,
    activation: Activation = "none",
    in_place: bool = False,
    out: Tensor | None = None,
) -> Any:
    """``act(x + y)``."""
    end = _End(y, False, writes, activation, in_place, out)
    name = fusing._fusable_name(activation)
    tensors = isinstance(x, Tensor) and isinstance(y, Tensor)
    if name is None or fusing._is_watched() or not tensors or not _fits(y, x.shape, x, x.dtype):
        return end.after(x)
    total = ops.residual_add(x, y, activation=name, out=out)
    return total if end.leaves_no_doubt(total) else end.laid_out(total, x.stride)


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


# ---- a chain's end ---------------------------------------------------------------------------------------------------


class _End:
    """An addition and an activation, as the user wrote them."""

    __slots__ = ("activation", "in_place", "out", "residual", "residual_first", "writes")

    def __init__(
        self,
        residual: Any = None,
        residual_first: bool = False,
        writes: str | None = None,
        activation: Activation = "none",
        in_place: bool = False,
        out: Tensor | None = None,
    ) -> None:
        self.residual, self.residual_first, self.writes = residual, residual_first, writes
        self.activation, self.in_place, self.out = activation, in_place, out

    def arguments(self) -> Settings:
        return {name: getattr(self, name) for name in self.__slots__}

    def after(self, y: Any) -> Any:
        """The two on a value, one after the other."""
        residual, writes = self.residual, self.writes
        if residual is not None:
            if writes is not None:
                y = y.add_(residual) if writes == "result" else residual.add_(y)
            else:
                y = residual + y if self.residual_first else y + residual
        if self.activation == "relu" and self.in_place and self.out is None:
            return y.relu_()
        return fusing._one_by_one(y, (), None, self.activation, self.out)

    def leaves_no_doubt(self, y: Tensor, normalised: bool = False) -> bool:
        """Whether a fused operator, to which the residual is the right operand and which activates in place, has surely
        given a result of the same strides. ``normalised``: a batch norm is one of the steps that it made one.
        """
        if self.out is not None:
            return True
        residual = self.residual
        ordered = residual is not None and (self.residual_first or self.writes is not None)
        if not ordered and not normalised and not self._makes_a_new_tensor:
            return True
        if residual is None:
            return not _strides.is_ambiguous(y.shape)
        strides = y.stride()
        return (not ordered or residual.stride() == strides) and _strides.is_definite(y.shape, strides)

    @property
    def _makes_a_new_tensor(self) -> bool:
        if self.activation == "none" or self.in_place:
            return False
        return isinstance(self.activation, str) or not self.activation.inplace  # type: ignore[union-attr]

    def laid_out(self, y: Tensor, before: Callable[[], _strides.Strides | None]) -> Tensor:
        """A fused operator's result in the layout of the two, one after the other, on a value of strides ``before``."""
        strides, residual, shape = before(), self.residual, y.shape
        if strides is None or torch._C._are_functorch_transforms_active():
            return y
        if self.writes is not None:
            written = strides if self.writes == "result" else residual.stride()
            strides = written if _strides.is_dense(shape, written) else _strides.elementwise(shape, written)
        elif residual is not None:
            operands = (residual.stride(), strides) if self.residual_first else (strides, residual.stride())
            strides = _strides.elementwise(shape, *operands)
        if self._makes_a_new_tensor:
            strides = _strides.elementwise(shape, strides)
        return _strides.in_strides(y, strides)


def _convolved(y: Tensor, x: Tensor, conv: ConvLayer, bn: NormLayer | None = None) -> _strides.Strides | None:
    """Strides of ``bn(conv(x))``, whose shape is y's; None where calling a layer would do more."""
    if _filters(conv) is None:
        return None
    weight = conv["weight"] if isinstance(conv, dict) else conv.weight
    strides = _strides.of_convolution(y.shape, x.shape, x.stride(), weight)
    return strides if bn is None else _normalised(y.shape, strides, bn)


def _normalised(shape: torch.Size, strides: _strides.Strides, bn: NormLayer) -> _strides.Strides | None:
    if not isinstance(bn, dict) and not fusing._is_plain(bn, nn.BatchNorm2d, BatchNorm2d):
        return None
    return _strides.of_batch_norm(shape, strides)


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
