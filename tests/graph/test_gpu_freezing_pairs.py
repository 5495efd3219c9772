"""Pairs of 1x1 convolutions in one kernel, in models frozen on a GPU; rehearsed on the CPU, by two calls of conv2d."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from support.fake_capture import FakeCapturer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastcnn import ops
from fastcnn.graph.freezing.gpu import freeze_on_gpu, fusions
from fastcnn.graph.freezing.gpu.fusing import fused
from fastcnn.graph.freezing.gpu.program import Program
from fastcnn.graph.freezing.gpu.saving import program_of
from fastcnn.graph.freezing.gpu.storage import with_parameters

CPU = torch.device("cpu")
RESIDENT, STREAMED = (rule for rule in fusions.RULES if "pairs" in rule.name)
fast = torch.ops.fastcnn
IMAGES = torch.randn(2, 16, 5, 6, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def as_on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernel served what it serves there, in any dtype; and what the tests below have."""

    def weights(device: torch.device, dtype: torch.dtype, channels: tuple[int, int, int]) -> str:
        if channels[2] > 256 or channels[0] > 128:
            return ""
        return "resident" if channels[0] <= 64 and channels[2] <= 128 else "streamed"

    monkeypatch.setattr(fusions, "_weights_of_pair", weights)


def count(program: Program, operator: Any) -> int:
    return sum(step.operator is operator for step in program.steps)


def rewritten(model: nn.Module, x: Tensor) -> Program | None:
    """The model's program after the rule for weights that stay, run and compared with the model."""
    with torch.no_grad():
        program, parts = program_of(model, [x])
        found = fused(program, CPU, RESIDENT)
        if found is None:
            return None
        expected, ours = model(x), with_parameters(found[0], parts, CPU)(x)
        Program.from_dict(found[0].to_dict())
    for one, other in zip(tree_leaves(expected), tree_leaves(ours), strict=True):
        assert torch.equal(one, other)
    return found[0]


class Pair(nn.Module):
    """What may be one kernel, with options of either convolution and something between them or beside the second."""

    def __init__(
        self,
        first: dict[str, Any] | None = None,
        second: dict[str, Any] | None = None,
        between: Callable[[Tensor, Tensor], Tensor] | None = None,
        filter: int = 1,
    ) -> None:
        super().__init__()
        self.expand = nn.Parameter(torch.randn(32, 16, 1, 1) / 4)
        self.reduce = nn.Parameter(torch.randn(24, 32, filter, filter) / 8)
        self.residual, self.scale = nn.Parameter(torch.randn(2, 32, 5, 6)), nn.Parameter(torch.rand(32))
        self.first, self.second = first or {}, second or {}
        self.between = between

    def forward(self, x: Tensor) -> Any:
        options = {"residual": self.residual, "scale": self.scale, "activation": "relu", **self.first}
        wide = ops.conv2d(x, self.expand, self.scale, **options)
        if self.between is not None:
            other = self.between(x, wide)
        narrow = ops.conv2d(wide, self.reduce, **{"activation": "relu", **self.second})
        return (wide * 2, narrow) if self.between is None else (wide * 2, narrow, other)


def test_a_pair_whose_first_result_has_other_readers() -> None:
    program = rewritten(Pair(), IMAGES)
    assert program is not None
    assert count(program, fast.conv2d_1x1_pair.default) == 1
    assert count(program, fast.conv2d.default) == 0


def test_a_result_that_the_model_returns() -> None:
    program = rewritten(Pair(between=lambda x, wide: wide), IMAGES)
    assert program is not None
    assert count(program, fast.conv2d_1x1_pair.default) == 1


@pytest.mark.parametrize(
    "model",
    [
        Pair({"residual": None}),
        Pair({"activation": "none"}),
        Pair({"input_scale": torch.ones(16)}),
        Pair({"input_shift": torch.ones(16)}),
        Pair({"input_activation": "relu"}),
        Pair(None, {"activation": "none"}),
        Pair(None, {"stride": 2}),
        Pair(None, {"padding": 1}),
        Pair(None, {"residual": torch.ones(2, 24, 5, 6)}),
        Pair(None, {"input_scale": torch.ones(32)}),
        Pair(None, {"padding": 1}, filter=3),
        Pair(between=lambda x, wide: wide + 1),
        Pair(between=lambda x, wide: x.add_(1.0)),
    ],
    ids=[
        "no residual", "no relu", "input scale", "input shift", "input relu", "no second relu", "stride", "padding",
        "second residual", "second input scale", "3x3", "read before", "written before",
    ],
)  # fmt: skip
def test_what_stays_apart(model: nn.Module) -> None:
    assert rewritten(model, IMAGES.clone()) is None


def test_the_kernel_must_serve_the_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusions, "_weights_of_pair", lambda device, dtype, channels: "")
    assert rewritten(Pair(), IMAGES) is None
    assert not RESIDENT.possible(CPU)
    seen: list[Any] = []
    monkeypatch.setattr(fusions, "_weights_of_pair", lambda *args: (seen.append(args), "resident")[1])
    assert rewritten(Pair(), IMAGES) is not None
    assert seen[-1] == (CPU, torch.float32, (16, 32, 24))


class Times(FakeCapturer):
    """The later a graph is captured, the faster it is."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: list[Any] = []

    def capture(self, *args: Any, **more: Any) -> Any:
        graph, result = super().capture(*args, **more)
        self.graphs.append(graph)
        return graph, result

    def milliseconds(self, graph: Any) -> float:
        return 10.0 - self.graphs.index(graph)


def test_resnet50(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusions, "_is_one_kernel", lambda *args: False)
    torch.manual_seed(0)
    model, x = torchvision.models.resnet50().eval(), torch.randn(2, 3, 64, 64)
    frozen = freeze_on_gpu(model, [x], None, capturer=Times(), most_lanes=1)
    program = frozen._held.model.program
    pairs = [step for step in program.steps if step.operator is fast.conv2d_1x1_pair.default]
    channels = [(step.results[0].shape[1], step.results[1].shape[1]) for step in pairs]
    assert channels == [(256, 64), (256, 64), (256, 128), (512, 128), (512, 128), (512, 128), (512, 256)]
    assert [note.split(":")[0] for note in frozen.fusions] == [
        "pairs of 1x1 conv2d (resident weights) in one kernel, 3 times",
        "pairs of 1x1 conv2d (streamed weights) in one kernel, 4 times",
    ]
    with torch.no_grad():
        expected = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(frozen(x), expected, rtol=1e-3, atol=1e-3)
