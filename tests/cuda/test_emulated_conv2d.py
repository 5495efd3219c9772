"""conv2d's CUDA kernels, executed on the CPU (see conftest.py), against torch.nn.functional.conv2d.

Inputs are small integers and factors powers of two: every product and sum is exact in fp32, so the kernels must agree
with float64 to the bit after one rounding to the output's type: no tolerance for a wrong address or lane to hide in.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from fastcnn.backends import proven

SM80, SM80_LARGE, SM90, SM90_TWO, SM90_EIGHT, SM90_LARGE = 0, 7, 16, 17, 19, 23
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ONE, NONE = (1, 1), (0, 0, 0, 0)


@dataclass(frozen=True)
class Case:
    kernel: str  # the kernel to run, and unless `asked` the one that conv2d must choose by itself
    dtype: torch.dtype
    device: int
    c: int
    k: int
    filter: tuple[int, int] = (3, 3)
    image: tuple[int, int, int] = (2, 9, 11)  # N, H, W
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)  # top, left, bottom, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    prologue: bool = False
    epilogue: bool = True
    tf32: bool = False
    x_extra: int = 0  # channels of the wider tensor that x, out and residual are slices of
    x_start: int = 0
    out_extra: int = 0
    out_start: int = 0
    residual_extra: int = 0
    asked: bool = False

    def __str__(self) -> str:
        name = f"{self.kernel}-{str(self.dtype)[6:]}-c{self.c}-k{self.k}-{self.filter[0]}x{self.filter[1]}"
        return name.replace(" ", "_") + (f"-g{self.groups}" if self.groups > 1 else "")


CASES = [
    # Tensor cores through mma.sync, cp.async.
    Case("mma 128x128", BF16, SM80, 64, 120, out_extra=8, residual_extra=16),
    Case("mma 128x128", F16, SM80, 40, 125, filter=(1, 1), padding=(0, 0, 0, 0), x_extra=24),
    Case("mma 128x128", F32, SM80, 20, 128, filter=(2, 3), padding=(1, 0, 0, 2), tf32=True),
    Case("mma 128x64", BF16, SM80, 8, 64, filter=(5, 5), padding=(2, 2, 2, 2), stride=(2, 1), x_extra=8),
    Case("wgmma 128x64 staged", F16, SM90, 72, 64, ONE, padding=NONE, image=(1, 1, 3), prologue=True, asked=True),
    Case("mma 128x32", BF16, SM80, 24, 24, dilation=(2, 3), padding=(2, 3, 2, 3)),
    Case("mma 128x32", F32, SM80, 4, 7, tf32=True, out_extra=1),
    Case("mma 64x64", BF16, SM80_LARGE, 16, 70, filter=(3, 1), padding=(1, 0, 1, 0), out_start=8, out_extra=10),
    Case("mma 64x64", F16, SM90_LARGE, 256, 64, ONE, padding=NONE, image=(1, 3, 3), asked=True),
    Case("mma 64x64", F32, SM80_LARGE, 12, 96, stride=(2, 2), tf32=True),
    # With a prologue: 16-byte vectors through registers.
    Case("mma 128x64 staged", BF16, SM80, 40, 64, prologue=True, x_extra=8),
    Case("mma 128x64 staged", F32, SM80, 12, 130, prologue=True, tf32=True, stride=(2, 2)),
    Case("mma 64x64 staged", F16, SM80_LARGE, 24, 33, prologue=True, dilation=(2, 1), padding=(2, 1, 2, 1)),
    Case("mma 128x32 staged", BF16, SM90, 8, 32, prologue=True),
    # Any channel count, any alignment: element by element.
    Case("mma 64x64 elements", BF16, SM80, 3, 64, filter=(7, 7), stride=(2, 2), padding=(3, 3, 3, 3), prologue=True),
    Case("mma 64x64 elements", F16, SM90, 3, 96, filter=(11, 11), stride=(4, 4), padding=(2, 2, 2, 2), x_extra=1),
    Case("mma 64x64 elements", F16, SM90, 3, 20, dilation=(1, 2)),
    Case("mma 64x64 elements", F32, SM90, 3, 40, (5, 5), tf32=True),
    Case("mma 64x64 elements", BF16, SM80, 5, 13, prologue=True, x_extra=2, out_extra=3, residual_extra=1),
    Case("mma 64x64 elements", BF16, SM80, 16, 16, x_start=4, x_extra=8, prologue=True),
    Case("mma 64x64 elements", F32, SM80, 3, 5, tf32=True, x_extra=1),
    # Groups with enough channels for tensor cores.
    Case("mma 128x32", BF16, SM80, 48, 48, groups=3),
    Case("mma 128x64", F16, SM80, 48, 80, groups=2),
    Case("mma 128x32 staged", F16, SM80, 64, 32, groups=2, prologue=True),
    Case("mma 64x64 elements", BF16, SM80, 34, 36, groups=2, prologue=True),
    # Hopper.
    Case("wgmma 128x64", BF16, SM90, 64, 64, image=(2, 9, 11), asked=True),
    Case("wgmma 128x64", F16, SM90, 72, 190, stride=(2, 1), padding=(1, 2, 1, 2), out_extra=2, residual_extra=8),
    Case("wgmma 128x128", BF16, SM90, 136, 128, ONE, padding=NONE, x_extra=8, residual_extra=8, asked=True),
    Case("wgmma 128x128", F16, SM90, 24, 123, dilation=(2, 2), padding=(2, 2, 2, 2)),
    Case("wgmma 128x256", BF16, SM90, 8, 256, image=(2, 12, 11), out_extra=16, asked=True),
    Case("wgmma 128x256", F16, SM90, 320, 256, ONE, padding=NONE, image=(1, 13, 15), asked=True),
    Case("wgmma 128x64 staged", BF16, SM90, 40, 190, prologue=True, stride=(2, 1), x_extra=8),
    Case("wgmma 128x128 staged", F16, SM90, 136, 123, prologue=True, dilation=(1, 2), padding=(1, 2, 1, 2)),
    Case("wgmma 128x128 staged", BF16, SM90, 320, 256, ONE, padding=NONE, prologue=True, asked=True),
    # Hopper's bulk copies: each tile with padding, strides, a channel tail, slices, several tiles a block.
    Case("tma 256x128", BF16, SM90, 64, 128, image=(3, 11, 13), asked=True),
    Case("tma 128x128 in turns", BF16, SM90, 64, 128, ONE, padding=NONE, epilogue=False),
    Case("tma 256x128", F16, SM90_TWO, 72, 136, stride=(2, 1), padding=(2, 1, 0, 1), x_extra=8, asked=True),
    Case("tma 256x64", BF16, SM90, 104, 56, image=(5, 9, 13), out_start=8, out_extra=16, asked=True),
    Case("tma 256x64", F16, SM90_TWO, 8, 192, (5, 3), dilation=(1, 2), padding=(2, 2, 2, 2), asked=True),
    Case("tma 128x128", BF16, SM90, 200, 248, ONE, padding=NONE, residual_extra=8, asked=True),
    Case("tma 128x128", F16, SM90_TWO, 64, 128, image=(7, 8, 8), stride=(2, 2), asked=True),
    Case("tma 128x64", BF16, SM90, 48, 64, image=(4, 9, 10), stride=(3, 3), asked=True),
    Case("tma 128x64", F16, SM90_TWO, 128, 72, ONE, padding=NONE, stride=(2, 2), image=(3, 13, 15), asked=True),
    Case("tma 128x128 in turns", BF16, SM90, 64, 256, ONE, padding=NONE, image=(3, 11, 12), asked=True),
    Case("tma 128x128 in turns", F16, SM90_TWO, 96, 128, image=(9, 9, 11), x_start=8, x_extra=16, asked=True),
    Case("tma 128x64 in turns", BF16, SM90, 64, 64, image=(3, 14, 15), asked=True),
    Case("tma 128x64 in turns", F16, SM90_TWO, 136, 120, stride=(1, 2), padding=(1, 0, 1, 3), asked=True),
    Case("tma 128x64 in turns", BF16, SM90_TWO, 64, 40, image=(1, 3, 3), asked=True),
    Case("tma 128x32", BF16, SM90_TWO, 128, 32, image=(3, 7, 9), out_start=32, out_extra=64, asked=True),
    Case("tma 128x32 in turns", F16, SM90, 40, 24, ONE, padding=NONE, image=(3, 9, 11), asked=True),
    Case("tma 128x64", BF16, SM90, 192, 192, groups=3, image=(2, 9, 10), asked=True),
    Case("tma 256x128", F16, SM90_TWO, 256, 512, groups=2, image=(2, 9, 10), stride=(2, 2), asked=True),
    Case("tma 128x64 in turns", F16, SM90_TWO, 128, 128, groups=2, image=(3, 9, 10), asked=True),
    # Reductions split over a cluster: even and odd shares, one stage for each block; tails of rows, columns, channels.
    Case("tma 128x64 split 2", BF16, SM90_LARGE, 64, 64, image=(2, 9, 11), asked=True),
    Case("tma 128x64 split 2", F16, SM90_LARGE, 136, 120, ONE, padding=NONE, image=(3, 9, 11), x_extra=8, asked=True),
    Case("tma 128x64 split 4", BF16, SM90_LARGE, 200, 72, ONE, padding=NONE, image=(1, 7, 7), out_start=8, out_extra=16,
         residual_extra=8, asked=True),
    Case("tma 128x64 split 4", F16, SM90_LARGE, 128, 128, groups=2, image=(2, 9, 10), stride=(2, 2), asked=True),
    Case("tma 128x64 split 8", F16, SM90_LARGE, 72, 64, (2, 2), padding=(0, 1, 1, 0), image=(1, 13, 11), x_start=8,
         x_extra=16, asked=True),
    Case("tma 128x64 split 8", BF16, SM90_LARGE, 96, 40, image=(1, 8, 9), stride=(2, 1), padding=(2, 1, 0, 1),
         out_extra=8, asked=True),
    Case("tma 128x128 split 2", F16, SM90_LARGE, 104, 248, ONE, padding=NONE, image=(1, 12, 12), asked=True),
    Case("tma 128x128 split 4", BF16, SM90_LARGE, 64, 136, dilation=(1, 2), padding=(1, 2, 1, 2), image=(1, 7, 9),
         residual_extra=8, asked=True),
    Case("tma 128x128 split 8", F16, SM90_LARGE, 72, 128, (3, 2), image=(1, 5, 6), out_start=8, out_extra=8,
         asked=True),
    Case("tma 128x64 staged split 2", BF16, SM90_LARGE, 136, 72, ONE, padding=NONE, image=(2, 9, 8), prologue=True,
         x_extra=8, asked=True),
    Case("tma 128x64 staged split 4", F16, SM90_LARGE, 328, 64, ONE, padding=NONE, image=(1, 7, 7), prologue=True,
         asked=True),
    Case("tma 128x64 staged split 8", BF16, SM90_LARGE, 520, 40, ONE, padding=NONE, image=(1, 15, 15), prologue=True,
         stride=(2, 2), asked=True),
    # By choice, in two parts on all eight multiprocessors.
    Case("tma 128x64 split 2", BF16, SM90_EIGHT, 1536, 200, ONE, padding=NONE, image=(1, 10, 10)),
    # Stages of two blocks of 32 channels: an odd number of blocks, blocks of two taps in one stage, channel tails.
    Case("tma 256x128 by 32", BF16, SM90, 96, 128, image=(3, 9, 11), asked=True),
    Case("tma 256x128 by 32", F16, SM90_TWO, 24, 136, (5, 3), padding=(2, 1, 2, 1), image=(3, 14, 15), asked=True),
    Case("tma 128x128 in turns by 32", F16, SM90, 160, 120, ONE, padding=NONE, image=(2, 12, 13), x_start=8,
         x_extra=16, out_extra=8, asked=True),
    Case("tma 128x128 in turns by 32", BF16, SM90_TWO, 32, 200, dilation=(1, 2), padding=(1, 2, 1, 2),
         image=(4, 9, 10), asked=True),
    Case("tma 128x64 in turns by 32", BF16, SM90, 144, 64, (3, 2), stride=(2, 1), image=(3, 13, 9), asked=True),
    Case("tma 128x64 in turns by 32", F16, SM90_TWO, 16, 72, ONE, padding=NONE, image=(1, 3, 3), asked=True),
    # Stages of 96 channels, the last one full, of 64, 48 and 16; a reduction of one stage.
    Case("tma 256x128 by 96", BF16, SM90, 96, 128, image=(3, 9, 11), asked=True),
    Case("tma 256x128 by 96", F16, SM90_TWO, 160, 136, (2, 3), padding=(1, 1, 0, 1), image=(5, 9, 10), asked=True),
    Case("tma 128x128 in turns by 96", F16, SM90, 144, 120, stride=(2, 1), image=(2, 12, 13), x_start=8, x_extra=16,
         out_extra=8, asked=True),
    Case("tma 128x128 in turns by 96", BF16, SM90_TWO, 72, 200, ONE, padding=NONE, image=(4, 9, 10), asked=True),
    Case("tma 128x64 in turns by 96", BF16, SM90, 208, 64, dilation=(1, 2), padding=(1, 2, 1, 2), image=(3, 7, 9),
         asked=True),
    Case("tma 128x64 in turns by 96", F16, SM90_TWO, 288, 72, ONE, padding=NONE, image=(3, 9, 9), asked=True),
    # Taps that share a patch: parts of rows, whole rows, several images; halos on all sides, a channel tail, groups.
    Case("patch 256x64", BF16, SM90, 64, 64, image=(2, 9, 11), asked=True),
    Case("patch 256x64", F16, SM90_TWO, 56, 120, image=(1, 19, 61), out_start=8, out_extra=16, asked=True),
    Case("patch 256x64", BF16, SM90_TWO, 16, 72, (4, 4), padding=(2, 2, 1, 1), image=(3, 7, 70), asked=True),
    Case("patch 256x64", F16, SM90_TWO, 64, 64, (3, 2), padding=(0, 1, 3, 0), image=(5, 5, 6), asked=True),
    Case("patch 256x64", BF16, SM90_TWO, 128, 128, groups=2, image=(2, 6, 9), residual_extra=8, asked=True),
    # The same with the filters in registers, by choice where there are many tiles.
    Case("patch held", BF16, SM90, 64, 64, image=(2, 28, 28)),
    Case("patch held", BF16, SM90, 64, 64, image=(2, 9, 11), asked=True),
    Case("patch held", F16, SM90_TWO, 56, 120, image=(1, 19, 61), out_start=8, out_extra=16, asked=True),
    Case("patch held", BF16, SM90_TWO, 16, 72, padding=(0, 2, 1, 0), image=(5, 7, 70), asked=True),
    Case("patch held", F16, SM90, 40, 40, image=(9, 5, 6), residual_extra=8, asked=True),
    Case("patch held", BF16, SM90_TWO, 192, 192, groups=3, image=(3, 14, 14), residual_extra=8, asked=True),
    Case("patch 256x32", BF16, SM90, 128, 32, image=(7, 7, 7), out_start=32, out_extra=64, asked=True),
    Case("patch 256x32", F16, SM90_TWO, 24, 24, (5, 5), padding=(2, 2, 2, 2), image=(2, 13, 15), asked=True),
    Case("patch 256x32", BF16, SM90_TWO, 40, 16, image=(1, 3, 300), asked=True),
    Case("tma 128x128 staged", BF16, SM90, 136, 128, ONE, padding=NONE, prologue=True, x_extra=8),
    Case("tma 128x64 staged", F16, SM90_TWO, 96, 72, ONE, padding=NONE, prologue=True, stride=(2, 2), asked=True),
    # Exact fp32.
    Case("simt", F32, SM80, 20, 70, x_extra=4, residual_extra=1),
    Case("simt", F32, SM90, 16, 64, prologue=True, stride=(2, 2), dilation=(1, 2), padding=(1, 2, 1, 2)),
    Case("simt elements", F32, SM80, 3, 64, filter=(7, 7), stride=(2, 2), padding=(3, 3, 3, 3), prologue=True),
    Case("simt elements", F32, SM80, 34, 38, groups=2, x_start=1, out_extra=3),
    # Few channels per group.
    Case("grouped", BF16, SM80, 12, 18, groups=3, prologue=True, x_extra=1, out_extra=2),
    Case("grouped", F32, SM80, 32, 64, groups=8, stride=(2, 2)),
    Case("grouped", F16, SM90, 6, 12, groups=6, padding=(0, 1, 2, 1)),
    Case("depthwise", BF16, SM80, 24, 24, groups=24, prologue=True, x_extra=8, out_extra=16, residual_extra=8),
    Case("depthwise", F32, SM80, 160, 160, groups=160, stride=(2, 2), filter=(5, 3), padding=(2, 1, 2, 1)),
    Case("depthwise", F16, SM90, 8, 8, groups=8, dilation=(2, 2), padding=(2, 2, 2, 2), epilogue=False),
]  # fmt: skip
# Each tensor-core kernel once more with nothing in the epilogue.
CASES += [
    replace(c, epilogue=False) for c in CASES if c.kernel.startswith(("mma 128x32", "wgmma 128x64", "tma", "patch"))
]


def test_every_kernel_is_among_the_cases() -> None:
    """And fastcnn.backends.proven, which tells what has run on a GPU, lists exactly these and the stem's, which have a
    file of tests of their own."""
    listed = {name.removeprefix("conv2d ") for name in proven.KERNELS["cuda"] if name.startswith("conv2d ")}
    assert {case.kernel for case in CASES} | {"stem", "stem wgmma"} == listed


def integers(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, most: int = 2) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv2d_is_exact(case: Case, emulated, pixels) -> None:
    g = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    n, h, w = case.image
    top, left, bottom, right = case.padding
    x = integers(g, (n, case.c, h, w), case.dtype)
    weight = integers(g, (case.k, case.c // case.groups, *case.filter), case.dtype)
    two = torch.tensor(2.0)
    scale = two ** integers(g, (case.k,), F32, 1) if case.epilogue else None
    bias = integers(g, (case.k,), F32) if case.epilogue else None
    input_scale = two ** integers(g, (case.c,), F32, 1) if case.prologue else None
    input_shift = integers(g, (case.c,), F32) if case.prologue else None

    wide = x.double()
    if case.prologue:
        wide = F.relu(wide * input_scale.double()[:, None, None] + input_shift.double()[:, None, None])
    wide = F.pad(wide, (left, right, top, bottom))
    expected = F.conv2d(wide, weight.double(), None, case.stride, 0, case.dilation, case.groups)
    residual = None
    if case.epilogue:
        values = integers(g, tuple(expected.shape), case.dtype)
        residual = pixels.of(values, case.residual_extra)
        expected = expected * scale.double()[:, None, None] + bias.double()[:, None, None] + values.double()
        expected = F.relu(expected)

    p, q = expected.shape[2:]
    out = pixels.empty(n, p, q, case.k, case.dtype, case.out_extra, case.out_start)
    name = emulated.conv2d(
        out, pixels.of(x, case.x_extra, case.x_start), weight, stride=case.stride, padding=(top, left),
        dilation=case.dilation, groups=case.groups, scale=scale, bias=bias, residual=residual,
        input_scale=input_scale, input_shift=input_shift, input_relu=case.prologue, relu=case.epilogue,
        allow_tf32=case.tf32, device=case.device, kernel=case.kernel,
    )  # fmt: skip
    assert case.asked or name == case.kernel
    assert len(set(emulated.kernels)) == len(emulated.kernels), "names must tell the kernels of a case apart"
    torch.testing.assert_close(out.nchw.double(), expected.to(case.dtype).double(), rtol=0, atol=0)
    assert out.untouched_around()


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("device", [SM80, SM90], ids=["sm80", "sm90"])
def test_nan_passes_relu(dtype: torch.dtype, device: int, emulated, pixels) -> None:
    x = torch.ones(1, 64, 4, 4, dtype=dtype)
    x[0, 3, 1, 2] = float("nan")
    weight = torch.ones(64, 64, 1, 1, dtype=dtype)
    out = pixels.empty(1, 4, 4, 64, dtype)
    emulated.conv2d(out, pixels.of(x), weight, relu=True, allow_tf32=True, device=device)
    assert torch.isnan(out.nchw[0, :, 1, 2]).all()
    assert torch.isnan(out.values).sum() == 64


@pytest.mark.parametrize("tf32", [False, True])
def test_rounding_of_fp32(tf32: bool, emulated, pixels) -> None:
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(1, 64, 6, 6, generator=g), torch.randn(32, 64, 3, 3, generator=g)
    out = pixels.empty(1, 6, 6, 32, F32)
    emulated.conv2d(out, pixels.of(x), weight, padding=(1, 1), allow_tf32=tf32)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    error = (out.nchw - exact).abs().max() / exact.abs().max()
    assert error < (1e-3 if tf32 else 3e-6)
    if tf32:  # rounded to nearest: half the error of the hardware's truncation
        assert error > 3e-6


@pytest.mark.parametrize("channels", [512, 513, 1024, 1040, 4100])
def test_long_sums_in_exact_fp32_are_split(channels: int, emulated, pixels) -> None:
    """Runs of 512 products; a single chain would err four times as much as this bound at 4100."""
    g = torch.Generator().manual_seed(channels)
    x, weight = torch.randn(1, channels, 6, 5, generator=g), torch.randn(40, channels, 1, 1, generator=g)
    out = pixels.empty(1, 6, 5, 40, F32)
    name = emulated.conv2d(out, pixels.of(x), weight)
    assert name == ("simt elements" if channels % 4 else "simt")
    exact = F.conv2d(x.double(), weight.double())
    assert (out.nchw - exact).norm() <= 4.5e-7 * exact.norm()


def test_a_kernel_that_does_not_serve_is_refused(emulated, pixels) -> None:
    x, out = torch.ones(1, 3, 4, 4, dtype=BF16), pixels.empty(1, 4, 4, 64, BF16)
    with pytest.raises(RuntimeError, match="kernel 'tma 256x128' does not serve this convolution"):
        emulated.conv2d(out, pixels.of(x), torch.ones(64, 3, 1, 1, dtype=BF16), device=SM90, kernel="tma 256x128")


@pytest.mark.parametrize("kernel", ["tma 128x64 split 8", "tma 128x128 split 4", "tma 128x64 split 2"])
def test_split_sums_do_not_depend_on_the_order_of_blocks(kernel: str, emulated_once, pixels) -> None:
    """The emulator runs a cluster's blocks from the last to the first, then from the first, with copies landing late,
    then at once: the same bits, and close to float64 on values that are no integers."""
    g = torch.Generator().manual_seed(5)
    x, weight = torch.randn(1, 192, 7, 7, generator=g).to(BF16), torch.randn(136, 192, 3, 3, generator=g).to(BF16)
    outs = []
    for eager in (False, True):
        emulated_once.eager(eager)
        out = pixels.empty(1, 7, 7, 136, BF16)
        emulated_once.conv2d(out, pixels.of(x), weight, padding=(1, 1), device=SM90_LARGE, kernel=kernel)
        outs.append(out)
    emulated_once.eager(False)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    assert torch.equal(outs[0].values, outs[1].values)
    assert (outs[0].nchw - exact).norm() <= 2e-3 * exact.norm()


def test_every_block_of_a_cluster_has_a_stage(emulated_once, pixels) -> None:
    for channels, served in ((256, ("2", "4")), (512, ("2", "4", "8")), (64, ())):
        x, out = torch.ones(1, channels, 2, 2, dtype=BF16), pixels.empty(1, 2, 2, 64, BF16)
        emulated_once.conv2d(out, pixels.of(x), torch.ones(64, channels, 1, 1, dtype=BF16), device=SM90_LARGE)
        found = tuple(name.split()[-1] for name in emulated_once.kernels if name.startswith("tma 128x64 split"))
        assert found == served


def test_the_rule_chooses_proven_kernels_only(emulated_once, pixels) -> None:
    """What no GPU has run is served by name, and so to the tuner, even where it should be best."""
    missing = proven.unproven(proven.record())["cuda"]
    layers = (512, 64, 7, "tma 128x64 split 8"), (96, 128, 9, "tma 256x128 by 32"), (96, 128, 9, "tma 256x128 by 96")
    for c, k, size, asked in layers:
        x, weight = torch.ones(1, c, size, size, dtype=BF16), torch.ones(k, c, 3, 3, dtype=BF16)
        chosen = emulated_once.conv2d(
            pixels.empty(1, size, size, k, BF16), pixels.of(x), weight, padding=(1, 1), device=SM90_LARGE, kernel=asked
        )
        assert asked in emulated_once.kernels
        assert f"conv2d {chosen}" not in missing


def test_many_tiles_share_rows(emulated, pixels) -> None:
    """Several tiles along rows and filters, on the tile order's fast division."""
    g = torch.Generator().manual_seed(2)
    x, weight = integers(g, (3, 8, 16, 16), BF16), integers(g, (320, 8, 1, 1), BF16)
    out = pixels.empty(3, 16, 16, 320, BF16)
    assert emulated.conv2d(out, pixels.of(x), weight) == "mma 128x64"
    expected = F.conv2d(x.double(), weight.double())
    torch.testing.assert_close(out.nchw.double(), expected.to(BF16).double(), rtol=0, atol=0)
