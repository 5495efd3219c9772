"""Max pooling taken in a frozen convolution: the bits of the two steps, and where it must not be."""

from __future__ import annotations

import pytest
import torch
from support.accuracy import relative_error
from support.instruction_sets import run_tests_under
from torch import Tensor, nn

import fastcnn
from fastcnn import _native
from fastcnn.backends import cpp


def steps_of(frozen: nn.Module) -> list[tuple[str, bool]]:
    """Each step's operator, and whether it is a convolution that pools."""
    return [(step.operator, step.attributes[-1:] == (True,)) for step in frozen._recipe.steps]


POOLED = ("conv2d_winograd", True)
POOLED_PLAINLY = ("conv2d", True)


def block(c: int, k: int, *, relu: bool = True, filter: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(c, k, filter, padding=filter // 2)
    return nn.Sequential(convolution, *([nn.ReLU()] if relu else []), nn.MaxPool2d(2))


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "k", "filter"),
    [
        ((1, 64, 32, 32), 64, 3),
        ((2, 24, 48, 47), 40, 3),  # odd: the last column is in no window
        ((1, 19, 35, 48), 33, 3),  # channels that fill no vector
        ((1, 512, 7, 7), 512, 3),  # tiles of 2x2
        ((1, 64, 27, 28), 192, 5),
        ((1, 40, 112, 119), 70, 3),  # tiles of 6x6: whole ones, although some hang over the edge
        ((1, 6, 14, 14), 16, 5),  # along rows
        ((2, 5, 31, 27), 20, 5),
        ((1, 3, 133, 126), 64, 6),  # with stride 2
    ],
    ids=str,
)
@torch.no_grad()
def test_has_the_bits_of_convolution_and_pooling(
    shape: tuple[int, ...], k: int, filter: int, dtype: torch.dtype, relu: bool, monkeypatch
):
    if filter == 6:  # where tiles of a row, which hold no windows, would be chosen with some instruction sets
        monkeypatch.setattr(cpp, "_cheapest", lambda *args: "winograd4s2")
    if shape[2] == 112 and dtype == torch.float32:
        monkeypatch.setattr(cpp, "_cheapest", lambda *args: "winograd6")
    torch.manual_seed(0)
    model, x = block(shape[1], k, relu=relu, filter=filter).eval(), torch.randn(shape)
    stride = model[0].stride = (2, 2) if filter == 6 else (1, 1)
    if dtype == torch.bfloat16:
        out = (shape[0], k, *shape[2:])
        if cpp.conv2d_algorithm(out, model[0].weight.shape, stride, (1, 1), 1, dtype) == cpp.DIRECT:
            pytest.skip("computed by the plain sum in bf16")
        model, x = model.bfloat16(), x.bfloat16()
    frozen = fastcnn.freeze(model, x)
    assert POOLED in steps_of(frozen)
    assert "max_pool2d" not in [operator for operator, _ in steps_of(frozen)]
    whole = fastcnn.freeze(model[:-1], x)(x)
    assert torch.equal(frozen(x), nn.functional.max_pool2d(whole, 2))
    if dtype == torch.float32:
        assert relative_error(frozen(x), model.double()(x.double())) <= 3e-6


@pytest.mark.parametrize(
    ("algorithm", "shape"),
    [
        ("winograd4", (1, 64, 14, 28)), ("winograd4", (2, 64, 28, 14)), ("winograd4", (1, 64, 13, 13)),
        ("winograd4", (1, 64, 29, 28)), ("winograd6", (1, 64, 28, 112)),
    ],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_windows_that_no_tile_holds_are_pooled_by_themselves(algorithm: str, shape: tuple[int, ...], monkeypatch):
    """14 = 4 + 4 + 3 + 3 outputs: the last tile begins within a window."""
    monkeypatch.setattr(cpp, "_cheapest", lambda *args: algorithm)
    model, x = block(64, 64).eval(), torch.randn(shape)
    frozen = fastcnn.freeze(model, x)
    assert POOLED not in steps_of(frozen)
    assert torch.equal(frozen(x), nn.functional.max_pool2d(fastcnn.freeze(model[:-1], x)(x), 2))
    assert relative_error(frozen(x), model.double()(x.double())) <= 3e-6


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_other_instruction_sets(isa: str) -> None:
    run_tests_under(isa, __file__, "few_channels")


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize(
    ("shape", "filter", "stride", "padding"),
    [
        ((1, 1, 32, 32), 5, 1, 0),  # LeNet-5
        ((3, 1, 32, 32), 5, 1, 0),
        ((2, 3, 31, 43), 3, 1, 1),  # odd: the last row and column are in no window
        ((1, 2, 63, 61), 7, 2, 3),
        ((1, 1, 4, 14), 3, 1, 1),
        ((2, 4, 9, 70), 3, 1, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17])
@torch.no_grad()
def test_few_channels_have_the_bits_of_convolution_and_pooling(
    k: int, shape: tuple[int, ...], filter: int, stride: int, padding: int, relu: bool
):
    torch.manual_seed(0)
    convolution = nn.Conv2d(shape[1], k, filter, stride, padding)
    model = nn.Sequential(convolution, *([nn.ReLU()] if relu else []), nn.MaxPool2d(2)).eval()
    x = torch.randn(shape)
    x[0, 0, 3, 5] = float("nan")
    with fastcnn.exact():
        frozen, whole = fastcnn.freeze(model, x), fastcnn.freeze(model[:-1], x)(x)
    # Pixels across the lanes, or, up to a vector of channels, two rows at a time.
    most = {"avx2": 8, "portable": 4}.get(_native.cpu_instruction_set(), 16)
    pools = k <= most
    assert (POOLED_PLAINLY in steps_of(frozen)) == pools
    assert ("max_pool2d" in [operator for operator, _ in steps_of(frozen)]) != pools
    expected = nn.functional.max_pool2d(whole, 2)
    assert expected.isnan().any()
    assert not expected.isnan().all()
    for threads in (1, 2, 3):
        frozen._plan.fill_arena(255)
        result = [torch.empty(expected.numel())]
        frozen._plan.run([x], result, threads)
        layout = frozen(x).stride()
        ours = result[0].as_strided(expected.shape, layout)
        assert torch.equal(ours.nan_to_num(-1.0), expected.nan_to_num(-1.0))


@torch.no_grad()
def test_few_channels_pool_where_only_the_maxima_are_kept():
    x = torch.randn(1, 1, 32, 32)
    for how in ("reader", "result", "window", "padding"):
        model = Read(how).eval()
        model.convolution = nn.Conv2d(1, 6, 5)
        frozen = fastcnn.freeze(model, x)
        assert POOLED_PLAINLY not in steps_of(frozen)
        for ours, exact in zip(_listed(frozen(x)), _listed(model.double()(x.double())), strict=True):
            assert relative_error(ours, exact) <= 1e-6


def test_pooling_that_the_kernel_cannot_do_is_refused():
    plan = _native.Plan(1 << 20, torch.empty(0, dtype=torch.uint8), [], [])
    weight = _native.PackedConv2dWeight(torch.randn(16, 16, 3, 3), 1)
    picture = (0, 0, "float32", (1, 16, 8, 8), (1024, 1, 128, 16))
    pooled = (0, 8192, "float32", (1, 16, 4, 4), (256, 1, 64, 16))
    geometry = ((1, 1), (1, 1), (1, 1))
    with pytest.raises(ValueError, match="cpu_conv2d_may_pool"):
        plan.conv2d(pooled, picture, weight, None, None, None, None, None, False, True, *geometry, True)
    with pytest.raises(ValueError, match="residual must be None where max_pool is set"):
        plan.conv2d(pooled, picture, weight, None, None, pooled, None, None, False, True, *geometry, True)


@torch.no_grad()
def test_nan_wins_and_infinity_stays():
    model, x = block(16, 16).eval(), torch.randn(1, 16, 32, 32)
    x[0, 3, 9, 13] = float("nan")
    frozen = fastcnn.freeze(model, x)
    assert POOLED in steps_of(frozen)
    whole = fastcnn.freeze(model[:-1], x)(x)
    expected = nn.functional.max_pool2d(whole, 2)
    assert expected.isnan().any()
    assert not expected.isnan().all()
    assert torch.equal(frozen(x).nan_to_num(-1.0), expected.nan_to_num(-1.0))


class Read(nn.Module):
    """The picture before pooling has another reader, is a result, or the window is another one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.convolution, self.how = nn.Conv2d(16, 16, 3, padding=1), how

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.convolution(x).relu()
        if self.how == "residual":
            y = (self.convolution(x) + x).relu()
        if self.how == "window":
            return nn.functional.max_pool2d(y, 3, 2)
        if self.how == "padding":
            return nn.functional.max_pool2d(y, 2, 2, padding=1)
        pooled = nn.functional.max_pool2d(y, 2)
        if self.how == "result":
            return pooled, y
        if self.how == "reader":
            return pooled + nn.functional.avg_pool2d(y, 2)
        return pooled


@pytest.mark.parametrize("how", ["reader", "result", "window", "padding", "residual"])
@torch.no_grad()
def test_where_it_must_not_be(how: str):
    torch.manual_seed(0)
    model, x = Read(how).eval(), torch.randn(1, 16, 32, 32)
    frozen = fastcnn.freeze(model, x)
    assert POOLED not in steps_of(frozen)
    for ours, exact in zip(_listed(frozen(x)), _listed(model.double()(x.double())), strict=True):
        assert relative_error(ours, exact) <= 1e-6


def _listed(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@torch.no_grad()
def test_a_saved_model_pools(tmp_path):
    model, x = nn.Sequential(block(16, 32), block(32, 16)).eval(), torch.randn(1, 16, 32, 32)
    frozen = fastcnn.freeze(model, x)
    assert steps_of(frozen).count(POOLED) == 2
    frozen.save(tmp_path / "model")
    again = fastcnn.load_frozen(tmp_path / "model")
    assert steps_of(again) == steps_of(frozen)
    assert torch.equal(again(x), frozen(x))


@torch.no_grad()
def test_tiles_of_a_row_hold_no_windows():
    torch.manual_seed(0)
    model, x = block(3, 64, filter=7).eval(), torch.randn(1, 3, 64, 62)
    model[0].stride = (2, 2)
    frozen = fastcnn.freeze(model, x)
    assert [algorithm for _, _, algorithm, *_ in frozen._recipe.weights] == ["winograd1x4s2"]
    assert [operator for operator, _ in steps_of(frozen) if operator != "copy"] == ["conv2d_winograd", "max_pool2d"]
    assert torch.equal(frozen(x), nn.functional.max_pool2d(fastcnn.freeze(model[:-1], x)(x), 2))


def test_pooling_beside_a_weight_along_rows_is_refused():
    plan = _native.Plan(1 << 20, torch.empty(0, dtype=torch.uint8), [], [])
    weight = _native.RowWinogradWeight(torch.randn(16, 16, 3, 3), 2)
    picture = (0, 0, "float32", (1, 16, 16, 16), (4096, 1, 256, 16))
    pooled = (0, 16384, "float32", (1, 16, 4, 4), (256, 1, 64, 16))
    with pytest.raises(ValueError, match="max_pool must be False beside a weight along rows"):
        plan.conv2d_winograd(pooled, picture, weight, None, None, None, None, None, False, True, (1, 1), True)


def test_a_residual_with_pooling_is_refused():
    plan = _native.Plan(1 << 20, torch.empty(0, dtype=torch.uint8), [], [])
    weight = _native.PackedConv2dWinogradWeight(torch.randn(16, 16, 3, 3), 4)
    picture = (0, 0, "float32", (1, 16, 8, 8), (1024, 1, 128, 16))
    pooled = (0, 8192, "float32", (1, 16, 4, 4), (256, 1, 64, 16))
    with pytest.raises(ValueError, match="residual must be None where max_pool is set"):
        plan.conv2d_winograd(pooled, picture, weight, None, None, pooled, None, None, False, True, (1, 1), True)
