"""What cannot be frozen is refused by name, and a frozen model takes only what it was frozen for."""

from __future__ import annotations

import pytest
import torch
from support.networks import small_input, small_network
from torch import Tensor, nn

import fastcnn
from fastcnn import ops


@pytest.fixture(scope="module")
def frozen() -> fastcnn.graph.freezing.FrozenModel:
    return fastcnn.freeze(small_network(), small_input())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (small_input(batch=3), r"input 0 must have shape \(4, 3, 16, 16\).*it has shape \(3, 3, 16, 16\)"),
        (small_input()[0], r"it has shape \(3, 16, 16\)"),
        (small_input()[:0], r"it has shape \(0, 3, 16, 16\)"),
        (small_input().double(), "must have .* dtype torch.float32 .* it has .* dtype torch.float64"),
        (small_input().bfloat16(), "dtype torch.bfloat16"),
        (small_input().to("meta"), "on the CPU.* on meta"),
    ],
)
def test_a_wrong_input_is_named(frozen: nn.Module, wrong: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        frozen(wrong)


def test_a_wrong_number_or_kind_of_inputs(frozen: nn.Module) -> None:
    with pytest.raises(ValueError, match="takes 1 inputs, was given 2"):
        frozen(small_input(), small_input())
    with pytest.raises(TypeError, match="input 0 must be a tensor, is a list"):
        frozen([1.0])


class _Refused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = ops.max_pool2d(x, 2).erf()
        return y.cumsum(1) + y.long()


def test_every_node_without_a_native_step_is_listed() -> None:
    with pytest.raises(ValueError, match="cannot be frozen") as error:
        fastcnn.freeze(_Refused(), small_input())
    assert "aten.erf" in str(error.value)
    assert "aten.cumsum" in str(error.value)  # also what comes after a refused node
    assert "torch.int64" in str(error.value)
    assert "(4, 3, 8, 8)" in str(error.value)


class _Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Buffer(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * 2.0


def test_a_model_that_writes_its_state_or_its_input_is_refused() -> None:
    with pytest.raises(ValueError, match="writes to a parameter or buffer"):
        fastcnn.freeze(_Writes(), small_input())

    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_()

    with pytest.raises(ValueError, match="writes to an input"):
        fastcnn.freeze(Overwrites(), small_input())


def test_weights_that_depend_on_the_input_are_refused() -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.channel_affine(x, ops.adaptive_avg_pool2d(x, 1)[0, :, 0, 0], None)

    with pytest.raises(ValueError, match="scale depends on the input"):
        fastcnn.freeze(Dynamic(), small_input())


def test_random_numbers_are_not_frozen() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(4, 3, 16, 16)

    with pytest.raises(ValueError, match="draws random numbers"):
        fastcnn.freeze(Noisy(), small_input())


@pytest.mark.parametrize("example", [small_input()[:0], small_input().half(), small_input().to("meta")])
def test_examples_that_no_plan_can_serve(example: Tensor) -> None:
    with pytest.raises(ValueError, match=r"example_inputs\[0\] must be a float32 or bfloat16 tensor on the CPU"):
        fastcnn.freeze(small_network(), example)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="model must be"):
        fastcnn.freeze(torch.relu, small_input())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"example_inputs\[0\] must be a tensor"):
        fastcnn.freeze(small_network(), [1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"dtype must be .* is torch.float16"):
        fastcnn.freeze(small_network(), small_input(), dtype=torch.float16)
