"""The plan's own steps for ATen's operators: values by the accuracy rule at every magnitude, odd shapes and layouts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from torch import Tensor, nn

import fastcnn


class Function(nn.Module):
    """A function that is frozen as it is: the class is not one that optimizing looks into."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def frozen_result(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    frozen = fastcnn.freeze(Function(function), inputs)
    frozen._plan.fill_arena(0xFF)
    return frozen(*inputs)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.7, 1.3),
    "clamp": lambda x: x.clamp(-0.5, 2.0),
    "clamp_min": lambda x: x.clamp(min=-0.5),
    "clamp_max": lambda x: x.clamp_max(0.25),
    "clamp_crossed": lambda x: x.clamp(2.0, 1.0),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": lambda x: F.elu(x, 1.3),
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "abs": torch.abs,
    "negate": torch.neg,
    "square": torch.square,
    "reciprocal": torch.reciprocal,
    "scaled": lambda x: 2.5 * x + 0.75,
    "subtracted": lambda x: 1 - x / 3,
    "powers": lambda x: x.abs().sqrt() + (x * x + 0.5).rsqrt() + x**2,
    "alpha": lambda x: torch.add(x, x * x, alpha=0.3) - torch.sub(x, x.relu(), alpha=2),
    "lerp": lambda x: torch.lerp(x, x.square(), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x.abs(), value=0.5),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_values_of_every_magnitude(name: str, sign: int) -> None:
    """By octaves, so that large values do not hide the errors of small ones; and of an odd number of values."""
    function = ACTIVATIONS[name]
    exponents = range(-20, 7)
    x = torch.stack([sign * 2.0**e * torch.linspace(1, 2, 1001) for e in exponents])
    ours, theirs, exact = frozen_result(function, x), function(x), function(x.double())
    assert ours.stride() == theirs.stride()
    for row in range(len(exponents)):
        finite = theirs[row].isfinite()  # beyond fp32's range there is infinity
        assert torch.equal(finite, ours[row].isfinite())
        assert_accurate(ours[row][finite], theirs[row][finite], exact[row][finite])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_infinities_and_nan(name: str) -> None:
    function = ACTIVATIONS[name]
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e38, -1e38, 1e-40, -1e-40] * 3)
    # In float64, as PyTorch's gelu in float32 makes NaN of infinity.
    torch.testing.assert_close(frozen_result(function, x), function(x.double()).float(), equal_nan=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bfloat16_activations(name: str) -> None:
    function = ACTIVATIONS[name]
    x = values(3, 5, 7, 9, dtype=torch.bfloat16)
    assert_accurate(frozen_result(function, x), function(x), function(x.double()))


def test_prelu_of_one_slope_and_of_one_a_channel() -> None:
    x = values(2, 5, 4, 3)
    for count in (1, 5):
        layer = nn.PReLU(count)
        nn.init.uniform_(layer.weight)
        assert_accurate(
            fastcnn.freeze(layer, x)(x), layer(x).detach(), F.prelu(x.double(), layer.weight.double()).detach()
        )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, : x.shape[1]],
    "every other": lambda x: torch.stack([x, x], 4).flatten(3)[:, :, :, ::2],
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": lambda x, y: x / (y.abs() + 0.5),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_functions_of_two_in_any_layouts(left: str, right: str) -> None:
    a, b = LAYOUTS[left](values(2, 19, 5, 7)), LAYOUTS[right](values(2, 19, 5, 7, seed=1))
    for function in BINARY.values():
        ours, theirs = frozen_result(function, a, b), function(a, b)
        assert_accurate(ours, theirs, function(a.double(), b.double()))
        # Of the optimized model: its sums of images whose rows and columns are exchanged are contiguous, not PyTorch's.
        assert ours.stride() == fastcnn.optimize(Function(function), (a, b))(a, b).stride()


class SumOfFive(nn.Module):
    """A sum that optimizing fuses with its ReLU, of values with more dimensions than images have."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result = x + y
        return F.relu(result) if self.relu else result


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 3, 1, 4, 2), (4, 3, 2, 1, 0)])
def test_sums_of_five_dimensions_in_any_layouts(order: tuple[int, ...], relu: bool) -> None:
    x = values(2, 5, 3, 4, 6)
    y = values(2, 5, 3, 4, 6, seed=1).permute(order).contiguous().permute([order.index(d) for d in range(5)])
    model = SumOfFive(relu)
    frozen = fastcnn.freeze(model, (x, y))
    frozen._plan.fill_arena(0xFF)
    ours = frozen(x, y)
    assert_accurate(ours, model(x, y), model(x.double(), y.double()))
    assert ours.stride() == model(x, y).stride()


@pytest.mark.parametrize("shape", [(1, 19, 1, 1), (2, 19, 1, 1), (2, 1, 5, 7), (7,), (5, 1), (2, 1, 1, 1), (1,)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_broadcasting(layout: str, shape: tuple[int, ...]) -> None:
    a, b = LAYOUTS[layout](values(2, 19, 5, 7)), values(*shape, seed=1)
    for function in BINARY.values():
        for x, y in ((a, b), (b, a)):
            assert_accurate(frozen_result(function, x, y), function(x, y), function(x.double(), y.double()))


@pytest.mark.parametrize("function", [torch.maximum, torch.minimum])
def test_nan_on_either_side(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = torch.tensor([math.nan, 1.0, math.nan, 2.0]), torch.tensor([1.0, math.nan, math.nan, 3.0])
    torch.testing.assert_close(frozen_result(function, a, b), function(a, b), rtol=0, atol=0, equal_nan=True)


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pixels": lambda x: x.mean((2, 3)),
    "pixels kept": lambda x: x.mean((2, 3), keepdim=True),
    "pixels summed": lambda x: x.sum((2, 3)),
    "channels": lambda x: x.mean(1, keepdim=True),
    "rows": lambda x: x.sum(2),
    "images and rows": lambda x: x.sum((0, 2)),
    "last": lambda x: x.mean(-1),
    "all": lambda x: x.mean() + x.sum(),
    "largest": lambda x: x.amax((1, 3)) + x.amax(),
    "norm": lambda x: x.norm(p=2, dim=(2, 3), keepdim=True),
    "norm of channels": lambda x: F.normalize(x, dim=1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str, layout: str) -> None:
    function = REDUCTIONS[name]
    x = LAYOUTS[layout](values(3, 19, 5, 7) + 0.5)
    assert_accurate(frozen_result(function, x), function(x), function(x.double()))


@pytest.mark.parametrize("size", [(1, 1), (6, 1), (1, 8), (3, 2), (4, 3), (7, 11)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adaptive_maxima(layout: str, size: tuple[int, int]) -> None:
    x = LAYOUTS[layout](values(2, 19, 6, 8))
    for image in (x, x[0]):
        ours, theirs = (f(lambda v: F.adaptive_max_pool2d(v, size), image) for f in (frozen_result, lambda g, v: g(v)))
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


def test_adaptive_maxima_keep_nan() -> None:
    x = values(1, 2, 5, 5)
    x[0, 0, 2, 2] = math.nan
    for size in ((1, 1), (2, 2)):
        ours, theirs = frozen_result(lambda v, s=size: F.adaptive_max_pool2d(v, s), x), F.adaptive_max_pool2d(x, size)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_large_reduction_is_cut_into_tasks() -> None:
    x = values(2, 40, 70, 70) + 0.5
    function = REDUCTIONS["channels"]
    assert_accurate(frozen_result(function, x), function(x), function(x.double()))


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax of channels": lambda x: x.softmax(1),
    "softmax of columns": lambda x: (8 * x).softmax(-1),
    "softmax of images": lambda x: x.softmax(0),
    "layer norm of columns": lambda x: F.layer_norm(x, x.shape[3:]),
    "layer norm of images": lambda x: F.layer_norm(x, x.shape[1:]),
    "layer norm of channels": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ROWS)
def test_functions_of_rows(name: str, layout: str, dtype: torch.dtype) -> None:
    function = ROWS[name]
    x = LAYOUTS[layout](values(3, 35, 5, 17, dtype=dtype))
    assert_accurate(frozen_result(function, x), function(x), function(x.double()))


def test_layer_norm_with_weights_far_from_zero() -> None:
    """A mean of a hundred deviations: sums of squares about zero would lose the variance."""
    x = values(4, 6, 96) + 100
    layer = nn.LayerNorm(96)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    frozen = fastcnn.freeze(layer, x)
    with torch.no_grad():
        assert_accurate(frozen(x), layer(x), layer.double()(x.double()))


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm(layout: str, groups: int) -> None:
    x = LAYOUTS[layout](values(2, 14, 5, 7))
    layer = nn.GroupNorm(groups, 14)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    frozen = fastcnn.freeze(layer, x)
    with torch.no_grad():
        assert_accurate(frozen(x), layer(x), layer.double()(x.double()))


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "upsample": lambda x: F.interpolate(x, scale_factor=3, mode="nearest"),
    "upsample to a size": lambda x: F.interpolate(x, size=(10, 28)),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x[:, :, :4, :6], 2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 3),
    "repeat": lambda x: x.repeat(2, 1, 1, 3, 1),
    "stack": lambda x: torch.stack([x, x * 2], 2),
    "crop": lambda x: F.pad(x, (-1, -2, 1, -1)),
    "channels on both sides": lambda x: F.pad(x.permute(0, 2, 3, 1), (2, 6)).permute(0, 3, 1, 2),
    "channels in front": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, -1), value=2.0),
    "images behind": lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1), value=-1.0),
    "columns": lambda x: F.pad(x, (2, 3)),
    "rows and columns": lambda x: F.pad(x, (2, 3, 0, 1)),
    "three channels": lambda x: x[:, :3].clone(memory_format=torch.channels_last),
    "rows of 64 bytes and 128": lambda x: torch.cat([x.flatten(1)[:, :32], x.flatten(1)[:, 3:19]], 1),
    "dead": lambda x: [x * 2, x.cumsum(1)][0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MOVES)
def test_moves_keep_every_bit(name: str, layout: str) -> None:
    function = MOVES[name]
    x = LAYOUTS[layout](values(2, 12, 5, 7))
    assert torch.equal(frozen_result(function, x), function(x))


PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "batched": lambda x: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)),
    "matrices": lambda x: x.flatten(1) @ x.flatten(1).t(),
    "four dimensions": lambda x: x @ x.transpose(2, 3),
    "with a sum": lambda x: torch.addmm(x[0, :3, 0, :3], x[0, :3, 1], x[1, :3, 2].t()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_values(name: str, layout: str) -> None:
    function = PRODUCTS[name]
    x = LAYOUTS[layout](values(3, 13, 5, 7))
    assert_accurate(frozen_result(function, x), function(x), function(x.double()))




def test_layers_that_were_not_replaced() -> None:
    """Convolutions, batch norms and pools of a model that cannot be traced are lowered from ATen's operators."""

    class Untraced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(12, 6, (3, 5), (2, 1), (1, 2), groups=2)
            self.line = nn.Conv1d(6, 4, 3, padding=1, stride=2)
            self.bn, self.flat = nn.BatchNorm2d(6), nn.BatchNorm1d(4)
            nn.init.uniform_(self.bn.running_mean)
            nn.init.uniform_(self.flat.running_var, 0.5, 2)

        def forward(self, x: Tensor) -> Tensor:
            *sizes, _ = x.shape  # no graph of fx can unpack this
            y = torch.relu(self.bn(self.conv(x)))
            y = F.max_pool2d(y, 3, 1, 1) + F.avg_pool2d(y, 3, 1, 1, count_include_pad=False)
            y = y + F.adaptive_avg_pool2d(y, 1) + F.adaptive_avg_pool2d(y, (2, 1))[:, :, :1]
            return self.flat(self.line(y.flatten(2))) * float(len(sizes))

    model = Untraced().eval()
    for layout in LAYOUTS.values():
        x = layout(values(3, 12, 9, 7))
        frozen = fastcnn.freeze(model, x)
        with torch.no_grad():
            exact = model.double()(x.double())
            assert_accurate(frozen(x), model.float()(x), exact)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_steps_give_the_same_bits_on_any_number_of_threads(threads: int) -> None:
    def function(x: Tensor) -> Tensor:
        return F.silu(x) * x.mean((2, 3), keepdim=True).sigmoid() + x.softmax(1)

    x = values(2, 24, 40, 41)
    frozen = fastcnn.freeze(Function(function), x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = frozen(x)
        torch.set_num_threads(threads)
        assert torch.equal(frozen(x), expected)
    finally:
        torch.set_num_threads(before)
