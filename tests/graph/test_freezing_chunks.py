"""Frozen batches, parts of which run a few images at a time: the same results, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import pytest
import torch
import torch.nn.functional as F
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn

import fastcnn
import fastcnn.nn as fnn
from fastcnn.graph.freezing import chunks, recipe


@pytest.fixture(autouse=True)
def no_lanes(monkeypatch) -> None:
    """Small networks would not run in chunks but in lanes (test_freezing_lanes.py)."""
    monkeypatch.setattr(recipe, "run_in_lanes", lambda program: False)


class Block(nn.Module):
    """A residual bottleneck, a concatenation, squeeze and excitation, an in-place operator, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.narrow, self.wide = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 3, padding=1)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.after = nn.Conv2d(16, 5, 3, padding=1)
        self.fc = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.wide(F.relu(self.narrow(x))) + x)
        y = y * self.squeeze(F.adaptive_avg_pool2d(y, 1)).sigmoid()
        y = self.after(torch.cat([y, F.max_pool2d(x, 3, 1, 1)], 1))
        y += 1
        return self.fc(y.mean((2, 3)))


@pytest.fixture
def choose(monkeypatch) -> Callable[[int], list[int]]:
    """Calling it with k has every step that can be split run on k images at a time; it returns the sizes that ran."""
    chosen: list[int] = []

    def force(k: int) -> list[int]:
        def sizes(program, batch, splittable):
            chosen[:] = [k if can else batch for can in splittable]
            return chosen

        monkeypatch.setattr(chunks, "_chunk_sizes", sizes)
        return chosen

    return force


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_chunks_compute_what_the_whole_batch_does(choose, k, dtype):
    model = randomise_batch_norms(Block()).eval().to(dtype)
    x = torch.randn(5, 3, 13, 10).to(dtype)
    whole = fastcnn.freeze(model, x)
    sizes = choose(k)
    chunked = fastcnn.freeze(model, x)
    assert set(sizes) == {k}
    assert len(chunked._recipe.steps) == len(whole._recipe.steps) * -(-5 // k)
    assert chunked.memory().arena < whole.memory().arena
    assert chunked.memory().weights == whole.memory().weights
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=layout)
        torch.testing.assert_close(chunked(given), whole(given), rtol=tolerance, atol=tolerance)
    chunked._plan.fill_arena(255)  # nothing is read that this run did not write
    torch.testing.assert_close(chunked(x), whole(x), rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet20_cifar", "densenet40_k12_cifar", "googlenet_lrn", "lenet5"])
def test_networks_in_chunks(choose, name):
    torch.manual_seed(0)
    size = (3, 65, 65) if name == "googlenet_lrn" else fastcnn.models.model_info(name).input_size
    model, x = fastcnn.create_model(name).eval(), torch.randn(3, *size)
    whole = fastcnn.freeze(model, x)(x)
    sizes = choose(2)
    torch.testing.assert_close(fastcnn.freeze(model, x)(x), whole, rtol=1e-5, atol=1e-6)
    assert 2 in sizes


@torch.no_grad()
def test_what_mixes_images_is_left_whole(choose):
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.conv(x))
            y = self.conv(y.transpose(0, 1).contiguous())  # as many channels as images
            y = y + y[:1]
            return self.conv(torch.cat([y[1:], y[:1]]))

    torch.manual_seed(0)
    model, x = Mixing().eval(), torch.randn(4, 4, 6, 5)
    sizes = choose(1)
    frozen = fastcnn.freeze(model, x)
    assert 4 in sizes
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_products_of_activations_are_left_whole(choose):
    class Gram(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = F.relu(x)
            return rows @ (rows * 2).t()

    x = torch.randn(6, 10)
    sizes = choose(2)
    frozen = fastcnn.freeze(Gram().eval(), x)
    assert 6 in sizes
    torch.testing.assert_close(frozen(x), Gram()(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_two_inputs_and_two_results(choose):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            y = F.relu(self.conv(a) + b)
            return y, F.avg_pool2d(y, 2)

    torch.manual_seed(0)
    model, inputs = Two().eval(), (torch.randn(3, 3, 8, 7), torch.randn(3, 4, 6, 5))
    sizes = choose(2)
    frozen = fastcnn.freeze(model, inputs)
    assert set(sizes) == {2}
    for ours, theirs in zip(frozen(*inputs), model(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def chunk_sizes(monkeypatch, model: nn.Module, x: Tensor) -> list[int]:
    """The sizes chosen, each once a segment."""
    found: list[int] = []
    true_choice = chunks._chunk_sizes

    def spy(*arguments):
        found[:] = true_choice(*arguments)
        return found

    monkeypatch.setattr(chunks, "_chunk_sizes", spy)
    fastcnn.freeze(model.eval(), x)
    return [size for size, _ in groupby(found)]


def test_large_pictures_run_in_chunks_and_many_weights_once(monkeypatch):
    pictures = [fnn.FusedSequential(fnn.Conv2d(3, 64, 3, padding=1), nn.ReLU()), fnn.Conv2d(64, 64, 3, padding=1)]
    weights = [nn.AdaptiveAvgPool2d(6), nn.Flatten(), fnn.Linear(64 * 36, 1000), fnn.Linear(1000, 1000)]
    x = torch.randn(8, 3, 96, 96)  # 2.25 MiB a layer and image
    assert chunk_sizes(monkeypatch, nn.Sequential(*pictures, *weights), x) == [2, 8]


def test_small_pictures_and_single_images_run_whole(monkeypatch):
    model = fastcnn.create_model("resnet20_cifar")
    assert chunk_sizes(monkeypatch, model, torch.randn(8, 3, 32, 32)) == [8]
    assert chunk_sizes(monkeypatch, model, torch.randn(1, 3, 32, 32)) == []
