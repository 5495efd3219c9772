"""Several modules as one fused operator call, with the results of calling them one after the other.

The modules stay where their owner keeps them (``conv1``, ``bn1``, ``relu``): state dicts, optimizers and checkpoints
do not change. A module that was given hooks, a parametrization (weight_norm, spectral_norm, pruning), another
``forward`` or another type is never swallowed: then the modules are called one by one, and what was added to them runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.nn.modules.module as _module
from torch import Tensor, nn

from fastcnn import ops
from fastcnn.nn._calls import (
    call_batch_norm,
    call_conv2d,
    folded_batch_norm,
    scaled_convolution,
    uses_batch_statistics,
)
from fastcnn.nn._sites import Fused, learn, repeat
from fastcnn.nn.modules import BatchNorm2d, Conv2d, Linear
from fastcnn.ops._registration import autocasts

Activation = str | nn.Module

_GLOBAL_PRE, _GLOBAL_POST = _module._global_forward_pre_hooks, _module._global_forward_hooks
_GLOBAL_BACKWARD_PRE, _GLOBAL_BACKWARD = _module._global_backward_pre_hooks, _module._global_backward_hooks


def _is_plain(module: nn.Module, torch_type: type[nn.Module], own_type: type[nn.Module]) -> bool:
    """Whether calling the module would run its class's forward and nothing else."""
    kind = type(module)
    return (kind is own_type or kind is torch_type) and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _is_watched() -> bool:
    """Whether global module hooks (profilers, FLOP counters) want to see every module's call."""
    return bool(_GLOBAL_POST or _GLOBAL_PRE or _GLOBAL_BACKWARD or _GLOBAL_BACKWARD_PRE)


def _fusable_name(activation: Activation) -> str | None:
    """The epilogue's name for an activation, or None when it must be called as a module."""
    if isinstance(activation, str):
        return activation
    return "relu" if _is_plain(activation, nn.ReLU, nn.ReLU) else None


def _dtype_of_convolution(x: Tensor) -> torch.dtype:
    """Of a convolution's result. A residual of another dtype, as under autocast, is added by PyTorch's ``+``, which
    gives the wider one.
    """
    device_type = x.device.type
    if x.dtype == torch.float64 or not autocasts(device_type):
        return x.dtype
    return torch.get_autocast_dtype(device_type)


def _one_by_one(
    input: Tensor,
    modules: tuple[nn.Module, ...],
    residual: Tensor | None,
    activation: Activation,
    out: Tensor | None,
    branch_scale: float = 1.0,
) -> Tensor:
    for module in modules:
        input = module(input)
    if branch_scale != 1:
        input = input * branch_scale
    if residual is not None:
        input = input + residual
    if isinstance(activation, nn.Module):
        input = activation(input)
    elif activation == "relu":
        input = F.relu(input)
    elif activation != "none":
        raise ValueError(f"activation must be 'none', 'relu' or a module, is {activation!r}")
    return input if out is None else out.copy_(input)


def conv_bn(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    *,
    residual: Tensor | None = None,
    branch_scale: float = 1.0,
    activation: Activation = "relu",
    out: Tensor | None = None,
) -> Tensor:
    """``act(branch_scale * bn(conv(x)) + residual)``.

    With running statistics (eval mode) this is one fused convolution, whose epilogue is
    ``act(sums * scale + shift + residual)`` with ``scale = gamma / sqrt(var + eps)``. With batch statistics (train
    mode) it is a convolution, then one batch norm with residual and activation fused in. Gradients flow in both.

    Args:
        x: (N, C, H, W).
        conv, bn: ``torch.nn`` or ``fastcnn.nn`` modules.
        residual: (N, K, P, Q), added before the activation.
        branch_scale: multiplies what the residual is added to, by way of scale and shift: a survival probability.
        activation: ``"relu"``, ``"none"`` or a module: an ``nn.ReLU`` is fused, any other is called.
        out: (N, K, P, Q) to write to, for example a channel slice of a wider tensor; no gradient then.

    Returns:
        (N, K, P, Q); ``out`` if given.
    """
    name = _fusable_name(activation)
    if _is_watched() or not (_is_plain(conv, nn.Conv2d, Conv2d) and _is_plain(bn, nn.BatchNorm2d, BatchNorm2d)):
        return _one_by_one(x, (conv, bn), residual, activation, out, branch_scale)
    if name is None:
        y = conv_bn(x, conv, bn, residual=residual, branch_scale=branch_scale, activation="none")
        return _one_by_one(y, (), None, activation, out)
    if residual is not None and residual.dtype != _dtype_of_convolution(x):
        y = conv_bn(x, conv, bn, branch_scale=branch_scale, activation="none")
        return _one_by_one(y, (), residual, activation, out)
    if uses_batch_statistics(bn):
        y = call_conv2d(x, conv, conv.bias)
        if branch_scale != 1:
            return _one_by_one(call_batch_norm(y, bn), (), residual, activation, out, branch_scale)
        return call_batch_norm(y, bn, residual=residual, activation=name, out=out)
    fused = Fused(conv, bn, None, branch_scale, name, "none")
    if (known := repeat(fused, x, residual, out)) is not None:
        return known
    scale, shift = folded_batch_norm(bn, conv.bias, branch_scale)
    y = call_conv2d(x, conv, shift, scale=scale, residual=residual, activation=name, out=out)
    learn(fused, x, residual, out, (scale, shift))
    return y


def conv_act(
    x: Tensor,
    conv: nn.Conv2d,
    *,
    residual: Tensor | None = None,
    branch_scale: float = 1.0,
    activation: Activation = "relu",
    out: Tensor | None = None,
) -> Tensor:
    """``act(branch_scale * conv(x) + residual)`` in one call: (N, C, H, W) -> (N, K, P, Q).

    Arguments as :func:`conv_bn`.
    """
    name = _fusable_name(activation)
    if _is_watched() or name is None or not _is_plain(conv, nn.Conv2d, Conv2d):
        return _one_by_one(x, (conv,), residual, activation, out, branch_scale)
    fused = Fused(conv, None, None, branch_scale, name, "none")
    if (known := repeat(fused, x, residual, out)) is not None:
        return known
    scale, bias = scaled_convolution(conv, branch_scale)
    if residual is not None and residual.dtype != _dtype_of_convolution(x):
        return _one_by_one(call_conv2d(x, conv, bias, scale=scale), (), residual, activation, out)
    y = call_conv2d(x, conv, bias, scale=scale, residual=residual, activation=name, out=out)
    learn(fused, x, residual, out, (scale, bias))
    return y


def bn_act_conv(
    x: Tensor,
    bn: nn.BatchNorm2d,
    conv: nn.Conv2d,
    *,
    preactivation: Activation = "relu",
    next_bn: nn.BatchNorm2d | None = None,
    residual: Tensor | None = None,
    activation: Activation = "none",
    out: Tensor | None = None,
) -> Tensor:
    """``act(next_bn(conv(preactivation(bn(x)))) + residual)``: the order of pre-activation and dense networks.

    With running statistics (eval mode) this is one convolution: ``bn`` and its ReLU are the prologue, applied to
    values as they are read, and ``next_bn`` is part of the epilogue. With batch statistics (train mode) each batch norm
    is a call of its own. Gradients flow in both.

    Args:
        x: (N, C, H, W); a channel slice of a wider tensor is read in place.
        bn, conv: ``torch.nn`` or ``fastcnn.nn`` modules.
        preactivation: what follows ``bn``, and
        activation: what follows the addition: ``"relu"``, ``"none"`` or a module, as in :func:`conv_bn`.
        next_bn: a batch norm right after the convolution, if there is one.
        residual, out: as in :func:`conv_bn`.

    Returns:
        (N, K, P, Q); ``out`` if given.
    """
    before, after = _fusable_name(preactivation), _fusable_name(activation)
    if (
        before is None
        or _is_watched()
        or not (_is_plain(conv, nn.Conv2d, Conv2d) and _is_plain(bn, nn.BatchNorm2d, BatchNorm2d))
        or uses_batch_statistics(bn)
        or x.dtype != _dtype_of_convolution(x)  # autocast rounds the convolution's input, not the batch norm's
    ):
        x = bn_act(x, bn, activation=preactivation)
        if next_bn is None:
            return conv_act(x, conv, residual=residual, activation=activation, out=out)
        return conv_bn(x, conv, next_bn, residual=residual, activation=activation, out=out)

    epilogue_fits = after is not None and (residual is None or residual.dtype == x.dtype)
    if next_bn is not None:
        epilogue_fits &= _is_plain(next_bn, nn.BatchNorm2d, BatchNorm2d) and not uses_batch_statistics(next_bn)
    fused = Fused(conv, next_bn, bn, 1.0, after or "none", before)
    if epilogue_fits and (known := repeat(fused, x, residual, out)) is not None:
        return known
    input_scale, input_shift = folded_batch_norm(bn)
    scale, shift = None, conv.bias
    if next_bn is not None and epilogue_fits:
        scale, shift = folded_batch_norm(next_bn, conv.bias)
    y = call_conv2d(
        x, conv, shift, scale=scale, residual=residual if epilogue_fits else None,
        activation=after if epilogue_fits and after is not None else "none",
        input_scale=input_scale, input_shift=input_shift, input_activation=before, out=out if epilogue_fits else None,
    )  # fmt: skip
    if epilogue_fits:
        learn(fused, x, residual, out, (scale, shift), (input_scale, input_shift))
        return y
    if next_bn is None:
        return _one_by_one(y, (), residual, activation, out)
    return bn_act(y, next_bn, residual=residual, activation=activation, out=out)


def bn_act(
    x: Tensor,
    bn: nn.BatchNorm2d,
    *,
    residual: Tensor | None = None,
    activation: Activation = "relu",
    out: Tensor | None = None,
) -> Tensor:
    """``act(bn(x) + residual)`` in one call, both modes: (N, C, H, W) -> the same. Arguments as :func:`conv_bn`."""
    name = _fusable_name(activation)
    if _is_watched() or name is None or not _is_plain(bn, nn.BatchNorm2d, BatchNorm2d):
        return _one_by_one(x, (bn,), residual, activation, out)
    if residual is not None and residual.dtype != x.dtype:
        return _one_by_one(call_batch_norm(x, bn), (), residual, activation, out)
    return call_batch_norm(x, bn, residual=residual, activation=name, out=out)


def linear_act(x: Tensor, linear: nn.Linear, *, activation: Activation = "relu", out: Tensor | None = None) -> Tensor:
    """``act(linear(x))`` in one call: (..., in_features) -> (..., out_features)."""
    name = _fusable_name(activation)
    if _is_watched() or name is None or not _is_plain(linear, nn.Linear, Linear):
        return _one_by_one(x, (linear,), None, activation, out)
    return ops.linear(x, linear.weight, linear.bias, activation=name, out=out)
