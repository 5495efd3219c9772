"""conv2d_1x1_pair against float64 and against the two conv2d calls that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import assert_accurate
from support.gradients import assert_gradients, leaf
from support.layout import LAYOUTS, GuardedSlice, sliced
from torch import Tensor, nn

import fastcnn
from fastcnn import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("input", "residual", "expand_weight", "expand_scale", "expand_bias", "reduce_weight", "reduce_scale",
         "reduce_bias")  # fmt: skip


@pytest.fixture(autouse=True)
def only_our_kernels():
    torch.manual_seed(0)
    with fastcnn.use_backend("cpp", strict=True):
        yield


def arguments(
    c: int = 16, j: int = 40, k: int = 24, n: int = 2, h: int = 5, w: int = 7, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    return {
        "input": normal(n, c, h, w), "residual": normal(n, j, h, w), "expand_weight": normal(j, c, 1, 1) / c**0.5,
        "expand_scale": torch.rand(j) + 0.5, "expand_bias": torch.randn(j),
        "reduce_weight": normal(k, j, 1, 1) / j**0.5, "reduce_scale": torch.rand(k) + 0.5,
        "reduce_bias": torch.randn(k),
    }  # fmt: skip


def pair(values: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    keywords = {name: values[name] for name in NAMES if name not in ("input", "residual")}
    return ops.conv2d_1x1_pair(values["input"], values["residual"], **keywords, **more)


def two_calls(values: dict[str, Any]) -> tuple[Tensor, Tensor]:
    wide = ops.conv2d(
        values["input"], values["expand_weight"], values["expand_bias"], scale=values["expand_scale"],
        residual=values["residual"], activation="relu",
    )  # fmt: skip
    return wide, ops.conv2d(
        wide, values["reduce_weight"], values["reduce_bias"], scale=values["reduce_scale"], activation="relu"
    )


def layer(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | float = 0.0) -> Tensor:
    sums = torch.nn.functional.conv2d(x, weight)
    return (sums * scale.to(x.dtype)[:, None, None] + bias.to(x.dtype)[:, None, None] + residual).relu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(1, 1, 1), (16, 64, 16), (17, 33, 9), (64, 256, 64)], ids=str)
def test_accuracy(channels: tuple[int, int, int], dtype: torch.dtype) -> None:
    values = arguments(*channels, dtype=dtype)
    wide, narrow = pair(values)
    for ours, names, x in ((wide, NAMES[2:5], values["input"]), (narrow, NAMES[5:], wide)):
        added = values["residual"] if ours is wide else torch.zeros((), dtype=dtype)
        factors = [values[name] for name in names]
        exact = layer(x.double(), *(f.double() for f in factors), added.double())
        assert_accurate(ours, layer(x, *factors, added), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
def test_results_and_strides_are_those_of_two_calls(layout: str, residual_layout: str, dtype: torch.dtype) -> None:
    values = arguments(dtype=dtype)
    values["input"] = LAYOUTS[layout](values["input"])
    values["residual"] = LAYOUTS[residual_layout](values["residual"])
    for ours, theirs in zip(pair(values), two_calls(values), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("absent", ["expand_scale", "expand_bias", "reduce_scale", "reduce_bias"])
def test_factors_may_be_absent(absent: str) -> None:
    values: dict[str, Any] = {**arguments(), absent: None}
    for ours, theirs in zip(pair(values), two_calls(values), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out(dtype: torch.dtype) -> None:
    values = arguments(dtype=dtype)
    expected = pair(values)
    targets = [GuardedSlice(tuple(e.shape), dtype) for e in expected]
    given = tuple(target.view for target in targets)
    results = pair({**values, "input": sliced(values["input"])}, out=given)
    for result, view, target, e in zip(results, given, targets, expected, strict=True):
        assert result is view
        assert torch.equal(view, e)
        target.assert_guards_intact()


def test_out_may_overlap_arguments_and_each_other() -> None:
    values = arguments(j=24)
    expected = pair(values)
    residual = values["residual"].contiguous(memory_format=torch.channels_last)
    wide, narrow = pair({**values, "residual": residual}, out=(residual, torch.empty_like(expected[1])))
    assert wide is residual
    assert torch.equal(wide, expected[0])
    assert torch.equal(narrow, expected[1])
    shared = torch.empty(2, 5, 8, 24).permute(0, 3, 1, 2)  # one is the other, a column further
    first, second = shared[..., :-1], shared[..., 1:]
    versions = first._version
    _, narrow = pair(values, out=(first, second))
    assert torch.equal(narrow, expected[1])
    assert first._version > versions


def test_empty() -> None:
    wide, narrow = pair(arguments(n=0))
    assert (wide.shape, narrow.shape) == ((0, 40, 5, 7), (0, 24, 5, 7))


def test_gradients_are_those_of_two_calls() -> None:
    shapes = [(2, 3, 2, 3), (2, 5, 2, 3), (5, 3, 1, 1), (5,), (5,), (4, 5, 1, 1), (4,), (4,)]
    leaves = [leaf(*shape) for shape in shapes]
    assert_gradients(lambda *tensors: pair(dict(zip(NAMES, tensors, strict=True))), *leaves, fast=True)


def test_torch_func() -> None:
    values = arguments()
    x = values.pop("input")

    def loss(function: Any) -> Any:
        return lambda x: sum(result.square().sum() for result in function({**values, "input": x}))

    torch.testing.assert_close(torch.func.grad(loss(pair))(x), torch.func.grad(loss(two_calls))(x))


def test_autocast() -> None:
    values = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = pair(values), two_calls(values)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args = tuple(arguments(dtype=dtype)[name] for name in NAMES)
        torch.library.opcheck(torch.ops.fastcnn.conv2d_1x1_pair.default, args)
        outs = [GuardedSlice((2, channels, 5, 7), dtype).view.zero_() for channels in (40, 24)]
        torch.library.opcheck(torch.ops.fastcnn.conv2d_1x1_pair_into.default, (*outs, *args))
    wanting = tuple(tensor.clone().requires_grad_() for tensor in arguments().values())
    torch.library.opcheck(torch.ops.fastcnn.conv2d_1x1_pair.default, wanting)


def test_interceptors_see_two_convolutions() -> None:
    calls: list[str] = []
    with fastcnn.backends.intercept(lambda call: (calls.append(call.operator), call.run())[1]):
        pair(arguments())
    assert calls == ["conv2d", "conv2d"]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"input": torch.zeros(16, 5, 7)}, ValueError, r"input must have shape \(N, C, H, W\)"),
        ({"residual": torch.zeros(2, 39, 5, 7)}, ValueError, "residual must have the output's shape"),
        ({"residual": None}, TypeError, "residual must be a torch.Tensor"),
        ({"residual": torch.zeros(2, 40, 5, 7).half()}, TypeError, "residual must have the input's dtype"),
        ({"expand_weight": torch.zeros(40, 15, 1, 1)}, ValueError, r"expand_weight must have shape \(J, 16, 1, 1\)"),
        ({"expand_weight": torch.zeros(40, 16, 3, 3)}, ValueError, r"expand_weight must have shape \(J, 16, 1, 1\)"),
        ({"reduce_weight": torch.zeros(24, 41, 1, 1)}, ValueError, r"reduce_weight must have shape \(K, 40, 1, 1\)"),
        ({"reduce_weight": torch.zeros(24, 40)}, ValueError, r"reduce_weight must have shape \(K, 40, 1, 1\)"),
        ({"reduce_weight": torch.zeros(24, 40, 1, 1).half()}, TypeError, "reduce_weight must have the input's dtype"),
        ({"expand_scale": torch.zeros(41)}, ValueError, r"expand_scale must have shape \(40,\)"),
        ({"expand_bias": torch.zeros(40).double()}, TypeError, "expand_bias must be torch.float32"),
        ({"reduce_scale": torch.zeros(25)}, ValueError, r"reduce_scale must have shape \(24,\)"),
        ({"reduce_bias": torch.zeros(24, 1)}, ValueError, r"reduce_bias must have shape \(24,\)"),
        ({"reduce_bias": 3.0}, TypeError, "reduce_bias must be a torch.Tensor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pair({**arguments(), **changed})


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.zeros(2, 40, 5, 7), TypeError, "out must be two tensors"),
        ((torch.zeros(2, 40, 5, 7), None), TypeError, r"out\[1\] must be a torch.Tensor"),
        ((torch.zeros(2, 40, 5, 6), torch.zeros(2, 24, 5, 7)), ValueError, r"out\[0\] must have shape"),
        ((torch.zeros(2, 40, 5, 7), torch.zeros(2, 24, 5, 7).half()), ValueError, r"out\[1\] must be torch.float32"),
        ((torch.zeros(2, 40, 5, 7), torch.zeros(24, 5, 7).expand(2, -1, -1, -1)), ValueError, "overlap itself"),
    ],
)
def test_bad_outputs_are_named(out: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pair(arguments(), out=out)


def test_out_refuses_gradients() -> None:
    values = arguments()
    values["reduce_weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        pair(values, out=(torch.empty(2, 40, 5, 7), torch.empty(2, 24, 5, 7)))


@torch.no_grad()
def test_models_that_call_it_freeze_on_the_cpu() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expand, self.reduce = nn.Conv2d(16, 40, 1, bias=False), nn.Conv2d(40, 24, 1, bias=False)

        def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return ops.conv2d_1x1_pair(x, residual, self.expand.weight, self.reduce.weight)

    model, values = Pair().eval(), arguments()
    inputs = (values["input"], values["residual"])
    for ours, expected in zip(fastcnn.freeze(model, inputs)(*inputs), model(*inputs), strict=True):
        assert torch.equal(ours, expected)
