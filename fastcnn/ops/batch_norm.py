"""batch_norm: batch normalisation (Ioffe and Szegedy, 2015), with what usually follows it.

    y = act((x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c] + residual)

In training mean and var are the batch's own: `fastcnn::batch_statistics` computes them, and `fastcnn::batch_norm`
applies them in this form; folded into one scale and one shift, a mean far from zero would cost digits of every value.
In evaluation they are the running statistics, folded: :func:`~fastcnn.ops.channel_affine`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn.backends import cpp
from fastcnn.ops._arguments import (
    kernel_vector,
    require_activation,
    require_floating,
    require_number,
    require_optional_tensors,
    require_tensor,
    require_vector,
)
from fastcnn.ops._layout import overlaps_itself
from fastcnn.ops._registration import Operator, Unread, records_gradient
from fastcnn.ops.batch_statistics import OPERATOR as STATISTICS
from fastcnn.ops.channel_affine import allocate as allocate_affine
from fastcnn.ops.channel_affine import channel_affine, over_channels
from fastcnn.ops.channel_affine import fill as fill_affine
from fastcnn.ops.channel_affine import finish as finish_affine

# `statistics` is (2, C), of fastcnn::batch_statistics for this very input, whose gradient goes through it as well.
SIGNATURE = "Tensor input, Tensor statistics, Tensor? weight, Tensor? bias, float eps, Tensor? residual, str activation"


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm`, with residual addition and ReLU fused into it.

    Args:
        input: (N, C, ...); fp32, bf16 or fp16 run on fastcnn's kernels.
        running_mean, running_var: (C,), in the input's dtype or fp32. Used in evaluation; updated in place in training
            (with the unbiased variance), where they may be None.
        weight, bias: (C,), in the input's dtype or fp32; None for 1 and 0.
        training: normalise by the batch's own mean and biased variance.
        momentum: how much of the batch's statistics goes into the running ones.
        eps: added to the variance.
        residual: the input's shape and dtype, added before the activation.
        activation: ``"none"`` or ``"relu"``.
        out: where to write: the input's shape and dtype; may be ``input`` or ``residual`` itself. No gradient can be
            recorded then.

    Returns:
        The input's shape, in the memory layout that PyTorch would choose; ``out`` if given.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, device or dtype; the message names it. ValueError also in
            training with a single value per channel, and in evaluation without running statistics.
    """
    require_tensor(input, "input")
    require_optional_tensors(
        running_mean=running_mean, running_var=running_var, weight=weight, bias=bias, residual=residual, out=out
    )
    require_activation(activation)
    require_number(eps, "eps")
    if input.dim() < 2 and input.numel() > 0:
        raise ValueError(f"input must have shape (N, C, ...), has {tuple(input.shape)}")
    if training:
        _require_more_than_one_value(input)
        require_number(momentum, "momentum")
        if eps <= 0:
            raise ValueError(f"eps must be positive in training, is {eps}")
        if (running_mean is None) != (running_var is None):
            raise ValueError("running_mean and running_var must both be given, or neither")
        if records_gradient((running_mean, running_var)):
            raise ValueError("running_mean and running_var are updated in training: they must not require grad")
        for name, vector in (("running_mean", running_mean), ("running_var", running_var)):
            if vector is not None and overlaps_itself(vector):
                raise ValueError(
                    f"{name} is updated in training: it must not overlap itself, has strides {vector.stride()}"
                )
    elif running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var must be given in evaluation (training=False)")
    channels = input.shape[1] if input.dim() > 1 else 0
    for name, vector in {
        "running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias,
    }.items():  # fmt: skip
        require_vector(vector, name, channels, input)
    if input.dim() < 2:
        return input.clone()  # PyTorch accepts an empty vector
    if not training:
        assert running_mean is not None
        assert running_var is not None
        scale, shift = fold_batch_norm(running_mean, running_var, weight, bias, eps)
        return channel_affine(input, scale, shift, residual=residual, activation=activation, out=out)

    def normalise(x: Tensor, added: Tensor | None, y: Tensor | None) -> Tensor:
        statistics = STATISTICS(x.detach())
        if x.numel() > 0:
            _update(running_mean, running_var, statistics, x.numel() // x.shape[1], momentum)
        return OPERATOR(x, statistics, weight, bias, eps, added, activation, out=y)

    return over_channels(normalise, input, residual=residual, out=out)


def fold_batch_norm(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scale and shift that batch norm with fixed statistics amounts to, for a convolution's epilogue.

    ``scale = weight / sqrt(running_var + eps)``, ``shift = bias + (conv_bias - running_mean) * scale``. Differentiable.

    Args:
        running_mean, running_var: (C,).
        weight, bias: (C,), or None for 1 and 0.
        eps: added to the variance.
        conv_bias: (C,), the bias of the convolution before it, or None for 0.

    Returns:
        scale, shift: (C,) each, in fp32 (float64 when a statistic or parameter is float64).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, device or dtype; the message names it.
    """
    require_tensor(running_mean, "running_mean")
    require_tensor(running_var, "running_var")
    require_optional_tensors(weight=weight, bias=bias, conv_bias=conv_bias)
    require_number(eps, "eps")
    if eps < 0:
        raise ValueError(f"eps must not be negative, is {eps}")
    for name, vector in {
        "running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias,
        "conv_bias": conv_bias,
    }.items():  # fmt: skip
        if vector is None:
            continue
        require_floating(vector, name)
        if vector.dim() != 1 or vector.shape != running_var.shape:
            raise ValueError(
                f"{name} must have shape (C,), as running_var {tuple(running_var.shape)}, has {tuple(vector.shape)}"
            )
        if vector.device != running_var.device:
            raise ValueError(f"{name} must be on running_var's device {running_var.device}, is on {vector.device}")
    vectors = (running_mean, running_var, weight, bias, conv_bias)
    wide = torch.float64 if any(v is not None and v.dtype == torch.float64 for v in vectors) else torch.float32
    mean, var, weight, bias, conv_bias = (None if v is None else v.to(wide) for v in vectors)
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    if conv_bias is not None:
        mean = mean - conv_bias
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return scale, shift


def _require_more_than_one_value(input: Tensor) -> None:
    """PyTorch's check, in its words: with one value per channel the variance says nothing."""
    count = input.shape[0]
    for size in input.shape[2:]:
        count = count * size
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")


def _update(
    running_mean: Tensor | None, running_var: Tensor | None, statistics: Tensor, count: int, momentum: float
) -> None:
    """running = (1 - momentum) * running + momentum * batch, with the unbiased variance."""
    mean, var = statistics.unbind(0)
    for running, batch, share in (
        (running_mean, mean, momentum), (running_var, var, momentum * (count / (count - 1))),
    ):  # fmt: skip
        if running is None:
            continue
        if running.dtype in (torch.float32, torch.float64):
            running.mul_(1 - momentum).add_(batch, alpha=float(share))
        else:  # rounded once
            running.copy_(running.to(batch.dtype) * (1 - momentum) + batch * share)


def _allocate(
    input: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    out = allocate_affine(input, weight, bias, residual, activation)
    if tuple(statistics.shape) != (2, input.shape[1]) or statistics.device != input.device:
        raise ValueError(f"statistics must have shape (2, {input.shape[1]}) on the input's device")
    return out


def _fill(
    out: Tensor,
    input: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> None:
    narrow = torch.float64 if out.dtype == torch.float64 else torch.float32
    if out.device.type == "cpu" and statistics.dtype == torch.float64 != narrow:
        centre, scale, shift = cpp.batch_norm_vectors(
            statistics.contiguous(), kernel_vector(weight), kernel_vector(bias), eps
        )
        fill_affine(out, input, scale, shift, residual, activation, centre)
    else:  # the mean has no digits beyond those of the centre
        statistics = statistics.to(narrow)
        centre = statistics[0]
        scale = torch.rsqrt(statistics[1] + eps)
        if weight is not None:
            scale = scale * weight
        fill_affine(out, input, scale, bias, residual, activation, centre)


def _backward(
    grad: Tensor,
    out: Tensor | None,
    needs: Sequence[bool],
    input: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Unread | None,
    eps: float,
    residual: Unread | None,
    activation: str,
) -> list[Tensor | None]:
    grads: list[Tensor | None] = [None] * 7
    if activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    if residual is not None and needs[5]:
        grads[5] = grad
    want_bias = bias is not None and needs[3]
    want_weight = weight is not None and needs[2]
    if not (needs[0] or want_weight or want_bias):
        return grads
    if input.numel() == 0:  # ATen divides by the number of values
        grads[0] = torch.zeros_like(input) if needs[0] else None
        if weight is not None and want_weight:
            grads[2] = torch.zeros_like(weight)
        if bias is not None and want_bias:
            grads[3] = torch.zeros_like(statistics[0], dtype=bias.dtype)
        return grads
    # ATen wants all its vectors in one dtype, fp32 for what is narrower.
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    wide_weight = None if weight is None else weight.to(wide)
    mean, inverse_deviation = statistics[0].to(wide), torch.rsqrt(statistics[1] + eps).to(wide)
    grad_input, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad, input, wide_weight, None, None, mean, inverse_deviation, True, eps, [needs[0], want_weight, want_bias]
    )
    grads[0] = grad_input if needs[0] else None
    if weight is not None and want_weight:
        grads[2] = grad_weight.to(weight.dtype)
    if bias is not None and want_bias:
        grads[3] = grad_bias.to(bias.dtype)
    return grads


def _finish(
    out: Tensor,
    input: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    return finish_affine(out, input, residual)


OPERATOR = Operator(
    "batch_norm",
    SIGNATURE,
    allocate=_allocate,
    finish=_finish,
    fill=_fill,
    backward=_backward,
    unread=(3, 5),
    in_place=True,
)
