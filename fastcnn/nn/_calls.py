"""What a torch.nn module computes, on fastcnn's operators, read from the module's own parameters and settings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn import ops
from fastcnn.backends.derived import PLAIN_TENSORS, derived, operations_are_replaced


def call_conv2d(
    input: Tensor,
    conv: nn.Conv2d,
    bias: Tensor | None,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    input_activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """``act(conv(pro(input)) * scale + bias + residual)``; ``conv.bias`` counts only when passed as ``bias``."""
    padding: str | tuple[int, ...] = conv.padding
    if conv.padding_mode != "zeros":  # these repeat values of the input: the prologue may come after them
        input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = (0, 0)
    return ops.conv2d(
        input, conv.weight, bias, conv.stride, padding, conv.dilation, conv.groups,
        scale=scale, residual=residual, activation=activation, input_scale=input_scale, input_shift=input_shift,
        input_activation=input_activation, out=out,
    )  # fmt: skip


def scaled_convolution(conv: nn.Conv2d, factor: float) -> tuple[Tensor | None, Tensor | None]:
    """(scale, bias), each (K,) or None, with which :func:`call_conv2d` gives ``factor * conv(input)``."""
    if factor == 1:
        return None, conv.bias
    weight = conv.weight
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scale = torch.full(weight.shape[:1], factor, dtype=wide, device=weight.device)
    return scale, None if conv.bias is None else conv.bias.to(wide) * factor


def uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    """Whether the module normalises with its batch's statistics: in train mode, or when it keeps no running ones."""
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def call_batch_norm(
    input: Tensor,
    bn: nn.BatchNorm2d,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """``act(bn(input) + residual)``; in train mode the running statistics are updated as the module would."""
    if not uses_batch_statistics(bn):
        scale, shift = folded_batch_norm(bn)
        return ops.channel_affine(input, scale, shift, residual=residual, activation=activation, out=out)
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:  # a plain average over all batches so far
            momentum = 1.0 / float(bn.num_batches_tracked)
    update = bn.training and bn.track_running_stats
    return ops.batch_norm(
        input, bn.running_mean if update else None, bn.running_var if update else None, bn.weight, bn.bias,
        True, momentum, bn.eps, residual=residual, activation=activation, out=out,
    )  # fmt: skip


def folded_batch_norm(
    bn: nn.BatchNorm2d, conv_bias: Tensor | None = None, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C,), of a batch norm with running statistics.

    ``factor * bn(x + conv_bias) = x * scale + shift``; a factor other than 1 is a survival probability.

    Kept until one of the five tensors (or eps) changes, without touching the module: nothing of it reaches state
    dicts, copies or pickles. Computed afresh, by differentiable operations, when a gradient is wanted and under tracers
    and transforms.
    """
    parameters, buffers, eps = bn._parameters, bn._buffers, bn.eps

    def fold(
        mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, conv_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert mean is not None
        assert var is not None
        scale, shift = ops.fold_batch_norm(mean, var, weight, bias, eps, conv_bias)
        return (scale, shift) if factor == 1 else (scale * factor, shift * factor)

    if operations_are_replaced() or not ("weight" in parameters and "running_mean" in buffers):
        return fold(bn.running_mean, bn.running_var, bn.weight, bn.bias, conv_bias)
    # Read past nn.Module.__getattr__, which costs more than the rest of this function.
    mean, var = buffers["running_mean"], buffers["running_var"]
    weight, bias = parameters["weight"], parameters["bias"]
    assert mean is not None
    given = (mean, var, weight, bias, conv_bias)
    if torch.is_grad_enabled():
        for tensor in given:
            if tensor is not None and tensor.requires_grad:
                return fold(*given)
    for tensor in given:
        if tensor is not None and type(tensor) not in PLAIN_TENSORS:
            return fold(*given)

    def fold_for_keeping(mean: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        # Made in normal mode, so that a later call that records gradients can save the vectors.
        with torch.inference_mode(False), torch.no_grad():
            return fold(mean, *others)

    return derived(mean, ("folded_batch_norm", eps, factor), fold_for_keeping, var, weight, bias, conv_bias)
