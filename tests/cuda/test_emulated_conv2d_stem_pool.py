"""The stem convolution with max pooling in one kernel, executed on the CPU (see conftest.py): the two kernels' bits."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

SM80, SM90, SM90_LARGE = 0, 16, 23
BF16, F16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    c: int
    k: int
    filter: tuple[int, int]
    image: tuple[int, int, int]  # N, H, W
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, left, bottom, right
    pool_padding: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    dtype: torch.dtype = BF16
    device: int = SM90
    relu: bool = True
    epilogue: bool = True
    out_extra: int = 0  # channels of the wider tensor that out is a slice of
    x_start: int = 0


def same(amount: int) -> tuple[int, int, int, int]:
    return (amount,) * 4


CASES = [
    # ResNet, GoogLeNet and AlexNet, at small sizes: rows of whole vectors, and not; one warpgroup, and two.
    Case(3, 64, (7, 7), (2, 24, 32), (2, 2), same(3)),
    Case(3, 64, (7, 7), (1, 18, 224), (2, 2), same(3), device=SM90_LARGE),
    Case(3, 64, (7, 7), (1, 40, 224), (2, 2), same(3), dtype=F16),
    Case(3, 64, (7, 7), (1, 26, 224), (2, 2), same(3), (0, 0), True),
    Case(3, 64, (7, 7), (2, 23, 30), (2, 2), same(3), (0, 0), True, F16, x_start=1),
    Case(3, 64, (11, 11), (1, 60, 64), (4, 4), same(2), (0, 0)),
    # Several walks a block, and walks of several tiles with a shorter last one.
    Case(3, 64, (3, 3), (3, 31, 17), (1, 1), same(1), device=SM90_LARGE),
    Case(3, 64, (3, 3), (2, 45, 12), (1, 1), same(1)),
    # Strips: more columns than two warpgroups have.
    Case(1, 40, (3, 3), (1, 9, 150), (1, 1), same(1), dtype=F16, out_extra=8),
    Case(2, 64, (3, 5), (2, 8, 260), (1, 1), same(2), (0, 1), True),
    # Several blocks of filters, the last one part; no epilogue; no ReLU, where zero is not the least.
    Case(3, 136, (3, 3), (1, 14, 16), (1, 2), same(1), (1, 0), out_extra=24),
    Case(3, 64, (7, 7), (1, 20, 24), (2, 2), same(3), relu=False),
    Case(3, 64, (7, 7), (1, 20, 24), (2, 2), same(3), relu=False, epilogue=False, dtype=F16),
    # Down to one window, and one that has one row or column.
    Case(3, 64, (7, 7), (2, 1, 1), (2, 2), same(3)),
    Case(4, 64, (1, 3), (1, 3, 4), (1, 1), (0, 1, 0, 1), (0, 0), True),
    Case(1, 64, (1, 1), (2, 2, 70), (1, 1), same(0)),
]


def pooled_size(size: int, padding: int, ceil_mode: bool) -> int:
    count = (size + 2 * padding - 3 + ceil_mode) // 2 + 1
    return count - 1 if ceil_mode and (count - 1) * 2 >= size + padding else count


def random_cases(count: int) -> list[Case]:
    rng = random.Random(11)
    cases: list[Case] = []
    while len(cases) < count:
        r, s = rng.randint(1, 7), rng.randint(1, 7)
        padding = (rng.randint(0, r), rng.randint(0, s), rng.randint(0, r), rng.randint(0, s))
        n, h, w = rng.randint(1, 3), rng.randint(1, 30), rng.choice([1, 3, 8, 21, 40, 64, 70, 131])
        stride = (rng.randint(1, 4), rng.randint(1, 4))
        pool_padding, ceil_mode = (rng.randint(0, 1), rng.randint(0, 1)), rng.random() < 0.5
        rooms = h + padding[0] + padding[2] - r, w + padding[1] + padding[3] - s
        if min(rooms) < 0:
            continue
        size = [room // step + 1 for room, step in zip(rooms, stride, strict=True)]
        if min(pooled_size(a, b, ceil_mode) for a, b in zip(size, pool_padding, strict=True)) < 1:
            continue
        cases.append(
            Case(
                rng.randint(1, 4), rng.choice([40, 64, 96, 136]), (r, s), (n, h, w), stride, padding, pool_padding,
                ceil_mode, rng.choice([BF16, F16]), rng.choice([SM90, SM90_LARGE]), rng.random() < 0.7,
                rng.random() < 0.7, rng.choice([0, 8]), rng.choice([0, 0, 1, 8]),
            )
        )  # fmt: skip
    return cases


@pytest.mark.parametrize("case", [*CASES, *random_cases(40)], ids=str)
def test_is_the_two_kernels_result_to_the_bit(case: Case, emulated, pixels) -> None:
    g = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    n, h, w = case.image
    top, left, bottom, right = case.padding
    x = torch.randn((n, case.c, h, w), generator=g).to(case.dtype)
    x[-1, 0, h // 2, w // 2] = float("nan")
    x[0, -1, 0, w - 1] = float("inf")
    weight = torch.randn((case.k, case.c, *case.filter), generator=g).to(case.dtype)
    vectors = {}
    if case.epilogue:
        vectors = {name: torch.randn(case.k, generator=g) for name in ("scale", "bias")}
    size = F.conv2d(F.pad(x.double(), (left, right, top, bottom)), weight.double(), None, case.stride).shape[2:]
    options = {"stride": case.stride, "padding": (top, left), "relu": case.relu, "device": case.device, **vectors}
    source = pixels.of(x, start=case.x_start)
    between = pixels.empty(n, *size, case.k, case.dtype)
    emulated.conv2d(between, source, weight, kernel="stem wgmma", **options)
    shape = [pooled_size(a, b, case.ceil_mode) for a, b in zip(size, case.pool_padding, strict=True)]
    expected = pixels.empty(n, *shape, case.k, case.dtype)
    emulated.max_pool2d(expected, between, (3, 3), (2, 2), case.pool_padding)
    reference = F.max_pool2d(between.nchw.float(), 3, 2, case.pool_padding, 1, case.ceil_mode)
    torch.testing.assert_close(expected.nchw.float(), reference, rtol=0, atol=0, equal_nan=True)
    out = pixels.empty(n, *shape, case.k, case.dtype, case.out_extra, case.out_extra)
    emulated.conv2d_max_pool2d(out, source, weight, size, pool_padding=case.pool_padding, **options)
    torch.testing.assert_close(out.nchw, expected.nchw, rtol=0, atol=0, equal_nan=True)
    assert out.untouched_around()
    assert case not in CASES or expected.nchw.isnan().any(), "the NaN is to be seen"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": (2, 2)}, "windows must be 3x3"),
        ({"pool_stride": (1, 2)}, "windows must be 3x3"),
        ({"pool_padding": (2, 1)}, "windows must be 3x3"),
        ({"pool_dilation": (1, 2)}, "windows must be 3x3"),
        ({"size": (3, 8)}, "out must not be larger"),
        ({"dilation": (2, 1)}, "stem wgmma"),
        ({"device": SM80}, "stem wgmma"),
        ({"c": 5}, "stem wgmma"),
        ({"k": 32}, "stem wgmma"),
        ({"k": 44}, "aligned to 16 bytes"),
        ({"start": 1}, "aligned to 16 bytes"),
        ({"dtype": torch.float32}, "bf16 or fp16"),
    ],
)
def test_what_it_does_not_serve_is_named(change: dict, words: str, emulated_once, pixels) -> None:
    options = {"size": (8, 8), "c": 3, "k": 64, "dtype": BF16, "start": 0, **change}
    c, k, dtype, start = (options.pop(name) for name in ("c", "k", "dtype", "start"))
    x, out = pixels.empty(1, 10, 10, c, dtype), pixels.empty(1, 4, 4, k, dtype, start=start)
    with pytest.raises(RuntimeError, match=words):
        emulated_once.conv2d_max_pool2d(out, x, torch.ones(k, c, 3, 3, dtype=dtype), **options)
