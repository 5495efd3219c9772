"""Small random networks, optimized and not: branches, sums, concats, shared layers, in-place operators, both modes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn

import fastcnn

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

C = 4
Step = tuple[str, int, int]  # what, and the values it reads, counted back from the last


class RandomNet(nn.Module):
    """A program of steps on a list of values, each (N, C, H, W)."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        torch.manual_seed(0)
        # Three of each, drawn by number: several steps may share one.
        self.conv = nn.ModuleList(nn.Conv2d(C, C, k, padding=k // 2, bias=k == 1) for k in (3, 1, 3))
        self.bn = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(3))
        self.join = nn.Conv2d(2 * C, C, 1, bias=False)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.steps = steps
        randomise_batch_norms(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for what, i, j in self.steps:
            a, b = values[-1 - i % len(values)], values[-1 - j % len(values)]
            values.append(STEPS[what](self, a, b, j))
        return values[1:]


def _iadd(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    a += b
    return a


def _written_between(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    y = m.conv[n % 3](a)
    b.mul_(0.5)
    return F.relu(m.bn[n % 3](y) + a)


STEPS: dict[str, Callable[[Any, Tensor, Tensor, int], Tensor]] = {
    "conv": lambda m, a, b, n: m.conv[n % 3](a),
    "bn": lambda m, a, b, n: m.bn[n % 3](a),
    "conv-bn": lambda m, a, b, n: m.bn[n % 3](m.conv[n % 3](a)),
    "conv-bn-relu": lambda m, a, b, n: m.relu_(m.bn[n % 3](m.conv[n % 3](a))),
    "bn-relu-conv": lambda m, a, b, n: m.conv[n % 3](F.relu(m.bn[n % 3](a))),
    "relu": lambda m, a, b, n: m.relu(a),
    "relu_": lambda m, a, b, n: m.relu_(a),
    "relu-method_": lambda m, a, b, n: a.relu_(),
    "add": lambda m, a, b, n: a + b,
    "iadd": _iadd,
    "torch.add": lambda m, a, b, n: torch.add(a, b),
    "residual": lambda m, a, b, n: F.relu(m.bn[n % 3](m.conv[n % 3](a)) + b),
    "scale_": lambda m, a, b, n: a.mul_(0.5),
    "cat": lambda m, a, b, n: m.join(torch.cat([a, b], 1)),
    "written-between": _written_between,
    "view_": lambda m, a, b, n: a[:, :2].mul_(0.5).repeat(1, 2, 1, 1),
    "dropout": lambda m, a, b, n: F.dropout(a, 0.3, m.training),
    "max": lambda m, a, b, n: F.max_pool2d(a, 3, 1, 1),
    "average": lambda m, a, b, n: F.avg_pool2d(a, 3, 1, 1),
}

steps = st.lists(
    st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=7
)
sizes = st.tuples(st.integers(1, 3), st.just(C), st.integers(2, 7), st.integers(2, 7))


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs in eval, train and eval mode, what became of the input, and the buffers."""
    found: list[Tensor] = []
    for training in (False, True, False):
        given = x.to(model.join.weight.dtype, copy=True)
        torch.manual_seed(1)
        found += [t.clone() for t in model.train(training)(given)] + [given]
    return [*found, *(b for b in model.buffers())]


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(steps=steps, size=sizes)
@torch.no_grad()
def test_the_same_results(steps: list[Step], size: tuple[int, ...]) -> None:
    model = RandomNet(steps)
    x = torch.randn(size, generator=torch.Generator().manual_seed(2))
    # Where nothing is left of a value, rounding is all there is to compare.
    exact = run(copy.deepcopy(model).double(), x)
    hypothesis.assume(all(t.isfinite().all() and t.abs().max() < 1e4 for t in exact))
    optimized = fastcnn.optimize(model)
    assert not any(entry.module == "(model)" for entry in fastcnn.report(optimized).left)  # it was traced
    for ours, theirs, precise in zip(run(optimized, x), run(model, x), exact, strict=True):
        if ours.is_floating_point():
            assert_accurate(ours, theirs, precise)
        else:
            assert torch.equal(ours, theirs)
