"""bf16 conv2d on the C++ backend: every way the kernels for bf16 dot products read their input, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.instruction_sets import check_kernels_under
from support.layout import GuardedSlice, sliced
from torch import Tensor

import fastcnn
from fastcnn import _native, ops
from fastcnn.backends import cpp

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def only_our_kernels():
    with fastcnn.use_backend("cpp", strict=True):
        yield


def tensors(shape: tuple[int, ...], k: int, filter: tuple[int, int], groups: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(sum(shape) + k)
    return torch.randn(shape).to(BF16), torch.randn(k, shape[1] // groups, *filter).to(BF16)


# input shape, output channels, filter, stride, padding, dilation, groups
CASES = {
    "in place": ((1, 64, 9, 11), 70, (1, 1), 1, 0, 1, 1),
    "in place, batch": ((3, 34, 5, 3), 16, (1, 1), 1, 0, 1, 1),
    "in place, groups": ((2, 12, 6, 6), 9, (1, 1), 1, 0, 1, 3),
    "1x1, odd channels": ((1, 33, 9, 11), 40, (1, 1), 1, 0, 1, 1),
    "1x1, 4 KiB from pixel to pixel": ((1, 2048, 7, 7), 40, (1, 1), 1, 0, 1, 1),
    "1x1, stride": ((2, 24, 15, 13), 65, (1, 1), 2, 0, 1, 1),
    "1x1, padding": ((1, 24, 5, 6), 33, (1, 1), 1, 1, 1, 1),
    "strip, 7 pixels wide": ((2, 40, 7, 7), 50, (3, 3), 1, 1, 1, 1),
    "strip, 7 pixels wide, odd rows": ((1, 16, 5, 7), 32, (3, 3), 1, 1, 1, 1),
    "strip, 8 pixels wide": ((1, 7, 9, 8), 33, (3, 3), 1, 1, 1, 1),
    "strip, 14 pixels wide": ((3, 32, 4, 14), 31, (3, 3), 1, 1, 1, 1),
    "strip, odd channels": ((1, 3, 21, 25), 40, (7, 7), 2, 3, 1, 1),
    "strip, one channel": ((2, 1, 28, 28), 6, (5, 5), 1, 2, 1, 1),
    "strip, stride 4": ((1, 3, 51, 67), 24, (11, 11), 4, 2, 1, 1),
    "strip, strides": ((1, 10, 13, 29), 48, (3, 2), (1, 3), (0, 1), 1, 1),
    "strip, rows dilated": ((1, 10, 13, 12), 20, (3, 3), 1, (2, 1), (2, 1), 1),
    "strip, much padding": ((1, 6, 3, 2), 20, (3, 3), 1, 5, 1, 1),
    "strip, groups": ((2, 15, 9, 10), 40, (3, 3), 1, 1, 1, 5),
    "strip, wide": ((1, 2, 3, 300), 5, (1, 3), 1, (0, 1), 1, 1),
    "panel, columns dilated": ((1, 9, 17, 16), 20, (3, 3), 1, 2, 2, 1),
    "panel, narrow": ((3, 19, 5, 4), 34, (3, 3), 1, 1, 1, 1),
    "panel, chunks": ((1, 601, 5, 5), 40, (3, 3), 1, 1, 1, 1),
    "panel, chunks of a row": ((1, 5001, 2, 2), 33, (1, 1), 1, 0, 1, 1),
    "panel, too wide for a strip": ((1, 2, 3, 1000), 5, (1, 3), 1, (0, 1), 1, 1),
    "panel, 4 KiB from pixel to pixel": ((1, 1024, 4, 14), 8, (2, 2), 2, 0, 1, 1),
    "depthwise": ((1, 24, 9, 9), 24, (3, 3), 1, 1, 1, 24),
    "groups of 2": ((1, 10, 9, 30), 10, (3, 3), 1, 1, 1, 5),
    "groups of 4": ((2, 128, 8, 17), 128, (3, 3), 1, 1, 1, 32),
    "groups of 4, stride": ((1, 36, 15, 13), 36, (3, 3), 2, 1, 1, 9),
    "groups of 8": ((1, 56, 7, 7), 56, (3, 3), 1, 1, 1, 7),
    "groups of 8, dilated": ((1, 40, 9, 31), 40, (3, 3), (1, 2), 2, 2, 5),
    "groups of 16": ((1, 48, 14, 14), 48, (3, 3), 1, 1, 1, 3),
    "groups of 32": ((1, 96, 7, 7), 96, (3, 3), 1, 1, 1, 3),
    "groups, more outputs": ((1, 12, 8, 9), 24, (3, 3), 1, 1, 1, 3),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["dense", "slices"])
def test_equals_float64(name: str, form: str):
    shape, k, filter, *geometry = CASES[name]
    x, w = tensors(shape, k, filter, geometry[-1])
    reference = F.conv2d(x, w, None, *geometry)
    exact = F.conv2d(x.double(), w.double(), None, *geometry)
    if form == "dense":
        assert_accurate(ops.conv2d(x, w, None, *geometry), reference, exact)
        return
    out = GuardedSlice(tuple(reference.shape), BF16)
    ops.conv2d(sliced(x), w, None, *geometry, out=out.view)
    assert_accurate(out.view, reference, exact)
    out.assert_guards_intact()


PARTS = ("scale", "bias", "residual", "relu", "input_scale", "input_shift", "input_relu")


@pytest.mark.parametrize(
    "name",
    ["in place", "1x1, odd channels", "strip, 7 pixels wide, odd rows", "strip, odd channels", "panel, narrow",
     "panel, chunks of a row", "groups of 4", "groups of 8, dilated", "depthwise"],
)  # fmt: skip
def test_every_prologue_and_epilogue(name: str):
    shape, k, filter, *geometry = CASES[name]
    x, w = tensors(shape, k, filter, geometry[-1])
    out_shape = F.conv2d(x, w, None, *geometry).shape
    values = {
        "scale": torch.randn(k), "bias": torch.randn(k), "residual": torch.randn(out_shape).to(BF16),
        "input_scale": torch.randn(shape[1]), "input_shift": torch.randn(shape[1]),
    }  # fmt: skip

    def channel(name: str, given: dict[str, bool], dtype: torch.dtype, otherwise: float) -> Tensor:
        value = values[name] if given[name] else torch.full_like(values[name], otherwise)
        return value.to(dtype).view(-1, 1, 1)

    def reference(given: dict[str, bool], dtype: torch.dtype) -> Tensor:
        y = x.to(dtype) * channel("input_scale", given, dtype, 1) + channel("input_shift", given, dtype, 0)
        y = F.relu(y) if given["input_relu"] else y
        y = F.conv2d(y, w.to(dtype), None, *geometry)
        y = y * channel("scale", given, dtype, 1) + channel("bias", given, dtype, 0)
        y = y + values["residual"].to(dtype) if given["residual"] else y
        return F.relu(y) if given["relu"] else y

    combinations = list(itertools.product((False, True), repeat=len(PARTS)))
    # All of them for one name, for the others every fifth and the one with everything.
    for chosen in combinations if name == "strip, odd channels" else [*combinations[::5], combinations[-1]]:
        given = dict(zip(PARTS, chosen, strict=True))
        ours = ops.conv2d(
            x, w, values["bias"] if given["bias"] else None, *geometry,
            activation="relu" if given["relu"] else "none", input_activation="relu" if given["input_relu"] else "none",
            **{part: values[part] for part in ("scale", "residual", "input_scale", "input_shift") if given[part]},
        )  # fmt: skip
        assert_accurate(ours, reference(given, BF16), reference(given, torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["in place", "1x1, odd channels", "strip, odd channels", "strip, 7 pixels wide", "panel, narrow",
             "groups of 2", "groups of 4", "depthwise"],
)  # fmt: skip
def test_special_values_reach_their_outputs_and_no_others(name: str, value: float):
    """Also where a pair holds the last value of one pixel and the first of the next.

    Of plain sums: tiles of Winograd's, which some instruction sets prefer here, share such values.
    """
    with fastcnn.exact():
        check_special_values(name, value)


def check_special_values(name: str, value: float) -> None:
    shape, k, filter, *geometry = CASES[name]
    x, w = tensors(shape, k, filter, geometry[-1])
    for c, h in itertools.product((0, shape[1] - 1), (0, shape[2] // 2)):
        special = x.clone()
        special[0, c, h, shape[3] // 2] = value
        ours = ops.conv2d(special, w, None, *geometry)
        theirs = F.conv2d(special.float(), w.float(), None, *geometry)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
        finite = theirs.isfinite()
        torch.testing.assert_close(ours[finite].float(), theirs[finite], rtol=1e-2, atol=1e-1)
        relu = ops.conv2d(special, w, None, *geometry, activation="relu")
        assert torch.equal(relu.isnan(), theirs.isnan())


def test_results_round_to_nearest_even():
    """1 + 2^-8 lies between two bf16 values, 1 and 1 + 2^-7; so does 1 + 3 * 2^-8: ties go to the even one."""
    x = torch.ones(1, 2, 1, 3, dtype=BF16)
    x[0, 1] = torch.tensor([2.0**-8, 3 * 2.0**-8, 2.0**-8 + 2.0**-9])
    ours = ops.conv2d(x, torch.ones(1, 2, 1, 1, dtype=BF16))
    assert ours.flatten().tolist() == [1.0, 1.0 + 2.0**-6, 1.0 + 2.0**-7]


@pytest.mark.parametrize(
    "name", ["in place", "strip, 14 pixels wide", "strip, odd channels", "panel, chunks", "groups of 4"]
)
def test_any_number_of_threads_gives_the_same_bits(name: str):
    shape, k, filter, *geometry = CASES[name]
    x, w = tensors(shape, k, filter, geometry[-1])
    expected, before = ops.conv2d(x, w, None, *geometry), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            torch.testing.assert_close(ops.conv2d(x, w, None, *geometry), expected, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


def test_many_random_shapes():
    generator = torch.Generator().manual_seed(5)

    def pick(*values: int) -> int:
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    for _ in range(80):
        groups = pick(1, 1, 1, 2, 3, 4)
        x = torch.randn(pick(1, 2, 3), groups * pick(1, 2, 4, 5, 8, 16, 19), pick(3, 4, 8, 15), pick(3, 7, 14, 16, 29))
        w = torch.randn(groups * pick(1, 2, 4, 8, 16, 20, 45), x.shape[1] // groups, pick(1, 2, 3), pick(1, 3))
        x, w = x.to(BF16), w.to(BF16)
        geometry = ((pick(1, 2), pick(1, 3)), (pick(0, 1, 2), pick(0, 1, 4)), (pick(1, 1, 2), pick(1, 1, 2)), groups)
        if x.shape[3] + 2 * geometry[1][1] < (w.shape[3] - 1) * geometry[2][1] + 1:
            continue
        if x.shape[2] + 2 * geometry[1][0] < (w.shape[2] - 1) * geometry[2][0] + 1:
            continue
        exact = F.conv2d(x.double(), w.double(), None, *geometry)
        assert_accurate(ops.conv2d(x, w, None, *geometry), F.conv2d(x, w, None, *geometry), exact)


@pytest.mark.skipif(not cpp.has_bf16_dot_products(), reason="this processor or compiler has no bf16 dot products")
def test_weights_in_pairs_take_bf16_tensors_only():
    weight = _native.PackedConv2dWeight(torch.zeros(4, 2, 1, 1, dtype=BF16), 1)
    x, out = (torch.zeros(1, c, 3, 3).contiguous(memory_format=torch.channels_last) for c in (2, 4))
    with pytest.raises(TypeError, match="input must be bfloat16"):
        _native.cpu_conv2d(out, x, weight, None, None, None, None, None, False, False, (1, 1), (0, 0), (1, 1), 1)
    plan = _native.Plan(1024, torch.zeros(0, dtype=torch.uint8), [], [])
    places = [(0, 256 * i, "float32", t.shape, t.stride()) for i, t in enumerate((out, x))]
    with pytest.raises(TypeError, match="input must be bfloat16"):
        plan.conv2d(*places, weight, None, None, None, None, None, False, False, (1, 1), (0, 0), (1, 1))


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_packed_values_can_be_kept(groups: int):
    _, w = tensors((1, 48, 5, 9), 48, (3, 3), groups)
    packed = _native.PackedConv2dWeight(w, groups)
    kept = _native.PackedConv2dWeight.from_packed(packed.packed(), tuple(w.shape), groups, "bfloat16")
    assert kept.packed() == packed.packed()
    if cpp.has_bf16_dot_products():
        # fp32 pads groups of one vector's channels to two.
        assert packed.bytes * (4 if groups == 3 else 2) == _native.PackedConv2dWeight(w.float(), groups).bytes
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        _native.PackedConv2dWeight.from_packed(packed.packed(), tuple(w.shape), groups, "float16")
    with pytest.raises(ValueError, match="packed must have"):
        _native.PackedConv2dWeight.from_packed(packed.packed()[:-4], tuple(w.shape), groups, "bfloat16")


def check_kernels() -> None:
    """Everything once, for whichever instruction set is in use."""
    for name in CASES:
        test_equals_float64(name, "slices")
    for name in ("in place", "strip, odd channels", "groups of 4"):
        test_special_values_reach_their_outputs_and_no_others(name, float("nan"))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_other_instruction_sets(isa: str):
    check_kernels_under(isa, __file__)
