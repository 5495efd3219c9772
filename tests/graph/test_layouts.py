"""Memory layouts: results have PyTorch's, and between fused calls nothing is converted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.dropin import tensors
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastcnn
from fastcnn.graph import dynamo

C = 8


class Net(nn.Module):
    """Three residual blocks, the second with a gate, between a stem and a head; ``end`` says what is returned."""

    def __init__(self, end: Callable[[Any, Tensor], Any] = lambda m, y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.ModuleList(nn.Conv2d(3 if i == 0 else C, C, 3, padding=1, bias=False) for i in range(7))
        self.bn = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(7))
        self.down, self.up = nn.Conv2d(C, 2, 1), nn.Conv2d(2, C, 1)
        self.pool, self.silu = nn.MaxPool2d(3, 2, 1), nn.SiLU(inplace=True)
        self.fc = nn.Linear(C, 5)
        self.end = end
        randomise_batch_norms(self)

    def unit(self, i: int, x: Tensor) -> Tensor:
        return self.bn[i](self.conv[i](x))

    def forward(self, x: Tensor) -> Any:
        x = self.pool(F.relu(self.unit(0, x)))
        for i in (1, 3, 5):
            y = self.unit(i + 1, F.relu(self.unit(i, x)))
            if i == 3:
                y = self.silu(y) * torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))
            y += x
            x = F.relu(y)
        return self.end(self, x)


ENDS: dict[str, Callable[[Any, Tensor], Any]] = {
    "images": lambda m, y: y,
    "logits": lambda m, y: m.fc(F.adaptive_avg_pool2d(y, 1).flatten(1)),
    "view": lambda m, y: y.view(y.size(0), -1),
    "shuffle": lambda m, y: m.conv[1](y.view(y.size(0), 2, C // 2, y.size(2), y.size(3)).transpose(1, 2).flatten(1, 2)),
    "several": lambda m, y: (y, m.conv[1](y), y.permute(0, 2, 3, 1)),
}


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 13, 10, generator=torch.Generator().manual_seed(3))


def compiled(net: nn.Module) -> Any:
    torch._dynamo.reset()
    dynamo.register()
    return torch.compile(net, backend="fastcnn")


@pytest.mark.parametrize("make", [fastcnn.optimize, compiled], ids=["optimize", "compile"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("end", ENDS)
def test_results_have_pytorchs_strides(end: str, training: bool, make: Callable[[nn.Module], Any]) -> None:
    net = Net(ENDS[end]).train(training)
    fast = make(copy.deepcopy(net))
    double = copy.deepcopy(net).double()
    for x in (image(), image().contiguous(memory_format=torch.channels_last)):
        if end in ("view", "shuffle") and not x.is_contiguous():
            continue  # PyTorch cannot either
        found = []
        for model in (fast, net, double):
            given = x.detach().to(torch.float64 if model is double else torch.float32, copy=True).requires_grad_()
            result = tensors(model(given))
            sum((t * torch.arange(t.numel()).view(t.shape) / t.numel()).sum() for t in result).backward()
            found.append([*(t.detach() for t in result), given.grad])
        for ours, theirs, exact in zip(*found, strict=True):
            assert_accurate(ours, theirs, exact)
            assert ours.stride() == theirs.stride()


class Copies(TorchDispatchMode):
    """Counts what changes layouts of images."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copies = func._overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.copy_)
        self.count += copies and args[0].dim() == 4 and args[0][0, 0].numel() > 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("end", ["images", "logits"])
@torch.no_grad()
def test_one_conversion_in_and_one_out(end: str) -> None:
    model = fastcnn.optimize(Net(ENDS[end]).eval())
    model(image())
    with Copies() as copies:
        model(image())
    assert copies.count <= 2
    x = image().contiguous(memory_format=torch.channels_last)
    with Copies() as copies:
        model(x)
    assert copies.count == 0


@torch.no_grad()
def test_a_channels_last_model_returns_channels_last() -> None:
    net = Net().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert fastcnn.optimize(net)(image()).stride() == net(image()).stride()


def written_in(m: Any, x: Tensor) -> Tensor:
    y = m.conv[1](x)
    x.mul_(2)
    return y + m.conv[2](x)


def written_out(m: Any, x: Tensor) -> Any:
    y = m.conv[1](x)
    z = y.flip(3)
    y.mul_(2)
    return z + m.conv[2](y), y


def concatenated(m: Any, x: Tensor) -> Any:
    y = m.conv[3](torch.cat([m.conv[1](x + x)[:, :4], m.conv[2](x)[:, :4]], 1))
    z = m.conv[4](torch.cat([m.down(y), m.up(m.down(y))[:, :6]], 1).relu_())
    z.relu_()
    return y + y, z + z, z


def parts_of_what_is_written(m: Any, x: Tensor) -> Any:
    y = m.conv[1](x)
    z = torch.cat([m.down(y), m.up(m.down(y)), F.max_pool2d(y, 3, 1, 1)], 1)
    z.relu_()
    y.relu_()
    return z.view(z.size(0), -1), y


def written_where_layouts_meet(m: Any, x: Tensor) -> Any:
    y = m.conv[1](x)
    y.add_((-x).contiguous(memory_format=torch.channels_last))
    return m.conv[2](y), y * y


BODIES = [written_in, written_out, concatenated, parts_of_what_is_written, written_where_layouts_meet]


@pytest.mark.parametrize("body", BODIES)
@torch.no_grad()
def test_writes_reach_both_forms(body: Callable[[Any, Tensor], Any]) -> None:
    class Body(Net):
        def forward(self, x: Tensor) -> Any:
            return body(self, x)

    net = Body().eval()
    x = torch.randn(2, C, 6, 5, generator=torch.Generator().manual_seed(1))
    found = []
    for model in (fastcnn.optimize(net), net, copy.deepcopy(net).double()):
        given = x.to(model.fc.weight.dtype, copy=True)
        found.append([*tensors(model(given)), given])
    for ours, theirs, exact in zip(*found, strict=True):
        assert_accurate(ours, theirs, exact)
        assert ours.is_contiguous() == theirs.is_contiguous()
