"""local_response_norm on the C++ backend against float64 and against PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable

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

# Shape, then (size, alpha, beta, k).
CASES = [
    ((1, 1, 1, 1), (1, 1e-4, 0.75, 1.0)),
    ((2, 96, 7, 5), (5, 1e-4, 0.75, 2.0)),  # AlexNet's
    ((1, 64, 9, 9), (5, 0.5, 0.75, 1.0)),  # alpha large enough to matter
    ((3, 13, 5, 3), (4, 2.0, 0.75, 1.0)),  # even: one more before than after
    ((1, 37, 4, 6), (3, 1.0, 0.5, 0.3)),
    ((2, 5, 3, 3), (7, 1.0, 1.0, 1.0)),  # wider than the channels
    ((1, 3, 6, 6), (100, 3.0, 0.6, 1.0)),
    ((1, 17, 1, 31), (2, 1.0, 0.75, 1e-3)),
    ((1, 200, 3, 3), (33, 1.0, 0.75, 1.0)),
]


@pytest.fixture(autouse=True)
def only_our_kernels():
    """Every call in this file must be covered by the C++ backend unless a test says otherwise."""
    with fastcnn.use_backend("cpp", strict=True):
        yield


def pytorchs(x: Tensor, *arguments: float) -> Tensor:
    """PyTorch's result in the input's dtype; a CPU has no avg_pool3d for bf16 and fp16, so these pass through fp32."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return F.local_response_norm(wide, *arguments).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "arguments"), CASES, ids=str)
def test_equals_float64(shape: tuple, arguments: tuple, dtype: torch.dtype):
    x = torch.randn(shape).to(dtype)
    exact = pytorchs(x.double(), *arguments)
    assert_accurate(ops.local_response_norm(x, *arguments), pytorchs(x, *arguments), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "arguments"), CASES, ids=str)
def test_writes_exactly_its_channel_slice(shape: tuple, arguments: tuple, dtype: torch.dtype):
    x = torch.randn(shape).to(dtype)
    out = GuardedSlice(shape, dtype)
    assert ops.local_response_norm(sliced(x), *arguments, out=out.view) is out.view
    assert_accurate(out.view, pytorchs(x, *arguments), pytorchs(x.double(), *arguments))
    out.assert_guards_intact()


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("shape", [(2, 5, 9, 7), (2, 1, 9, 7), (3, 5, 1, 1), (1, 6, 4, 1)], ids=str)
def test_layouts_give_pytorchs_result_and_strides(layout: str, shape: tuple):
    x = torch.randn(shape)
    x = x[:1].expand(3, *shape[1:]) if layout == "expanded" else LAYOUTS[layout](x)
    ours, theirs = ops.local_response_norm(x, 3), F.local_response_norm(x, 3)
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs)


INPUTS = {
    "3-D": torch.randn(2, 6, 10),
    "3-D, channels adjacent": torch.randn(2, 10, 6).transpose(1, 2),
    "5-D": torch.randn(2, 6, 3, 4, 5),
    "5-D channels-last": torch.randn(2, 6, 3, 4, 5).to(memory_format=torch.channels_last_3d),
    "6-D": torch.randn(2, 6, 3, 2, 2, 2),
    "empty batch": torch.randn(0, 6, 3, 3),
    "no channels": torch.randn(2, 0, 3),
}


@pytest.mark.parametrize("name", INPUTS)
def test_any_number_of_dimensions(name: str):
    x = INPUTS[name]
    ours, theirs = ops.local_response_norm(x, 3), F.local_response_norm(x, 3)
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs)
    out = torch.full_like(x, float("nan"))
    assert ops.local_response_norm(x, 3, out=out) is out
    torch.testing.assert_close(out, theirs)


@pytest.mark.parametrize("beta", [0.75, 0.6])
@pytest.mark.parametrize("channels", [3, 16, 45])
def test_nan_infinity_and_overflow_stay_in_their_windows(channels: int, beta: float):
    x = torch.randn(2, channels, 4, 5)
    for value in (float("nan"), float("inf"), -float("inf"), 1e30):
        x[torch.rand(x.shape) < 0.04] = value
    for alpha, k in ((1.0, 1.0), (-1e-3, 1.0), (1.0, 0.0)):
        ours, theirs = (f(x, 5, alpha, beta, k) for f in (ops.local_response_norm, F.local_response_norm))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads: int):
    x, before = torch.randn(2, 96, 27, 27), torch.get_num_threads()
    expected = ops.local_response_norm(x, 5)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ops.local_response_norm(x, 5), expected)
    finally:
        torch.set_num_threads(before)


# ---- autograd, compile, autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_gradients(size: int):
    x = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return ops.local_response_norm(x, size, 0.7, 0.75, 1.1)

    with fastcnn.use_backend("reference"):  # float64 is the reference's; the backward formulas are what is checked
        assert torch.autograd.gradcheck(function, (x,))
        assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_pytorchs(dtype: torch.dtype):
    x = torch.randn(2, 20, 5, 5).to(dtype)
    grads = []
    for function in (ops.local_response_norm, pytorchs):
        leaf = x.clone().requires_grad_()
        function(leaf, 5, 0.5, 0.75, 2.0).float().square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        ops.local_response_norm(x.clone().requires_grad_(), 5, out=torch.empty_like(x))


def test_opcheck():
    x, arguments = torch.randn(2, 5, 7, 8), (3, 1e-2, 0.75, 1.0)
    function = torch.ops.fastcnn.local_response_norm.default
    channels_last = x.contiguous(memory_format=torch.channels_last)
    for sample in (x, x.clone().requires_grad_(), channels_last, LAYOUTS["transposed"](x)):
        torch.library.opcheck(function, (sample, *arguments))
    out = GuardedSlice(tuple(x.shape), torch.float32).view.zero_()
    torch.library.opcheck(torch.ops.fastcnn.local_response_norm_into.default, (out, x, *arguments))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic: bool):
    def network(x: Tensor) -> Tensor:
        y = ops.local_response_norm(x, 5, alpha=0.5)
        ops.local_response_norm(x, 3, out=y)
        return y + ops.local_response_norm(x.flatten(2), 5).view_as(x)

    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (5, 8):
        x = torch.randn(2, 6, size, size + 1)
        torch.testing.assert_close(compiled(x), network(x))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 5, 4), (2, 6, 3, 3, 2)], ids=str)
def test_autocast_gives_pytorchs_dtype(shape: tuple, dtype: torch.dtype):
    x = torch.randn(shape).to(dtype)
    with torch.autocast("cpu", torch.bfloat16), fastcnn.use_backend("cpp"):
        ours, theirs = ops.local_response_norm(x, 3, 0.5), F.local_response_norm(x, 3, 0.5)
    assert ours.dtype == theirs.dtype
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2  # PyTorch rounds the squares to 16 bits
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_pytorchs_sample_inputs(dtype: torch.dtype):
    common = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    (info,) = [o for o in common.op_db if o.name == "nn.functional.local_response_norm"]
    assert dtype in info.dtypes
    for count, sample in enumerate(info.sample_inputs("cpu", dtype, requires_grad=False)):  # noqa: B007
        theirs = F.local_response_norm(sample.input, *sample.args, **sample.kwargs)
        with fastcnn.use_backend("cpp"):  # float64 and integers take the reference path
            ours = ops.local_response_norm(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()
    assert count > 3


# ---- bad input -----------------------------------------------------------------------------------------------------

X = torch.zeros(2, 4, 6, 6)

BAD: dict[str, Callable[[], object]] = {
    "input must be a torch.Tensor": lambda: ops.local_response_norm([[1.0]], 5),
    "input must have three dimensions or more": lambda: ops.local_response_norm(X[0, 0], 5),
    "size must be an int": lambda: ops.local_response_norm(X, 2.0),
    "size must be at least 1": lambda: ops.local_response_norm(X, 0),
    "out must have shape (2, 4, 6, 6)": lambda: ops.local_response_norm(X, 5, out=X[:1]),
    "out must have shape (2, 4, 36)": lambda: ops.local_response_norm(X.flatten(2), 5, out=X.clone()),
    "out must be torch.float32": lambda: ops.local_response_norm(X, 5, out=X.half()),
    "out must have trailing dimensions": lambda: ops.local_response_norm(
        torch.zeros(2, 4, 6, 3, 2), 5, out=torch.zeros(2, 4, 6, 2, 3).transpose(3, 4)
    ),
    "out needs a floating-point input": lambda: ops.local_response_norm(X.long(), 5, out=X),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message: str):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        BAD[message]()


def test_native_function_refuses_what_is_not_memory_safe():
    from fastcnn import _native

    x = X.contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="size"):
        _native.cpu_local_response_norm(torch.empty_like(x), x, 0, 1.0, 0.75, 1.0, 1)
    with pytest.raises(ValueError, match="out must have shape"):
        _native.cpu_local_response_norm(torch.empty_like(x)[:1], x, 5, 1.0, 0.75, 1.0, 1)


def check_kernels() -> None:
    """The kernels' core against PyTorch, to be run under each instruction set."""
    torch.manual_seed(0)
    for shape, arguments in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            test_writes_exactly_its_channel_slice(shape, arguments, dtype)
    for channels in (3, 16, 45):
        test_nan_infinity_and_overflow_stay_in_their_windows(channels, 0.75)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_other_instruction_sets(isa: str):
    check_kernels_under(isa, __file__)
