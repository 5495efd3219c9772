"""What a call of a frozen model does around its plan: hooks, inputs of every kind, results wherever they lie."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from support.networks import small_input, small_network
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import fastcnn
from fastcnn import _native
from fastcnn.graph.freezing import FrozenModel


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Of fastcnn's operators, so that a frozen one has its bits."""
    return fastcnn.optimize(small_network(), small_input())


@pytest.fixture
def frozen(model: nn.Module) -> FrozenModel:
    return fastcnn.freeze(model, small_input())


def expected(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_its_own_hooks_run(model: nn.Module, frozen: FrozenModel) -> None:
    x, seen = small_input(), []
    before = frozen.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    after = frozen.register_forward_hook(lambda module, inputs, result: seen.append(result) or result + 1)
    assert torch.equal(frozen(x), expected(model, x * 2) + 1)
    assert len(seen) == 1
    before.remove()
    after.remove()
    assert torch.equal(frozen(x), expected(model, x))
    assert len(seen) == 1


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_global_hooks_run(frozen: FrozenModel, register) -> None:
    seen: list[nn.Module] = []
    handle = register(lambda module, *_: seen.append(module))
    try:
        frozen(small_input())
    finally:
        handle.remove()
    assert seen == [frozen]


def test_keyword_arguments_are_refused_as_ever(frozen: FrozenModel) -> None:
    with pytest.raises(TypeError):
        frozen(x=small_input())


def test_results_that_are_kept_lie_anywhere(model: nn.Module, frozen: FrozenModel) -> None:
    """More of them than the plan remembers places for, in and out, and the first places again."""
    inputs = [small_input() + i for i in range(9)]
    for _ in range(2):
        results = [frozen(x) for x in inputs]
        assert len({result.data_ptr() for result in results}) == len(results)
        for x, result in zip(inputs, results, strict=True):
            assert torch.equal(result, expected(model, x))


def test_the_number_of_threads_may_change_between_places(model: nn.Module, frozen: FrozenModel) -> None:
    threads, inputs = torch.get_num_threads(), [small_input(), small_input() * 3]
    try:
        for count in (1, 2, 2, 5, 1, 2):
            torch.set_num_threads(count)
            for x in inputs:
                assert torch.equal(frozen(x), expected(model, x))
    finally:
        torch.set_num_threads(threads)


def test_several_python_threads_with_more_threads_than_processors(model: nn.Module, frozen: FrozenModel) -> None:
    threads, wrong = torch.get_num_threads(), []
    inputs = [small_input() + i for i in range(4)]
    wanted = [expected(model, x) for x in inputs]

    def run(index: int) -> None:
        torch.set_num_threads(4 * (torch.get_num_threads() + 1))
        for _ in range(20):
            if not torch.equal(frozen(inputs[index]), wanted[index]):
                wrong.append(index)

    try:
        workers = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(threads)
    assert not wrong


class _Subclass(Tensor):
    pass


def test_inputs_of_every_kind(model: nn.Module, frozen: FrozenModel) -> None:
    x = small_input()
    wanted = expected(model, x)
    assert torch.equal(frozen(nn.Parameter(x.clone())), wanted)
    assert torch.equal(frozen(x.clone().requires_grad_()), wanted)
    assert torch.equal(frozen(x.as_subclass(_Subclass)), wanted)
    for other in (x.contiguous(), x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).transpose(2, 3)):
        assert torch.equal(frozen(other), wanted)
    offset = torch.cat([x.new_zeros(1, *x.shape[1:]), x])[1:]
    assert torch.equal(frozen(offset), wanted)


def test_a_negative_view_is_read_as_negative(model: nn.Module, frozen: FrozenModel) -> None:
    x = small_input()
    view = torch._neg_view(x)
    assert view.is_neg()
    assert view.stride() == x.stride()
    assert torch.equal(frozen(view), expected(model, -x))


def test_strides_of_single_dimensions_mean_nothing() -> None:
    lenet = fastcnn.create_model("lenet5").eval()
    x = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    frozen = fastcnn.freeze(lenet, x)
    for strides in ((1024, 1024, 32, 1), (1024, 1, 32, 1), (7, 3, 32, 1)):
        assert torch.equal(frozen(x.as_strided(x.shape, strides)), expected(lenet, x))


def test_no_gradient_is_recorded(frozen: FrozenModel) -> None:
    assert not frozen(small_input().requires_grad_()).requires_grad


def test_a_caller_must_be_told_the_truth_about_its_regions(frozen: FrozenModel) -> None:
    checks, (length, dtype) = frozen._input_checks, frozen._output_memory[0]
    out = [((length,), (1,), dtype)]
    with pytest.raises(ValueError, match="as many inputs and outputs"):
        frozen._plan.caller([], out, True, [], torch)
    with pytest.raises(ValueError, match="output must fill its region"):
        frozen._plan.caller(checks, [((length - 1,), (1,), dtype)], True, [], torch)
    with pytest.raises(ValueError, match="input must fill its region"):
        frozen._plan.caller([((1,), (1,), torch.float32)], out, True, [], torch)
    for shape, strides in (((0, 2), (-(2**40), 1)), ((2**41,), (1,)), ((2**40, 2**40), (2**40, 1))):
        with pytest.raises(ValueError, match="positive sizes and strides"):
            frozen._plan.caller([(shape, strides, torch.float32)], out, True, [], torch)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        frozen._plan.caller([(*checks[0][:2], torch.float64)], out, True, [], torch)


def test_results_are_ordinary_tensors(frozen: FrozenModel) -> None:
    x = small_input()
    with torch.inference_mode():
        inside = frozen(x)
    result = frozen(x)
    assert inside.is_inference()
    assert not result.is_inference()
    assert type(result) is Tensor
    assert result._base is None
    assert result.is_leaf
    assert result.untyped_storage().nbytes() == result.numel() * result.element_size()
    for same in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert torch.equal(same, result)
        assert same.stride() == result.stride()
    assert result.stride() == frozen.forward(x).stride()
    result.add_(1).requires_grad_().sum().backward()
    before = inside.clone()
    with torch.inference_mode():
        inside.resize_(2 * inside.numel())
    assert torch.equal(inside[: before.numel()], before.as_strided((before.numel(),), (1,)))


def test_a_default_device_does_not_reach_the_results(model: nn.Module, frozen: FrozenModel) -> None:
    x = small_input()
    with torch.device("meta"):
        result = frozen(x)
    assert torch.equal(result, expected(model, x))


def test_what_compile_has_set_is_called(model: nn.Module, frozen: FrozenModel) -> None:
    x = small_input()
    frozen._compiled_call_impl = lambda x: "compiled"
    assert frozen(x) == "compiled"
    frozen._compiled_call_impl = None
    assert torch.equal(frozen(x), expected(model, x))


class _Several(nn.Module):
    def __init__(self, results: int) -> None:
        super().__init__()
        self.results, self.layer = results, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.layer(x) * factor for factor in range(self.results)]


@pytest.mark.parametrize("results", [1, 2, 12])
def test_results_in_a_structure(results: int) -> None:
    module, x = _Several(results).eval(), torch.randn(2, 4)
    ours, wanted = fastcnn.freeze(module, x)(x), module(x)
    assert isinstance(ours, list)
    for result, reference in zip(ours, wanted, strict=True):
        assert torch.allclose(result, reference, rtol=1e-5, atol=1e-6)


def test_a_plan_is_run_for_modules_alone(frozen: FrozenModel) -> None:
    x = small_input()
    with pytest.raises(TypeError, match="a module, a tuple and a dictionary"):
        _native.call_plan(frozen, [x], {})
    with pytest.raises(AttributeError):
        _native.call_plan(3, (x,), {})
    assert _native.call_plan(nn.Linear(2, 2), (x,), {}) is None
    assert _native.call_plan(frozen, (x,), {"x": x}) is None
    assert _native.call_plan(frozen, (x, x), {}) is None
