"""Groups of operators that one kernel does, in models frozen on a GPU; rehearsed on the CPU, where none does both."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from support.fake_capture import FakeCapturer, FakeGraph
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastcnn
from fastcnn import ops
from fastcnn.graph.freezing.gpu import cuda_graph, freeze_on_gpu, frozen, fusions
from fastcnn.graph.freezing.gpu.comparing import near
from fastcnn.graph.freezing.gpu.frozen import FrozenOnGpu
from fastcnn.graph.freezing.gpu.fusing import Fusion, Rule, View, argument, fused
from fastcnn.graph.freezing.gpu.interpreting import Interpreted, run_substituted
from fastcnn.graph.freezing.gpu.program import Program, Step, Value
from fastcnn.graph.freezing.gpu.saving import program_of
from fastcnn.graph.freezing.gpu.storage import with_parameters

CPU = torch.device("cpu")
STEM_POOL = fusions.RULES[0]
aten, fast = torch.ops.aten, torch.ops.fastcnn


@pytest.fixture
def as_on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a kernel did every first convolution with its pooling; the operator itself runs the two."""
    monkeypatch.setattr(fusions, "_is_one_kernel", lambda device, dtype, weight, *rest: weight[1] <= 4)


class Times(FakeCapturer):
    """The graphs of each model take so long, in the order in which they are captured."""

    def __init__(self, *times: float) -> None:
        super().__init__()
        self._of_graphs = list(times)
        self.graphs: list[FakeGraph] = []

    def capture(self, run: Callable[[], Any], most_lanes: int, early: bool = False) -> tuple[FakeGraph, Any]:
        graph, result = super().capture(run, most_lanes, early)
        self.graphs.append(graph)
        return graph, result

    def milliseconds(self, graph: FakeGraph) -> float:
        return self._of_graphs[self.graphs.index(graph)]


def freeze(model: nn.Module, x: Tensor, capturer: FakeCapturer | None = None) -> FrozenOnGpu:
    return freeze_on_gpu(model, [x], None, capturer=capturer or Times(2.0, 1.0), most_lanes=1)


def operators_of(program: Program) -> list[Any]:
    return [step.operator for step in program.steps]


def stem() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 40, 3, 2, 1), nn.BatchNorm2d(40), nn.ReLU(), nn.MaxPool2d(3, 2, 1)).eval()


class Stem(nn.Module):
    def __init__(self, between: Callable[[Tensor, Tensor], Tensor] | None = None, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 3, 3, 3))
        self.between, self.options = between, options

    def forward(self, x: Tensor) -> Any:
        y = ops.conv2d(x, self.weight, None, 2, 1, activation="relu", **self.options)
        if self.between is not None:
            y = self.between(x, y)
        return ops.max_pool2d(y, 3, 2, 1)


IMAGES = torch.randn(2, 3, 34, 40, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)

NETWORKS = {
    "resnet18": lambda: fastcnn.create_model("resnet18"),
    "googlenet": lambda: fastcnn.create_model("googlenet"),
    "torchvision densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16),
}


@pytest.mark.usefixtures("as_on_an_h100")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_keep_their_results(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]().eval(), torch.randn(2, 3, 64, 64)
    together = freeze(model, x)
    assert len(together.fusions) == 1
    assert "conv2d and max_pool2d in one kernel, 1 times: in one kernel 1.0000 ms, apart 2.0000 ms" in repr(together)
    program = together._held.model.program
    assert operators_of(program).count(fast.conv2d_max_pool2d.default) == 1
    assert together.recomputed == 0
    monkeypatch.setattr(frozen, "RULES", ())
    apart = freeze(model, x)
    assert apart.fusions == ()
    x = x + 1
    expected = apart(x)
    assert torch.equal(together(x), expected)
    # Files hold the fused operator.
    monkeypatch.setattr(cuda_graph, "capturer_on", lambda device=None: FakeCapturer())
    together.save(tmp_path / "file")
    loaded = fastcnn.load_frozen(tmp_path / "file")
    assert operators_of(loaded._held.model.program) == operators_of(program)
    assert torch.equal(loaded(x), expected)


def test_where_no_kernel_does_both_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "program_of", lambda *args: pytest.fail("traced"))
    model = freeze(stem(), IMAGES)
    assert (model.fusions, len(model._capturer.graphs)) == ((), 1)


@pytest.mark.usefixtures("as_on_an_h100")
def test_what_is_slower_stays_apart() -> None:
    model = freeze(stem(), IMAGES, Times(1.0, 1.0))
    assert model.fusions == ("conv2d and max_pool2d apart: in one kernel 1.0000 ms, apart 1.0000 ms",)
    assert isinstance(model._held.model, nn.Sequential)
    assert model._graph is model._capturer.graphs[0]
    assert torch.equal(model(IMAGES), model._held.model(IMAGES))


@pytest.mark.usefixtures("as_on_an_h100")
def test_weights_stay_packed_where_operators_stay_apart() -> None:
    """A graph is captured after the model was traced in vain."""
    capturer = Times(1.0, 2.0, 0.5)
    capturer.early_starts = True
    model = freeze(fastcnn.create_model("resnet18").eval(), torch.randn(1, 3, 64, 64), capturer)
    assert "apart: in one kernel 2.0000 ms" in model.fusions[0]
    assert model.early_starts
    assert model.recomputed == 0


@pytest.mark.usefixtures("as_on_an_h100")
def test_another_result_stays_apart(caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(Times):
        def capture(self, run: Callable[[], Any], most_lanes: int, early: bool = False) -> tuple[FakeGraph, Any]:
            return super().capture((lambda: run() * 1.5) if self.graphs else run, most_lanes, early)

    model = freeze(stem(), IMAGES, Wrong(2.0, 1.0))
    assert "another result" in model.fusions[0]
    assert "another result" in caplog.text
    assert torch.equal(model(IMAGES), model._held.model(IMAGES))


@pytest.fixture
def inexact(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets the operator that does both be so far off, and not the two."""
    module = sys.modules["fastcnn.ops.conv2d_max_pool2d"]
    exact = module.fill_max

    def by(off: float) -> None:
        monkeypatch.setattr(module, "fill_max", lambda out, *args: (exact(out, *args), out.mul_(1 + off)))

    return by


@pytest.mark.usefixtures("as_on_an_h100")
@pytest.mark.parametrize(("off", "is_taken"), [(2e-4, True), (2e-2, False)])
def test_kernels_are_judged_where_they_are(off: float, is_taken: bool, inexact: Callable[[float], None]) -> None:
    """Not by the model's results, which may make much of little."""

    class Chaotic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(1e6 * x)

    model = stem().append(Chaotic())
    apart = freeze(model, IMAGES, Times(1.0, 2.0))(IMAGES)
    inexact(off)
    found = freeze(model, IMAGES)
    assert ("in one kernel, 1 times" if is_taken else "another result") in found.fusions[0]
    assert near(found(IMAGES), apart) != is_taken


@pytest.mark.usefixtures("as_on_an_h100")
def test_a_kernel_that_writes_into_the_same_memory_is_judged_too(inexact: Callable[[float], None]) -> None:
    program, parts = program_of(Slice(), [IMAGES])
    found = fused(program, CPU, STEM_POOL)
    assert found is not None
    given = (IMAGES, *with_parameters(program, parts, CPU).constants)
    for off, expected in ((0.0, True), (2e-2, False)):
        inexact(off)
        (result,), same = run_substituted(program, given, CPU, found[1], near)
        assert same == expected
        assert torch.equal(result, with_parameters(found[0], parts, CPU)(IMAGES))


@pytest.mark.usefixtures("as_on_an_h100")
def test_models_that_no_program_holds_stay_as_they_are() -> None:
    class Gathers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.gather(x, 1, torch.zeros_like(x, dtype=torch.int64))

    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] > 1 else x  # torch.fx cannot look into it

    model = freeze(stem().append(Gathers()), IMAGES)
    assert model.fusions == ("conv2d and max_pool2d apart: no file can hold aten.gather.default",)
    assert not isinstance(model._held.model, Interpreted)
    assert freeze(stem().append(Branches()), IMAGES).fusions == ()


def test_a_capture_that_fails_is_left(monkeypatch: pytest.MonkeyPatch, as_on_an_h100: None) -> None:
    class Refuses(Times):
        def capture(self, run: Callable[[], Any], most_lanes: int, early: bool = False) -> tuple[FakeGraph, Any]:
            if self.graphs:
                raise torch.OutOfMemoryError("no memory for another one")
            return super().capture(run, most_lanes, early)

    model = freeze(stem(), IMAGES, Refuses(1.0))
    assert model.fusions == ("conv2d and max_pool2d apart: no memory for another one",)
    assert torch.equal(model(IMAGES), model._held.model(IMAGES))


@pytest.mark.usefixtures("as_on_an_h100")
def test_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stem()
    with torch.autocast("cpu", torch.bfloat16):
        together = freeze(model, IMAGES)
        monkeypatch.setattr(frozen, "RULES", ())
        expected = freeze(model, IMAGES)(IMAGES)  # the fake graph runs the model again, which autocast decides on
        assert torch.equal(together(IMAGES), expected)
    assert "1 times" in together.fusions[0]
    assert expected.dtype == torch.bfloat16
    assert torch.equal(together(IMAGES), expected), "a program holds what autocast decided"


# ---- which steps may be one ------------------------------------------------------------------------------------------


def rewritten(model: nn.Module, x: Tensor, rule: Rule = STEM_POOL) -> Program | None:
    """The model's program after a rule, run and compared with the model."""
    with torch.no_grad():
        program, parts = program_of(model, [x])
        found = fused(program, CPU, rule)
        if found is None:
            return None
        expected, ours = model(x), with_parameters(found[0], parts, CPU)(x)
        Program.from_dict(found[0].to_dict())
    for one, other in zip(tree_leaves(expected), tree_leaves(ours), strict=True):
        assert torch.equal(one, other)
    return found[0]


class Returns(Stem):
    def forward(self, x: Tensor) -> Any:
        y = ops.conv2d(x, self.weight)
        return y, ops.max_pool2d(y, 3, 2)


class Slice(Stem):
    """A dense block's beginning: the pooling writes into a slice of a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        y = ops.conv2d(x, self.weight, None, 2, 1, scale=self.weight[:, 0, 0, 0], activation="relu")
        buffer = torch.empty((2, 56, 9, 10), memory_format=torch.channels_last)
        buffer[:, 40:].fill_(1.0) if self.options.get("writes") else None
        ops.max_pool2d(y, 3, 2, 1, out=buffer[:, :40])
        buffer[:, 40:].fill_(1.0)
        return buffer


@pytest.mark.usefixtures("as_on_an_h100")
def test_a_pooling_into_a_slice() -> None:
    program = rewritten(Slice(), IMAGES)
    assert program is not None
    assert fast.conv2d_max_pool2d_into.default in operators_of(program)
    assert fast.max_pool2d_into.default not in operators_of(program)
    assert rewritten(Slice(writes=True), IMAGES) is None, "what the convolution reads might have been written"


@pytest.mark.usefixtures("as_on_an_h100")
@pytest.mark.parametrize(
    "model",
    [
        Returns(),
        Stem(lambda x, y: y + y),
        Stem(lambda x, y: ops.max_pool2d(y, 2, 1) + ops.max_pool2d(y, 2, 1)),
        Stem(lambda x, y: (x.add_(1.0), y)[1]),
        Stem(lambda x, y: y.relu_()),
        Stem(lambda x, y: y.view(y.shape)),
        Stem(residual=torch.randn(2, 40, 17, 20)),
        Stem(input_scale=torch.ones(3)),
        Stem(input_shift=torch.ones(3)),
        Stem(input_activation="relu"),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 8, 1), nn.AvgPool2d(2)),
    ],
    ids=["returned", "arithmetic", "twice", "written", "changed", "view", "residual", "scale", "shift", "relu", "mean"],
)  # fmt: skip
def test_what_stays_apart(model: nn.Module) -> None:
    assert rewritten(model, IMAGES.clone()) is None


def test_a_group_whose_first_value_has_other_readers() -> None:
    """A rule for operators with several results, of which each keeps its readers."""

    def find(view: View, i: int) -> Fusion | None:
        step = view.steps[i]
        if step.operator is not aten.var.correction:
            return None
        x, dims = argument(step, "self"), argument(step, "dim")
        for j in view.readers(x.number):
            if view.steps[j].operator is aten.mean.dim and argument(view.steps[j], "dim") == dims and j > i:
                both = (*step.results, *view.steps[j].results)
                fused = Step(aten.var_mean.correction, (x, dims), {"correction": argument(step, "correction")}, both)
                return Fusion((i, j), fused, (*view.results[i], *view.results[j]))
        return None

    class Moments(nn.Module):
        def __init__(self, early: bool) -> None:
            super().__init__()
            self.early = early

        def forward(self, x: Tensor) -> Sequence[Tensor]:
            y = x * 2
            var = torch.var(y, (2, 3), correction=1)
            early = var + 1 if self.early else y - 1
            mean = torch.mean(y, (2, 3))
            return early, mean / var, var, early * 2, mean

    rule = Rule("var and mean", lambda device: True, find)
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)  # exact sums: both ways have the same bits
    program = rewritten(Moments(False), x, rule)
    assert program is not None
    assert operators_of(program).count(aten.var_mean.correction) == 1
    assert not {aten.var.correction, aten.mean.dim} & set(operators_of(program))
    assert rewritten(Moments(True), x, rule) is None, "the variance is read before the mean is there"


def test_views_of_a_program() -> None:
    program, _ = program_of(Stem().eval(), [IMAGES])
    view = View(program, CPU)
    convolution = next(i for i, step in enumerate(view.steps) if step.operator is fast.conv2d.default)
    step = view.steps[convolution]
    assert view.only_reader(convolution) == convolution + 1
    assert view.only_reader(convolution + 1) is None, "the program returns it"
    assert view.spec(Value(view.results[convolution][0])).shape == (2, 40, 17, 20)
    assert argument(step, "activation") == "relu"
    with pytest.raises(KeyError):
        argument(step, "no such")
