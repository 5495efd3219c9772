"""Small random networks, frozen: branches, sums, concats, splits, broadcasts, in-place operators, odd shapes."""

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

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

C = 6
Step = tuple[str, int, int]  # what, and the values it reads, counted back from the last


class RandomNet(nn.Module):
    """A program of steps on a list of values, each (N, C, H, W); every value is a result."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.ModuleList(nn.Conv2d(C, C, k, padding=k // 2, bias=k == 1) for k in (3, 1, 5))
        self.grouped = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1, groups=groups) for groups in (C, 2, 3))
        self.bn = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(3))
        self.join = nn.Conv2d(2 * C, C, 1, bias=False)
        self.down = nn.Conv2d(C, C, 3, stride=2)
        self.squeeze, self.excite = nn.Conv2d(C, 2, 1), nn.Conv2d(2, C, 1)
        self.norm, self.groups = nn.LayerNorm(C), nn.GroupNorm(2, C)
        self.mix = nn.Linear(C, C)
        self.relu_ = nn.ReLU(inplace=True)
        self.steps = steps
        randomise_batch_norms(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x * 1.5]
        for what, i, j in self.steps:
            a, b = values[-1 - i % len(values)], values[-1 - j % len(values)]
            values.append(STEPS[what](self, a, b, j))
        return values


def _iadd(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    a += b
    return a


def _written_between(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    y = m.conv[n % 3](a)
    b.mul_(0.5)
    return F.relu(m.bn[n % 3](y) + a)


def _branches(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    parts = [F.relu(m.bn[n % 3](m.conv[n % 3](a))), F.max_pool2d(b, 3, 1, 1)]
    return m.join(torch.cat(parts if n % 2 else parts[::-1], 1))


def _dense(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    features = [a, b]
    features.append(m.join(torch.cat(features, 1)))
    return m.join(torch.cat(features[1:], 1))


def _shuffled(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    first, second = a.chunk(2, 1)
    y = torch.cat([first, F.silu(second)], 1)
    size, height, width = y.shape[0], *y.shape[2:]
    return y.view(size, 2, C // 2, height, width).transpose(1, 2).reshape(size, C, height, width)


def _written_channels(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    a[:, n % 3 : n % 3 + 2].mul_(0.5)
    return a[:, :2].repeat(1, 3, 1, 1)


def _down_and_up(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    height, width = a.shape[2:]
    y = m.down(F.pad(a, (1, 2, 1, 2)))
    return F.interpolate(y, scale_factor=2, mode="nearest")[:, :, :height, :width]


def _normed(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    return m.norm(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _mixed(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    return F.gelu(m.mix(a.permute(0, 2, 3, 1))).permute(0, 3, 1, 2) + b


def _written_flat(m: Any, a: Tensor, b: Tensor, n: int) -> Tensor:
    """Whether the reshaped tensor shares a's memory depends on its strides."""
    y = a.reshape(a.shape[0], -1)
    y[:, : 3 + n].mul_(0.5)
    return y.view(a.shape) + b


STEPS: dict[str, Callable[[Any, Tensor, Tensor, int], Tensor]] = {
    "conv": lambda m, a, b, n: m.conv[n % 3](a),
    "grouped": lambda m, a, b, n: F.leaky_relu(m.grouped[n % 3](a), 0.1),
    "bn": lambda m, a, b, n: m.bn[n % 3](a),
    "conv-bn-relu": lambda m, a, b, n: m.relu_(m.bn[n % 3](m.conv[n % 3](a))),
    "conv-bn-hardswish": lambda m, a, b, n: F.hardswish(m.bn[n % 3](m.conv[n % 3](a)), inplace=n > 2),
    "bn-relu-conv": lambda m, a, b, n: m.conv[n % 3](F.relu(m.bn[n % 3](a))),
    "residual": lambda m, a, b, n: F.relu(m.bn[n % 3](m.conv[n % 3](a)) + b),
    "relu_": lambda m, a, b, n: m.relu_(a),
    "relu6": lambda m, a, b, n: F.relu6(a, inplace=n > 2),
    "elu": lambda m, a, b, n: F.elu(a, inplace=n > 2),
    "add": lambda m, a, b, n: a + b,
    "iadd": _iadd,
    "subtract": lambda m, a, b, n: a - 0.5 * b,
    "gate": lambda m, a, b, n: a * b.mean((2, 3), keepdim=True),
    "squeeze-excite": lambda m, a, b, n: a * m.excite(F.relu(m.squeeze(F.adaptive_avg_pool2d(b, 1)))).sigmoid(),
    "attention": lambda m, a, b, n: (a.flatten(2) * torch.softmax(b.flatten(2), n % 2 + 1)).view_as(a),
    "scale_": lambda m, a, b, n: a.mul_(0.5),
    "branches": _branches,
    "dense": _dense,
    "shuffled": _shuffled,
    "written-between": _written_between,
    "written-channels": _written_channels,
    "written-flat": _written_flat,
    "down-up": _down_and_up,
    "layer norm": _normed,
    "group norm": lambda m, a, b, n: m.groups(a),
    "mixed": _mixed,
    "average": lambda m, a, b, n: F.avg_pool2d(a, 3, 1, 1),
    "contiguous": lambda m, a, b, n: a.contiguous(),
}

steps = st.lists(
    st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=8
)
sizes = st.tuples(st.integers(1, 3), st.just(C), st.integers(2, 7), st.integers(2, 7))

# FASTCNN_TEST_EXAMPLES asks for a longer run, with other networks each time.
EXAMPLES = int(os.environ.get("FASTCNN_TEST_EXAMPLES", "0"))


def compute(model: nn.Module, x: Tensor) -> Results:
    optimized = fastcnn.optimize(model, x)
    frozen = fastcnn.freeze(optimized, torch.zeros_like(x))
    frozen._plan.fill_arena(0xFF)
    ours, plain = frozen(x), model(x)
    for results in (ours, optimized(x)):
        assert [t.stride() for t in results] == [t.stride() for t in plain]
    return Results(ours, plain, copy.deepcopy(model).double()(x.double()))


@hypothesis.settings(max_examples=EXAMPLES or 40, deadline=None, derandomize=not EXAMPLES, database=None)
@hypothesis.given(steps=steps, size=sizes, channels_last=st.booleans())
@torch.no_grad()
def test_the_same_results(steps: list[Step], size: tuple[int, ...], channels_last: bool) -> None:
    model = RandomNet(steps).eval()
    x = torch.randn(size, generator=torch.Generator().manual_seed(2))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()(x.double())
    # Where nothing is left of a value, rounding is all there is to compare.
    hypothesis.assume(all(t.isfinite().all() and 1e-3 < t.abs().max() < 1e4 for t in exact))
    assert_accurate_here_or_nearby(compute, model, x)
