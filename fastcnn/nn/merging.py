"""Several 1x1 convolutions of one input as one convolution: the input is read once, and one call does the work.

The modules keep their parameters; the joined weight is a derived value, kept until one of them changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from fastcnn import ops
from fastcnn.backends.derived import PLAIN_TENSORS, derived, operations_are_replaced
from fastcnn.nn._calls import uses_batch_statistics
from fastcnn.nn.fusing import _is_plain, _is_watched
from fastcnn.nn.modules import BatchNorm2d, Conv2d
from fastcnn.ops._registration import autocasts, records_gradient

Unit = tuple[nn.Conv2d, nn.BatchNorm2d | None]
_TENSORS_A_UNIT = 6  # weight and bias of the convolution; mean, variance, weight and bias of the batch norm

_traced_as_run: ContextVar[bool] = ContextVar("fastcnn_traced_as_run", default=False)


@contextmanager
def traced_as_run() -> Iterator[None]:
    """Inside, a trace holds what a call without a tracer would run: it is for inputs of these very shapes only."""
    token = _traced_as_run.set(True)
    try:
        yield
    finally:
        _traced_as_run.reset(token)


def writes_in_place(input: Tensor, parameters: Sequence[Tensor | None]) -> bool:
    """Whether branches may write into slices of one output: no gradient, no autocast, no module hooks, and no
    tracer but in :func:`traced_as_run`.
    """
    return not (
        (operations_are_replaced() and not _traced_as_run.get())
        or _is_watched()
        or autocasts(input.device.type)
        or forward_ad._current_level >= 0
        or records_gradient((input, *parameters))
    )


def is_as_in_a_call(tensor: object) -> bool:
    """Whether it is a plain tensor, or stands for one in :func:`traced_as_run`."""
    return type(tensor) in PLAIN_TENSORS or (_traced_as_run.get() and isinstance(tensor, FakeTensor))


def can_merge(units: Sequence[Unit]) -> bool:
    """Whether 1x1 convolutions, each with its batch norm or with none, can run as one (see :func:`writes_in_place`)."""
    first_conv, first_bn = units[0]
    for conv, bn in units:
        if not _is_plain(conv, nn.Conv2d, Conv2d) or (bn is None) != (first_bn is None):
            return False
        if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding != (0, 0) or conv.groups != 1:
            return False
        if (conv.bias is None) != (first_conv.bias is None):
            return False
        if bn is not None and (not _is_plain(bn, nn.BatchNorm2d, BatchNorm2d) or uses_batch_statistics(bn)):
            return False
    return all(t is None or type(t) in PLAIN_TENSORS for t in _tensors(units))


def merged_pointwise(input: Tensor, units: Sequence[Unit], *, activation: str = "relu", out: Tensor) -> Tensor:
    """``out = cat([act(bn_i(conv_i(input))) for each unit], 1)`` by one convolution.

    (N, C, H, W) -> ``out``, (N, sum of K_i, H, W). Only where :func:`writes_in_place` and :func:`can_merge` hold.
    """
    epsilons = tuple(None if bn is None else bn.eps for _, bn in units)
    weight, scale, bias = joined(_tensors(units), epsilons)
    return ops.conv2d(input, weight, bias, scale=scale, activation=activation, out=out)


def joined(
    tensors: Sequence[Tensor | None], epsilons: tuple[float | None, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(weight, scale, bias) of convolutions side by side, kept until one of their tensors changes.

    Args:
        tensors: of each: weight, bias, and of its batch norm mean, variance, weight and bias (None without one).
        epsilons: of the batch norms; None without one. All have one, or none has.
    """

    def merge(*tensors: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # Made in normal mode, so that a later call that records gradients can save the result.
        with torch.inference_mode(False), torch.no_grad():
            return _merge(tensors, epsilons)

    first, *others = tensors
    assert first is not None
    if operations_are_replaced():
        return merge(*tensors)
    return derived(first, ("merged_pointwise", epsilons), merge, *others)


def _tensors(units: Sequence[Unit]) -> list[Tensor | None]:
    tensors: list[Tensor | None] = []
    for conv, bn in units:
        tensors += [conv.weight, conv.bias]
        tensors += [None] * 4 if bn is None else [bn.running_mean, bn.running_var, bn.weight, bn.bias]
    return tensors


def _merge(
    tensors: Sequence[Tensor | None], epsilons: Sequence[float | None]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    weights, scales, biases = [], [], []
    for i, eps in enumerate(epsilons):
        weight, bias, mean, var, gamma, beta = tensors[i * _TENSORS_A_UNIT : (i + 1) * _TENSORS_A_UNIT]
        assert weight is not None
        weights.append(weight.detach())
        if eps is not None:
            assert mean is not None
            assert var is not None
            scale, bias = ops.fold_batch_norm(mean, var, gamma, beta, eps, bias)
            scales.append(scale)
        biases.append(weight.new_zeros(len(weight)) if bias is None else bias.detach())
    without = all(eps is None for eps in epsilons) and all(bias is None for bias in tensors[1::_TENSORS_A_UNIT])
    return torch.cat(weights), torch.cat(scales) if scales else None, None if without else torch.cat(biases)
