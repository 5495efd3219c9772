"""Frozen batches of small networks in lanes: the bits of a plan without, on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastcnn
from fastcnn import _native
from fastcnn.graph.freezing import FrozenModel, recipe


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def network(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return fastcnn.create_model(name).eval().to(dtype)


def images(name: str, batch: int) -> Tensor:
    return torch.randn(batch, *fastcnn.models.model_info(name).input_size)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "batch", "threads"),
    [("lenet5", 8, 2), ("lenet5", 7, 3), ("lenet5", 2, 5), ("resnet20_cifar", 8, 2), ("resnet20_cifar", 5, 4)],
)
def test_lanes_change_no_bits(monkeypatch, name: str, batch: int, threads: int, dtype: torch.dtype) -> None:
    model, x = network(name, dtype), images(name, batch).to(dtype)
    torch.set_num_threads(threads)
    frozen = fastcnn.freeze(model, x)
    assert frozen._recipe.lanes == min(batch, threads)
    monkeypatch.setattr(recipe, "run_in_lanes", lambda program: False)
    expected = fastcnn.freeze(model, x)(x)
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        frozen._plan.fill_arena(255)  # nothing is read that this run did not write
        assert torch.equal(frozen(x), expected)
    kept = [(y, frozen(y)) for y in (x + i for i in range(7))]  # results in more places than the plan remembers
    for y, result in kept:
        assert torch.equal(result, frozen(y))


@torch.no_grad()
def test_a_saved_model_keeps_its_lanes(tmp_path) -> None:
    model, x = network("resnet20_cifar"), images("resnet20_cifar", 4)
    frozen = fastcnn.freeze(model, x)
    frozen.save(tmp_path / "model")
    again = fastcnn.load_frozen(tmp_path / "model")
    assert isinstance(again, FrozenModel)
    assert again._recipe.lanes == frozen._recipe.lanes == 2
    assert torch.equal(again(x), frozen(x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "batch", "threads"),
    [
        ("lenet5", 1, 2),
        ("lenet5", 8, 1),
        ("lenet5", 16, 2),  # a linear layer of so many rows adds in another order
        ("resnet20_cifar", 64, 2),  # 32 images do not fit a core's cache
    ],
)
def test_no_lanes(name: str, batch: int, threads: int) -> None:
    model, x = network(name), images(name, batch)
    torch.set_num_threads(threads)
    assert fastcnn.freeze(model, x)._recipe.lanes == 1


@torch.no_grad()
def test_many_weights_are_read_once() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)).eval()
    assert fastcnn.freeze(model, torch.randn(4, 1, 32, 32))._recipe.lanes == 1


@torch.no_grad()
def test_what_mixes_images_has_no_lanes() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + y[:1]

    model, x = Mixing().eval(), torch.randn(4, 4, 6, 5)
    frozen = fastcnn.freeze(model, x)
    assert frozen._recipe.lanes == 1
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-5)


def plan_of(steps: list[tuple[int, int]]) -> _native.Plan:
    """A step that copies 4 values from one place in the arena to another for each (to, from)."""
    plan = _native.Plan(1024, torch.empty(0, dtype=torch.uint8), [], [])

    def at(place: int) -> tuple:
        return (0, 16 * place, "float32", (4,), (1,))

    for to, source in steps:
        plan.copy(at(to), at(source))
    return plan


def test_lanes_must_be_apart() -> None:
    plan_of([(1, 0), (2, 1), (4, 0), (5, 4)]).set_lanes(2)
    for steps in ([(1, 0), (2, 1), (2, 0), (5, 2)], [(1, 0), (2, 1), (4, 1), (5, 4)], [(1, 5), (2, 1), (4, 0), (5, 4)]):
        with pytest.raises(ValueError, match="what another one writes"):
            plan_of(steps).set_lanes(2)
    for lanes in (0, -1, 3):
        with pytest.raises(ValueError, match="divide"):
            plan_of([(1, 0), (2, 1), (4, 0), (5, 4)]).set_lanes(lanes)


def test_lanes_may_not_share_a_workspace() -> None:
    plan = _native.Plan(4096, torch.zeros(1024, dtype=torch.uint8), [], [])
    for at in (0, 2048):
        x, y = (0, at, "float32", (9, 4), (4, 1)), (0, at + 1024, "float32", (9, 4), (4, 1))
        plan.linear(y, x, (1, 0, "float32", (4, 4), (4, 1)), None, False)
    with pytest.raises(ValueError, match="many rows"):
        plan.set_lanes(2)


@torch.no_grad()
def test_a_profile_shares_the_lanes_out() -> None:
    x = images("resnet20_cifar", 4)
    frozen = fastcnn.freeze(network("resnet20_cifar"), x)
    memory = [torch.empty(40)]
    entries = frozen._plan.profile([x], memory, 2)
    length = len(frozen._recipe.steps) // 2
    assert [steps for steps, _ in entries] == [[i, i + length] for i in range(length)]
    assert all(seconds > 0 for _, seconds in entries)
    assert torch.equal(memory[0].view(4, 10), frozen(x))
