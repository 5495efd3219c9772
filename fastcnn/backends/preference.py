"""Which backends serve a call when nobody chose and the tuner never saw it: tables that a measurement may change.

`DEFAULT_ORDER` names, for a kind of device, the first backend that covers the case; the reference is always there at
the end. `RULES` refines it for an operator, by what is known of the call: its dtype and the arguments of the kernel
contract (shapes, groups, activation). The first row that applies counts. It is asked on every call, so a row must
look at a few numbers and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

DEFAULT_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}


class Rule(NamedTuple):
    """Calls that are better served in another order than their device's."""

    applies: Callable[[torch.dtype, tuple[Any, ...]], bool]  # of the call's dtype and the contract's arguments
    order: tuple[str, ...]


def _has_16_bits(dtype: torch.dtype, args: tuple[Any, ...]) -> bool:
    return dtype.itemsize == 2


_CUDA_FIRST = (Rule(_has_16_bits, ("cuda", "triton")),)

# By (kind of device, operator). Measured on an H100 in bf16 (docs/performance-gpu.md): the CUDA kernels are ahead of
# the Triton ones on nearly every convolution and where a result is small; Triton's where only bandwidth counts. The two
# are level in max_pool2d, but CUDA kernels can begin early in a frozen model.
RULES: dict[tuple[str, str], Sequence[Rule]] = {
    ("cuda", "conv2d"): _CUDA_FIRST,
    ("cuda", "linear"): _CUDA_FIRST,
    ("cuda", "batch_statistics"): _CUDA_FIRST,
    ("cuda", "local_response_norm"): _CUDA_FIRST,
    ("cuda", "max_pool2d"): _CUDA_FIRST,
    ("cuda", "avg_pool2d"): _CUDA_FIRST,
    ("cuda", "adaptive_avg_pool2d"): _CUDA_FIRST,
}


def order(operator: str, device_type: str, dtype: torch.dtype, args: tuple[object, ...]) -> tuple[str, ...]:
    """The backends to ask for one call, in this order; those that cannot run here included."""
    rules = RULES.get((device_type, operator))
    if rules is not None:
        for rule in rules:
            if rule.applies(dtype, args):
                return rule.order
    return DEFAULT_ORDER.get(device_type, ())
