"""The accuracy rule: how wrong a result may be, measured by how wrong PyTorch's own result is.

    err(ours, float64) <= 2 * err(reference in the same dtype, float64) + tiny

with err the relative error in the Euclidean norm. A few wrong elements hardly move the norm of a large tensor, so the
largest single error, relative to the largest exact value, is held to a rule of the same form; extremes scatter more
than norms do, so its factor is 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What one rounding of a result to its dtype costs: half a unit in the last place for 16-bit types, whose arithmetic is
# fp32; two units for fp32 and 45 for float64, whose sums round on the way and may be summed in any order.
TINY = {torch.float64: 1e-14, torch.float32: 2.5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}

NORM_FACTOR = 2.0
LARGEST_FACTOR = 4.0

# The one stated exception: an fp32 layer computed by a fast algorithm (Winograd, Strassen).
FAST_ALGORITHM_ALLOWANCE = 1e-5


@dataclass(frozen=True)
class Error:
    """Relative errors against float64: in the Euclidean norm, and the largest one relative to the largest value."""

    norm: float
    largest: float


@dataclass(frozen=True)
class Judgement:
    """Errors of our result and of the reference's, and what ours may be."""

    ours: Error
    reference: Error
    bound: Error

    @property
    def passed(self) -> bool:
        return self.ours.norm <= self.bound.norm and self.ours.largest <= self.bound.largest

    @property
    def share(self) -> float:
        """Our error as a share of its bound, of the two the one nearer to it; above 1 is wrong."""
        if self.ours.norm == float("inf") and self.bound.norm == float("inf"):
            return 1.0
        return max(self.ours.norm / self.bound.norm, self.ours.largest / self.bound.largest)


def relative_error(actual: Tensor, exact: Tensor) -> Error:
    """Errors of ``actual`` against a float64 result of the same shape.

    Both are infinite where a NaN or an infinity of one stands for something else in the other.
    """
    if actual.numel() == 0:
        return Error(0.0, 0.0)
    actual, exact = actual.detach().double(), exact.detach()
    difference = actual - exact
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    difference.masked_fill_(same, 0.0)
    finite = exact.masked_fill(~exact.isfinite(), 0.0)
    norm, largest = difference.norm().item(), difference.abs().max().item()
    if not torch.isfinite(difference).all():
        return Error(float("inf"), float("inf"))
    scale, peak = finite.norm().item(), finite.abs().max().item()
    return Error(norm / scale if scale > 0 else norm, largest / peak if peak > 0 else largest)


def judge(ours: Tensor, reference: Tensor, exact: Tensor, *, allowance: float = 0.0) -> Judgement:
    """Apply the rule to one result.

    Args:
        ours, reference: results in the same dtype, of the same shape.
        exact: the float64 result.
        allowance: a relative error that is granted in any case.
    """
    tiny = TINY[ours.dtype]
    theirs = relative_error(reference, exact)
    bound = Error(
        max(NORM_FACTOR * theirs.norm + tiny, allowance),
        max(LARGEST_FACTOR * theirs.largest + tiny, allowance),
    )
    return Judgement(relative_error(ours, exact), theirs, bound)
