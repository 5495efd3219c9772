"""The accuracy rule for a network and its neighbours (tests/support/neighbours.py): luck passes, mistakes do not."""

from __future__ import annotations

import copy

import pytest
import torch
from support.accuracy import assert_accurate, relative_error
from support.neighbours import NEAR, Results, assert_accurate_here_or_nearby, neighbour
from torch import Tensor, nn


class OneValueLeft(nn.Module):
    """relu(0.1531 - 0.0442 - 0.0963): every sum is rounded, and little is left."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.1531, -0.0442]))
        self.bias = nn.Parameter(torch.tensor(-0.0963))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu((x * self.weight).sum() + self.bias)


X = torch.tensor([0.9973, 1.0038])


def results(model: nn.Module, x: Tensor, mistake: float = 0.0) -> Results:
    """Ours: the same sum in another order, with a mistake in the first factor."""
    weight, bias = model.weight, model.bias
    ours = torch.relu((x[1] * weight[1] + bias) + x[0] * weight[0] * (1 + mistake))
    return Results([ours], [model(x)], [copy.deepcopy(model).double()(x.double())])


@torch.no_grad()
def test_two_orders_of_a_sum_are_as_accurate_where_one_value_alone_breaks_the_rule() -> None:
    model = OneValueLeft()
    broken = 0
    for seed in range(200):
        near, x = neighbour(model, X, 1000 + seed)
        (ours,), (theirs,), (exact,) = results(near, x)
        try:
            assert_accurate(ours, theirs, exact)
        except AssertionError:
            broken += 1
        if seed < 40:
            assert_accurate_here_or_nearby(results, near, x)
    assert broken > 10  # luck: the rule by itself says nothing of one value


@pytest.mark.parametrize("mistake", [1e-6, -1e-5, 1e-3])
@torch.no_grad()
def test_mistakes_are_found(mistake: float) -> None:
    with pytest.raises(AssertionError, match="relative error"):
        assert_accurate_here_or_nearby(lambda model, x: results(model, x, mistake), OneValueLeft(), X)


@torch.no_grad()
def test_a_mistake_at_the_network_alone_is_found() -> None:
    model = OneValueLeft()

    def once(near: nn.Module, x: Tensor) -> Results:
        return results(near, x, 1e-5 if near is model else 0.0)

    with pytest.raises(AssertionError, match="relative error"):
        assert_accurate_here_or_nearby(once, model, X)


@torch.no_grad()
def test_neighbours_are_near_and_leave_the_network_alone() -> None:
    model = OneValueLeft()
    before = copy.deepcopy(model.state_dict())
    near, x = neighbour(model, X, 0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for changed, given in ((x, X), (near.weight, model.weight), (near.bias, model.bias)):
        assert 0 < relative_error(changed, given.double()) <= 1.01 * NEAR
