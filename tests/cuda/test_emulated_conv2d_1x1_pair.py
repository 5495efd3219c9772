"""The CUDA kernel of two 1x1 convolutions, executed on the CPU (see conftest.py), against float64.

Inputs are small integers and factors powers of two, as in test_emulated_conv2d.py: both results must agree to the bit
after one rounding each, the second one's taken from the first one's as it was rounded.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch

SM80, SM90, SM90_TWO, SM90_LARGE = 0, 16, 17, 23
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    channels: tuple[int, int, int]  # of the input, wide, narrow
    dtype: torch.dtype = BF16
    device: int = SM90
    image: tuple[int, int, int] = (2, 13, 19)  # N, H, W
    factors: str = "sbsb"  # scale and bias of the first, of the second; "-" where there is none
    extra: tuple[int, int, int, int] = (0, 0, 0, 0)  # of the tensors that input, residual, wide, narrow are slices of
    start: int = 0

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.channels))}-{str(self.dtype)[6:]}-sm{self.device}-{self.factors}"


CASES = [
    # Weights stay in shared memory: ResNet's first stage, the step to the second.
    Case((64, 256, 64)),
    Case((64, 256, 64), F16, SM90_TWO, image=(3, 17, 23), extra=(8, 16, 24, 32), start=8),
    Case((64, 256, 128), BF16, SM90_TWO),
    Case((64, 256, 128), F16, image=(5, 9, 13)),
    # They stream: one tile and several, of three warpgroups' rows; and of two for up to 256 columns.
    Case((128, 512, 128), BF16, image=(3, 14, 14)),
    Case((128, 512, 128), F16, SM90_TWO, image=(1, 7, 3)),
    Case((128, 256, 128), BF16, SM90_TWO, image=(4, 13, 14), extra=(64, 0, 128, 64), start=64),
    Case((128, 512, 256), BF16, image=(2, 12, 13)),
    Case((128, 256, 256), F16, SM90_TWO, image=(3, 15, 16), factors="-bs-"),
    Case((64, 64, 256), BF16, factors="----"),
    # Channels that fill no whole blocks, and images that fill no whole tiles.
    Case((72, 200, 40), BF16, image=(2, 9, 11), extra=(8, 8, 8, 8)),
    Case((136, 328, 136), F16, SM90_TWO, image=(3, 10, 10), factors="s--b"),
    Case((8, 8, 8), BF16, image=(1, 1, 1)),
    Case((16, 1024, 72), F16, SM90, image=(1, 8, 24), factors="sb--"),
    Case((256, 64, 248), BF16, SM90_LARGE, image=(2, 20, 20)),
]


def integers(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, most: int = 2) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_results_are_exact(case: Case, emulated, pixels) -> None:
    g = torch.Generator().manual_seed(sum(case.channels))
    (n, h, w), (c, j, k) = case.image, case.channels
    x, values = integers(g, (n, c, h, w), case.dtype), integers(g, (n, j, h, w), case.dtype)
    expand, reduce = integers(g, (j, c), case.dtype), integers(g, (k, j), case.dtype, 1)
    factors = [
        None if kind == "-" else torch.tensor(2.0) ** integers(g, (size,), F32, 1) if kind == "s"
        else integers(g, (size,), F32)
        for kind, size in zip(case.factors, (j, j, k, k), strict=True)
    ]  # fmt: skip

    def layer(matrix: torch.Tensor, weight: torch.Tensor, scale, bias, residual=0.0) -> torch.Tensor:
        sums = torch.einsum("nchw,kc->nkhw", matrix.double(), weight.double())
        sums = sums if scale is None else sums * scale.double()[:, None, None]
        sums = sums if bias is None else sums + bias.double()[:, None, None]
        return (sums + residual).relu().to(case.dtype)

    expected_wide = layer(x, expand, *factors[:2], values.double())
    expected_narrow = layer(expected_wide, reduce, *factors[2:])
    x_extra, residual_extra, wide_extra, narrow_extra = case.extra
    wide = pixels.empty(n, h, w, j, case.dtype, wide_extra, case.start)
    narrow = pixels.empty(n, h, w, k, case.dtype, narrow_extra, case.start)
    emulated.conv2d_1x1_pair(
        wide, narrow, pixels.of(x, x_extra, case.start), pixels.of(values, residual_extra), expand, reduce, factors,
        case.device,
    )  # fmt: skip
    torch.testing.assert_close(wide.nchw.double(), expected_wide.double(), rtol=0, atol=0)
    torch.testing.assert_close(narrow.nchw.double(), expected_narrow.double(), rtol=0, atol=0)
    assert expected_narrow.count_nonzero() > 0
    assert wide.untouched_around()
    assert narrow.untouched_around()


def test_nan_passes_both_relus(emulated, pixels) -> None:
    x, residual = torch.ones(1, 64, 4, 4, dtype=BF16), torch.ones(1, 128, 4, 4, dtype=BF16)
    residual[0, 3, 1, 2] = float("nan")
    wide, narrow = pixels.empty(1, 4, 4, 128, BF16), pixels.empty(1, 4, 4, 64, BF16)
    ones = torch.ones(128, 64, dtype=BF16)
    emulated.conv2d_1x1_pair(wide, narrow, pixels.of(x), pixels.of(residual), ones, ones.t().contiguous())
    assert torch.isnan(wide.values).sum() == 1
    assert torch.isnan(narrow.nchw[0, :, 1, 2]).all()
    assert torch.isnan(narrow.values).sum() == 64


@pytest.mark.parametrize(
    ("channels", "dtype", "device", "message"),
    [
        ((64, 256, 64), F32, SM90, "fp32"),
        ((64, 256, 64), BF16, SM80, "compute capability 9.0"),
        ((64, 256, 60), BF16, SM90, "multiples of 8"),
        ((64, 260, 64), F16, SM90, "multiples of 8"),
        ((64, 256, 264), BF16, SM90, "more channels than"),
        ((1024, 256, 64), BF16, SM90, "more channels than"),
    ],
)
def test_what_it_does_not_serve_is_refused(channels, dtype, device, message, emulated_once, pixels) -> None:
    c, j, k = channels
    image = (1, 2, 2)
    x, residual, wide, narrow = (pixels.empty(*image, size, dtype) for size in (c, j, j, k))
    expand, reduce = torch.ones(j, c, dtype=dtype), torch.ones(k, j, dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        emulated_once.conv2d_1x1_pair(wide, narrow, x, residual, expand, reduce, device=device)
    assert torch.isnan(wide.values).all()


def test_unaligned_pixels_are_refused(emulated_once, pixels) -> None:
    x, residual, wide = (pixels.empty(1, 2, 2, 64, BF16) for _ in range(3))
    narrow = pixels.empty(1, 2, 2, 64, BF16, extra=4)
    ones = torch.ones(64, 64, dtype=BF16)
    with pytest.raises(RuntimeError, match="aligned to 16 bytes"):
        emulated_once.conv2d_1x1_pair(wide, narrow, x, residual, ones, ones)


@pytest.mark.parametrize(
    ("channels", "weights"),
    [
        ((64, 256, 64), "resident"),
        ((64, 256, 128), "resident"),
        ((128, 256, 128), "streamed"),
        ((128, 512, 128), "streamed"),
        ((128, 512, 256), "streamed"),
        ((128, 256, 256), "streamed"),
        ((256, 1024, 256), ""),
        ((64, 256, 512), ""),
        ((64, 256, 60), ""),
    ],
)
def test_where_weights_are(channels: tuple[int, int, int], weights: str, emulated_once) -> None:
    sizes = [ctypes.c_int64(size) for size in channels]
    assert emulated_once._call("conv2d_1x1_pair_weights", *sizes, SM90) == weights
    assert emulated_once._call("conv2d_1x1_pair_weights", *sizes, SM80) == ""
