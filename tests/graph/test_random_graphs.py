"""Small random networks, optimized and not: branches, sums, concats, shared layers, in-place operators, both modes.

FASTCNN_RANDOM_GRAPHS=N draws N networks, other ones in each run, in place of the fixed few.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.neighbours import Results, assert_accurate_here_or_nearby
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn

import fastcnn
from fastcnn.graph import dynamo

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

C = 4
EXAMPLES = int(os.environ.get("FASTCNN_RANDOM_GRAPHS", "0"))
Step = tuple[str, int, int]  # what, and the values it reads, counted back from the last


class RandomNet(nn.Module):
    """A program of steps on a list of values, each (N, C, H, W)."""

    def __init__(self, steps: list[Step], returned: int = 100) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.returned = returned
        # Three of each, drawn by number: several steps may share one.
        self.conv = nn.ModuleList(nn.Conv2d(C, C, k, padding=k // 2, bias=k == 1) for k in (3, 1, 3))
        self.bn = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(3))
        self.join = nn.Conv2d(2 * C, C, 1, bias=False)
        self.grow = nn.ModuleList(nn.Conv2d(i * C, C, 1 + 2 * (i % 2), padding=i % 2) for i in (1, 2, 3, 4))
        self.norm = nn.ModuleList(nn.BatchNorm2d(i * C) for i in (1, 2, 3))
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.steps = steps
        randomise_batch_norms(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for what, i, j in self.steps:
            a, b = values[-1 - i % len(values)], values[-1 - j % len(values)]
            values.append(STEPS[what](self, a, b, j))
        return values[1:][-self.returned :]


def _dense(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    """A dense block; by n its first part is another's value, and its parts are read once more."""
    features = [a]
    for i in range(3):
        x = torch.cat(features, 1)
        features.append(m.grow[i](F.relu(m.norm[i](x)) if n % 2 else x))
    y = m.grow[3](torch.cat(features, 1))
    return y + features[n % 4] if n > 2 else y


def _inception(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    """Branches of a convolution, of a chain, of a pooling, and of another concatenation, with what n says in place."""
    branches = [F.relu(m.bn[n % 3](m.conv[n % 3](a))), m.conv[1](b), F.max_pool2d(a, 3, 1, 1)]
    if n == 1:
        branches[1].mul_(2)
    if n == 2:
        branches = [branches[0], torch.cat(branches[1:], 1)]
    if n == 3:
        branches.reverse()
    y = torch.cat(branches, 1)
    if n == 4:
        y.relu_()
    if n == 5:
        branches[0].add_(1)
        y = y + torch.cat(branches, 1)
    return m.grow[2](y)


def _functional(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    """The layers' tensors in functions, before or after a convolution."""
    conv, bn = m.conv[n % 3], m.bn[(n + 1) % 3]

    def norm(x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training))

    if n < 3:
        return F.conv2d(norm(a), conv.weight, conv.bias, padding=conv.padding) + b
    return norm(conv(a))


def _gate(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    """Squeeze and excitation, and a view that asks for contiguous memory where PyTorch's result is."""
    y = m.conv[n % 3](a)
    y = y * F.adaptive_avg_pool2d(y, 1).sigmoid()
    if n > 3:
        y = F.silu(y, inplace=True)
    return m.relu_(m.bn[n % 3](y.flip(1).contiguous().view(y.shape)))


def _iadd_new(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    y = a * 2
    y += m.bn[n % 3](m.conv[n % 3](b))
    return F.relu(y)


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
    "iadd-new": _iadd_new,
    "dense": _dense,
    "inception": _inception,
    "functional": _functional,
    "gate": _gate,
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
        given = x.to(model.join.weight.dtype, copy=True, memory_format=torch.preserve_format)
        torch.manual_seed(1)
        found += [t.clone() for t in model.train(training)(given)] + [given]
    return [*found, *(b for b in model.buffers())]


def compute(model: nn.Module, x: Tensor) -> Results:
    exact = run(copy.deepcopy(model).double(), x)
    hypothesis.assume(all(t.isfinite().all() and t.abs().max() < 1e4 for t in exact))
    optimized = fastcnn.optimize(model)
    assert not any(entry.module == "(model)" for entry in fastcnn.report(optimized).left)  # it was traced
    return Results(run(optimized, x), run(copy.deepcopy(model), x), exact)


def compute_compiled(model: nn.Module, x: Tensor) -> Results:
    exact = run(copy.deepcopy(model).double(), x)
    hypothesis.assume(all(t.isfinite().all() and t.abs().max() < 1e4 for t in exact))
    torch._dynamo.reset()
    dynamo.register()
    compiled = copy.deepcopy(model)
    compiled.compile(backend="fastcnn")
    return Results(run(compiled, x), run(copy.deepcopy(model), x), exact)


def check(
    compute: Callable[[nn.Module, Tensor], Results],
    steps: list[Step],
    size: tuple[int, ...],
    returned: int,
    channels_last: bool,
) -> None:
    model = RandomNet(steps, returned)
    x = torch.randn(size, generator=torch.Generator().manual_seed(2))
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    results = assert_accurate_here_or_nearby(compute, model, x)
    ours, theirs = ([t.stride() for t in side] for side in results[:2])
    assert ours == theirs


@hypothesis.settings(max_examples=EXAMPLES or 60, deadline=None, derandomize=not EXAMPLES, database=None)
@hypothesis.given(steps=steps, size=sizes, returned=st.integers(1, 8), channels_last=st.booleans())
@hypothesis.example(  # a contiguous value is convolved into a slice of channels-last memory
    steps=[("add", 0, 0), ("relu-method_", 1, 0), ("bn-relu-conv", 0, 0), ("cat", 0, 2), ("add", 1, 0),
           ("add", 0, 0), ("add", 0, 0)],
    size=(1, C, 2, 2), returned=4, channels_last=False,
)  # fmt: skip
@hypothesis.example(  # a sum converts the input, a concatenation of what was written does not
    steps=[("inception", 0, 4), ("relu-method_", 0, 0), ("add", 0, 2)],
    size=(1, C, 2, 2),
    returned=3,
    channels_last=False,
)
@hypothesis.example(  # one value survives the last ReLU, a 23rd of the terms that it is the sum of
    steps=[("bn-relu-conv", 0, 0), ("relu", 0, 0), ("conv", 0, 1), ("relu", 0, 0)],
    size=(1, C, 7, 2),
    returned=1,
    channels_last=False,
)
@hypothesis.example(  # the same of two values
    steps=[("bn-relu-conv", 0, 1), ("conv-bn-relu", 2, 1), ("dense", 2, 0), ("average", 2, 3), ("relu_", 0, 5)],
    size=(2, C, 5, 5),
    returned=7,
    channels_last=False,
)
@hypothesis.example(  # of one in eval mode, of ten in train mode, where dropout has its own mask in each layout
    steps=[("cat", 1, 1), ("average", 0, 5), ("iadd", 1, 5), ("written-between", 1, 3), ("dropout", 0, 3)],
    size=(1, C, 3, 2),
    returned=6,
    channels_last=True,
)
@hypothesis.example(  # a batch norm as a layer, then in a function, then the first one's ReLU: updates keep their order
    steps=[("conv-bn", 2, 2), ("functional", 1, 4), ("relu-method_", 1, 0)],
    size=(1, C, 6, 2),
    returned=2,
    channels_last=False,
)
@hypothesis.example(  # dropout of what comes of a concatenation of both layouts: its mask follows the order of memory
    steps=[("max", 0, 0), ("view_", 0, 0), ("iadd", 0, 0), ("iadd", 2, 4), ("conv-bn", 1, 4), ("inception", 1, 3),
           ("dropout", 0, 4)],
    size=(1, C, 7, 2), returned=5, channels_last=True,
)  # fmt: skip
@hypothesis.example(  # channels-last plus the batch norm of a contiguous value: dropout's mask follows the left one
    steps=[("gate", 0, 0), ("bn", 0, 1), ("add", 2, 0), ("dropout", 0, 0)],
    size=(1, C, 2, 2),
    returned=1,
    channels_last=True,
)
@torch.no_grad()
def test_the_same_results(steps: list[Step], size: tuple[int, ...], returned: int, channels_last: bool) -> None:
    check(compute, steps, size, returned, channels_last)


@hypothesis.settings(max_examples=EXAMPLES or 8, deadline=None, derandomize=not EXAMPLES, database=None)
@hypothesis.given(steps=steps, size=sizes, returned=st.integers(1, 8), channels_last=st.booleans())
@hypothesis.example(  # layouts meet in a sum that is written into a value which is read again
    steps=[("gate", 0, 0), ("iadd", 0, 5), ("iadd", 1, 4), ("add", 0, 3), ("dropout", 0, 2)],
    size=(2, C, 4, 7),
    returned=1,
    channels_last=True,
)
@torch.no_grad()
def test_the_same_results_of_compiled_graphs(
    steps: list[Step], size: tuple[int, ...], returned: int, channels_last: bool
) -> None:
    check(compute_compiled, steps, size, returned, channels_last)
