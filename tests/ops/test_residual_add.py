"""residual_add on the C++ backend against float64 and against PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.gradients import assert_gradients, assert_registered, leaf
from support.layout import LAYOUTS, GuardedSlice, sliced

import fastcnn
from fastcnn import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 13, 1, 4), (3, 16, 3, 3), (1, 24, 13, 11), (1, 67, 9, 2), (2, 256, 7, 5)]


@pytest.fixture(autouse=True)
def only_our_kernels():
    """Every call in this file must be covered by the C++ backend unless a test says otherwise."""
    torch.manual_seed(0)
    with fastcnn.use_backend("cpp", strict=True):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.8])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_accuracy(shape, dtype, scale, activation):
    x, r = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    reference, exact = torch.add(r, x, alpha=scale), r.double() + scale * x.double()
    if activation == "relu":
        reference, exact = reference.relu(), exact.relu()
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = ops.residual_add(
            x.contiguous(memory_format=layout), r.contiguous(memory_format=layout), scale=scale, activation=activation
        )
        assert_accurate(ours, reference, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
def test_layouts(layout, residual_layout, dtype):
    x = LAYOUTS[layout](torch.randn(2, 11, 5, 6).to(dtype))
    r = LAYOUTS[residual_layout](torch.randn(2, 11, 5, 6).to(dtype))
    ours, theirs = ops.residual_add(x, r), F.relu(x + r)
    torch.testing.assert_close(ours, theirs)
    assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (2, 3, 5), (2, 3, 4, 5, 6), (0, 3, 2, 2), (2, 0, 3, 3)], ids=str)
def test_any_number_of_dimensions(shape):
    x, r = torch.randn(shape), torch.randn(shape)
    torch.testing.assert_close(ops.residual_add(x, r), F.relu(x + r))
    if x.dim() > 1:
        x, r = x.transpose(0, -1), r.transpose(0, -1)
        ours, theirs = ops.residual_add(x, r), F.relu(x + r)
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out(dtype):
    x, r = torch.randn(2, 9, 4, 3).to(dtype), torch.randn(2, 9, 4, 3).to(dtype)
    expected = ops.residual_add(x, r)
    target = GuardedSlice((2, 9, 4, 3), dtype)
    assert ops.residual_add(sliced(x), r, out=target.view) is target.view
    assert torch.equal(target.view, expected)
    target.assert_guards_intact()
    for layout in LAYOUTS.values():
        a = layout(x).clone(memory_format=torch.preserve_format)
        assert torch.equal(ops.residual_add(a, r, out=a), expected)  # the input itself
        b = layout(r).clone(memory_format=torch.preserve_format)
        assert torch.equal(ops.residual_add(x, b, out=b), expected)  # the residual itself
    shared = torch.randn(2, 9, 5, 3).to(dtype)
    expected = ops.residual_add(shared[:, :, 1:], shared[:, :, :-1])
    assert torch.equal(ops.residual_add(shared[:, :, 1:], shared[:, :, :-1], out=shared[:, :, :-1]), expected)


def test_mixed_dtypes_promote():
    x, r = torch.randn(2, 3, 4, 5).bfloat16(), torch.randn(2, 3, 4, 5)
    assert ops.residual_add(x, r).dtype == torch.float32
    torch.testing.assert_close(ops.residual_add(x, r), F.relu(x + r))


def test_nan_and_infinity_pass():
    x, r = torch.randn(1, 20, 2, 2), torch.randn(1, 20, 2, 2)
    x[0, 0], x[0, 1], x[0, 2], r[0, 2] = float("nan"), float("inf"), float("inf"), -float("inf")
    x[0, 3] = -float("inf")
    for activation, after in (("relu", F.relu), ("none", lambda t: t)):
        torch.testing.assert_close(ops.residual_add(x, r, activation=activation), after(x + r), equal_nan=True)


def test_gradients():
    assert_gradients(lambda x, r: ops.residual_add(x, r, scale=0.7), leaf(2, 3, 2, 2), leaf(2, 3, 2, 2))
    assert_gradients(lambda x, r: ops.residual_add(x, r, activation="none"), leaf(2, 3), leaf(2, 3))


def test_registration():
    x = torch.randn(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    for a, b in ((x, x), (last, last), (last, x), (sliced(x), last)):
        assert_registered(torch.ops.fastcnn.residual_add.default, a, b, 0.5, "relu")
    torch.library.opcheck(torch.ops.fastcnn.residual_add_into.default, (torch.empty_like(x), last, x, 1.0, "none"))


def test_compile():
    compiled = torch.compile(lambda x, r: ops.residual_add(x, r, scale=0.5), fullgraph=True, backend="aot_eager")
    x, r = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(compiled(x, r), F.relu(0.5 * x + r))
    compiled(x, r).sum().backward()
    torch.testing.assert_close(x.grad, 0.5 * ((0.5 * x + r) > 0))


def test_autocast_changes_nothing():
    x, r = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.residual_add(x, r).dtype == torch.float32


def test_messages():
    x = torch.randn(2, 3, 4, 5)
    with pytest.raises(ValueError, match="residual must have the output's shape"):
        ops.residual_add(x, torch.randn(2, 3, 4, 4))
    with pytest.raises(TypeError, match=r"residual must be a torch\.Tensor"):
        ops.residual_add(x, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="input must be a floating-point tensor"):
        ops.residual_add(x.long(), x.long())
    with pytest.raises(ValueError, match="activation must be one of"):
        ops.residual_add(x, x, activation="gelu")
    with pytest.raises(ValueError, match="out must have shape"):
        ops.residual_add(x, x, out=torch.empty(2, 3, 4, 4))
    with pytest.raises(RuntimeError, match="out= does not support"):
        ops.residual_add(x.requires_grad_(), x, out=torch.empty_like(x))
