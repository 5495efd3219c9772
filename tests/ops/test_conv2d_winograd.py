"""Winograd convolution against float64, and the rule that says when it serves."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate, relative_error
from support.instruction_sets import check_kernels_under
from support.layout import GuardedSlice, sliced
from torch import Tensor

import fastcnn
from fastcnn import _native, ops
from fastcnn.backends import cpp


class Form(NamedTuple):
    """F(tile x tile, taps x taps) of each phase that a stride makes of the input; plain: with weights that are
    transformed while they are used; rows: along rows alone."""

    tile: int
    filter: int
    stride: int = 1
    plain: bool = False
    rows: bool = False

    @property
    def taps(self) -> int:
        return -(-self.filter // self.stride)

    def pack(self, weight: Tensor, groups: int = 1) -> cpp.PackedWeight:
        if self.plain:
            return _native.PlainWinogradWeight(weight, groups)
        if self.rows:
            return _native.RowWinogradWeight(weight, self.stride)
        return _native.PackedConv2dWinogradWeight(weight, self.tile, self.stride)

    @property
    def points(self) -> int:
        return self.tile + self.taps - 1

    @property
    def usual(self) -> float:
        """The largest error in these cases. Of a large filter's taps all but one may lie in the padding: what they
        were rounded by is then measured against one product."""
        if self.points == 8:
            return 4.5e-6 if self.filter == 3 else 7e-6
        if self.filter == 3:
            return USUAL
        return 3e-6 if self.stride == 1 else 5e-6  # with a stride fewer outputs share it: four of a case's are not zero


TRANSFORMED = (Form(6, 3), Form(4, 3), Form(2, 3), Form(4, 5), Form(2, 5))
PLAIN = Form(4, 3, plain=True)
FORMS = (*TRANSFORMED, PLAIN)
STRIDED = (
    Form(4, 7, 2), Form(4, 8, 2), Form(4, 5, 2), Form(2, 6, 2), Form(2, 3, 2), Form(2, 4, 2), Form(2, 9, 2),
    Form(4, 7, 3), Form(2, 5, 3), Form(4, 11, 4), Form(2, 12, 4), Form(2, 5, 4),
)  # fmt: skip
ROWS = tuple(
    Form(4, filter, stride, rows=True)
    for filter, stride in ((7, 2), (8, 2), (5, 2), (6, 2), (3, 2), (4, 2), (7, 3), (5, 3), (11, 4), (16, 4), (5, 4))
)

ALONG_ROWS = Form(2, 5, rows=True)  # with stride 1

# What the accuracy rule grants fast algorithms, and what these points keep to with room for small sums.
STATED, USUAL = 1e-5, 1e-6


class Case(NamedTuple):
    """Padding as of 3x3 filters with stride 1: larger ones get as much more as gives the same output."""

    n: int
    c: int
    h: int
    w: int
    k: int
    padding: tuple[int, int] = (1, 1)  # top, left
    padding_end: tuple[int, int] = (1, 1)  # bottom, right
    stride: int = 1

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        p = self.h + self.padding[0] + self.padding_end[0] - 2
        q = self.w + self.padding[1] + self.padding_end[1] - 2
        return self.n, self.k, (p - 1) // self.stride + 1, (q - 1) // self.stride + 1


CASES = [
    Case(1, 1, 1, 1, 1),
    Case(1, 3, 1, 1, 5),
    Case(3, 5, 1, 9, 3),
    Case(1, 16, 7, 7, 33),
    Case(1, 33, 13, 11, 16),
    Case(3, 64, 5, 17, 64),
    Case(1, 100, 14, 14, 100),
    Case(2, 33, 8, 8, 1),
    Case(1, 16, 31, 29, 64),
    Case(1, 16, 31, 29, 16),  # one vector of columns: twice as many tiles at once
    Case(2, 20, 22, 30, 48),
    Case(1, 5, 3, 3, 16, (0, 0), (0, 0)),  # a single output
    Case(2, 16, 9, 10, 33, (0, 0), (0, 0)),
    Case(1, 17, 6, 7, 35, (2, 2), (2, 2)),
    Case(1, 3, 2, 3, 100, (5, 4), (6, 3)),  # tiles that see nothing but padding
    Case(2, 16, 9, 6, 20, (0, 1), (1, 0)),
    Case(1, 20, 6, 6, 40, (1, 0), (0, 2)),
    Case(1, 512, 6, 6, 40),
    Case(3, 37, 23, 19, 130),  # several tile blocks and column blocks
    # One or two vectors of channels in and out, for vectors of 16, 8 and 4: a path of its own.
    *(Case(1, c, 32, 32, k) for c in (4, 8, 16, 32) for k in (4, 8, 16, 32)),
    Case(3, 16, 15, 21, 32, (0, 2), (1, 0)),
    Case(2, 32, 9, 10, 16, (2, 1), (0, 1)),
    Case(1, 32, 6, 30, 32, (0, 0), (0, 0)),
    Case(2, 8, 11, 13, 8),
]


# Few channels, of several phases in a vector, and pictures that end between two strides.
STRIDED_CASES = [case for case in CASES if case.c < 50] + [
    Case(2, 4, 21, 18, 20),
    Case(1, 2, 30, 31, 40, (0, 3), (2, 0)),
    Case(1, 3, 61, 53, 64, (2, 2), (3, 1)),
    Case(2, 3, 45, 38, 24),  # half a column block
    Case(1, 8, 20, 25, 35),
]
# Of 5x5 filters without padding, whose tiles lie in the input itself: groups of rows into one vector, and two vectors.
UNPADDED_CASES = [
    Case(n, c, h, w, k, (-1, -1), (-1, -1))
    for n, c, h, w, k in (
        (1, 6, 14, 14, 16), (2, 4, 13, 23, 9), (1, 8, 33, 52, 16), (3, 5, 11, 7, 16), (1, 12, 9, 30, 14),
        (1, 7, 12, 12, 24), (2, 1, 5, 6, 3), (1, 13, 10, 11, 16),
    )
]  # fmt: skip
COMBINATIONS = (
    [(case, form) for form in FORMS for case in CASES]
    + [(case, form) for form in STRIDED + ROWS for case in STRIDED_CASES]
    + [(case, ALONG_ROWS) for case in CASES + UNPADDED_CASES]
)


class Arguments(NamedTuple):
    """The tensors of one call, and what an exact convolution makes of them."""

    x: Tensor
    w: Tensor
    scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    input_scale: Tensor | None
    input_shift: Tensor | None
    relu: bool

    def reference(self, case: Case, dtype: torch.dtype) -> Tensor:
        x, w = self.x.to(dtype).contiguous(), self.w.to(dtype)
        if self.input_scale is not None and self.input_shift is not None:
            x = x * self.input_scale.to(dtype).view(-1, 1, 1) + self.input_shift.to(dtype).view(-1, 1, 1)
            x = F.relu(x)
        (top, left), (bottom, right) = case.padding, case.padding_end
        more = w.shape[2] - 3
        before, after = more // 2, more - more // 2
        padded = F.pad(x, (left + before, right + after, top + before, bottom + after))
        y = F.conv2d(padded, w, stride=case.stride, groups=self.groups)
        if self.scale is not None:
            y = y * self.scale.to(dtype).view(-1, 1, 1)
        if self.bias is not None:
            y = y + self.bias.to(dtype).view(-1, 1, 1)
        if self.residual is not None:
            y = y + self.residual.to(dtype)
        return F.relu(y) if self.relu else y

    @property
    def groups(self) -> int:
        return self.x.shape[1] // self.w.shape[1]

    def run(self, case: Case, form: Form, out: Tensor, threads: int) -> None:
        packed = form.pack(self.w, self.groups)
        top, left = (padding + (self.w.shape[2] - 3) // 2 for padding in case.padding)
        _native.cpu_conv2d_winograd(
            out, self.x, packed, self.scale, self.bias, self.residual, self.input_scale, self.input_shift,
            self.input_scale is not None, self.relu, (top, left), threads,
        )  # fmt: skip


def arguments(
    case: Case, dtype: torch.dtype, *, full: bool, slices: bool, filter: int = 3, groups: int = 1
) -> Arguments:
    generator = torch.Generator().manual_seed(sum(case.out_shape))
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    lay = sliced if slices else lambda t: t.contiguous(memory_format=torch.channels_last)
    x, w = draw(case.n, case.c, case.h, case.w).to(dtype), draw(case.k, case.c // groups, filter, filter).to(dtype)
    if not full:
        return Arguments(lay(x), w, None, None, None, None, None, False)
    return Arguments(
        lay(x), w, draw(case.k), draw(case.k), lay(draw(*case.out_shape).to(dtype)), draw(case.c), draw(case.c), True
    )


def check(case: Case, form: Form, dtype: torch.dtype, full: bool, threads: int, groups: int = 1) -> None:
    """One call into a poisoned slice: right everywhere, nothing written beside it."""
    case = case._replace(stride=form.stride)
    given = arguments(case, dtype, full=full, slices=full, filter=form.filter, groups=groups)
    out = GuardedSlice(case.out_shape, dtype)
    given.run(case, form, out.view, threads)
    out.assert_guards_intact()
    exact = given.reference(case, torch.float64)
    if dtype == torch.float32:
        assert relative_error(out.view, exact) <= form.usual
    else:
        assert_accurate(out.view, given.reference(case, torch.float32).to(dtype), exact)


@pytest.mark.parametrize(
    ("dtype", "full"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)],
    ids=["float32-plain", "float32-everything", "bfloat16-everything"],
)
@pytest.mark.parametrize(("case", "form"), COMBINATIONS, ids=str)
def test_equals_float64(case: Case, form: Form, dtype: torch.dtype, full: bool):
    check(case, form, dtype, full, threads=2)


# With the number of groups. Of whole vectors of channels: tasks that begin and end within groups.
GROUPED = [
    (Case(2, 64, 7, 7, 96), 2),
    (Case(1, 160, 9, 13, 160), 5),
    (Case(1, 96, 14, 14, 48), 3),
    (Case(3, 32, 5, 6, 32), 2),
    (Case(2, 128, 9, 13, 128), 4),  # several blocks of tiles
    # Of 4, 8 or 16 channels: a vector holds several, the last one not always all of its channels.
    (Case(2, 20, 9, 13, 20), 5),
    (Case(1, 24, 14, 14, 24), 3),
    (Case(3, 48, 5, 6, 48), 3),
    (Case(1, 64, 31, 29, 64), 8),
    (Case(1, 40, 45, 50, 40), 10),  # several blocks of tiles
    (Case(1, 48, 3, 3, 48, (0, 0), (0, 0)), 12),  # a single output
    (Case(2, 32, 9, 6, 32, (0, 1), (1, 0)), 4),
    (Case(1, 16, 2, 3, 16, (5, 4), (6, 3)), 2),  # tiles that see nothing but padding
    (Case(1, 144, 22, 30, 144), 9),
]


@pytest.mark.parametrize("full", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "groups"), GROUPED, ids=str)
def test_groups(case: Case, groups: int, dtype: torch.dtype, full: bool):
    for threads in (1, 2, 3):
        check(case, PLAIN, dtype, full, threads, groups)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("size", [(5, 5), (6, 9), (12, 8)], ids=str)
def test_a_large_filter_without_padding(size: tuple[int, int], tile: int):
    check(Case(2, 21, *size, 35, (-1, -1), (-1, -1)), Form(tile, 5), torch.float32, full=True, threads=2)


@pytest.mark.parametrize("c", [17, 32, 33, 64, 70, 256])
@pytest.mark.parametrize("relu", [False, True], ids=["normal", "non-negative"])
def test_a_bfloat16_layer_keeps_to_the_rule(c: int, relu: bool):
    """Where its products are formed in bf16, the error is some 2.5 times that of rounding the result."""
    case = Case(1, c, 14, 14, 48)
    given = arguments(case, torch.bfloat16, full=False, slices=False)
    if relu:
        given = given._replace(x=given.x.relu())
    out = torch.empty(case.out_shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    given.run(case, Form(2, 3), out, 2)
    exact = given.reference(case, torch.float64)
    assert_accurate(out, given.reference(case, torch.bfloat16), exact)
    assert relative_error(out, exact) < 5e-3


# Of few channels, in whole vectors of 16, 8 or 4: odd sizes, tiles that overhang, paddings, several images.
FEW = [
    Case(1, 16, 28, 28, 16),
    Case(1, 32, 16, 16, 32),
    Case(1, 16, 33, 31, 32),
    Case(3, 32, 5, 7, 16),
    Case(2, 8, 13, 22, 8),
    Case(1, 4, 9, 6, 8, (0, 2), (1, 0)),
    Case(2, 32, 1, 1, 32),
    Case(5, 16, 4, 3, 16, (2, 1), (0, 1)),
]


def check_few_channels(case: Case, full: bool, threads: int) -> None:
    """Few channels have a path of their own. With one output channel more it does not serve: the others' bits."""
    wide = case._replace(k=case.k + 1)
    more = arguments(wide, torch.float32, full=full, slices=full)
    if full:
        more.x[0, 0, 0, 0] = float("nan")
    vectors = [None if v is None else v[: case.k] for v in (more.scale, more.bias)]
    residual = None if more.residual is None else more.residual[:, : case.k]
    fewer = more._replace(w=more.w[: case.k], scale=vectors[0], bias=vectors[1], residual=residual)
    results = []
    for given, of in ((more, wide), (fewer, case)):
        out = torch.full(of.out_shape, 5.0).contiguous(memory_format=torch.channels_last)
        given.run(of, Form(4, 3), out, threads)
        results.append(out[:, : case.k])
    # As integers: a NaN, too, has to be the same, and a zero's sign.
    assert torch.equal(*(out.contiguous().view(torch.int32) for out in results))


@pytest.mark.parametrize("full", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_few_channels_have_the_bits_of_many(case: Case, full: bool):
    for threads in (1, 2):
        check_few_channels(case, full, threads)


# Small weights are half transformed where registers allow it; of whole chunks of channels and parts of them.
SMALL = [Case(1, 64, 8, 8, 64), Case(1, 48, 7, 5, 64), Case(2, 20, 9, 13, 128), Case(1, 70, 3, 3, 60, (0, 0), (0, 0))]


def check_small_weights(case: Case, full: bool, threads: int) -> None:
    """With so many output channels more that all weights stay plain: the others' bits."""
    wide = case._replace(k=case.k + 1024)
    more = arguments(wide, torch.float32, full=full, slices=full)
    vectors = [None if v is None else v[: case.k] for v in (more.scale, more.bias)]
    residual = None if more.residual is None else more.residual[:, : case.k]
    fewer = more._replace(w=more.w[: case.k], scale=vectors[0], bias=vectors[1], residual=residual)
    results = []
    for given, of in ((more, wide), (fewer, case)):
        out = torch.full(of.out_shape, 5.0).contiguous(memory_format=torch.channels_last)
        given.run(of, PLAIN, out, threads)
        results.append(out[:, : case.k])
    assert torch.equal(*results)


@pytest.mark.parametrize("full", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_weights_have_the_bits_of_large_ones(case: Case, full: bool):
    for threads in (1, 2, 3):
        check_small_weights(case, full, threads)


def test_small_weights_are_packed_in_twice_the_bytes_where_registers_allow_it():
    times = _native.PlainWinogradWeight(torch.randn(64, 64, 3, 3), 1).bytes / (64 * 64 * 9 * 4)
    assert times == 2 if _native.cpu_instruction_set().startswith("avx512") else times in (1, 2)
    assert _native.PlainWinogradWeight(torch.randn(512, 64, 3, 3), 1).bytes == 512 * 64 * 9 * 4
    assert _native.PlainWinogradWeight(torch.randn(32, 64, 3, 3), 1).bytes == 32 * 64 * 9 * 4  # for one thread only


def check_kernels() -> None:
    """For whichever instruction set is in use: every case of every form, in one dtype or the other, plain or full."""
    variants = itertools.cycle(itertools.product((torch.float32, torch.bfloat16), (False, True)))
    for (case, form), (dtype, full) in zip(COMBINATIONS, variants, strict=False):
        check(case, form, dtype, full, threads=1 if full else 3)
    for case, groups in GROUPED:
        check(case, PLAIN, torch.float32, True, threads=3, groups=groups)
    for case in FEW:
        for full in (False, True):
            check_few_channels(case, full, threads=2)
    for case in SMALL:
        for full in (False, True):
            check_small_weights(case, full, threads=2)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_other_instruction_sets(isa: str):
    check_kernels_under(isa, __file__)


@pytest.mark.parametrize("form", FORMS + STRIDED[:5] + ROWS[:5], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 64, 61, 53, 64), Case(1, 300, 14, 14, 310), Case(3, 40, 30, 7, 50), Case(1, 16, 4, 4, 16),
        Case(1, 3, 70, 70, 64), Case(1, 16, 32, 32, 16), Case(3, 16, 15, 21, 32), Case(1, 32, 13, 30, 32),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_on_any_number_of_threads(case: Case, form: Form, dtype: torch.dtype):
    """Fewer threads cut the work differently, into blocks of other sizes or by output channels."""
    case = case._replace(stride=form.stride)
    given = arguments(case, dtype, full=True, slices=False, filter=form.filter)
    results = []
    for threads in (1, 2, 3, 4):
        out = torch.full(case.out_shape, float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)
        given.run(case, form, out, threads)
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [*FORMS, Form(4, 7, 2), Form(2, 3, 2)], ids=str)
def test_tiles_that_are_an_output_short(form: Form, dtype: torch.dtype):
    """They have no products at infinity, where memory holds what an earlier call left: NaN."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(40, 24, form.filter, form.filter, generator=generator).to(dtype)
    bias = torch.randn(40, generator=generator)
    for p in range(1, 15):
        for q in (1, 2, 3, 5, 6, 7, 8, 13, 14):
            case = Case(2, 24, (p - 1) * form.stride + 1, (q - 1) * form.stride + 1, 40, stride=form.stride)
            x = torch.randn(case.n, case.c, case.h, case.w, generator=generator).to(dtype)
            given = Arguments(x.contiguous(memory_format=torch.channels_last), w, None, bias, None, None, None, False)
            out = GuardedSlice(case.out_shape, dtype)
            given._replace(x=torch.full_like(given.x, float("nan"))).run(case, form, out.view, 1)
            given.run(case, form, out.view, 1)
            out.assert_guards_intact()
            exact = given.reference(case, torch.float64)
            if dtype == torch.float32:
                assert relative_error(out.view, exact) <= form.usual, (p, q)
            else:
                assert_accurate(out.view, given.reference(case, torch.float32).to(dtype), exact)


@pytest.mark.parametrize("channels", [3, 24])
@pytest.mark.parametrize("form", FORMS + STRIDED + ROWS, ids=str)
def test_an_image_does_not_depend_on_its_batch(form: Form, channels: int):
    case = Case(5, channels, 23, 19, 40, stride=form.stride)
    given = arguments(case, torch.float32, full=False, slices=False, filter=form.filter)
    out = torch.empty(case.out_shape).contiguous(memory_format=torch.channels_last)
    given.run(case, form, out, 2)
    alone = torch.empty_like(out[3:4]).contiguous(memory_format=torch.channels_last)
    given._replace(x=given.x[3:4]).run(case._replace(n=1), form, alone, 2)
    assert torch.equal(out[3:4], alone)


@pytest.mark.parametrize("relu", [False, True], ids=["normal", "non-negative"])
@pytest.mark.parametrize("channels", [16, 64, 256, 512])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_error_keeps_far_below_the_stated_one(form: Form, channels: int, relu: bool):
    usual = 3.5e-6 if form.points == 8 else USUAL
    assert layer_error(Case(1, channels, 16, 16, 32), form, relu) <= usual < STATED


@pytest.mark.parametrize("relu", [False, True], ids=["normal", "non-negative"])
@pytest.mark.parametrize("channels", [1, 3, 16, 64])
@pytest.mark.parametrize("form", STRIDED + ROWS, ids=str)
def test_error_with_a_stride_keeps_far_below_the_stated_one(form: Form, channels: int, relu: bool):
    usual = 2e-6 if form.taps == 4 and not form.rows else USUAL
    size = 16 * form.stride
    assert layer_error(Case(1, channels, size, size, 32, stride=form.stride), form, relu) <= usual < STATED


def layer_error(case: Case, form: Form, relu: bool) -> float:
    given = arguments(case, torch.float32, full=False, slices=False, filter=form.filter)
    if relu:
        given = given._replace(x=given.x.relu())
    out = torch.empty(case.out_shape).contiguous(memory_format=torch.channels_last)
    given.run(case, form, out, 2)
    return relative_error(out, given.reference(case, torch.float64))


@pytest.mark.parametrize("form", [Form(4, 3), PLAIN], ids=str)
def test_a_nan_reaches_its_tiles_and_nothing_else(form: Form):
    case = Case(1, 16, 16, 16, 16)
    given = arguments(case, torch.float32, full=False, slices=False)
    clean = given.reference(case, torch.float64)
    given.x[0, 3, 1, 2] = float("nan")
    out = torch.empty(case.out_shape).contiguous(memory_format=torch.channels_last)
    given.run(case, form, out, 2)
    assert out[..., :3, 1:4].isnan().all()  # wherever the exact result is NaN
    assert not out[..., 4:, :].isnan().any()
    assert not out[..., 4:].isnan().any()
    assert relative_error(out[..., 4:], clean[..., 4:]) <= USUAL


# ---- memory safety ----------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    packed = _native.PackedConv2dWinogradWeight(torch.randn(8, 16, 3, 3), 4)

    def run(out: Tensor, x: Tensor, threads: int = 1, **changed: Tensor) -> None:
        vectors = {"scale": None, "bias": None, "residual": None, "input_scale": None, "input_shift": None, **changed}
        _native.cpu_conv2d_winograd(
            out, x, packed, **vectors, input_relu=False, relu=False, padding=(1, 1), threads=threads
        )

    nhwc = lambda *shape: torch.randn(*shape).contiguous(memory_format=torch.channels_last)  # noqa: E731
    out, x = nhwc(1, 8, 6, 6), nhwc(1, 16, 6, 6)
    run(out, x)
    with pytest.raises(ValueError, match="input must have shape"):
        run(out, nhwc(1, 15, 6, 6))
    with pytest.raises(ValueError, match="out must have shape"):
        run(nhwc(1, 9, 6, 6), x)
    with pytest.raises(ValueError, match="channels-last"):
        run(torch.randn(1, 8, 6, 6), x)
    with pytest.raises(TypeError, match="out must have the input's dtype"):
        run(out.bfloat16(), x)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        run(out.half(), x.half())
    with pytest.raises(ValueError, match="residual must have shape"):
        run(out, x, residual=nhwc(1, 8, 6, 5))
    with pytest.raises(ValueError, match="bias must be contiguous with 8 values"):
        run(out, x, bias=torch.randn(9))
    with pytest.raises(ValueError, match="input_scale must be contiguous with 16 values"):
        run(out, x, input_scale=torch.randn(8))
    with pytest.raises(ValueError, match="threads must be positive"):
        run(out, x, threads=0)
    packed = _native.PackedConv2dWinogradWeight
    with pytest.raises(ValueError, match=r"weight must have shape \(K, C, R, R\)"):
        packed(torch.randn(8, 16, 3, 1), 4)
    with pytest.raises(ValueError, match="tile must be 2, 4 or 6 for 3 taps a phase, is 3"):
        packed(torch.randn(8, 16, 3, 3), 3)
    with pytest.raises(ValueError, match="tile must be 2 or 4 for 5 taps a phase, is 6"):
        packed(torch.randn(8, 16, 5, 5), 6)
    with pytest.raises(ValueError, match="tile must be 4 for 4 taps a phase, is 2"):
        packed(torch.randn(8, 16, 7, 7), 2, 2)
    with pytest.raises(ValueError, match="tile must be 2 for 2 taps a phase, is 4"):
        packed(torch.randn(8, 16, 3, 3), 4, stride=2)
    with pytest.raises(ValueError, match=r"2 to 5 rows of taps for each of the input's phases, has 1 .*stride 3"):
        packed(torch.randn(8, 16, 3, 3), 2, 3)
    with pytest.raises(ValueError, match="2 to 5 rows of taps for each of the input's phases, has 7"):
        packed(torch.randn(8, 16, 7, 7), 2)
    with pytest.raises(ValueError, match="stride must be positive, is 0"):
        packed(torch.randn(8, 16, 3, 3), 4, 0)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        _native.PackedConv2dWinogradWeight(torch.randn(8, 16, 3, 3).half(), 4)


def test_a_weight_packed_in_pairs_takes_bfloat16_only():
    packed = _native.PackedConv2dWinogradWeight(torch.randn(8, 32, 3, 3).bfloat16(), 2)
    x, out = (torch.randn(1, c, 6, 6).contiguous(memory_format=torch.channels_last) for c in (32, 8))
    plan = _native.Plan(0, torch.empty(0, dtype=torch.uint8), [x.nbytes], [out.nbytes])
    operands = [(region, 0, "float32", tuple(t.shape), t.stride()) for region, t in ((3, out), (2, x))]

    def run() -> None:
        _native.cpu_conv2d_winograd(out, x, packed, None, None, None, None, None, False, False, (1, 1), 1)

    def add() -> None:
        plan.conv2d_winograd(*operands, packed, None, None, None, None, None, False, False, (1, 1), False)

    for call in (run, add):
        if cpp.has_bf16_dot_products():
            with pytest.raises(TypeError, match="input must be bfloat16"):
                call()
        else:
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", TRANSFORMED + STRIDED, ids=str)
def test_a_packed_weight_from_its_bytes(form: Form, dtype: torch.dtype):
    case = Case(1, 19, 9, 8, 40, stride=form.stride)
    given = arguments(case, dtype, full=False, slices=False, filter=form.filter)
    name = str(dtype).removeprefix("torch.")
    packed = _native.PackedConv2dWinogradWeight(given.w, form.tile, form.stride)
    content, shape = packed.packed(), tuple(given.w.shape)
    again = _native.PackedConv2dWinogradWeight.from_packed(content, shape, form.tile, form.stride, name)
    assert again.packed() == content
    assert len(content) == packed.bytes
    with pytest.raises(ValueError, match=f"packed must have {packed.bytes} bytes, has {packed.bytes - 4}"):
        _native.PackedConv2dWinogradWeight.from_packed(content[:-4], shape, form.tile, form.stride, name)
    if form == Form(4, 3):
        with pytest.raises(ValueError, match="packed must have"):
            _native.PackedConv2dWinogradWeight.from_packed(content, shape, 6 - form.tile, form.stride, name)
    with pytest.raises(ValueError, match=r"tile must be .* for . taps a phase, is 3"):
        _native.PackedConv2dWinogradWeight.from_packed(content, shape, 3, form.stride, name)
    with pytest.raises(ValueError, match=r"weight must have shape \(K, C, R, R\)"):
        _native.PackedConv2dWinogradWeight.from_packed(content, (40, 19, 3, 1), form.tile, form.stride, name)
    with pytest.raises(ValueError, match="shape must be positive"):
        _native.PackedConv2dWinogradWeight.from_packed(content, (40, 0, *shape[2:]), form.tile, form.stride, name)
    with pytest.raises(ValueError, match="packed must hold the weight's values"):
        again.from_packed(content, (1 << 20, 1 << 20, *shape[2:]), form.tile, form.stride, name)
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        again.from_packed(content, shape, form.tile, form.stride, "float16")


@pytest.mark.parametrize(("channels", "groups"), [(96, 1), (48, 1), (32, 2), (4, 16)])
def test_a_plain_weight_from_its_bytes(channels: int, groups: int):
    weight = torch.randn(64, channels, 3, 3)
    packed = _native.PlainWinogradWeight(weight, groups)
    content, shape = packed.packed(), tuple(weight.shape)
    assert _native.PlainWinogradWeight.from_packed(content, shape, groups).packed() == content
    half_transformed = (channels, groups) == (48, 1) and _native.cpu_instruction_set().startswith("avx512")
    assert len(content) == packed.bytes == weight.numel() * (8 if half_transformed else 4)
    with pytest.raises(ValueError, match=f"packed must have {packed.bytes} bytes, has {packed.bytes - 4}"):
        _native.PlainWinogradWeight.from_packed(content[:-4], shape, groups)
    with pytest.raises(ValueError, match=r"weight must have shape \(K, C/groups, 3, 3\)"):
        _native.PlainWinogradWeight.from_packed(content, (*shape[:2], 3, 1), groups)
    with pytest.raises(ValueError, match=r"groups must be 1, divide .*, is 64"):
        _native.PlainWinogradWeight.from_packed(content, shape, 64)
    with pytest.raises(ValueError, match=r"groups must be 1, divide .*, is 0"):
        _native.PlainWinogradWeight(weight, 0)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        _native.PlainWinogradWeight(weight.half(), groups)


@pytest.mark.parametrize("form", ROWS, ids=str)
def test_a_weight_along_rows_from_its_bytes(form: Form):
    weight = torch.randn(40, 19, form.filter, form.filter)
    packed = _native.RowWinogradWeight(weight, form.stride)
    content, shape = packed.packed(), tuple(weight.shape)
    assert _native.RowWinogradWeight.from_packed(content, shape, form.stride).packed() == content
    assert len(content) == packed.bytes
    with pytest.raises(ValueError, match=f"packed must have {packed.bytes} bytes, has {packed.bytes - 4}"):
        _native.RowWinogradWeight.from_packed(content[:-4], shape, form.stride)
    with pytest.raises(ValueError, match=r"weight must have shape \(K, C, R, R\)"):
        _native.RowWinogradWeight.from_packed(content, (40, 19, 3, 1), form.stride)
    with pytest.raises(ValueError, match="shape must be positive"):
        _native.RowWinogradWeight.from_packed(content, (40, 0, *shape[2:]), form.stride)
    with pytest.raises(ValueError, match="packed must hold the weight's values"):
        packed.from_packed(content, (1 << 20, 1 << 20, *shape[2:]), form.stride)


def test_what_no_weight_along_rows_covers_is_named():
    for filter, stride in ((3, 1), (2, 2), (9, 2), (5, 5), (3, 0), (3, -1)):
        with pytest.raises(ValueError, match=f"stride must be 2 to 4 .*, or 1 and 5 taps, stride is {stride}"):
            _native.RowWinogradWeight(torch.randn(8, 16, filter, filter), stride)
    with pytest.raises(ValueError, match=r"weight must have shape \(K, C, R, R\)"):
        _native.RowWinogradWeight(torch.randn(8, 16, 3, 4), 2)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        _native.RowWinogradWeight(torch.randn(8, 16, 3, 3).half(), 2)
    with pytest.raises(ValueError, match="out_shape must be positive"):
        _native.cpu_conv2d_winograd_rows_cycles((1, 0, 4, 4), 3, 7, 2)
    with pytest.raises(ValueError, match="stride must be 2 to 4"):
        _native.cpu_conv2d_winograd_rows_cycles((1, 8, 4, 4), 3, 7, 1)


@pytest.mark.parametrize("packing", ["plain", "rows"])
def test_wrong_arguments_beside_other_weights_are_named(packing: str):
    weight = torch.randn(8, 16, 3, 3)
    packed = _native.PlainWinogradWeight(weight, 1) if packing == "plain" else _native.RowWinogradWeight(weight, 2)
    nhwc = lambda *shape: torch.randn(*shape).contiguous(memory_format=torch.channels_last)  # noqa: E731

    def run(out: Tensor, x: Tensor, threads: int = 1) -> None:
        _native.cpu_conv2d_winograd(out, x, packed, None, None, None, None, None, False, False, (1, 1), threads)

    out, x = nhwc(1, 8, 6, 6), nhwc(1, 16, 6, 6) if packing == "plain" else nhwc(1, 16, 12, 12)
    run(out, x)
    with pytest.raises(ValueError, match="input must have shape"):
        run(out, nhwc(1, 15, 6, 6))
    with pytest.raises(ValueError, match="out must have shape"):
        run(nhwc(1, 9, 6, 6), x)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        run(out.half(), x.half())
    with pytest.raises(ValueError, match="threads must be positive"):
        run(out, x, threads=0)


# ---- the choice -------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch) -> list[str]:
    """The algorithm of each convolution that the C++ backend runs."""
    seen: list[str] = []
    plain = cpp.conv2d_by

    def watching(algorithm: str, *args: object) -> None:
        seen.append(algorithm)
        plain(algorithm, *args)

    monkeypatch.setattr(cpp, "conv2d_by", watching)
    return seen


# Where the rule chooses otherwise for kernels of half as wide vectors and half as many registers.
AVX2 = _native.cpu_instruction_set() == "avx2"
BY_POINTS = "direct" if AVX2 else "winograd2s2"  # 3x3 filters with a stride over many channels
GROUPS = "direct" if AVX2 else "winograd4_plain"
FEW_TILES = "winograd2" if AVX2 else "winograd4_plain"  # with large weights
WIDE_STRIDE = "winograd1x4s4" if AVX2 else "winograd4s4"


@pytest.mark.parametrize(
    ("algorithm", "shape", "k", "options"),
    [
        ("winograd4", (1, 64, 28, 28), 64, {}),
        ("winograd4", (1, 128, 112, 112), 128, {}),  # tiles of 6x6: only when tuned
        ("winograd4", (8, 16, 7, 7), 32, {}),
        (FEW_TILES, (1, 512, 7, 7), 512, {}),
        (GROUPS, (1, 1024, 7, 7), 1024, {"groups": 32}),
        (GROUPS, (8, 1024, 7, 7), 1024, {"groups": 32}),
        (GROUPS, (1, 96, 28, 28), 96, {"groups": 12}),
        (GROUPS, (2, 256, 14, 14), 256, {"groups": 16}),
        ("direct", (1, 96, 28, 28), 96, {"groups": 24}),  # groups of 4: the way there and back outweighs the products
        ("direct", (1, 96, 28, 28), 96, {"groups": 96}),
        ("winograd4", (8, 512, 7, 7), 512, {}),
        ("direct", (1, 64, 4, 4), 64, {}),  # too little work for the way there and back
        ("direct", (1, 3, 28, 28), 64, {}),
        ("direct", (1, 64, 28, 28), 3, {}),
        ("direct", (1, 64, 3, 3), 64, {}),
        ("direct", (64, 64, 1, 1), 64, {}),  # nothing but overhanging tiles
        ("direct", (1, 64, 28, 28), 64, {"stride": 2}),
        ("winograd1x4s2", (1, 3, 112, 112), 64, {"filter": 7, "stride": 2}),  # tiles of 4x4: only when tuned
        (WIDE_STRIDE, (1, 3, 112, 112), 64, {"filter": 11, "stride": 4}),
        (BY_POINTS, (8, 256, 28, 28), 256, {"stride": 2}),
        ("winograd1x4s2", (1, 128, 56, 56), 128, {"stride": 2}),
        ("direct", (1, 512, 14, 14), 512, {"stride": 2}),  # large weights for few tiles
        ("direct", (1, 3, 112, 112), 4, {"filter": 7, "stride": 2}),
        ("direct", (1, 3, 28, 28), 64, {"filter": 7, "stride": 4, "dilation": 2}),
        ("direct", (1, 16, 64, 64), 64, {"filter": 9, "stride": 2}),
        ("direct", (1, 64, 28, 28), 64, {"dilation": 2}),
        ("winograd4_plain", (1, 64, 28, 28), 64, {"groups": 2}),
        ("direct", (1, 60, 28, 28), 60, {"groups": 2}),  # neither whole vectors nor parts of one
        ("winograd4", (1, 64, 27, 27), 192, {"filter": 5}),
        ("winograd1x2", (1, 6, 14, 14), 16, {"filter": 5}),
        ("winograd1x2", (2, 5, 33, 31), 40, {"filter": 5}),
        ("direct", (1, 4, 14, 14), 16, {"filter": 5}),
        ("direct", (1, 6, 14, 14), 8, {"filter": 5}),
        ("direct", (1, 6, 14, 14), 16, {"filter": 5, "dilation": 2}),
        ("winograd4s2", (1, 64, 54, 54), 192, {"filter": 5, "stride": 2}),
        ("direct", (1, 64, 28, 28), 64, {"filter": 7}),
    ],
)
@torch.no_grad()
def test_which_algorithm_serves(served, algorithm: str, shape: tuple[int, ...], k: int, options: dict[str, int]):
    options = dict(options)
    filter = options.pop("filter", 3)
    x, w = torch.randn(shape), torch.randn(k, shape[1] // options.get("groups", 1), filter, filter)
    y = ops.conv2d(x, w, padding=1, **options)
    assert served == [algorithm]
    exact = F.conv2d(x.double(), w.double(), padding=1, **options)
    assert relative_error(y, exact) <= (Form(4, 5).usual if (algorithm, filter) == ("winograd4", 5) else 2 * USUAL)
    verified = fastcnn.verify(Layer(w, options), x)
    assert verified.passed, str(verified)
    expected = None if algorithm == "direct" else "winograd"
    assert [layer.algorithm for layer in verified.layers] == [expected]


class Layer(torch.nn.Module):
    def __init__(self, weight: Tensor, options: dict[str, int]) -> None:
        super().__init__()
        self.weight, self.options = torch.nn.Parameter(weight), options

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv2d(x, self.weight, padding=1, **self.options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_contiguous_and_channels_last_inputs(served, dtype: torch.dtype):
    x, w = torch.randn(2, 128, 65, 63).to(dtype), torch.randn(70, 128, 3, 3).to(dtype)
    reference, exact = F.conv2d(x, w, padding=1), F.conv2d(x.double(), w.double(), padding=1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = ops.conv2d(x.contiguous(memory_format=memory_format), w, padding=1)
        assert y.is_contiguous(memory_format=memory_format)
        if dtype == torch.float32:
            assert relative_error(y, exact) <= USUAL
        else:
            assert_accurate(y, reference, exact)
    by_pairs = dtype == torch.bfloat16 and cpp.has_bf16_dot_products()
    assert served == ["winograd2" if by_pairs else "winograd4"] * 2


@pytest.mark.parametrize(
    ("algorithm", "out", "in_channels"),
    [
        ("winograd4", (1, 64, 224, 224), 64),  # the transforms take longer than the products
        ("winograd2", (1, 256, 56, 56), 256),
        ("winograd2", (1, 256, 14, 14), 256),
        ("winograd2", (1, 512, 7, 7), 512),
        ("direct", (1, 64, 4, 4), 64),
        ("direct", (1, 64, 56, 56), 3),
    ],
)
def test_which_algorithm_serves_bfloat16(algorithm: str, out: tuple[int, int, int, int], in_channels: int):
    if not cpp.has_bf16_dot_products():
        pytest.skip("this processor has no bf16 dot products")
    form = (out, (out[1], in_channels, 3, 3), (1, 1), (1, 1), 1, torch.bfloat16)
    assert cpp.conv2d_algorithm(*form) == algorithm
    with fastcnn.exact():
        assert cpp.conv2d_algorithm(*form) == "direct"


@torch.no_grad()
def test_exact_keeps_to_the_plain_sum(served):
    x, layer = torch.randn(1, 64, 28, 28), Layer(torch.randn(64, 64, 3, 3), {})
    with fastcnn.exact():
        layer(x)
        with fastcnn.use_backend("cpp"):
            layer(x)
        with fastcnn.exact(False):
            layer(x)
    layer(x)
    assert served == ["direct", "direct", "winograd4", "winograd4"]
    served.clear()
    verified = fastcnn.verify(layer, x, exact=True)
    assert verified.passed
    assert verified.layers[0].algorithm is None
    assert set(served) == {"direct"}


@pytest.mark.parametrize(("value", "algorithm"), [("1", "direct"), ("0", "winograd4"), ("", "winograd4")])
def test_exact_from_the_environment(value: str, algorithm: str):
    code = (
        "import torch, fastcnn; from fastcnn.backends import cpp; "
        "print(cpp.conv2d_algorithm((1, 64, 28, 28), (64, 64, 3, 3), (1, 1), (1, 1), 1, torch.float32))"
    )
    environment = {**os.environ, "FASTCNN_EXACT": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == algorithm, done.stderr


def test_recorded_calls_keep_to_the_plain_sum(served):
    x, w = torch.randn(1, 64, 28, 28), torch.randn(64, 64, 3, 3, requires_grad=True)
    y = ops.conv2d(x, w, padding=1)
    y.sum().backward()
    assert served == ["direct"]
    with torch.no_grad():
        ops.conv2d(x, w, padding=1)
    ops.conv2d(x, w.detach(), padding=1)
    assert served == ["direct", "winograd4", "winograd4"]


@torch.no_grad()
def test_a_changed_weight_is_transformed_again():
    x, w = torch.randn(1, 16, 32, 32), torch.randn(16, 16, 3, 3)
    ops.conv2d(x, w, padding=1)
    w.mul_(-2)
    exact = F.conv2d(x.double(), w.double(), padding=1)
    assert relative_error(ops.conv2d(x, w, padding=1), exact) <= USUAL


# ---- variants for the tuner -------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_tuner_times_every_algorithm_and_exact_overrules_its_choice(served, monkeypatch):
    import fastcnn.tuning
    from fastcnn.tuning.tuner import tune

    layer, x = Layer(torch.randn(16, 16, 3, 3), {}), torch.randn(1, 16, 12, 12)
    fastcnn.tuning.forget()
    try:
        report = tune(layer, x, rounds=3, save=False, again=True)
        (call,) = report.calls
        names = {c.name: c.rejected for c in call.candidates}
        algorithms = ("direct", "winograd6", "winograd4", "winograd2", "winograd4_plain")
        assert {"cpp", *(f"cpp:{algorithm}" for algorithm in algorithms)} <= names.keys()
        assert not any(names.values())
        fastcnn.tuning._adopt(x.device, {call.key: "cpp:winograd2"})
        served.clear()
        layer(x)
        with fastcnn.exact():
            layer(x)
        assert served == ["winograd2", "direct"]
    finally:
        fastcnn.tuning.forget()


def test_variants_are_offered_where_they_can_run():
    x, w, out = torch.empty(1, 16, 8, 8), torch.empty(16, 16, 3, 3), torch.empty(1, 16, 4, 4)
    args = (out, x, w, None, None, None, None, None, False, "none")
    assert cpp.variants("conv2d", *args, (1, 1), (1, 1), (1, 1), 1) == (
        "direct", "winograd6", "winograd4", "winograd2", "winograd4_plain",
    )  # fmt: skip
    assert cpp.variants("conv2d", *args, (2, 2), (1, 1), (1, 1), 1) == ("direct", "winograd2s2", "winograd1x4s2")
    for stride, dilation in ((2, 1), (1, 1)), ((1, 1), (2, 2)), ((5, 5), (1, 1)):
        assert cpp.variants("conv2d", *args, stride, (1, 1), dilation, 1) == ()
    assert cpp.variants("conv2d", *args, (2, 2), (1, 1), (1, 1), 2) == ()
    assert cpp.variants("linear", out, x, w, None, "none") == ()
    with pytest.raises(ValueError, match=r"winograd4 serves 3x3 and 5x5 filters with stride 1 .*, stride is \(2, 2\)"):
        cpp.variant("winograd4").conv2d(*args, (2, 2), (1, 1), (1, 1), 1)
    with pytest.raises(ValueError, match="winograd4s2 serves 5 to 8 taps a side with stride 2"):
        cpp.variant("winograd4s2").conv2d(*args, (2, 2), (1, 1), (1, 1), 1)
    with pytest.raises(ValueError, match="winograd1x4s3 serves 4 to 12 taps a side with stride 3"):
        cpp.variant("winograd1x4s3").conv2d(*args, (2, 2), (1, 1), (1, 1), 1)
    with pytest.raises(ValueError, match="not 'winograd3'"):
        cpp.variant("winograd3")
    assert "algorithm" in cpp.variant("winograd4").unsupported("linear", x.device, x.dtype)
