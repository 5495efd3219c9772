"""conv2d on the C++ backend against float64 and against PyTorch, over awkward shapes, dtypes and layouts."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.layout import LAYOUTS, GuardedSlice, sliced
from torch import Tensor

import fastcnn
from fastcnn import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def only_our_kernels():
    """Every call in this file must be covered by the C++ backend unless a test says otherwise."""
    with fastcnn.use_backend("cpp", strict=True):
        yield


class Case(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.n, self.c, self.h, self.w)
        w = torch.randn(self.k, self.c // self.groups, self.r, self.s)
        return x.to(dtype), w.to(dtype)

    @property
    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups


CASES = [
    Case(1, 1, 1, 1, 1, 1, 1),
    Case(1, 3, 7, 7, 5, 3, 3, 1, 1),
    Case(2, 7, 13, 11, 17, 1, 1),
    Case(1, 31, 5, 3, 33, 1, 1, 2),
    Case(3, 13, 9, 17, 29, 3, 3, (2, 1), (2, 0), (1, 2)),
    Case(1, 3, 33, 29, 64, 7, 7, 2, 3),  # few-channel stem
    Case(1, 3, 35, 39, 19, 11, 11, 4),
    Case(2, 64, 14, 14, 64, 3, 3, 1, 1),
    Case(1, 520, 4, 4, 40, 1, 1),  # several chunks of the reduction
    Case(1, 48, 7, 7, 72, 5, 5, 1, 2),
    Case(1, 5, 6, 7, 11, 2, 4, 1, "same"),  # even filters: asymmetric padding
    Case(1, 5, 6, 7, 11, 3, 3, 1, "same", 2),
    Case(2, 6, 5, 5, 9, 3, 3, 1, "valid", 1, 3),
    Case(1, 64, 6, 6, 64, 3, 3, 1, 1, 1, 16),  # ResNeXt-like
    Case(1, 24, 6, 6, 24, 3, 3, 1, 1, 1, 24),  # depthwise
    Case(1, 23, 6, 6, 46, 3, 3, 1, 1, 1, 23),  # depthwise with multiplier, prime
    Case(2, 96, 5, 5, 128, 5, 5, 1, 2, 1, 2),  # AlexNet's two GPUs
    Case(1, 2, 3, 3, 4, 3, 3, 3, 3),  # windows that lie in the padding altogether
    Case(4, 16, 1, 1, 10, 1, 1),
    Case(2, 8, 1, 40, 8, 1, 9, 1, (0, 4)),
    Case(1, 5, 3, 101, 24, 3, 3, 1, 1),  # wide rows, of one task up to 224 pixels
    Case(1, 3, 4, 224, 20, 3, 3, 1, 1),
    Case(1, 3, 3, 231, 7, 3, 3, 1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case, dtype: torch.dtype):
    x, w = case.tensors(dtype)
    bias = torch.randn(case.k).to(dtype)
    exact = F.conv2d(x.double(), w.double(), bias.double(), *case.geometry)
    assert_accurate(ops.conv2d(x, w, bias, *case.geometry), F.conv2d(x, w, bias, *case.geometry), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[1::3], ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_prologue_and_epilogue(case: Case, dtype: torch.dtype, relu: bool):
    x, w = case.tensors(dtype)
    scale, bias = torch.randn(case.k), torch.randn(case.k)
    input_scale, input_shift = torch.randn(case.c), torch.randn(case.c)
    residual = torch.randn_like(F.conv2d(x, w, None, *case.geometry))
    activation = "relu" if relu else "none"

    def reference(dtype: torch.dtype) -> Tensor:
        def channel(v: Tensor) -> Tensor:
            return v.to(dtype).view(-1, 1, 1)

        y = x.to(dtype) * channel(input_scale) + channel(input_shift)
        y = F.relu(y) if relu else y
        y = F.conv2d(y, w.to(dtype), None, *case.geometry) * channel(scale) + channel(bias) + residual.to(dtype)
        return F.relu(y) if relu else y

    ours = ops.conv2d(
        x, w, bias, *case.geometry, scale=scale, residual=residual, activation=activation,
        input_scale=input_scale, input_shift=input_shift, input_activation=activation,
    )  # fmt: skip
    assert_accurate(ours, reference(dtype), reference(torch.float64))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "strided"])
def test_layouts_give_pytorchs_result_and_strides(layout: str, weight_layout: str):
    x, w = Case(2, 6, 9, 8, 10, 3, 3).tensors(torch.float32)
    x, w = LAYOUTS[layout](x), LAYOUTS[weight_layout](w)
    ours, theirs = ops.conv2d(x, w, None, 1, 1), F.conv2d(x, w, None, 1, 1)
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[:8], ids=str)
def test_writes_exactly_its_channel_slice(case: Case, dtype: torch.dtype):
    x, w = case.tensors(dtype)
    reference = F.conv2d(x, w, None, *case.geometry)
    out = GuardedSlice(tuple(reference.shape), dtype)
    result = ops.conv2d(sliced(x), w, None, *case.geometry, residual=sliced(reference), out=out.view)
    assert result is out.view
    exact = F.conv2d(x.double(), w.double(), None, *case.geometry) + reference.double()
    assert_accurate(out.view, reference + reference, exact)
    out.assert_guards_intact()


def test_reads_and_writes_slices_of_one_buffer():
    """A dense block: the input is a prefix of the buffer that the output grows."""
    buffer = torch.randn(2, 12, 5, 5).contiguous(memory_format=torch.channels_last)
    before, w = buffer.clone(), torch.randn(4, 8, 3, 3)
    ops.conv2d(buffer[:, :8], w, padding=1, out=buffer[:, 8:])
    torch.testing.assert_close(buffer[:, :8], before[:, :8], rtol=0, atol=0)
    torch.testing.assert_close(buffer[:, 8:], F.conv2d(before[:, :8], w, padding=1), rtol=1e-5, atol=1e-5)


def test_out_that_overlaps_the_input_is_right_all_the_same():
    buffer = torch.randn(1, 10, 6, 6).contiguous(memory_format=torch.channels_last)
    x, w = buffer[:, :8], torch.randn(8, 8, 3, 3)
    expected = F.conv2d(x.clone(), w, padding=1)
    ops.conv2d(x, w, padding=1, out=buffer[:, 2:])
    torch.testing.assert_close(buffer[:, 2:], expected, rtol=1e-5, atol=1e-5)


def test_out_of_any_layout():
    x, w = Case(1, 3, 8, 8, 4, 3, 3).tensors(torch.float32)
    out = torch.full((1, 4, 6, 6), float("nan"))
    version = out._version
    ops.conv2d(x, w, out=out)
    assert out._version > version
    torch.testing.assert_close(out, F.conv2d(x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_batch_and_unbatched(batch: int):
    w, bias = torch.randn(4, 3, 3, 3), torch.randn(4)
    empty = ops.conv2d(torch.randn(0, 3, 8, 8), w, bias)
    assert empty.shape == (0, 4, 6, 6)
    image = torch.randn(3, 8, 8)
    torch.testing.assert_close(ops.conv2d(image, w, bias), F.conv2d(image, w, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_special_values(value: float):
    x, w = Case(1, 5, 6, 6, 7, 3, 3).tensors(torch.float32)
    x[0, 2, 3, 3] = value
    ours, theirs = ops.conv2d(x, w, padding=1, activation="relu"), F.relu(F.conv2d(x, w, padding=1))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(threads: int):
    x, w = Case(1, 70, 15, 13, 90, 3, 3).tensors(torch.float32)
    expected, before = ops.conv2d(x, w, padding=1), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        torch.testing.assert_close(ops.conv2d(x, w, padding=1), expected, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


# ---- weights change ----------------------------------------------------------------------------------------------


def rewrite_in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(2)


def rewrite_through_data(weight: Tensor) -> None:
    weight.data.mul_(2)


def replace_data(weight: Tensor) -> None:
    weight.data = weight.data * 2


@pytest.mark.parametrize("change", [rewrite_in_place, rewrite_through_data, replace_data])
def test_packed_weights_follow_the_weight(change):
    x, weight = torch.randn(1, 6, 5, 5), torch.nn.Parameter(torch.randn(9, 6, 3, 3))
    with torch.no_grad():
        before = ops.conv2d(x, weight)
        change(weight)
        torch.testing.assert_close(ops.conv2d(x, weight), 2 * before, rtol=1e-6, atol=1e-6)


def test_packed_weights_survive_a_recycled_address():
    x = torch.randn(1, 4, 5, 5)
    for _ in range(20):
        weight = torch.randn(6, 4, 3, 3)
        torch.testing.assert_close(ops.conv2d(x, weight), F.conv2d(x, weight), rtol=1e-5, atol=1e-5)
        del weight


def test_packed_weights_die_with_the_weight():
    from fastcnn.backends import derived

    derived.clear()
    weight = torch.randn(6, 4, 3, 3)
    ops.conv2d(torch.randn(1, 4, 5, 5), weight)
    assert len(derived._entries) == 1
    del weight
    assert len(derived._entries) == 0


# ---- autograd, compile, autocast ---------------------------------------------------------------------------------


def gradcheck_arguments(padding: tuple[int, int, int, int]) -> tuple:
    torch.manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, w = random(2, 4, 5, 6), random(6, 2, 3, 2)
    p = (5 + padding[0] + padding[2] - 3) // 2 + 1
    q = 6 + padding[1] + padding[3] - 2 + 1
    return (
        x, w, random(6), (2, 1), padding, (1, 1), 2, random(6), random(2, 6, p, q), "relu", random(4), random(4), True,
    )  # fmt: skip


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 0)])
@pytest.mark.parametrize("second_order", [False, True])
def test_gradients(padding: tuple[int, int, int, int], second_order: bool):
    args = gradcheck_arguments(padding)
    check = torch.autograd.gradgradcheck if second_order else torch.autograd.gradcheck
    with fastcnn.use_backend("reference"):  # float64 is the reference's; the backward formulas are what is checked
        assert check(torch.ops.fastcnn.conv2d, args)


@pytest.mark.parametrize("needed", range(6))
def test_gradient_of_each_argument_alone(needed: int):
    """Formulas must not depend on which other arguments need a gradient."""
    args = list(gradcheck_arguments((1, 1, 1, 1)))
    tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    for i in tensors:
        args[i] = args[i].detach().requires_grad_(i == tensors[needed])
    with fastcnn.use_backend("reference"):
        assert torch.autograd.gradcheck(torch.ops.fastcnn.conv2d, tuple(args))


def test_float32_gradients_equal_pytorchs():
    x, w = Case(2, 8, 9, 9, 12, 3, 3).tensors(torch.float32)
    ours, theirs = (
        [t.clone().requires_grad_() for t in (x, w)],
        [t.clone().requires_grad_() for t in (x, w)],
    )
    ops.conv2d(*ours, padding=1, activation="relu").square().sum().backward()
    F.relu(F.conv2d(*theirs, padding=1)).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_forward_mode_is_refused_not_dropped():
    x, w = Case(1, 2, 4, 4, 2, 1, 1).tensors(torch.float32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            ops.conv2d(dual, w)


def test_out_refuses_gradients():
    x, w = Case(1, 2, 4, 4, 2, 1, 1).tensors(torch.float32)
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        ops.conv2d(x, w.requires_grad_(), out=torch.empty(1, 2, 4, 4))


def test_opcheck():
    args = tuple(a.detach().float() if isinstance(a, Tensor) else a for a in gradcheck_arguments((0, 1, 1, 0)))
    wanting = tuple(a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in args)
    channels_last = (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
    for sample in (args, wanting, channels_last):
        torch.library.opcheck(torch.ops.fastcnn.conv2d.default, sample)
    out = GuardedSlice(tuple(args[8].shape), torch.float32).view.zero_()
    torch.library.opcheck(torch.ops.fastcnn.conv2d_into.default, (out, *args))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic: bool):
    w = torch.randn(8, 4, 3, 3)

    def network(x: Tensor) -> Tensor:
        buffer = torch.empty(x.shape[0], 16, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
        ops.conv2d(x, w, padding=1, activation="relu", out=buffer[:, :8])
        ops.conv2d(x, w, padding="same", out=buffer[:, 8:])
        return ops.conv2d(buffer, torch.ones(3, 16, 1, 1))

    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (7, 9):
        x = torch.randn(2, 4, size, size + 1)
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-5, atol=1e-5)


def test_autocast():
    x, w = Case(1, 4, 6, 6, 8, 3, 3).tensors(torch.float32)
    scale, residual = torch.rand(8), torch.randn(1, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ours = ops.conv2d(x, w, scale=scale, residual=residual)
    expected = ops.conv2d(x.bfloat16(), w.bfloat16(), scale=scale, residual=residual.bfloat16())
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_works_in_inference_mode_and_on_its_tensors():
    x, w = Case(1, 4, 6, 6, 8, 3, 3).tensors(torch.float32)
    expected = F.conv2d(x, w)
    with torch.inference_mode():
        inference_weight = w.clone()
        out = torch.empty(1, 8, 4, 4)
        ops.conv2d(x, inference_weight, out=out)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        inference_weight.mul_(2)
        torch.testing.assert_close(ops.conv2d(x, inference_weight), 2 * expected, rtol=1e-5, atol=1e-5)


# ---- PyTorch's own test inputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64], ids=str)
def test_pytorchs_sample_inputs(dtype: torch.dtype):
    common = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    (info,) = [o for o in common.op_db if o.name == "nn.functional.conv2d"]
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=False):
        theirs = F.conv2d(sample.input, *sample.args, **sample.kwargs)
        with fastcnn.use_backend("cpp"):  # float64 and integers take the reference path
            ours = ops.conv2d(sample.input, *sample.args, **sample.kwargs)
        assert ours.stride() == theirs.stride()
        if dtype == torch.int64:
            assert torch.equal(ours, theirs)
        else:
            wide = torch.complex128 if dtype.is_complex else torch.float64
            args = [a.to(wide) if isinstance(a, Tensor) else a for a in sample.args]
            assert_accurate(ours, theirs, F.conv2d(sample.input.to(wide), *args, **sample.kwargs))
        count += 1
    assert count > 5


# ---- bad input ---------------------------------------------------------------------------------------------------

X, W = torch.zeros(2, 4, 6, 6), torch.zeros(8, 4, 3, 3)

BAD = {
    "input must be a torch.Tensor": lambda: ops.conv2d([[1.0]], W),
    "weight must be a torch.Tensor": lambda: ops.conv2d(X, None),
    "weight must have 4 dimensions": lambda: ops.conv2d(X, torch.zeros(8, 4, 3)),
    "input must have shape": lambda: ops.conv2d(torch.zeros(4, 6), W),
    "the input must have 4 channels, has 5": lambda: ops.conv2d(torch.zeros(2, 5, 6, 6), W),
    "multiple of groups=3": lambda: ops.conv2d(torch.zeros(2, 12, 6, 6), W, groups=3),
    "groups must be at least 1": lambda: ops.conv2d(X, W, groups=0),
    "stride must be at least 1": lambda: ops.conv2d(X, W, stride=0),
    "padding must be at least 0": lambda: ops.conv2d(X, W, padding=-1),
    "dilation must be at least 1": lambda: ops.conv2d(X, W, dilation=0),
    "padding must be ints": lambda: ops.conv2d(X, W, padding="full"),
    "padding='same'": lambda: ops.conv2d(X, W, None, 2, "same"),
    "stride must be an int or two ints": lambda: ops.conv2d(X, W, stride=(1, 2, 3)),
    "larger than the padded input": lambda: ops.conv2d(torch.zeros(1, 4, 2, 2), W),
    "weight must have the input's dtype": lambda: ops.conv2d(X, W.bfloat16()),
    "bias must have shape": lambda: ops.conv2d(X, W, torch.zeros(7)),
    "bias must be torch.float32": lambda: ops.conv2d(X, W, torch.zeros(8, dtype=torch.float64)),
    "scale must have shape": lambda: ops.conv2d(X, W, scale=torch.zeros(1)),
    "input_scale must have shape": lambda: ops.conv2d(X, W, input_scale=torch.zeros(8)),
    "residual must have the output's shape": lambda: ops.conv2d(X, W, residual=torch.zeros(2, 8, 6, 6)),
    "residual must have the input's dtype": lambda: ops.conv2d(X, W, residual=torch.zeros(2, 8, 4, 4).half()),
    "activation must be one of": lambda: ops.conv2d(X, W, activation="tanh"),
    "out must have shape": lambda: ops.conv2d(X, W, out=torch.zeros(2, 8, 6, 6)),
    "out must be torch.float32": lambda: ops.conv2d(X, W, out=torch.zeros(2, 8, 4, 4).half()),
    "weight must be on the input's device": lambda: ops.conv2d(X, W.to("meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message: str):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        BAD[message]()


def test_every_bad_input_is_refused_under_the_fake_kernel_too():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        x, w = mode.from_tensor(X), mode.from_tensor(W)
        with pytest.raises(ValueError, match="stride must be at least 1"):
            ops.conv2d(x, w, stride=0)


def test_many_random_shapes():
    generator = torch.Generator().manual_seed(3)

    def pick(*values: int) -> int:
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    for _ in range(60):
        groups = pick(1, 1, 2, 3, 4)
        case = Case(
            pick(1, 2, 3), groups * pick(1, 2, 5, 8, 19), pick(3, 4, 8, 15), pick(3, 7, 16), groups * pick(1, 3, 8, 20),
            pick(1, 2, 3), pick(1, 3), (pick(1, 2), pick(1, 3)), (pick(0, 1, 2), pick(0, 1)), 1, groups,
        )  # fmt: skip
        x, w = case.tensors(torch.float32)
        exact = F.conv2d(x.double(), w.double(), None, *case.geometry)
        assert_accurate(ops.conv2d(x, w, None, *case.geometry), F.conv2d(x, w, None, *case.geometry), exact)


def test_concurrent_calls_from_python_threads():
    x, w = Case(1, 33, 14, 14, 45, 3, 3).tensors(torch.float32)
    expected = F.conv2d(x, w, padding=1)

    def work(_: int) -> Tensor:
        return ops.conv2d(x, w, padding=1)

    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(work, range(40)):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
