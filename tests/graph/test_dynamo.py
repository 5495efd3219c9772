"""torch.compile(backend="fastcnn"): inference, training, graph breaks and batches of any size."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn

from fastcnn.backends import Call, intercept
from fastcnn.graph import dynamo

C = 8


class Net(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(C, C), nn.Linear(C, 3)
        self.breaks = breaks
        randomise_batch_norms(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        if self.breaks:
            torch._dynamo.graph_break()
        y = self.bn2(self.conv2(y))
        y += x
        y = self.pool(F.relu(y))
        y = F.adaptive_avg_pool2d(y, 1).flatten(1)
        return self.fc2(F.relu(self.fc1(y)))


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    torch._dynamo.reset()
    dynamo.register()
    yield
    torch._dynamo.reset()


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, C, 8, 6, generator=torch.Generator().manual_seed(3))


class Calls:
    """Counts operator calls and what is fused into convolutions."""

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self.fused: list[tuple[bool, bool, Any]] = []

    def __call__(self, call: Call) -> None:
        self.operators[call.operator] += 1
        if call.operator == "conv2d":
            self.fused.append((call.args[3] is not None, call.args[5] is not None, call.args[9]))
        call.run()


@pytest.mark.parametrize("breaks", [False, True], ids=["", "graph-break"])
@torch.no_grad()
def test_inference(breaks: bool) -> None:
    net = Net(breaks).eval()
    compiled = torch.compile(net, backend="fastcnn")
    for batch in (2, 3, 5):
        x = image(batch)
        assert_accurate(compiled(x), net(x), copy.deepcopy(net).double()(x.double()))
    calls = Calls()
    with intercept(calls):
        compiled(image())
    assert calls.operators == {"conv2d": 2, "max_pool2d": 1, "adaptive_avg_pool2d": 1, "linear": 2}
    assert calls.fused == [(True, False, "relu"), (True, True, "relu")]


@torch.no_grad()
def test_folded_values_follow_the_parameters() -> None:
    net = Net().eval()
    compiled = torch.compile(net, backend="fastcnn")
    compiled(image())
    net.bn1.weight.mul_(2)
    net.bn2.running_mean.add_(1)
    assert_accurate(compiled(image()), net(image()), copy.deepcopy(net).double()(image().double()))


def test_training() -> None:
    net = Net().train()
    results = []
    for make in (lambda m: torch.compile(m, backend="fastcnn"), lambda m: m, lambda m: m.double()):
        model = copy.deepcopy(net)
        run = make(model)
        x = image().to(model.fc1.weight.dtype).requires_grad_()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        output = run(x)
        (output * torch.arange(6.0).view(2, 3).to(output.dtype)).sum().backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            after = run(x)
        results.append([output, x.grad, after, *model.parameters(), *(b for b in model.buffers() if b.dim())])
        assert int(model.bn1.num_batches_tracked) == 1
    for ours, theirs, exact in zip(*results, strict=True):
        assert_accurate(ours.detach(), theirs.detach(), exact.detach())


def test_dynamic_batch_is_captured_once() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return dynamo.fastcnn(graph, inputs)

    compiled = torch.compile(Net().eval(), backend=counting, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 4, 7):
            assert compiled(image(batch)).shape == (batch, 3)
    assert len(graphs) == 1


def test_entry_point() -> None:
    tomllib = pytest.importorskip("tomllib")
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    entries = tomllib.loads(path.read_text())["project"]["entry-points"]["torch_dynamo_backends"]
    module, _, name = entries["fastcnn"].partition(":")
    assert (module, getattr(dynamo, name)) == (dynamo.__name__, dynamo.fastcnn)
