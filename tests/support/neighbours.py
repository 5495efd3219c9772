"""The accuracy rule for results that are few numbers left of larger ones: applied to a network and its neighbours.

The rule compares two errors, ours and PyTorch's. Over many rounded values each is close to what is to be expected, and
a factor of 2 says something. But a small network's result may be one value, left by a ReLU of `0.153 - 0.044 - 0.096`.
Then each error is a single draw, enlarged by the cancellation. Of two draws from one normal distribution one exceeds
twice the other in 30 % of cases, and one of 5 sigma comes up among a million values: nothing is wrong with either.

What is to be expected shows when the draw is repeated. A neighbour of a network has its parameters, statistics and
inputs changed by up to NEAR: a thousand times rounding, so every rounding in it is another, and small enough that the
same terms cancel as before. Ours, PyTorch's and float64's results of a network and its NEIGHBOURS are put together, and
the rule holds for them as one result, with its own factor and its own `tiny`. A mistake is made at the neighbours too,
and counts in full; one made at the network alone is found when it is 16 times (the root of 65, doubled) PyTorch's
rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from support.accuracy import TINY, assert_accurate, relative_error

NEAR = 2.0**-14
NEIGHBOURS = 64  # with one value each: twice the other's error by chance in one of ten million


class Results(NamedTuple):
    """Of one network, in the same order."""

    ours: Sequence[Tensor]
    theirs: Sequence[Tensor]
    exact: Sequence[Tensor]


def neighbour(model: nn.Module, x: Tensor, seed: int) -> tuple[nn.Module, Tensor]:
    """A copy of the model and of its input, off by a relative NEAR at most in every value."""
    generator = torch.Generator().manual_seed(seed)
    model, x = copy.deepcopy(model), x.clone()
    with torch.no_grad():
        for t in (x, *model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.mul_(1 + NEAR * (2 * torch.rand(t.shape, generator=generator) - 1))
    return model, x


def assert_accurate_here_or_nearby(
    compute: Callable[[nn.Module, Tensor], Results], model: nn.Module, x: Tensor
) -> Results:
    """Each result keeps to the accuracy rule: itself or, if not, together with its neighbours. Integers are equal.

    `compute` leaves the model as it was, and computes the same at each call.
    """
    here = compute(model, x)
    doubtful = []
    for i, (ours, theirs, exact) in enumerate(zip(*here, strict=True)):
        if not ours.is_floating_point():
            assert torch.equal(ours, theirs)
        elif relative_error(ours, exact) > 2 * relative_error(theirs, exact) + TINY[ours.dtype]:
            doubtful.append(i)
        else:
            assert_accurate(ours, theirs, exact)
    if doubtful:
        all_results = [here, *(compute(*neighbour(model, x, seed)) for seed in range(NEIGHBOURS))]
        for i in doubtful:
            assert_accurate(*(torch.stack([one[side][i] for one in all_results]) for side in range(3)))
    return here
