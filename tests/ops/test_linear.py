"""linear on the C++ backend against float64 and against PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.gradients import assert_gradients, assert_registered, leaf
from torch.testing._internal.common_methods_invocations import op_db

import fastcnn
from fastcnn import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (M, C, K): around the kernel's tiles of rows, vectors and chunks
SHAPES = [
    (1, 1, 1), (1, 7, 5), (2, 16, 4), (3, 17, 31), (5, 31, 3), (6, 64, 33), (7, 129, 10), (13, 511, 29), (49, 513, 37),
    (101, 1025, 67), (1, 4096, 129), (97, 3, 2),
]  # fmt: skip


@pytest.fixture(autouse=True)
def only_our_kernels():
    """Every call in this file must be covered by the C++ backend unless a test says otherwise."""
    torch.manual_seed(0)
    with fastcnn.use_backend("cpp", strict=True):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_accuracy(shape, dtype, activation, with_bias):
    m, c, k = shape
    x, w, b = torch.randn(m, c).to(dtype), torch.randn(k, c).to(dtype), torch.randn(k).to(dtype) if with_bias else None
    ours = ops.linear(x, w, b, activation=activation)
    reference, exact = F.linear(x, w, b), F.linear(x.double(), w.double(), None if b is None else b.double())
    if activation == "relu":
        reference, exact = reference.relu(), exact.relu()
    assert_accurate(ours, reference, exact)
    assert ours.stride() == reference.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.repeat_interleave(2, 0)[::2],  # strided rows
        lambda t: F.pad(t, (3, 2), value=float("nan"))[:, 3:-2],  # slice of wider rows
        lambda t: t.t().contiguous().t(),  # columns
        lambda t: t[:1].expand(t.shape[0], -1),  # one row, many times
    ],
)
def test_strided_operands(make, dtype):
    x, w = make(torch.randn(9, 37).to(dtype)), make(torch.randn(11, 37).to(dtype))
    assert_accurate(ops.linear(x, w), F.linear(x, w), F.linear(x.double(), w.double()))


@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (2, 0, 3), (4, 1, 2, 1)])
def test_leading_dimensions(lead):
    x, w, b = torch.randn(*lead, 6), torch.randn(5, 6), torch.randn(5)
    torch.testing.assert_close(ops.linear(x, w, b), F.linear(x, w, b))


def test_no_features():
    x, w, b = torch.randn(3, 0), torch.randn(5, 0), torch.randn(5)
    torch.testing.assert_close(ops.linear(x, w, b, activation="relu"), F.linear(x, w, b).relu())
    assert ops.linear(torch.randn(3, 4), torch.randn(0, 4)).shape == (3, 0)


def test_one_dimensional_weight():
    x, w, b = torch.randn(2, 3, 6), torch.randn(6), torch.randn(())
    torch.testing.assert_close(ops.linear(x, w), F.linear(x, w))
    torch.testing.assert_close(ops.linear(x, w, b), F.linear(x, w, b))


def test_weight_changed_in_place_is_seen():
    x, w = torch.randn(2, 8).half(), torch.randn(3, 8).half()
    ops.linear(x, w)
    w.mul_(2)
    torch.testing.assert_close(ops.linear(x, w), F.linear(x, w), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out(dtype):
    x, w, b = torch.randn(3, 20).to(dtype), torch.randn(6, 20).to(dtype), torch.randn(6)
    expected = ops.linear(x, w, b)
    buffer = torch.full((3, 10), 7.0).to(dtype)
    buffer[:, 2:8] = float("nan")
    assert ops.linear(x, w, b, out=buffer[:, 2:8]) is not None
    assert torch.equal(buffer[:, 2:8], expected)
    assert (buffer[:, :2] == 7).all()
    assert (buffer[:, 8:] == 7).all()
    columns = torch.empty(6, 3, dtype=dtype).t()
    assert torch.equal(ops.linear(x, w, b, out=columns), expected)
    square = torch.randn(3, 3).to(dtype)
    weight = square.clone()
    assert torch.equal(ops.linear(square, weight, out=square), ops.linear(weight, weight))  # out overlaps the input


def test_nan_and_infinity_pass():
    x, w = torch.randn(3, 40), torch.randn(5, 40)
    x[0, 3], x[1, 7] = float("nan"), float("inf")
    torch.testing.assert_close(ops.linear(x, w, activation="relu"), F.linear(x, w).relu(), equal_nan=True)


def test_same_result_from_any_thread_count():
    x, w, threads = torch.randn(50, 300), torch.randn(70, 300), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.linear(x, w))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


def test_autocast():
    x, w, b = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = ops.linear(x, w, b), F.linear(x, w, b)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)  # PyTorch rounds the bias, too


def test_gradients():
    assert_gradients(lambda x, w, b: ops.linear(x, w, b), leaf(2, 3, 4), leaf(5, 4), leaf(5))
    assert_gradients(lambda x, w, b: ops.linear(x, w, b, activation="relu"), leaf(3, 4), leaf(5, 4), leaf(5))
    assert_gradients(lambda x, w: ops.linear(x, w), leaf(3, 4), leaf(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_match_pytorch(dtype):
    args = [torch.randn(7, 9).to(dtype), torch.randn(5, 9).to(dtype), torch.randn(5).to(dtype)]
    results = []
    for function in (lambda *a: ops.linear(*a, activation="relu"), lambda *a: F.linear(*a).relu()):
        leaves = [a.clone().requires_grad_() for a in args]
        function(*leaves).float().square().sum().backward()
        results.append([a.grad for a in leaves])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_registration():
    x, w, b = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    assert_registered(torch.ops.fastcnn.linear.default, x, w, b, "relu")
    assert_registered(torch.ops.fastcnn.linear.default, x, w, None, "none")
    torch.library.opcheck(torch.ops.fastcnn.linear_into.default, (torch.empty(2, 3, 5), x, w, b, "relu"))


def test_compile():
    def function(x, w, b):
        return ops.linear(x, w, b, activation="relu") * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, w, b = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True), torch.randn(5)
    compiled(x, w, b).sum().backward()
    torch.testing.assert_close(compiled(x, w, b), F.linear(x, w, b).relu() * 2)
    assert w.grad is not None


def test_messages():
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="input must have 4 features"):
        ops.linear(torch.randn(3, 5), w)
    with pytest.raises(TypeError, match="weight must have the input's dtype"):
        ops.linear(x, w.double())
    with pytest.raises(ValueError, match=r"bias must have shape \(5,\)"):
        ops.linear(x, w, torch.randn(4))
    with pytest.raises(ValueError, match="activation must be one of"):
        ops.linear(x, w, activation="gelu")
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.linear(x, torch.randn(5, 4, 1))
    with pytest.raises(ValueError, match="out must have shape"):
        ops.linear(x, w, out=torch.empty(3, 4))
    with pytest.raises(RuntimeError, match="out= does not support automatic differentiation"):
        ops.linear(x, w.requires_grad_(), out=torch.empty(3, 5))
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor"):
        ops.linear([1.0], w)  # type: ignore[arg-type]


def test_pytorchs_own_samples():
    info = next(op for op in op_db if op.name == "nn.functional.linear")
    count = 0
    for sample in info.sample_inputs("cpu", torch.float32, requires_grad=True):
        ours = ops.linear(sample.input, *sample.args, **sample.kwargs)
        theirs = F.linear(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()
        leaves = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
        gradient = torch.randn_like(theirs)
        for a, b in zip(
            torch.autograd.grad(ours, leaves, gradient), torch.autograd.grad(theirs, leaves, gradient), strict=True
        ):
            torch.testing.assert_close(a, b)
        count += 1
    assert count > 10
