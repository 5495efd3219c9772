"""A convolution writes its result over the residual that it adds, where nobody reads that afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.instruction_sets import run_tests_under
from torch import Tensor, nn

import fastcnn
from fastcnn import _native
from fastcnn.backends import cpp
from fastcnn.graph.freezing import FrozenModel
from fastcnn.graph.freezing.program import Buffer, Program, Step, View, channels_last_strides
from fastcnn.graph.freezing.residuals import write_over_residuals


class Block(nn.Module):
    """``relu(conv(y) + r)``, then the same again: both residuals are read for the last time there."""

    def __init__(self, c: int, middle: int, **conv: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, c, 1)
        self.narrow = nn.ModuleList(nn.Conv2d(c, middle, 1) for _ in range(2))
        self.conv = nn.ModuleList(nn.Conv2d(middle, c, **conv) for _ in range(2))
        self.last = nn.Conv2d(c, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        r = torch.relu(self.first(x))
        for narrow, conv in zip(self.narrow, self.conv, strict=True):
            r = torch.relu(conv(torch.relu(narrow(r))) + r)
        return self.last(r)


def written_over(frozen: FrozenModel) -> int:
    """Convolutions whose result is their residual's memory."""
    steps = [s for s in frozen._recipe.steps if s.operator.startswith("conv2d")]
    return sum(s.inputs[3] is not None and s.inputs[3][:2] == s.out[:2] for s in steps)  # region, offset


FORMS = {
    "1x1": (70, 33, {"kernel_size": 1}),
    "1x1 of 256": (256, 128, {"kernel_size": 1}),
    "1x1 of 1024": (1024, 512, {"kernel_size": 1}),
    "3x3": (37, 20, {"kernel_size": 3, "padding": 1}),
    "3x3 of 64": (64, 64, {"kernel_size": 3, "padding": 1}),
    "5x5": (32, 48, {"kernel_size": 5, "padding": 2}),
    "dilated": (40, 24, {"kernel_size": 3, "padding": 2, "dilation": 2}),
    "groups of 4": (64, 64, {"kernel_size": 3, "padding": 1, "groups": 16}),
    "groups of 16": (64, 64, {"kernel_size": 3, "padding": 1, "groups": 4}),
    "depthwise": (35, 35, {"kernel_size": 3, "padding": 1, "groups": 35}),
    "few": (3, 5, {"kernel_size": 3, "padding": 1}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 14, 14), (1, 8, 1, 1), (3, 8, 9, 30)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_has_the_bits_of_the_unfrozen_model(form: str, shape: tuple[int, ...], dtype: torch.dtype):
    torch.manual_seed(0)
    c, middle, conv = FORMS[form]
    model, x = Block(c, middle, **conv).eval().to(dtype), torch.randn(shape, dtype=dtype)
    frozen = fastcnn.freeze(model, x)
    assert written_over(frozen) == 2 * frozen._recipe.lanes
    expected = fastcnn.optimize(model)(x)
    for _ in range(2):
        assert torch.equal(frozen(x), expected)


@pytest.mark.parametrize(
    "algorithm", ["winograd6", "winograd4", "winograd2", "winograd4_plain", "winograd2s2", "winograd1x4s2", "strassen"]
)
@torch.no_grad()
def test_every_algorithm_reads_before_it_writes(algorithm: str):
    """Forced, with a residual that is the result's memory, against memory of its own."""
    torch.manual_seed(0)
    size, stride = 1 if algorithm == "strassen" else 3, 2 if algorithm.endswith("s2") else 1
    weight = torch.randn(70, 36, size, size)
    x = torch.randn(2, 36, 25, 21).contiguous(memory_format=torch.channels_last)
    plain = nn.functional.conv2d(x.double(), weight.double(), padding=size // 2, stride=stride)
    residual = torch.randn(plain.shape).contiguous(memory_format=torch.channels_last)
    packed = cpp.pack_weight(weight, 1, algorithm)
    results = []
    for over in (True, False):
        plan = _native.Plan(0, torch.empty(0, dtype=torch.uint8), [x.nbytes, residual.nbytes], [residual.nbytes])
        out, given, added = (
            (region, 0, "float32", tuple(t.shape), t.stride())
            for region, t in ((4, residual), (2, x), (4 if over else 3, residual))
        )
        step, settings = ("conv2d_strassen", ()) if size == 1 else ("conv2d_winograd", ((1, 1), False))
        getattr(plan, step)(out, given, packed, None, None, added, None, None, False, True, *settings)
        result = residual.clone() if over else torch.full_like(residual, float("nan"))
        plan.run([x, residual], [result], 2)
        results.append(result)
    assert torch.equal(*results)
    expected = torch.relu(plain + residual.double())
    assert (results[0].double() - expected).norm() < 1e-5 * expected.norm()


class Kept(nn.Module):
    """The residual is read once more, is an input, or is what the convolution reads; or the sum is the result."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.conv, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        r = torch.relu(self.first(x))
        if self.how == "input":
            return self.last(torch.relu(self.conv(r) + x))
        if self.how == "own":
            return self.last(torch.relu(self.conv(r) + r))
        y = torch.relu(self.conv(torch.sigmoid(r)) + r)
        if self.how == "result":
            return y
        return self.last(y) + self.last(r)


@pytest.mark.parametrize("how", ["again", "input", "own", "result"])
@torch.no_grad()
def test_what_is_still_read_stays(how: str):
    torch.manual_seed(0)
    x = torch.randn(1, 8, 6, 7).contiguous(memory_format=torch.channels_last)
    model, given = Kept(how).eval(), x.clone(memory_format=torch.preserve_format)
    frozen = fastcnn.freeze(model, x)
    assert written_over(frozen) == 0
    torch.testing.assert_close(frozen(x), model(x))
    assert torch.equal(x, given)


def test_a_slice_or_another_layout_stays():
    shape = (1, 4, 2, 2)
    strides = channels_last_strides(shape)

    def view(buffer: Buffer, **changes: Any) -> View:
        return View(**{"buffer": buffer, "offset": 0, "shape": shape, "strides": strides, **changes})

    for changes, length in (({}, 16), ({"offset": 4, "strides": (32, 1, 16, 8)}, 32), ({"strides": (16, 4, 2, 1)}, 16)):
        r, x, out = (Buffer(length, torch.float32), *(Buffer(16, torch.float32) for _ in range(2)))
        conv = Step("conv2d", view(out), (view(x), None, None, view(r, **changes), None, None))
        after = Step("copy", view(Buffer(16, torch.float32)), (view(out),))
        write_over_residuals(Program(steps=[conv, after]))
        assert (conv.out.buffer is r) == (not changes)
        assert after.inputs[0] == conv.out


@torch.no_grad()
def test_a_saved_model_keeps_it(tmp_path: Path):
    torch.manual_seed(0)
    model, x = Block(32, 16, kernel_size=1).eval(), torch.randn(1, 8, 5, 7)
    frozen = fastcnn.freeze(model, x)
    frozen.save(tmp_path / "model")
    loaded = fastcnn.load_frozen(tmp_path / "model")
    assert written_over(loaded) == written_over(frozen) == 2
    assert torch.equal(loaded(x), frozen(x))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_under_other_instruction_sets(isa: str):
    run_tests_under(isa, __file__, "bits_of_the_unfrozen or every_algorithm")
