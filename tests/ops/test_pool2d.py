"""Pooling on the C++ backend against float64 and against PyTorch, over awkward shapes, dtypes and layouts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.instruction_sets import check_kernels_under
from support.layout import LAYOUTS, GuardedSlice, sliced
from torch import Tensor

import fastcnn
from fastcnn import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
FUNCTIONS = {name: (getattr(ops, name), getattr(F, name)) for name in NAMES}


@pytest.fixture(autouse=True)
def only_our_kernels():
    """Every call in this file must be covered by the C++ backend unless a test says otherwise."""
    torch.manual_seed(0)  # a mean near zero of one draw in many has no digits to lose
    with fastcnn.use_backend("cpp", strict=True):
        yield


class Case(NamedTuple):
    function: str
    shape: tuple[int, int, int, int]
    arguments: dict[str, Any]

    def ours(self, x: Tensor, **more: Any) -> Tensor:
        return FUNCTIONS[self.function][0](x, **self.arguments, **more)

    def theirs(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.function][1](x, **self.arguments)


def window(kernel_size: Any, stride: Any = None, padding: Any = 0, **more: Any) -> dict[str, Any]:
    return {"kernel_size": kernel_size, "stride": stride, "padding": padding, **more}


# Windows that both maximum and average take.
WINDOWS = [
    ((1, 1, 1, 1), window(1)),
    ((2, 64, 15, 13), window(3, 2, 1)),  # the stem's
    ((1, 7, 9, 17), window((3, 2), (2, 3), (1, 0))),
    ((3, 31, 7, 5), window(3, 1, 1)),
    ((1, 13, 8, 9), window(3, 2, 0, ceil_mode=True)),
    ((1, 40, 11, 7), window(3, 2, 1, ceil_mode=True)),
    ((2, 3, 6, 6), window(2)),
    ((2, 37, 7, 9), window(2)),
    ((1, 16, 9, 7), window(2, ceil_mode=True)),
    ((1, 6, 7, 7), window(2, (1, 2), (1, 0))),
    ((1, 129, 5, 6), window((5, 6))),  # one window, the whole image
    ((1, 97, 3, 2), window(3, 5, 1, ceil_mode=True)),
    ((1, 17, 4, 40), window((1, 33), (3, 2), (0, 16))),
    ((2, 200, 6, 5), window(2, 3, 1)),  # more stride than kernel
]
CASES = [
    *(Case(function, shape, arguments) for shape, arguments in WINDOWS for function in ("max_pool2d", "avg_pool2d")),
    Case("max_pool2d", (2, 19, 11, 13), window(3, 2, 1, dilation=(2, 3))),
    Case("max_pool2d", (1, 8, 9, 9), window((2, 3), 1, (1, 1), dilation=4, ceil_mode=True)),
    Case("avg_pool2d", (1, 40, 11, 7), window(3, 2, 1, ceil_mode=True, count_include_pad=False)),
    Case("avg_pool2d", (2, 9, 8, 8), window(3, 1, 1, count_include_pad=False)),
    Case("avg_pool2d", (2, 9, 8, 8), window(3, 2, 1, divisor_override=7)),
    Case("avg_pool2d", (1, 21, 8, 8), window(4, 2, 2, divisor_override=-4, ceil_mode=True)),
    Case("adaptive_avg_pool2d", (2, 65, 7, 7), {"output_size": 1}),
    Case("adaptive_avg_pool2d", (1, 2048, 7, 7), {"output_size": 1}),
    Case("adaptive_avg_pool2d", (1, 5, 113, 97), {"output_size": 1}),  # many terms: rounding must not pile up
    Case("adaptive_avg_pool2d", (1, 96, 13, 11), {"output_size": (6, None)}),
    Case("adaptive_avg_pool2d", (2, 23, 7, 5), {"output_size": (3, 2)}),
    Case("adaptive_avg_pool2d", (1, 3, 2, 3), {"output_size": 7}),  # more outputs than inputs
    Case("adaptive_avg_pool2d", (1, 1, 1, 29), {"output_size": (1, 10)}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case, dtype: torch.dtype):
    x = torch.randn(case.shape).to(dtype)
    assert_accurate(case.ours(x), case.theirs(x), case.theirs(x.double()))
    if case.function == "max_pool2d":
        assert torch.equal(case.ours(x), case.theirs(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts_give_pytorchs_result_and_strides(case: Case, layout: str):
    x = LAYOUTS[layout](torch.randn(case.shape))
    ours, theirs = case.ours(x), case.theirs(x)
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_writes_exactly_its_channel_slice(case: Case, dtype: torch.dtype):
    x = torch.randn(case.shape).to(dtype)
    reference = case.theirs(x)
    out = GuardedSlice(tuple(reference.shape), dtype)
    assert case.ours(sliced(x), out=out.view) is out.view
    assert_accurate(out.view, reference, case.theirs(x.double()))
    out.assert_guards_intact()


@pytest.mark.parametrize("case", CASES[2::5], ids=str)
def test_unbatched_empty_batch_and_out_of_any_layout(case: Case):
    x = torch.randn(case.shape)
    for image in (x[0], x[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        ours, theirs = case.ours(image), case.theirs(image)
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs)
        out = torch.full_like(theirs, float("nan"))
        assert case.ours(image, out=out) is out
        torch.testing.assert_close(out, theirs)
    assert case.ours(x[:0]).shape == case.theirs(x[:0]).shape
    assert case.ours(x[:0]).stride() == case.theirs(x[:0]).stride()
    out = torch.full_like(case.theirs(x), float("nan")).contiguous()
    version = out._version
    case.ours(x, out=out)
    assert out._version > version
    torch.testing.assert_close(out, case.theirs(x))


def test_out_that_overlaps_the_input_is_right_all_the_same():
    buffer = torch.randn(1, 10, 6, 6).contiguous(memory_format=torch.channels_last)
    expected = F.max_pool2d(buffer[:, :8].clone(), 3, 1, 1)
    ops.max_pool2d(buffer[:, :8], 3, 1, 1, out=buffer[:, 2:])
    torch.testing.assert_close(buffer[:, 2:], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 5, 16, 37, 80])
def test_nan_and_infinity(channels: int, dtype: torch.dtype):
    x = torch.randn(2, channels, 9, 8)
    x[torch.rand(x.shape) < 0.05] = float("nan")
    x[torch.rand(x.shape) < 0.05] = float("inf")
    x[torch.rand(x.shape) < 0.3] = -float("inf")
    x = x.to(dtype)
    for case in (Case("max_pool2d", x.shape, window(3, 2, 1)), Case("max_pool2d", x.shape, window(2)),
                 Case("avg_pool2d", x.shape, window(2)),
                 Case("adaptive_avg_pool2d", x.shape, {"output_size": (4, 3)})):  # fmt: skip
        torch.testing.assert_close(case.ours(x), case.theirs(x), equal_nan=True)


def test_window_that_steps_over_the_image():
    """PyTorch gives -inf and an index outside the image; the gradient must not follow it there."""
    x = torch.randn(1, 1, 1, 1, requires_grad=True)
    arguments = window(3, 5, 1, dilation=3, ceil_mode=True)
    y = ops.max_pool2d(x, **arguments)
    assert y.item() == F.max_pool2d(x, **arguments).item() == -float("inf")
    y.sum().backward()
    assert x.grad.item() == 0


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads: int):
    x, before = torch.randn(2, 300, 30, 31), torch.get_num_threads()
    cases = [Case("max_pool2d", x.shape, window(3, 2, 1)), Case("adaptive_avg_pool2d", x.shape, {"output_size": 1})]
    expected = [case.ours(x) for case in cases]
    try:
        torch.set_num_threads(threads)
        for case, result in zip(cases, expected, strict=True):
            assert torch.equal(case.ours(x), result)
    finally:
        torch.set_num_threads(before)


def test_many_random_windows():
    generator = torch.Generator().manual_seed(5)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    for _ in range(150):
        kernel = (pick(1, 4), pick(1, 5))
        arguments = window(
            kernel, (pick(1, 4), pick(1, 3)), (pick(0, kernel[0] // 2), pick(0, kernel[1] // 2)),
            ceil_mode=bool(pick(0, 1)),
        )  # fmt: skip
        x = torch.randn(pick(1, 2), pick(1, 70), pick(5, 12), pick(5, 12))
        ours, theirs = ops.max_pool2d(x, **arguments), F.max_pool2d(x, **arguments)
        assert torch.equal(ours, theirs)
        include = bool(pick(0, 1))
        ours = ops.avg_pool2d(x, count_include_pad=include, **arguments)
        torch.testing.assert_close(ours, F.avg_pool2d(x, count_include_pad=include, **arguments))
        size = (pick(1, 9), pick(1, 9))
        torch.testing.assert_close(ops.adaptive_avg_pool2d(x, size), F.adaptive_avg_pool2d(x, size))


def test_different_padding_at_the_two_ends():
    """Part of the kernel contract, not of PyTorch's operator: the C++ kernel against the reference backend."""
    x = torch.randn(1, 20, 6, 7).contiguous(memory_format=torch.channels_last)
    for include in (True, False):
        for divisor in (0, 5):
            results = []
            for backend in ("cpp", "reference"):
                out = torch.full((1, 20, 3, 4), float("nan")).contiguous(memory_format=torch.channels_last)
                module = fastcnn.backends.backend_module(backend)
                module.avg_pool2d(out, x, (3, 3), (2, 2), (0, 1), (1, 1), include, divisor)
                results.append(out)
            torch.testing.assert_close(*results)


# ---- autograd, compile, autocast -----------------------------------------------------------------------------------

SMALL = [
    Case("max_pool2d", (2, 3, 6, 5), window(3, 2, 1)),
    Case("max_pool2d", (1, 2, 7, 7), window(2, 2, 1, dilation=2, ceil_mode=True)),
    Case("avg_pool2d", (2, 3, 6, 5), window(3, 2, 1, ceil_mode=True, count_include_pad=False)),
    Case("avg_pool2d", (1, 2, 5, 5), window(2, 1, divisor_override=3)),
    Case("adaptive_avg_pool2d", (2, 3, 6, 5), {"output_size": (3, 2)}),
    Case("adaptive_avg_pool2d", (2, 3, 4, 5), {"output_size": 1}),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients(case: Case):
    x = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    with fastcnn.use_backend("reference"):  # float64 is the reference's; the backward formulas are what is checked
        assert torch.autograd.gradcheck(case.ours, (x,))
        assert torch.autograd.gradgradcheck(case.ours, (x,))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_float32_gradients_equal_pytorchs(case: Case):
    x = torch.randn(case.shape)
    grads = []
    for function in (case.ours, case.theirs):
        leaf = x.clone().requires_grad_()
        function(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        case.ours(x.clone().requires_grad_(), out=torch.empty_like(case.theirs(x)))


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("max_pool2d", ([3, 2], [2, 1], [1, 0], [1, 2], True)),
        ("avg_pool2d", ([3, 2], [2, 1], [1, 0], True, False, None)),
        ("adaptive_avg_pool2d", ([3, 2],)),
        ("adaptive_avg_pool2d", ([1, 1],)),
    ],
)
def test_opcheck(operator: str, arguments: tuple):
    x = torch.randn(2, 5, 7, 8)
    function = getattr(torch.ops.fastcnn, operator).default
    for sample in (x, x.clone().requires_grad_(), x.contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(function, (sample, *arguments))
    out = GuardedSlice(tuple(function(x, *arguments).shape), torch.float32).view.zero_()
    torch.library.opcheck(getattr(torch.ops.fastcnn, f"{operator}_into").default, (out, x, *arguments))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic: bool):
    def network(x: Tensor) -> Tensor:
        y = ops.max_pool2d(x, 3, 2, 1) + ops.avg_pool2d(x, 3, 2, 1)
        ops.max_pool2d(y, 3, 1, 1, out=y)
        return ops.adaptive_avg_pool2d(y, (3, 2)) + ops.global_avg_pool2d(x)

    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (9, 12):
        x = torch.randn(2, 4, size, size + 1)
        torch.testing.assert_close(compiled(x), network(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL[::2], ids=str)
def test_autocast_leaves_pooling_alone(case: Case, dtype: torch.dtype):
    x = torch.randn(case.shape).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = case.ours(x), case.theirs(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("strict", [False, True])
def test_indices_are_pytorchs_and_counted(strict: bool):
    x = torch.randn(1, 3, 6, 6)
    with fastcnn.use_backend("cpp", strict=strict):
        if strict:
            with pytest.raises(RuntimeError, match="return_indices"):
                ops.max_pool2d(x, 2, return_indices=True)
            return
        fastcnn.reset_fallbacks()
        ours, theirs = ops.max_pool2d(x, 2, return_indices=True), F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert [f.operator for f in fastcnn.fallbacks()] == ["max_pool2d"]


# ---- PyTorch's own test inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_pytorchs_sample_inputs(name: str, dtype: torch.dtype):
    common = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    (info,) = [o for o in common.op_db if o.name == f"nn.functional.{name}"]
    if dtype not in info.dtypes:
        pytest.skip("not a dtype of PyTorch's operator")
    ours, theirs = FUNCTIONS[name]
    for count, sample in enumerate(info.sample_inputs("cpu", dtype, requires_grad=False)):  # noqa: B007
        expected = theirs(sample.input, *sample.args, **sample.kwargs)
        with fastcnn.use_backend("cpp"):  # float64 and integers take the reference path
            actual = ours(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(actual, expected)
        for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (actual, expected)), strict=True):
            assert a.stride() == b.stride()
    assert count > 3


# ---- bad input -------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 4, 6, 6)

BAD: dict[str, Callable[[], object]] = {
    "input must be a torch.Tensor": lambda: ops.max_pool2d([[1.0]], 2),
    "input must have shape (N, C, H, W) or (C, H, W), has (6, 6)": lambda: ops.max_pool2d(X[0, 0], 2),
    "input must have shape (N, C, H, W) or (C, H, W), has (4, 6)": lambda: ops.adaptive_avg_pool2d(X[0, :, 0], 2),
    "input must not be empty but for N, has": lambda: ops.avg_pool2d(X[:, :0], 2),
    "input must not be empty but for N and C": lambda: ops.adaptive_avg_pool2d(X[:, :, :0], 2),
    "input must be floating point or integer": lambda: ops.max_pool2d(X.bool(), 2),
    "input must be floating point or int64": lambda: ops.avg_pool2d(X.int(), 2),
    "input must be floating point, is": lambda: ops.adaptive_avg_pool2d(X.int(), 2),
    "kernel_size must be an int or two ints": lambda: ops.max_pool2d(X, (1, 2, 3)),
    "kernel_size must be an int or two ints, is 2.5": lambda: ops.max_pool2d(X, 2.5),
    "kernel_size must be at least 1": lambda: ops.avg_pool2d(X, 0, 1),
    "is larger than the padded input (6, 6)": lambda: ops.max_pool2d(X, 7),
    "kernel_size (3, 3) with dilation (3, 3) is larger": lambda: ops.max_pool2d(X, 3, dilation=3),
    "stride must be at least 1": lambda: ops.max_pool2d(X, 2, 0),
    "padding must be at least 0": lambda: ops.max_pool2d(X, 2, padding=-1),
    "padding must be at most half of kernel_size": lambda: ops.avg_pool2d(X, 3, padding=2),
    "padding must be at most half of kernel_size (2, 3)": lambda: ops.max_pool2d(X, (2, 3), padding=2, dilation=2),
    "dilation must be at least 1": lambda: ops.max_pool2d(X, 2, dilation=0),
    "divisor_override must not be 0": lambda: ops.avg_pool2d(X, 2, divisor_override=0),
    "output_size must be an int or two ints": lambda: ops.adaptive_avg_pool2d(X, (3,)),
    "output_size must be at least 0": lambda: ops.adaptive_avg_pool2d(X, -1),
    "out must have shape (2, 4, 3, 3)": lambda: ops.max_pool2d(X, 2, out=torch.zeros(2, 4, 3, 4)),
    "out must be torch.float32": lambda: ops.avg_pool2d(X, 2, out=torch.zeros(2, 4, 3, 3).half()),
    "out cannot be given together with": lambda: ops.max_pool2d(X, 2, return_indices=True, out=torch.zeros(2, 4, 3, 3)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message: str):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        BAD[message]()


def test_native_functions_refuse_what_is_not_memory_safe():
    from fastcnn import _native

    x = X.contiguous(memory_format=torch.channels_last)
    for kernel, stride, padding in (
        ((0, 1), (1, 1), (0, 0)),
        ((2, 2), (0, 1), (0, 0)),
        ((2, 2), (1, 1), (-1, 0)),
        ((2, 2), (2**62, 1), (0, 0)),
    ):
        with pytest.raises(ValueError, match=r"kernel|stride|padding"):
            _native.cpu_max_pool2d(torch.empty_like(x), x, kernel, stride, padding, (1, 1), 1)
    with pytest.raises(ValueError, match="out must have shape"):
        _native.cpu_max_pool2d(torch.empty_like(x)[:, :3], x, (1, 1), (1, 1), (0, 0), (1, 1), 1)
    with pytest.raises(ValueError, match="channels-last"):
        _native.cpu_adaptive_avg_pool2d(torch.zeros(2, 4, 3, 3), x, 1)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        _native.cpu_adaptive_avg_pool2d(x.half(), x.half(), 1)
    # An output larger than its windows reach: nothing outside the input is read.
    out = torch.zeros(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    _native.cpu_max_pool2d(out, x, (2, 2), (2, 2), (0, 0), (1, 1), 1)
    assert (out[:, :, 3:] == -float("inf")).all()


def check_kernels() -> None:
    """The kernels' core against PyTorch, to be run under each instruction set."""
    torch.manual_seed(0)
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(case.shape).to(dtype)
            reference = case.theirs(x)
            out = GuardedSlice(tuple(reference.shape), dtype)
            case.ours(sliced(x), out=out.view)
            assert_accurate(out.view, reference, case.theirs(x.double()))
            out.assert_guards_intact()
    for channels in (1, 5, 16, 37):
        for dtype in (torch.float32, torch.bfloat16):
            test_nan_and_infinity(channels, dtype)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_other_instruction_sets(isa: str):
    check_kernels_under(isa, __file__)
