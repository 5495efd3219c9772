"""The CUDA kernels besides conv2d, executed on the CPU (see conftest.py), against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# (C, extra channels of the wider tensor, offset): 16-byte vectors, a slice that keeps them, and single elements.
LAYOUTS = {
    "vectors": (40, 0, 0),
    "slice": (16, 8, 8),
    "elements": (11, 2, 1),
    "wide": (600, 0, 0),
    "many": (2056, 8, 0),
}
dtypes = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=lambda d: str(d)[6:])
layouts = pytest.mark.parametrize("layout", list(LAYOUTS))


def random(shape: tuple[int, ...], dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@dtypes
@layouts
@pytest.mark.parametrize("parts", ["all", "affine", "scale", "add", "centre"])
def test_channel_affine(dtype, layout: str, parts: str, emulated_once, pixels) -> None:
    c, extra, start = LAYOUTS[layout]
    x, residual = random((2, c, 5, 7), dtype), random((2, c, 5, 7), dtype, 1)
    scale = random((c,), seed=2) if parts != "add" else None
    shift = random((c,), seed=3) if parts in ("all", "affine", "centre") else None
    centre = 100 + random((c,), seed=4) if parts == "centre" else None
    if centre is not None:
        x = x + centre.to(dtype)[:, None, None]
    added = residual if parts in ("all", "add") else None
    out = pixels.empty(2, 5, 7, c, dtype, extra)
    relu = parts != "scale"
    emulated_once.channel_affine(
        out, pixels.of(x, extra, start), scale, shift, None if added is None else pixels.of(added, extra, start), relu,
        centre=centre,
    )  # fmt: skip

    def compute(to: torch.dtype) -> torch.Tensor:
        y = x.to(to)
        if centre is not None:
            y = y - centre.to(to)[:, None, None]
        if scale is not None:
            y = y * scale.to(to)[:, None, None]
        if shift is not None:
            y = y + shift.to(to)[:, None, None]
        if added is not None:
            y = y + added.to(to)
        return F.relu(y) if relu else y

    assert_accurate(out.nchw, compute(F32).to(dtype), compute(torch.float64))
    assert out.untouched_around()


@dtypes
@layouts
def test_residual_add_in_place(dtype, layout: str, emulated_once, pixels) -> None:
    c, extra, start = LAYOUTS[layout]
    x, residual = random((1, c, 6, 3), dtype), random((1, c, 6, 3), dtype, 1)
    x[0, 0, 0, 0] = float("nan")
    for aliased in (0, 1):
        operands = [pixels.of(x, extra, start), pixels.of(residual, extra, start)]
        emulated_once.residual_add(operands[aliased], *operands, scale=0.25, relu=True)
        expected = F.relu(x.double() * 0.25 + residual.double())
        assert_accurate(operands[aliased].nchw, expected.to(dtype), expected)
        assert operands[aliased].untouched_around()


POOLS = [
    # kernel, stride, padding, dilation, ceil_mode
    ((3, 3), (2, 2), (1, 1), (1, 1), False),
    ((2, 2), (2, 2), (0, 0), (1, 1), True),
    ((3, 2), (2, 3), (1, 0), (1, 1), True),
    ((3, 3), (1, 2), (1, 1), (2, 2), False),
    ((2, 3), (3, 1), (1, 1), (3, 2), True),
]


@dtypes
@layouts
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_max_pool2d(dtype, layout: str, pool, emulated_once, pixels) -> None:
    c, extra, start = LAYOUTS[layout]
    kernel, stride, padding, dilation, ceil_mode = pool
    x = random((2, c, 9, 8), dtype)
    x[1, 2, 4, 4] = float("nan")
    x[0, 1] = -float("inf")
    expected = F.max_pool2d(x.float(), kernel, stride, padding, dilation, ceil_mode).to(dtype)
    out = pixels.empty(2, *expected.shape[2:], c, dtype, extra)
    emulated_once.max_pool2d(out, pixels.of(x, extra, start), kernel, stride, padding, dilation)
    torch.testing.assert_close(out.nchw, expected, rtol=0, atol=0, equal_nan=True)
    assert out.untouched_around()


@dtypes
@layouts
@pytest.mark.parametrize("pool", [p for p in POOLS if p[3] == (1, 1)], ids=str)
@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("divisor", [None, 5])
def test_avg_pool2d(dtype, layout: str, pool, count_include_pad: bool, divisor, emulated_once, pixels) -> None:
    c, extra, start = LAYOUTS[layout]
    kernel, stride, padding, _, ceil_mode = pool
    x = random((2, c, 9, 8), dtype)
    options = (kernel, stride, padding, ceil_mode, count_include_pad, divisor)
    expected = F.avg_pool2d(x.double(), *options)
    reference = F.avg_pool2d(x.float(), *options).to(dtype)
    out = pixels.empty(2, *expected.shape[2:], c, dtype, extra)
    emulated_once.avg_pool2d(
        out, pixels.of(x, extra, start), kernel, stride, padding, padding, count_include_pad, divisor or 0
    )
    assert_accurate(out.nchw, reference, expected)
    assert out.untouched_around()


@dtypes
@layouts
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (3, 5), (16, 2)], ids=str)
def test_adaptive_avg_pool2d(dtype, layout: str, size: tuple[int, int], emulated_once, pixels) -> None:
    c, extra, start = LAYOUTS[layout]
    x = random((2, c, 9, 13), dtype)
    out = pixels.empty(2, *size, c, dtype, extra)
    emulated_once.adaptive_avg_pool2d(out, pixels.of(x, extra, start))
    reference = F.adaptive_avg_pool2d(x.float(), size).to(dtype)
    assert_accurate(out.nchw, reference, F.adaptive_avg_pool2d(x.double(), size))
    assert out.untouched_around()


@dtypes
@pytest.mark.parametrize(("c", "extra", "start"), [(64, 0, 0), (16, 8, 8), (11, 2, 1), (8200, 0, 0), (3, 0, 0)])
@pytest.mark.parametrize(
    ("size", "alpha", "beta", "k"),
    [(5, 1e-2, 0.75, 2.0), (4, 0.5, 0.5, 1.0), (1, 1.0, 1.0, 1.0), (31, 2.0, 2.0, 0.5)],
)
def test_local_response_norm(dtype, c, extra, start, size, alpha, beta, k, emulated_once, pixels) -> None:
    x = random((1, c, 3, 2), dtype)
    out = pixels.empty(1, 3, 2, c, dtype, extra)
    emulated_once.local_response_norm(out, pixels.of(x, extra, start), size, alpha, beta, k)
    expected = F.local_response_norm(x.double(), size, alpha, beta, k)
    reference = F.local_response_norm(x.float(), size, alpha, beta, k).to(dtype)
    assert_accurate(out.nchw, reference, expected)
    assert out.untouched_around()


# Chunks of 16 bytes that fill warps, straddle them, and are all of a block; more pixels than a block holds.
@dtypes
@pytest.mark.parametrize(("c", "image"), [(8, (3, 61, 5)), (96, (2, 9, 11)), (192, (1, 7, 13)), (1024, (1, 12, 13))])
@pytest.mark.parametrize("extra", [0, 8])
def test_local_response_norm_of_published_networks(dtype, c, image, extra, emulated_once, pixels) -> None:
    n, h, w = image
    x = random((n, c, h, w), dtype)
    x[0, 5, 1, 1] = float("nan")
    out = pixels.empty(n, h, w, c, dtype, extra)
    emulated_once.local_response_norm(out, pixels.of(x, extra), 5, 1e-1, 0.75, 2.0)
    expected = F.local_response_norm(x.double(), 5, 1e-1, 0.75, 2.0)
    reference = F.local_response_norm(x.float(), 5, 1e-1, 0.75, 2.0).to(dtype)
    assert torch.equal(out.nchw.isnan(), expected.isnan())
    assert_accurate(out.nchw.nan_to_num(), reference.nan_to_num(), expected.nan_to_num())
    assert out.untouched_around()


@dtypes
@layouts
@pytest.mark.parametrize("image", [(1, 1, 1), (2, 9, 7), (5, 31, 29)], ids=str)
def test_batch_statistics(dtype, layout: str, image: tuple[int, int, int], emulated_once, pixels) -> None:
    c, extra, start = LAYOUTS[layout]
    n, h, w = image
    if c > 100 and n * h * w > 1000:
        c = 100 if c == 600 else c
    x = random((n, c, h, w), dtype) * random((c, 1, 1), dtype, 5)
    mean, variance = emulated_once.batch_statistics(pixels.of(x, extra, start))
    wide = x.double()
    assert_accurate(mean, x.float().mean((0, 2, 3)), wide.mean((0, 2, 3)))
    assert_accurate(variance, x.float().var((0, 2, 3), correction=0), wide.var((0, 2, 3), correction=0))


def test_batch_statistics_of_more_slabs_than_a_pass_merges(emulated_once, pixels) -> None:
    x = random((1, 128, 130, 330)) + 3.0
    mean, variance = emulated_once.batch_statistics(pixels.of(x))
    wide = x.double()
    assert_accurate(mean, x.mean((0, 2, 3)), wide.mean((0, 2, 3)))
    assert_accurate(variance, x.var((0, 2, 3), correction=0), wide.var((0, 2, 3), correction=0))


def test_batch_statistics_survive_a_large_mean(emulated_once, pixels) -> None:
    x = random((4, 8, 40, 40)) * 1e-2 + 1000.0
    _, variance = emulated_once.batch_statistics(pixels.of(x))
    exact = x.double().var((0, 2, 3), correction=0)
    assert ((variance - exact).abs() / exact).max() < 1e-3


@dtypes
@pytest.mark.parametrize("m", [1, 3, 7, 8, 9, 140])
@pytest.mark.parametrize(("c", "k", "extra"), [(64, 40, 0), (72, 10, 8), (19, 13, 3), (520, 66, 0)])
@pytest.mark.parametrize("device", [0, 16], ids=["sm80", "sm90"])
def test_linear(dtype, m: int, c: int, k: int, extra: int, device: int, emulated, pixels) -> None:
    x, weight, bias = random((m, c, 1, 1), dtype), random((k, c, 1, 1), dtype, 1), random((k,), seed=2)
    out = pixels.empty(m, 1, 1, k, dtype, extra)
    emulated.linear(out, pixels.of(x, extra), pixels.of(weight, extra), bias, relu=True, device=device)
    expected = F.relu(F.linear(x[..., 0, 0].double(), weight[..., 0, 0].double(), bias.double()))
    reference = F.relu(F.linear(x[..., 0, 0].float(), weight[..., 0, 0].float(), bias)).to(dtype)
    assert_accurate(out.nchw[..., 0, 0], reference, expected)
    assert out.untouched_around()
