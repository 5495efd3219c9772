"""A fused call returns its result in the strides of the chain that it replaces, whatever the operands' are."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.dropin import tensors
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn

import fastcnn
from fastcnn.graph import dynamo

Chain = Callable[[Any, Tensor, Tensor], Tensor]


def _written_into_the_residual(m: Any, x: Tensor, r: Tensor) -> Tensor:
    r = r * 2
    r += m.bn(m.conv(x))
    return r


def _written_into_the_result(m: Any, x: Tensor, r: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    y += r
    return F.relu(y, inplace=True)


def _sum_in_place(m: Any, x: Tensor, r: Tensor) -> Tensor:
    y = x * 2
    y += r
    return F.relu(y)


CHAINS: dict[str, Chain] = {
    "conv bn": lambda m, x, r: m.bn(m.conv(x)),
    "conv relu": lambda m, x, r: F.relu(m.conv(x)),
    "conv relu_": lambda m, x, r: F.relu(m.conv(x), inplace=True),
    "conv bn relu module": lambda m, x, r: m.relu(m.bn(m.conv(x))),
    "conv bn relu_ module": lambda m, x, r: m.relu_(m.bn(m.conv(x))),
    "conv bn + r": lambda m, x, r: m.bn(m.conv(x)) + r,
    "r + conv bn": lambda m, x, r: r + m.bn(m.conv(x)),
    "conv += r": _written_into_the_result,
    "r += conv bn": _written_into_the_residual,
    "relu(conv + r)": lambda m, x, r: F.relu(m.conv(x) + r),
    "relu_(r + conv)": lambda m, x, r: (r + m.conv(x)).relu_(),
    "relu(r + bn)": lambda m, x, r: F.relu(r + m.bn(x)),
    "relu_(bn + r)": lambda m, x, r: m.relu_(m.bn(x) + r),
    "bn relu conv": lambda m, x, r: m.conv(F.relu(m.bn(x))),
    "bn relu_ conv + r": lambda m, x, r: m.conv(m.relu_(m.bn(x))) + r,
    "r + bn relu conv bn": lambda m, x, r: r + m.second(m.conv(m.relu(m.bn(x)))),
    "relu(x + r)": lambda m, x, r: F.relu(x + r),
    "relu_(r + x)": lambda m, x, r: torch.relu_(r + x),
    "x += r": _sum_in_place,
    "pool": lambda m, x, r: F.max_pool2d(x, 3, 1, 1) + r,
    "cat": lambda m, x, r: torch.cat([m.conv(x), r, m.bn(m.conv(r))], 1),
    "functions": lambda m, x, r: r + F.batch_norm(
        F.conv2d(x, m.conv.weight, None, 1, m.conv.padding), m.bn.running_mean, m.bn.running_var
    ),
}  # fmt: skip

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "channel slice": lambda t: torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last)[:, : t.shape[1]],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:, :, :1, :1].expand(t.shape),
}
PAIRS = [pair for pair in itertools.product(LAYOUTS, repeat=2) if pair[0][0] == "c" or pair[1][0] == "c"]
SHAPES = [(2, 4, 3, 5), (1, 4, 2, 2), (2, 4, 1, 1), (2, 1, 3, 2), (1, 1, 3, 2), (1, 4, 1, 3), (0, 4, 2, 3)]


class Net(nn.Module):
    def __init__(self, chain: Chain, channels: int, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, channels, size, padding=size // 2)
        self.bn, self.second = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.chain = chain
        randomise_batch_norms(self)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.chain(self, x, r)


def compiled(net: nn.Module) -> Any:
    torch._dynamo.reset()
    dynamo.register()
    return torch.compile(net, backend="fastcnn", dynamic=False)


def images(shape: tuple[int, ...], layout: str, seed: int) -> Tensor:
    return LAYOUTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("channels_last_model", [False, True], ids=["contiguous model", "channels_last model"])
@pytest.mark.parametrize("name", CHAINS)
@torch.no_grad()
def test_optimized(name: str, channels_last_model: bool) -> None:
    for i, (shape, training) in enumerate([*((s, False) for s in SHAPES), *((s, True) for s in SHAPES[:3])]):
        net = Net(CHAINS[name], shape[1], 1 + 2 * (i % 2)).train(training)
        if channels_last_model:
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fast = fastcnn.optimize(net)
        for of_x, of_r in PAIRS:
            x, r = images(shape, of_x, 1), images(shape, of_r, 2)
            plain = net(x, r)
            ours = fast(x, r)
            assert ours.stride() == plain.stride(), (shape, training, of_x, of_r)
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CHAINS)
@torch.no_grad()
def test_compiled_and_frozen(name: str) -> None:
    for (shape, size), (of_x, of_r) in itertools.product(
        [((2, 4, 3, 5), 3), ((1, 4, 2, 2), 1), ((2, 1, 3, 2), 1)],
        [("contiguous", "channels_last"), ("channels_last", "contiguous"), ("channels_last", "channels_last")],
    ):
        net = Net(CHAINS[name], shape[1], size).eval()
        x, r = images(shape, of_x, 1), images(shape, of_r, 2)
        plain, exact = net(x, r), copy.deepcopy(net).double()(x.double(), r.double())
        for fast in (compiled(copy.deepcopy(net)), fastcnn.freeze(net, (x, r))):
            ours = fast(x, r)
            assert ours.stride() == plain.stride(), (shape, of_x, of_r, fast)
            assert_accurate(ours, plain, exact)


class Whole(nn.Module):
    """Values of contiguous and of channels-last memory in one network: what meets, and what follows."""

    def __init__(self, end: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.bn = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.join, self.end = nn.Conv2d(8, 4, 1), end
        randomise_batch_norms(self)

    def unit(self, i: int, x: Tensor) -> Tensor:
        return F.relu(self.bn[i](self.conv[i](x)))

    def forward(self, x: Tensor, r: Tensor) -> Any:
        return self.end(self, self.unit(0, x), r)


ENDS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "a sum of two entries": lambda m, y, r: y + m.unit(1, r),
    "the other way round": lambda m, y, r: m.unit(1, r) + y,
    "a product": lambda m, y, r: (m.unit(1, r) * y, m.unit(2, y * r)),
    "a concatenation": lambda m, y, r: torch.cat([y, m.unit(1, r)], 1),
    "one that goes on": lambda m, y, r: m.unit(2, m.join(torch.cat([m.unit(1, r), y], 1))),
    "with a value from outside": lambda m, y, r: m.unit(2, y + y.flip(1)) + r,
    "a residual after a view": lambda m, y, r: F.relu(m.bn[1](m.conv[1](y.flip(2).contiguous())) + m.unit(2, r)),
    "twice": lambda m, y, r: (y + r, F.relu(r + y), m.conv[3](r + y)),
}


@pytest.mark.parametrize("part", [None, "conv.0", "conv.2", "join"], ids=str)
@pytest.mark.parametrize("end", ENDS)
@torch.no_grad()
def test_networks_of_mixed_layouts(end: str, part: str | None) -> None:
    """Also where only some convolutions' weights are channels-last, and where that changes later."""
    net = Whole(ENDS[end]).eval()
    fast = fastcnn.optimize(net)
    for turn in range(2):
        for shape, of_x, of_r in [(s, *pair) for s in ((2, 4, 3, 5), (1, 4, 2, 2)) for pair in PAIRS]:
            x, r = images(shape, of_x, 1), images(shape, of_r, 2)
            for ours, plain in zip(tensors(fast(x, r)), tensors(net(x, r)), strict=True):
                assert ours.stride() == plain.stride(), (shape, of_x, of_r, turn)
                torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
        if part is None:
            return
        for model in (net, fast):
            model.get_submodule(part).to(memory_format=torch.channels_last)


@torch.no_grad()
def test_one_channel_is_converted_once() -> None:
    """A grey image is contiguous and channels-last at once; what follows stays channels-last."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    seen: list[bool] = []
    with fastcnn.backends.intercept(lambda call: (seen.append(call.args[1].stride(1) == 1), call.run())[1]):
        fastcnn.optimize(net)(torch.randn(2, 1, 9, 9))
    assert seen == [True] * 3
