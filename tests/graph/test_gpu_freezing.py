"""Freezing for a GPU, rehearsed on the CPU: all but the CUDA graph itself, for which a rerun of the model stands."""

from __future__ import annotations

import copy
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torchvision
from support.accuracy import assert_accurate
from support.fake_capture import FakeCapturer, FakeGraph
from support.networks import small_input, small_network
from torch import Tensor, nn

import fastcnn
from fastcnn.backends import derived
from fastcnn.graph.freezing import FrozenOnGpu
from fastcnn.graph.freezing.gpu import freeze_on_gpu
from fastcnn.graph.freezing.gpu.hidden import hidden_code
from fastcnn.graph.freezing.gpu.watching import CannotBeCaptured
from fastcnn.verification import calibrate


def freeze(model: nn.Module, *examples: Tensor, dtype: torch.dtype | None = None, **options: Any) -> FrozenOnGpu:
    return freeze_on_gpu(model, examples, dtype, **{"capturer": FakeCapturer(), **options})


@pytest.fixture(scope="module")
def frozen() -> FrozenOnGpu:
    return freeze(small_network(), small_input())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn, self.shortcut = nn.BatchNorm2d(8), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv1(x))
        return torch.relu(self.bn(self.conv2(y)) + self.shortcut(x))


NETWORKS = {
    "resnet20_cifar": lambda: fastcnn.create_model("resnet20_cifar"),
    "googlenet": lambda: fastcnn.create_model("googlenet"),
    "densenet_bc100_k12_cifar": lambda: fastcnn.create_model("densenet_bc100_k12_cifar"),
    "torchvision resnet18": torchvision.models.resnet18,
    "torchvision googlenet": lambda: torchvision.models.googlenet(init_weights=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@fastcnn.exact()  # the fast algorithms of the processor that stands in for a GPU are judged by another rule
def test_networks_with_changed_inputs(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = calibrate(NETWORKS[name]().eval(), torch.randn(4, 3, 32, 32))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    side_by_side_is_faster = FakeCapturer(times={2: 0.5, 3: 0.5, 4: 0.5})
    frozen = freeze(model, torch.randn(2, 3, 32, 32), dtype=dtype, capturer=side_by_side_is_faster)
    assert frozen.recomputed == 0
    assert (frozen.lanes > 1) == ("densenet" not in name)
    reference = copy.deepcopy(model).to(dtype)
    results = []
    for seed in (1, 2):
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
        results.append(frozen(x))
        with torch.no_grad(), fastcnn.use_backend("reference"):
            assert_accurate(results[-1], reference(x), copy.deepcopy(reference).double()(x.double()))
    assert not torch.equal(*results), "results must have memory of their own"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_model_is_left_alone_and_out_of_reach() -> None:
    model = small_network().train()
    x = small_input()
    frozen = freeze(model, x)
    expected = frozen(x)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not expected.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    frozen.train()
    assert torch.equal(frozen(x.requires_grad_()), expected)
    assert list(frozen.parameters()) == []


def test_in_inference_mode() -> None:
    model, x = torchvision.models.resnet18().eval(), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        frozen = freeze(model, torch.randn(1, 3, 32, 32))
        expected = frozen(x)
    assert frozen.recomputed == 0
    assert torch.equal(frozen(x), expected)
    with torch.inference_mode():
        model = torchvision.models.resnet18().eval()  # its parameters are inference tensors
        frozen = freeze(model, x)
    assert not any(tensor.is_inference() for tensor in frozen._held.tensors())


def test_what_the_graph_reads_outlives_the_cache(frozen: FrozenOnGpu) -> None:
    frozen = freeze(torchvision.models.resnet18().eval(), torch.randn(1, 3, 32, 32))
    folded = [weakref.ref(leaf) for pair in frozen._held.derived.values if isinstance(pair, tuple) for leaf in pair]
    assert len(folded) == 40
    derived.clear()
    assert all(reference() is not None for reference in folded)


def test_inputs_are_filled_in_place_or_copied(frozen: FrozenOnGpu) -> None:
    (static,) = frozen.inputs
    first, second = small_input(), small_input() + 1
    by_copy = [frozen(x) for x in (first, second)]
    static.copy_(first)
    assert torch.equal(frozen(static), by_copy[0])
    static.copy_(second)
    result = frozen.replay()
    assert torch.equal(result, by_copy[1])
    static.copy_(first)
    assert frozen.replay() is result
    assert torch.equal(result, by_copy[0])
    assert torch.equal(frozen(second.contiguous(memory_format=torch.channels_last)), by_copy[1])
    with torch.inference_mode():
        assert torch.equal(frozen(first), by_copy[0])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (small_input(batch=3), r"input 0 must have shape \(4, 3, 16, 16\).*it has shape \(3, 3, 16, 16\)"),
        (small_input()[0], r"it has shape \(3, 16, 16\)"),
        (small_input().double(), "must have .* dtype torch.float32 .* it has .* dtype torch.float64"),
        (small_input().to("meta"), "on cpu.* on meta"),
    ],
)
def test_a_wrong_input_is_named(frozen: FrozenOnGpu, wrong: Tensor, words: str) -> None:
    replays = frozen._graph.replays
    with pytest.raises(ValueError, match=words):
        frozen(wrong)
    assert frozen._graph.replays == replays


def test_a_wrong_number_or_kind_of_inputs(frozen: FrozenOnGpu) -> None:
    with pytest.raises(ValueError, match="takes 1 inputs, was given 2"):
        frozen(small_input(), small_input())
    with pytest.raises(TypeError, match="input 0 must be a tensor, is a list"):
        frozen([1.0])


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Buffer(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * 2.0


class Replaces(Writes):
    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return x * 2.0


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Calls(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Writes(), "writes to a parameter or buffer"),
        (Replaces(), "writes to a parameter or buffer"),
        (Calls(lambda x: x.relu_()), "writes to an input"),
        (Calls(lambda x: x + torch.rand(4, 3, 16, 16)), "draws random numbers"),
        (Calls(lambda x: x / x.max().item()), r"_local_scalar_dense\.default looks at values"),
        (Calls(lambda x: x[x > 0]), "looks at values"),
        (Calls(lambda x: (x, 1)), "must return tensors, returned a int"),
        (Counts(), "depends on what changes from call to call"),
    ],
)
def test_what_no_graph_can_hold(model: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        freeze(model, small_input())


def test_a_model_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="model must be on cpu like example_inputs"):
        freeze(small_network().to("meta"), small_input())


def test_random_numbers_of_others_are_no_reason_to_refuse() -> None:
    class Attention(nn.Module):
        """Its operator could draw (dropout), and does not."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    x = small_input()
    assert torch.allclose(freeze(Attention(), x)(x), Attention()(x))


def test_structures_of_results_and_several_inputs() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            return {"sum": x + y, "both": (x, [y * 2])}

    x, y = small_input(), small_input() + 1
    frozen = freeze(Several(), x, y)
    found = frozen(y, x)
    assert found.keys() == {"sum", "both"}
    assert torch.equal(found["sum"], x + y)
    assert torch.equal(found["both"][0], y)
    assert found["both"][0].data_ptr() not in {t.data_ptr() for t in (y, *frozen.inputs)}
    assert torch.equal(found["both"][1][0], x * 2)


def test_threads_take_turns(frozen: FrozenOnGpu) -> None:
    inputs = [small_input() + i for i in range(4)]
    expected = [frozen(x) for x in inputs]
    taken = frozen._capturer.turn.taken
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: frozen(inputs[i % 4]), range(40)))
    assert all(torch.equal(result, expected[i % 4]) for i, result in enumerate(results))
    assert frozen._capturer.turn.taken == taken + 40


def test_two_frozen_models_share_nothing() -> None:
    model = small_network()
    one, other = freeze(model, small_input()), freeze(model, small_input())
    x = small_input()
    expected = one(x)
    other(x + 1)
    assert torch.equal(one.replay(), expected)


def test_memory_is_reported() -> None:
    frozen = freeze(small_network(), small_input())
    memory = frozen.memory()
    assert memory.inputs == small_input().nbytes
    assert memory.weights >= sum(p.nbytes for p in small_network().parameters())
    assert memory.graph == 4096
    assert "inputs (4, 3, 16, 16)" in repr(frozen)
    assert str(memory) in repr(frozen)


# ---- branches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("faster", "lanes"), [(True, 2), (False, 1)])
def test_branches_are_side_by_side_where_that_is_faster(faster: bool, lanes: int) -> None:
    capturer = FakeCapturer(times={1: 1.0, 2: 0.5 if faster else 1.5})
    frozen = freeze(Residual().eval(), small_input(), capturer=capturer)
    assert [most for most, _, _ in capturer.captures] == [1, 4]
    assert frozen.lanes == lanes
    assert "ms" in frozen.branches


def test_one_graph_is_enough_where_there_are_no_branches() -> None:
    capturer = FakeCapturer()
    frozen = freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()).eval(), small_input(), capturer=capturer)
    assert len(capturer.captures) == 1
    assert frozen.branches == "no branches"


def test_branches_with_another_result_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    class Racing(FakeCapturer):
        def capture(self, run, most_lanes: int, early: bool = False) -> tuple[FakeGraph, Any]:
            return super().capture(run if most_lanes == 1 else lambda: run() * (1 + 1e-6), most_lanes, early)

    frozen = freeze(Residual().eval(), small_input(), capturer=Racing(times={1: 1.0, 2: 0.5}))
    assert frozen.lanes == 1
    assert "the result is another" in caplog.text


# ---- early starts ----------------------------------------------------------------------------------------------------


def test_kernels_begin_early_where_that_is_faster() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    for slower, early in ((-0.1, True), (0.1, False)):
        capturer = FakeCapturer(early_starts=True, slower_when_early=slower)
        frozen = freeze(model, small_input(), capturer=capturer)
        assert frozen.early_starts == early
        assert len(capturer.captures) == 2


def test_branches_begin_early_too() -> None:
    capturer = FakeCapturer(times={1: 1.0, 2: 0.5}, early_starts=True, slower_when_early=-0.1)
    frozen = freeze(Residual().eval(), small_input(), capturer=capturer)
    assert frozen.early_starts
    assert frozen.lanes == 2


@pytest.mark.parametrize("most", [1, 4])
def test_what_cannot_begin_early_is_captured_without(most: int, caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(FakeCapturer):
        def capture(self, run, most_lanes: int, early: bool = False) -> tuple[FakeGraph, Any]:
            if early and most_lanes == most:
                raise CannotBeCaptured("CUDA refuses it")
            return super().capture(run, most_lanes, early)

    capturer = Refusing(times={1: 1.0, 2: 0.5}, early_starts=True, slower_when_early=-0.1)
    frozen = freeze(Residual().eval(), small_input(), capturer=capturer)
    assert not frozen.early_starts
    assert frozen.lanes == 2
    assert ("do not begin early" in caplog.text) == (most == 1)


def test_an_early_start_with_another_result_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    class Racing(FakeCapturer):
        def capture(self, run, most_lanes: int, early: bool = False) -> tuple[FakeGraph, Any]:
            return super().capture(lambda: run() * (1 + 1e-6) if early else run(), most_lanes, early)

    frozen = freeze(Residual().eval(), small_input(), capturer=Racing(early_starts=True, slower_when_early=-0.1))
    assert not frozen.early_starts
    assert "the result is another" in caplog.text


def test_weights_that_a_replay_computes_keep_kernels_from_beginning_early() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
            return fastcnn.ops.conv2d(x, weight, self.bias)

    capturer = FakeCapturer(early_starts=True, slower_when_early=-0.1)
    frozen = freeze(nn.Sequential(Standardised(3, 8, 3)).eval(), small_input(), capturer=capturer)
    assert frozen.recomputed > 0
    assert not frozen.early_starts
    assert len(capturer.captures) == 1


def test_code_that_may_launch_unseen_gets_one_lane() -> None:
    class Opaque(Residual):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * 2 if y.shape[0] > 1 else y  # control flow: torch.fx cannot look into it

    capturer = FakeCapturer(times={1: 1.0, 2: 0.5})
    frozen = freeze(Opaque().eval(), small_input(), capturer=capturer)
    assert len(capturer.captures) == 1
    assert "Opaque" in frozen.branches


def test_what_a_model_is_made_of_is_known() -> None:
    x = torch.randn(1, 3, 32, 32)
    for model in (fastcnn.create_model("resnet20_cifar"), fastcnn.optimize(Residual().eval(), x)):
        model.eval()(x)
        assert hidden_code(model) is None
    assert "Residual" in str(hidden_code(Residual()))
    hooked = fastcnn.create_model("resnet20_cifar")
    hooked.layer1.register_forward_hook(lambda *_: None)
    assert "layer1" in str(hidden_code(hooked))


def test_a_converted_parameter_is_converted_once() -> None:
    """A vector in bf16 that kernels want in fp32: on a GPU a conversion would be a kernel in each replay."""
    from fastcnn.ops._arguments import kernel_vector

    class OnGpu(nn.Parameter):
        is_cuda = True

    bias = OnGpu(torch.randn(4).bfloat16(), requires_grad=False)
    with derived.keeping() as kept:
        once, again = kernel_vector(bias), kernel_vector(bias)
    assert once is again
    assert once.dtype == torch.float32
    assert (kept.made, len(kept.values)) == (1, 2)
    with torch.no_grad():
        bias += 1
    assert torch.equal(kernel_vector(bias), bias.float())
