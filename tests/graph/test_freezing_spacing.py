"""Pixels that lie a multiple of 4 KiB apart get a cache line more between them, where nobody can see it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastcnn
from fastcnn.graph.freezing import FrozenModel


def pixel_strides(frozen: FrozenModel) -> list[tuple[str, int, int]]:
    """Each step's operator, channels and pixel stride of its result."""
    return [(s.operator, s.out.shape[1], s.out.strides[3]) for s in frozen._recipe.steps if len(s.out.shape) == 4]


class Residual(nn.Module):
    """1x1 convolutions and a sum, all of ``c`` channels but the middle ones."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, c, 1)
        self.down, self.up = nn.Conv2d(c, 32, 1), nn.Conv2d(32, c, 1)
        self.last = nn.Conv2d(c, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.relu(self.first(x))
        return self.last(torch.relu(self.up(torch.relu(self.down(wide))) + wide))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("c", "dtype", "spaced"),
    [
        (1024, torch.float32, 1040),
        (2048, torch.bfloat16, 2080),
        (1024, torch.bfloat16, 1024),
        (1000, torch.float32, 1000),
    ],
    ids=str,
)
@torch.no_grad()
def test_has_the_bits_of_the_unfrozen_model(c: int, dtype: torch.dtype, spaced: int, batch: int):
    torch.manual_seed(0)
    model, x = Residual(c).eval().to(dtype), torch.randn(batch, 8, 5, 7, dtype=dtype)
    frozen = fastcnn.freeze(model, x)
    wide = [stride for _, channels, stride in pixel_strides(frozen) if channels == c]
    assert wide == [spaced] * 2 * frozen._recipe.lanes
    assert torch.equal(frozen(x), fastcnn.optimize(model)(x))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 600, 1), nn.Conv2d(8, 424, 1)
        self.read_one, self.read_all = nn.Conv2d(600, 16, 1), nn.Conv2d(1024, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        whole = torch.cat([a, self.b(x)], 1)
        pooled = nn.functional.max_pool2d(torch.relu(whole), 3, stride=1, padding=1)
        return self.read_one(a) + self.read_all(whole) + self.read_all(pooled)


@torch.no_grad()
def test_slices_of_a_concatenation_follow():
    torch.manual_seed(0)
    model, x = Concatenated().eval(), torch.randn(2, 8, 5, 7)
    frozen = fastcnn.freeze(model, x)
    strides = pixel_strides(frozen)
    assert ("conv2d", 600, 1040) in strides
    assert ("conv2d", 424, 1040) in strides
    assert torch.equal(frozen(x), fastcnn.optimize(model)(x))


class Seen(nn.Module):
    """The wide activation is an input, the result, read by a step that knows rows only, or of few pixels."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last = nn.Conv2d(8, 1024, 1), nn.Conv2d(1024, 8, 1)
        self.norm = nn.LayerNorm(1024)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "input":
            return self.last(x)
        wide = torch.relu(self.first(x))
        if self.how == "result":
            return wide
        if self.how == "rows":
            return self.last(self.norm(wide.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.last(wide)


@pytest.mark.parametrize(
    ("how", "shape"),
    [("input", (1, 1024, 3, 3)), ("result", (1, 8, 3, 3)), ("rows", (1, 8, 3, 3)), ("few", (1, 8, 1, 2))],
)
@torch.no_grad()
def test_what_others_see_stays(how: str, shape: tuple[int, ...]):
    torch.manual_seed(0)
    model, x = Seen(how).eval(), torch.randn(shape).contiguous(memory_format=torch.channels_last)
    frozen = fastcnn.freeze(model, x)
    assert all(stride != 1040 for _, _, stride in pixel_strides(frozen))
    torch.testing.assert_close(frozen(x), model(x))


@torch.no_grad()
def test_a_saved_model_keeps_it(tmp_path: Path):
    torch.manual_seed(0)
    model, x = Residual(1024).eval(), torch.randn(1, 8, 5, 7)
    frozen = fastcnn.freeze(model, x)
    frozen.save(tmp_path / "model")
    loaded = fastcnn.load_frozen(tmp_path / "model")
    assert pixel_strides(loaded) == pixel_strides(frozen)
    assert torch.equal(loaded(x), frozen(x))
