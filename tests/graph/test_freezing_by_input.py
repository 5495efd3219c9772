"""Fully connected weights that a frozen model stores by input value: those that meet a zero are not read, with the same
bits in the result."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastcnn
from fastcnn import _native
from fastcnn.backends import cpp
from fastcnn.graph.freezing import short_weights

pytestmark = pytest.mark.skipif(
    not _native.cpu_reads_short_weights("float32"),
    reason=f"instruction set {_native.cpu_instruction_set()} does not read short weights",
)


def layer(depth: int, columns: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(depth + columns)
    return nn.Linear(depth, columns, bias=bias).eval()


def algorithms(frozen: fastcnn.FrozenModel) -> list[str | None]:
    steps = [step for step in frozen._recipe.steps if step.operator.startswith("linear")]
    return [None if step.weight is None else frozen._recipe.weights[step.weight][2] for step in steps]


def both(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """The results with weights as they are and stored by input value."""
    monkeypatch.setattr(short_weights, "LEAST_BYTES", math.inf)
    plain = fastcnn.freeze(model, x)
    monkeypatch.setattr(short_weights, "LEAST_BYTES", 1)
    by_input = fastcnn.freeze(model, x)
    assert (algorithms(plain), algorithms(by_input)) == ([None], [cpp.SHORT_BY_INPUT])
    return plain(x), by_input(x)


def with_zeros(depth: int, zeros: float) -> Tensor:
    return torch.where(torch.rand(1, depth) < zeros, -1.0, torch.rand(1, depth) + 0.1)


@pytest.mark.parametrize("zeros", [0.0, 0.1, 0.5, 0.95, 1.0])
@pytest.mark.parametrize(
    ("depth", "columns"), [(1, 1), (7, 5), (15, 33), (16, 4), (17, 64), (300, 31), (515, 1030), (130, 2100), (4096, 40)]
)
def test_the_bits_are_those_of_plain_weights(
    depth: int, columns: int, zeros: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = layer(depth, columns, bias=zeros != 0.5)
    model, x = nn.Sequential(nn.ReLU(), linear, nn.ReLU()), with_zeros(depth, zeros)
    plain, by_input = both(model, x, monkeypatch)
    assert torch.equal(plain, by_input)
    assert torch.allclose(by_input.double(), model.double()(x.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_values_outside_the_window_of_exponents(zeros: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some to a row of the input's, many in one, in every lane and at both ends."""
    linear, x = layer(200, 1100, bias=False), with_zeros(200, zeros)
    kinds = torch.tensor([0.0, -0.0, 1e-38, -1e-40, 3e30, -1e-20, 1e20, 2.0**-126, -(2.0**100), 1e-4, 7.0])
    with torch.no_grad():
        flat = linear.weight.view(-1)
        places = torch.randperm(flat.numel())[:1100]
        flat[places] = kinds.repeat(100)
        linear.weight[:, 77] = 1e-30 * torch.randn(1100)
        flat[-1], flat[0] = 1e-30, 1e30
    x[0, 77] = 1e25
    plain, by_input = both(nn.Sequential(nn.ReLU(), linear), x, monkeypatch)
    assert torch.equal(plain, by_input)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_infinities_and_nan_in_the_input(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = layer(100, 40), with_zeros(100, 0.5)
    with torch.no_grad():
        linear.weight[5, 30] = 1e-30  # outside the window
    x[0, 30] = value
    plain, by_input = both(nn.Sequential(nn.ReLU(), linear), x, monkeypatch)
    assert not torch.isfinite(by_input).any()
    torch.testing.assert_close(by_input, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_weights_that_are_not_finite_are_all_read(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_weights, "LEAST_BYTES", 1)
    linear, x = layer(100, 40), with_zeros(100, 0.5)
    x[0, 50] = 0
    with torch.no_grad():
        linear.weight[3, 50] = value
    frozen = fastcnn.freeze(nn.Sequential(nn.ReLU(), linear), x)
    assert algorithms(frozen) == [cpp.SHORT]
    assert frozen(x)[0, 3].isnan()
    assert frozen(x).isfinite().sum() == 39
    with pytest.raises(ValueError, match="weight must be finite"):
        _native.ShortLinearWeight(linear.weight.detach(), True)


def test_where_weights_lie_by_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind ReLU, for one row of fp32."""
    monkeypatch.setattr(short_weights, "FEWER_ROWS", {})
    monkeypatch.setattr(short_weights, "LEAST_BYTES", 1)

    def chosen(*layers: nn.Module, shape: tuple[int, ...] = (1, 64), dtype: torch.dtype = torch.float32) -> str | None:
        model = nn.Sequential(*layers).eval().to(dtype)
        return algorithms(fastcnn.freeze(model, torch.randn(shape).to(dtype)))[-1]

    picture, flat = (1, 4, 6, 6), nn.Flatten()
    convolution = [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    assert chosen(layer(64, 8)) == cpp.SHORT
    assert chosen(layer(64, 64), layer(64, 8)) == cpp.SHORT
    assert chosen(layer(64, 64), nn.ReLU(), layer(64, 8)) == cpp.SHORT_BY_INPUT
    assert chosen(layer(64, 64), nn.ReLU(), nn.Dropout(), layer(64, 8)) == cpp.SHORT_BY_INPUT
    assert chosen(nn.ReLU6(), layer(64, 8)) == cpp.SHORT_BY_INPUT
    assert chosen(nn.Hardswish(), layer(64, 8)) == cpp.SHORT
    assert chosen(nn.ReLU(), layer(64, 4096), shape=(2, 64)) == cpp.SHORT
    assert chosen(*convolution, flat, layer(144, 8), shape=picture) == cpp.SHORT_BY_INPUT
    assert chosen(*convolution, nn.MaxPool2d(2), flat, layer(36, 8), shape=picture) == cpp.SHORT_BY_INPUT
    assert chosen(*convolution, nn.AdaptiveAvgPool2d(6), flat, layer(144, 8), shape=picture) == cpp.SHORT_BY_INPUT
    assert chosen(*convolution, nn.AdaptiveAvgPool2d(3), flat, layer(36, 8), shape=picture) == cpp.SHORT
    assert chosen(convolution[0], flat, layer(144, 8), shape=picture) == cpp.SHORT
    if _native.cpu_reads_short_weights("bfloat16"):
        assert chosen(nn.ReLU(), layer(64, 8), dtype=torch.bfloat16) == cpp.SHORT


def test_layers_that_share_a_weight_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_weights, "LEAST_BYTES", 1)
    shared, x = layer(64, 64), torch.randn(1, 64)
    agreed = fastcnn.freeze(nn.Sequential(nn.ReLU(), shared, nn.ReLU(), shared), x)
    apart = fastcnn.freeze(nn.Sequential(shared, nn.ReLU(), shared), x)
    assert (algorithms(agreed), len(agreed._recipe.weights)) == ([cpp.SHORT_BY_INPUT] * 2, 1)
    assert (algorithms(apart), len(apart._recipe.weights)) == ([cpp.SHORT] * 2, 1)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_any_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More share the columns of a block."""
    monkeypatch.setattr(short_weights, "LEAST_BYTES", 1)
    x = with_zeros(130, 0.5)
    frozen = fastcnn.freeze(nn.Sequential(nn.ReLU(), layer(130, 2100)), x)
    expected, before = frozen(x), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(frozen(x), expected)
    finally:
        torch.set_num_threads(before)


def test_files(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.ReLU(), layer(1024, 1000)), with_zeros(1024, 0.5)
    frozen = fastcnn.freeze(model, x)
    assert algorithms(frozen) == [cpp.SHORT_BY_INPUT]
    frozen.save(tmp_path / "model")
    loaded = fastcnn.load_frozen(tmp_path / "model")
    assert torch.equal(loaded(x), frozen(x))
    assert algorithms(loaded) == algorithms(frozen)
    assert loaded.memory() == frozen.memory()


def test_packed_bytes_that_nothing_gave_are_refused() -> None:
    """Their lists say where values are written: none may lie outside."""
    weight = layer(100, 700).weight.detach()
    weight[3, 50] = 1e-30
    weight[690, 99] = 1e30
    good = _native.ShortLinearWeight(weight, True).packed()

    def of(packed: bytes, columns: int = 700, depth: int = 100, dtype: str = "float32") -> bytes:
        return _native.ShortLinearWeight.from_packed(packed, columns, depth, dtype, True).packed()

    assert of(good) == good
    for columns, depth in ((730, 100), (700, 101), (1300, 100), (2**40, 2**40), (0, 100)):
        with pytest.raises(ValueError, match="packed must"):
            of(good, columns, depth)
    for length in (0, 4, 40, len(good) - 1):
        with pytest.raises(ValueError, match="packed must"):
            of(good[:length])
    first_exception = 8 + 4 * 3  # two blocks of columns
    # The first exponent, the number of exceptions, those before a block, position, vector and lane of an exception.
    changes = {0: 0, 4: 0xFF, 8: 1, first_exception: 200, first_exception + 4: 200, first_exception + 6: 16}
    for at, value in changes.items():
        bad = bytearray(good)
        bad[at] = value
        assert bad != good
        with pytest.raises(ValueError, match="packed must"):
            of(bytes(bad))


def test_one_row_and_fp32_only() -> None:
    if _native.cpu_reads_short_weights("bfloat16"):
        with pytest.raises(ValueError, match="weight must be float32"):
            _native.ShortLinearWeight(torch.randn(4, 8).bfloat16(), True)
    packed = _native.ShortLinearWeight(torch.randn(4, 8), True)
    plan = _native.Plan(4096, torch.zeros(8, dtype=torch.uint8), [], [])
    out, x = (0, 0, "float32", (2, 4), (4, 1)), (0, 64, "float32", (2, 8), (8, 1))
    with pytest.raises(ValueError, match="input must have one row"):
        plan.linear_short(out, x, packed, None, False)
