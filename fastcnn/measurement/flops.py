"""Floating-point operations of convolutions and matrix products: two a multiply-accumulate, as direct convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastcnn.backends import Call, intercept


def conv_flops(out_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    """FLOPs of a convolution with output (N, K, P, Q) and weight (K, C / groups, R, S)."""
    return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])


def call_flops(call: Call) -> int:
    """FLOPs of one operator call; zero for all but convolutions and matrix products."""
    tensors = [a for a in call.args if isinstance(a, Tensor)]
    if call.operator == "conv2d":
        return conv_flops(tensors[0].shape, tensors[2].shape)
    if call.operator == "linear":
        return 2 * math.prod(tensors[0].shape) * tensors[1].shape[-1]
    return 0


@torch.no_grad()
def count_flops(model: nn.Module, *inputs: Any) -> int:
    """FLOPs of the convolutions and matrix products of one forward pass, in fastcnn's operators and in PyTorch's."""
    total = 0

    def count(call: Call) -> None:
        nonlocal total
        total += call_flops(call)
        call.run()

    with intercept(count), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return total + counter.get_total_flops()
