"""freeze: the same results as the model, for every family, however often and by whomever the frozen model is called."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.accuracy import assert_accurate, relative_error
from support.networks import small_input, small_network
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn

import fastcnn
from fastcnn import ops
from fastcnn.backends import cpp
from fastcnn.graph.freezing import choosing

# A name of each family and variant, with the smallest image that it takes.
FAMILIES = {
    "lenet5": (1, 32),
    "alexnet_2gpu": (3, 227),
    "alexnet_owt": (3, 64),
    "zfnet": (3, 224),
    "vgg11": (3, 32),
    "vgg11_bn": (3, 32),
    "googlenet": (3, 64),
    "googlenet_lrn": (3, 64),
    "resnet18": (3, 64),
    "resnet50": (3, 64),
    "resnext50_32x4d": (3, 64),
    "plain18": (3, 64),
    "preresnet50": (3, 64),
    "densenet121": (3, 64),
    "resnet20_cifar": (3, 32),
    "resnet110_sd_cifar": (3, 32),
    "preresnet164_cifar": (3, 32),
    "resnext29_8x64d_cifar": (3, 32),
    "wrn16_8_cifar": (3, 32),
    "densenet40_k12_cifar": (3, 32),
    "densenet_bc100_k12_cifar": (3, 32),
}


def model_named(name: str) -> nn.Module:
    """In eval mode, with batch norms that have something to fold."""
    torch.manual_seed(0)
    return randomise_batch_norms(fastcnn.create_model(name)).eval()


def images(batch: int, channels: int, size: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def unfrozen(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(*inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_models_own_bits(name: str) -> None:
    """The same kernels run on the same values: equality, not closeness. Twice, and with an arena full of NaN."""
    model = model_named(name)
    for batch in (1, 3):
        x = images(batch, *FAMILIES[name])
        expected = unfrozen(model, x)
        assert expected.isfinite().all()
        frozen = fastcnn.freeze(model, torch.zeros_like(x))
        first, second = frozen(x), frozen(x)
        frozen._plan.fill_arena(0xFF)
        poisoned = frozen(x)
        for result in (first, second, poisoned):
            assert torch.equal(result, expected)
            assert result.stride() == expected.stride()


def test_lenet5_1998_obeys_the_accuracy_rule() -> None:
    """Its tanh and its sums over features are ATen's in the model and the plan's own here: not the same bits."""
    model = model_named("lenet5_1998")
    for batch in (1, 3):
        x = images(batch, 1, 32)
        with fastcnn.use_backend("reference"):
            exact, reference = unfrozen(copy.deepcopy(model).double(), x.double()), unfrozen(model, x)
        frozen = fastcnn.freeze(model, x)
        result = frozen(x)
        assert_accurate(result, reference, exact)
        frozen._plan.fill_arena(0xFF)
        assert torch.equal(frozen(x), result)


@pytest.mark.parametrize("name", ["resnet20_cifar", "densenet40_k12_cifar", "lenet5"])
def test_bfloat16_freezes_a_converted_copy(name: str) -> None:
    model = model_named(name)
    x = images(3, *FAMILIES[name])
    frozen = fastcnn.freeze(model, x, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.float32
    narrow = x.bfloat16()
    expected = unfrozen(copy.deepcopy(model).bfloat16(), narrow)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(frozen(narrow), expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_results_have_the_models_strides_and_other_layouts_are_converted(channels_last: bool) -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 20, 3)

        def forward(self, x: Tensor) -> Tensor:
            return ops.max_pool2d(ops.conv2d(x, self.conv.weight, self.conv.bias, activation="relu"), 2)

    model = Features().eval()
    x = images(2, 3, 12)
    other = x.to(memory_format=torch.channels_last)
    if channels_last:
        x, other = other, x
    expected = unfrozen(model, x)
    frozen = fastcnn.freeze(model, x)
    for given in (x, other, images(2, 3, 24)[:, :, ::2, ::2].copy_(x)):
        result = frozen(given)
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()


def test_later_changes_of_the_model_do_not_reach_the_frozen_one() -> None:
    model = model_named("resnet20_cifar")
    x = images(1, 3, 32)
    expected = unfrozen(model, x)
    frozen = fastcnn.freeze(model, x)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert not torch.equal(unfrozen(model, x), expected)
    assert torch.equal(frozen(x), expected)


def test_the_models_own_modes_and_state_are_left_alone() -> None:
    model = small_network().train()
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = fastcnn.freeze(model, small_input())
    assert [module.training for module in model] == [False, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list(frozen.parameters())


def test_results_are_fresh_memory() -> None:
    model = model_named("resnet20_cifar")
    frozen = fastcnn.freeze(model, images(1, 3, 32))
    first = frozen(images(1, 3, 32))
    kept = first.clone()
    frozen(images(1, 3, 32, seed=2))
    assert torch.equal(first, kept)
    assert not first.requires_grad


def test_two_threads_at_once() -> None:
    model = model_named("densenet40_k12_cifar")
    inputs = [images(1, 3, 32, seed=seed) for seed in range(4)]
    expected = [unfrozen(model, x) for x in inputs]
    assert not torch.equal(expected[0], expected[1])
    frozen = fastcnn.freeze(model, inputs[0])
    wrong: list[int] = []

    def call(first: int) -> None:
        for i in range(40):
            index = (first + i) % len(inputs)
            if not torch.equal(frozen(inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    model = model_named("resnet20_cifar")
    x = images(2, 3, 32)
    frozen = fastcnn.freeze(model, x)
    expected = frozen(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(frozen(x), expected)
    finally:
        torch.set_num_threads(before)


def operators_of(frozen: fastcnn.graph.freezing.FrozenModel) -> list[str]:
    """Of one lane, where the batch runs in lanes."""
    recipe = frozen._recipe
    return [step.operator for step in recipe.steps[: len(recipe.steps) // recipe.lanes]]


# Batch, channels in and out, height and width. Many blocks of tiles; few, so that threads share out the output
# channels; tiles of 2x2; weights that stay plain; tiles of 6x6.
WINOGRAD = {
    "winograd4": (2, 40, 33, 61, 53), "winograd4 columns": (2, 256, 300, 16, 11), "winograd2": (1, 256, 128, 10, 10),
    "winograd4_plain": (1, 512, 300, 7, 6), "winograd6": (2, 40, 33, 61, 53),
}  # fmt: skip


class _Convolution(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(out_channels, channels, 3, 3, generator=generator))
        self.scale, self.shift = (nn.Parameter(torch.randn(channels, generator=generator)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(out_channels, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        first = ops.conv2d(
            x, self.weight, self.bias, padding=(1, 2), activation="relu",
            input_scale=self.scale, input_shift=self.shift, input_activation="relu",
        )  # fmt: skip
        return ops.conv2d(x, self.weight, padding=(1, 2), residual=first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", WINOGRAD)
def test_winograd_steps_give_the_models_own_bits(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.float32:  # whatever pays with this instruction set
        monkeypatch.setattr(cpp, "_cheapest", lambda *args: form.split()[0])
    batch, channels, out_channels, height, width = WINOGRAD[form]
    model = _Convolution(channels, out_channels).to(dtype)
    x = torch.randn(batch, channels, height, width).to(dtype).contiguous(memory_format=torch.channels_last)
    expected = unfrozen(model, x)
    frozen = fastcnn.freeze(model, x)
    # Where a processor multiplies bf16, small pictures need no Winograd.
    if dtype == torch.float32 or form == "winograd4":
        assert operators_of(frozen) == ["conv2d_winograd"] * 2
        chosen = {algorithm for _, _, algorithm, *_ in frozen._recipe.weights}
        assert chosen == {form.split()[0]}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            frozen._plan.fill_arena(0xFF)
            assert torch.equal(frozen(x), expected)
    finally:
        torch.set_num_threads(before)


def test_exact_rules_winograd_out_of_a_frozen_model() -> None:
    model, x = _Convolution(16, 24), images(1, 16, 12).contiguous(memory_format=torch.channels_last)
    with fastcnn.exact():
        expected, frozen = unfrozen(model, x), fastcnn.freeze(model, x)
    assert operators_of(frozen) == ["conv2d"] * 2
    assert torch.equal(frozen(x), expected)
    assert not torch.equal(unfrozen(model, x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tuning_takes_the_fastest_algorithm_that_is_right(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"direct": 3.0, "winograd6": 1.5, "winograd4": 1.0, "winograd2": 2.0, "winograd4_plain": 2.5}
    monkeypatch.setattr(choosing._Layer, "seconds", lambda layer: taken[layer.algorithm])
    monkeypatch.setattr(choosing, "is_faster", lambda candidate, usual: True)
    model = _Convolution(16, 24).to(dtype)
    x = images(1, 16, 12).to(dtype).contiguous(memory_format=torch.channels_last)

    def chosen() -> set[str]:
        frozen = fastcnn.freeze(model, x, tune=True)
        assert frozen(x).isfinite().all()
        return {algorithm for _, _, algorithm, *_ in frozen._recipe.weights}

    assert chosen() == {"winograd4"}
    with fastcnn.exact():
        assert chosen() == {"direct"}
    plain = cpp.pack_weight

    def wrong(weight: Tensor, groups: int, algorithm: str) -> cpp.PackedWeight:
        return plain(weight * (1 + 2e-5) if algorithm == "winograd4" else weight, groups, algorithm)

    monkeypatch.setattr(cpp, "pack_weight", wrong)
    assert chosen() == {"winograd6"}
    usual = cpp.conv2d_algorithm(unfrozen(model, x).shape, (24, 16, 3, 3), (1, 1), (1, 1), 1, dtype)
    taken.update(dict.fromkeys(taken, 1.0))
    taken["direct" if usual == "winograd2" else "winograd2"] = 0.99  # too little to matter
    monkeypatch.setattr(cpp, "pack_weight", plain)
    assert chosen() == {usual}


# Filter, stride, algorithm, input's shape and output channels: several phases of few channels in a vector; one phase.
STRIDED = [
    (6, 2, "winograd4s2", (1, 3, 111, 98), 64),
    (11, 4, "winograd4s4", (2, 3, 118, 117), 64),
    (5, 2, "winograd4s2", (1, 40, 54, 57), 64),
    (3, 2, "winograd2s2", (8, 256, 28, 28), 256),
    (7, 2, "winograd1x4s2", (1, 3, 111, 98), 64),
    (3, 2, "winograd1x4s2", (1, 128, 57, 55), 128),
]


@pytest.mark.parametrize(("filter", "stride", "algorithm", "shape", "k"), STRIDED, ids=str)
def test_winograd_with_a_stride_gives_the_models_own_bits(
    filter: int,
    stride: int,
    algorithm: str,
    shape: tuple[int, ...],
    k: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpp, "_cheapest", lambda *args: algorithm)  # whatever pays with this instruction set
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(shape[1], k, filter, stride, filter // 2), nn.ReLU()).eval()
    optimized = fastcnn.optimize(model)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    frozen = fastcnn.freeze(optimized, x)
    assert [a for _, _, a, *_ in frozen._recipe.weights] == [algorithm]
    assert torch.equal(frozen(x), unfrozen(optimized, x))
    assert 0 < relative_error(frozen(x), copy.deepcopy(model).double()(x.double())) <= 2e-6
    frozen.save(tmp_path / "frozen")
    assert torch.equal(fastcnn.load_frozen(tmp_path / "frozen")(x), frozen(x))
    with fastcnn.exact():
        assert operators_of(fastcnn.freeze(optimized, x)) == ["conv2d"]


def test_tuning_measures_strided_convolutions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"direct": 3.0, "winograd4s2": 2.0, "winograd2s2": 1.0, "winograd1x4s2": 1.5}
    monkeypatch.setattr(choosing._Layer, "seconds", lambda layer: taken[layer.algorithm])
    monkeypatch.setattr(choosing, "is_faster", lambda candidate, usual: True)
    model, x = nn.Conv2d(16, 24, 5, 2, 2).eval(), images(1, 16, 12)

    def chosen(strided: nn.Conv2d) -> list[str]:
        frozen = fastcnn.freeze(strided, x, tune=True)
        assert relative_error(frozen(x), copy.deepcopy(strided).double()(x.double())) <= 2e-6
        return [algorithm for _, _, algorithm, *_ in frozen._recipe.weights]

    assert chosen(model) == ["winograd2s2"]
    taken["winograd4s2"] = 0.5
    assert chosen(model) == ["winograd4s2"]
    taken["direct"] = 0.1
    assert chosen(model) == ["direct"]
    assert chosen(nn.Conv2d(16, 24, 5, (2, 1), 2).eval()) == ["direct"]


@pytest.mark.parametrize("faster", [False, True])
def test_a_tuned_model_is_taken_where_it_is_faster_as_a_whole(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _Convolution(16, 24), images(1, 16, 12).contiguous(memory_format=torch.channels_last)
    usual = fastcnn.freeze(model, x)
    taken = {algorithm: 2.0 for algorithm in ("direct", "winograd6", "winograd4", "winograd2", "winograd4_plain")}
    other = "direct" if "winograd" in usual._recipe.weights[0][2] else "winograd4"
    monkeypatch.setattr(choosing._Layer, "seconds", lambda layer: (taken | {other: 1.0})[layer.algorithm])
    compared: list[Any] = []

    def is_faster(candidate: Callable[[], Any], usual: Callable[[], Any]) -> bool:
        compared.append((candidate(), usual()))
        return faster

    monkeypatch.setattr(choosing, "is_faster", is_faster)
    tuned = fastcnn.freeze(model, x, tune=True)
    if faster:
        assert {algorithm for _, _, algorithm, *_ in tuned._recipe.weights} == {other}
    else:
        assert tuned._recipe == usual._recipe
    ((ours, theirs),) = compared
    assert relative_error(ours, theirs) <= 1e-5
    # Where measuring a layer changes nothing, there is nothing to compare.
    monkeypatch.setattr(choosing._Layer, "seconds", lambda layer: 1.0)
    fastcnn.freeze(model, x, tune=True)
    assert len(compared) == 1


def test_a_tuned_model_computes_the_same_within_the_stated_error() -> None:
    model = model_named("resnet20_cifar")
    x = images(2, 3, 32)
    expected, tuned = unfrozen(model, x), fastcnn.freeze(model, x, tune=True)
    assert relative_error(tuned(x), expected.double()) <= 1e-5
    assert torch.equal(tuned(x), tuned(x))


@pytest.mark.parametrize("weight", [0.0, float("nan")])
def test_tuning_with_weights_that_say_nothing(weight: float) -> None:
    model = _Convolution(16, 24)
    torch.nn.init.constant_(model.weight, weight)
    x = images(1, 16, 12)
    assert torch.equal(fastcnn.freeze(model, x, tune=True)(x).isnan(), unfrozen(model, x).isnan())


@pytest.mark.parametrize("rows", [1, 9, 40])
def test_linear_layers_of_many_rows_share_the_plans_workspace(rows: int) -> None:
    model = nn.Sequential(nn.Linear(70, 130), nn.Linear(130, 20)).eval()
    x = torch.randn(rows, 70)
    frozen = fastcnn.freeze(model, x)
    planned = frozen.memory().workspace  # before a run has used it
    assert_accurate(frozen(x), unfrozen(model, x), unfrozen(copy.deepcopy(model).double(), x.double()))
    assert frozen.memory().workspace == planned
    # Whole panels of rows, of the layer with the most input features.
    assert planned == 0 if rows <= 8 else rows * 130 * 4 <= planned < (rows + 64) * 130 * 4
    assert ("workspace" in str(frozen.memory())) == (rows > 8)


def test_in_inference_mode_and_under_autocast() -> None:
    model = model_named("resnet20_cifar")
    x = images(1, 3, 32).requires_grad_()
    expected = unfrozen(model, x)
    with torch.inference_mode():
        frozen = fastcnn.freeze(model, x)
        assert torch.equal(frozen(x), expected)
    assert torch.equal(frozen(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow, frozen = unfrozen(model, x), fastcnn.freeze(model, x)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(frozen(x), narrow)


class _Function(nn.Module):
    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


FUNCTIONS = {
    "cat_of_overlapping_use": lambda x: torch.cat([ops.max_pool2d(x, 2), ops.avg_pool2d(x, 2)], 1),
    "cat_of_one_twice": lambda x: torch.cat([y := ops.max_pool2d(x, 2), y], 1),
    "cat_along_rows": lambda x: torch.cat([ops.max_pool2d(x, 2), ops.avg_pool2d(x, 2)], 2),
    "cat_read_before_and_after": lambda x: (
        torch.cat([y := ops.max_pool2d(x, 2), ops.avg_pool2d(y, 3, 1, 1)], 1) + torch.cat([y, y], 1)
    ),
    "cat_of_flattened": lambda x: torch.cat([ops.max_pool2d(x, 2).flatten(1), ops.avg_pool2d(x, 2).flatten(1)], 1),
    "cat_of_cat": lambda x: torch.cat(
        [torch.cat([ops.max_pool2d(x, 2), ops.avg_pool2d(x, 2)], 1), x[:, :, ::2, 1::2]], 1
    ),
    "add_of_layouts": lambda x: ops.max_pool2d(x, 2) + ops.avg_pool2d(x, 2).contiguous(),
    "in_place": lambda x: ops.max_pool2d(x, 2).relu_().add_(ops.avg_pool2d(x, 2)).mul_(3.0),
    "broadcast": lambda x: x * x[:1, :, :1, :1] - ops.adaptive_avg_pool2d(x, 1),
    "pad": lambda x: torch.nn.functional.pad(x, (1, 2, 0, 3, 4, 0), value=2.5),
    "transposed": lambda x: (x.permute(0, 2, 3, 1) * 2.0).transpose(1, 2).clone(),
    "split": lambda x: torch.cat([part.relu() for part in (x - 0.5).split(1, 1)][::-1], 1),
    "residual": lambda x: ops.residual_add(x, -x, scale=0.5, activation="relu"),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_graphs_beyond_plain_networks(name: str, layout: torch.memory_format) -> None:
    model = _Function(FUNCTIONS[name]).eval()
    x = images(2, 3, 8).to(memory_format=layout)
    expected = unfrozen(model, x)
    frozen = fastcnn.freeze(model, x)
    frozen._plan.fill_arena(0xFF)
    result = frozen(x)
    assert torch.equal(result, expected)
    assert result.stride() == expected.stride()


def test_several_inputs_and_structured_results() -> None:
    def function(x: Tensor, y: Tensor) -> dict[str, object]:
        pooled = ops.max_pool2d(x, 2)
        return {"pooled": pooled, "parts": (pooled[:, 1:], y), "sum": x + y}

    model = _Function(function)
    x, y = images(1, 3, 8), images(1, 3, 8, seed=2)
    expected, result = model(x, y), fastcnn.freeze(model, (x, y))(x, y)
    assert list(result) == ["pooled", "parts", "sum"]
    assert torch.equal(result["pooled"], expected["pooled"])
    assert torch.equal(result["parts"][0], expected["parts"][0])
    assert torch.equal(result["parts"][1], y)
    assert result["parts"][1].data_ptr() != y.data_ptr()
    assert torch.equal(result["sum"], expected["sum"])


def test_a_linear_layer_of_torch_nn_obeys_the_accuracy_rule() -> None:
    model, x = small_network().eval(), small_input()
    exact = unfrozen(copy.deepcopy(model).double(), x.double())
    with fastcnn.use_backend("reference"):
        reference = unfrozen(model, x)
    assert_accurate(fastcnn.freeze(model, x)(x), reference, exact)
