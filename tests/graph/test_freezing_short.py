"""Fully connected weights that a frozen model stores short: the same bits in the result, fewer in the weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastcnn
from fastcnn import _native
from fastcnn.graph.freezing import short_weights

DTYPES = [torch.float32, torch.bfloat16]
ROWS, LANES = 4, {torch.float32: 16, torch.bfloat16: 32}  # of a block
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def reads_short(dtype: torch.dtype) -> bool:
    return _native.cpu_reads_short_weights(name_of(dtype))


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if not reads_short(request.param):
        pytest.skip(f"instruction set {_native.cpu_instruction_set()} does not read short weights of this dtype")
    return request.param


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)


def layer(depth: int, columns: int, dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(depth + columns)
    return nn.Linear(depth, columns, bias=bias).eval().to(dtype)


def with_everything(weight: Tensor) -> None:
    """Values of every kind, some of them in one block and in the last one: zeros, denormals, large, small ones."""
    flat = weight.detach().view(-1)
    kinds = torch.tensor([0.0, -0.0, 1e-38, -1e-40, 3e38, -1e-20, 1e20, 2.0**-126, -(2.0**127), 1e-4, 7.0])
    places = torch.randperm(flat.numel())[: min(flat.numel(), 5 * len(kinds))]
    flat[places] = kinds.repeat(5)[: len(places)].to(weight.dtype)
    flat[-1], flat[0] = 1e-30, 1e30


def both(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """The results with weights as they are and stored short."""
    monkeypatch.setattr(short_weights, "FEWER_ROWS", {})
    monkeypatch.setattr(short_weights, "LEAST_BYTES", math.inf)
    plain = fastcnn.freeze(model, x)
    assert all(step.operator != "linear_short" for step in plain._recipe.steps)
    monkeypatch.setattr(short_weights, "LEAST_BYTES", 1)
    short = fastcnn.freeze(model, x)
    assert any(step.operator == "linear_short" for step in short._recipe.steps)
    return plain(x), short(x)


@each_dtype
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (7, 5), (16, 4), (31, 9), (32, 3), (33, 8), (515, 130)])
def test_the_bits_are_those_of_plain_weights(
    dtype: torch.dtype, rows: int, depth: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(layer(depth, columns, dtype), nn.ReLU(), layer(columns, 3, dtype, bias=False))
    x = torch.randn(rows, depth).to(dtype)
    plain, short = both(model, x, monkeypatch)
    assert torch.equal(plain.view(BITS[dtype]), short.view(BITS[dtype]))
    with_everything(model[0].weight)
    plain, short = both(model, x * 1e-8, monkeypatch)
    assert torch.equal(plain.view(BITS[dtype]), short.view(BITS[dtype]))


@each_dtype
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinities_and_nan(dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layer(100, 9, dtype), torch.randn(2, 100).to(dtype)
    with torch.no_grad():
        model.weight[3, 50] = value
    plain, short = both(model, x, monkeypatch)
    torch.testing.assert_close(short, plain, rtol=0, atol=0, equal_nan=True)
    assert torch.isfinite(short).sum() == 2 * 8
    with torch.no_grad():
        model.weight.fill_(1e-30)
        model.weight[0] = 1
    x[1, 99] = value
    plain, short = both(model, x, monkeypatch)
    torch.testing.assert_close(short, plain, rtol=0, atol=0, equal_nan=True)


@each_dtype
def test_the_result_is_right(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layer(1000, 130, dtype), torch.randn(3, 1000).to(dtype)
    exact = x.double() @ model.weight.double().t() + model.bias.double()
    short = both(model, x, monkeypatch)[1].double()
    reference = (model(x).double() - exact).norm()
    rounding = {torch.float32: 2.5e-7, torch.bfloat16: 4e-3}[dtype] * exact.norm()
    assert (short - exact).norm() <= 2 * reference + rounding


@each_dtype
def test_weights_become_smaller(dtype: torch.dtype) -> None:
    weight = layer(2048, 1024, dtype).weight
    bits = 8 * _native.ShortLinearWeight(weight.detach()).bytes / weight.numel()
    assert bits < {torch.float32: 28.2, torch.bfloat16: 12.1}[dtype]


def test_only_large_constant_weights_with_few_rows() -> None:
    def operators(columns: int, rows: int) -> set[str]:
        x = torch.randn(rows, 1024)
        return {step.operator for step in fastcnn.freeze(layer(1024, columns, torch.float32), x)._recipe.steps}

    large = "linear_short" if reads_short(torch.float32) else "linear"
    most = short_weights.FEWER_ROWS.get(_native.cpu_instruction_set(), 8)
    assert operators(256, most) == {large}
    assert operators(255, most) == {"linear"}  # of less than a MiB
    assert operators(256, most + 1) == {"linear"}


@each_dtype
def test_a_weight_that_several_layers_share_is_stored_once(dtype: torch.dtype) -> None:
    shared = layer(1024, 1024, dtype)
    frozen = fastcnn.freeze(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(1, 1024).to(dtype))
    assert [step.operator for step in frozen._recipe.steps] == ["linear_short"] * 2
    assert len(frozen._recipe.weights) == 1


@each_dtype
def test_files(dtype: torch.dtype, tmp_path: Path) -> None:
    model = layer(1024, 1024, dtype)
    with_everything(model.weight)
    x = torch.randn(1, 1024).to(dtype)
    frozen = fastcnn.freeze(model, x)
    frozen.save(tmp_path / "model")
    loaded = fastcnn.load_frozen(tmp_path / "model")
    assert torch.equal(loaded(x).view(BITS[dtype]), frozen(x).view(BITS[dtype]))
    assert loaded.memory() == frozen.memory()


@each_dtype
def test_packed_bytes_that_nothing_gave_are_refused(dtype: torch.dtype) -> None:
    """Their lists say where values are written: none may lie outside."""
    weight = layer(100, 30, dtype).weight.detach()
    with_everything(weight)
    good = _native.ShortLinearWeight(weight).packed()
    assert _native.ShortLinearWeight.from_packed(good, 30, 100, name_of(dtype)).packed() == good
    for columns, depth in ((33, 100), (40, 100), (30, 200), (2**40, 2**40), (0, 100)):
        with pytest.raises(ValueError, match="packed must"):
            _native.ShortLinearWeight.from_packed(good, columns, depth, name_of(dtype))
    for length in (0, 4, 40, len(good) - 1):
        with pytest.raises(ValueError, match="packed must"):
            _native.ShortLinearWeight.from_packed(good[:length], 30, 100, name_of(dtype))
    groups = -(-30 // ROWS)
    first_exception = 8 + 4 * (groups + 1)
    changes = {0: 0, 1: 250, 4: 0xFF, 8: 1, 12: 0xFF, 8 + 4 * groups: 0}
    changes |= {first_exception + 3: 1, first_exception + 4: ROWS, first_exception + 6: LANES[dtype]}
    for at, value in changes.items():
        bad = bytearray(good)
        bad[at : at + 2] = (value, bad[at + 1]) if value < 250 else (value, value)
        if bad != good:
            with pytest.raises(ValueError, match="packed must"):
                _native.ShortLinearWeight.from_packed(bytes(bad), 30, 100, name_of(dtype))


def test_weights_that_are_no_matrix_of_floats_are_refused() -> None:
    if reads_short(torch.float32):
        with pytest.raises(ValueError, match="weight must have 2 dimensions"):
            _native.ShortLinearWeight(torch.randn(8))
        with pytest.raises(ValueError, match="weight must not be empty"):
            _native.ShortLinearWeight(torch.randn(0, 8))
    with pytest.raises(ValueError, match="dtype must be"):
        _native.ShortLinearWeight(torch.randn(4, 8).half())
