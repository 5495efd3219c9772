"""The stem kernel (few input channels), executed on the CPU (see conftest.py), against float64.

As in test_emulated_conv2d.py, values are small integers and factors powers of two, so results must agree to the bit.
"""

from __future__ import annotations

import itertools
import random
import zlib
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

SM80, SM80_LARGE, SM90, SM90_LARGE = 0, 7, 16, 23
BF16, F16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    c: int
    k: int
    filter: tuple[int, int]
    image: tuple[int, int, int]  # N, H, W
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dtype: torch.dtype = BF16
    device: int = SM80
    epilogue: bool = True
    out_extra: int = 0  # channels of the wider tensor that out and residual are slices of
    residual_extra: int = 0
    out_start: int = 0
    x_start: int = 0

    def kernels(self) -> list[str]:
        return ["stem wgmma", "stem"] if self.device >= SM90 and self.k > 32 else ["stem"]

    def __str__(self) -> str:
        shape = "x".join(map(str, self.image))
        return (
            f"c{self.c}-k{self.k}-{self.filter[0]}x{self.filter[1]}-{shape}-s{self.stride[0]}{self.stride[1]}"
            f"-p{''.join(map(str, self.padding))}-{str(self.dtype)[6:]}-d{self.device}-x{self.x_start}"
            f"-o{self.out_extra}"
        )


def same(amount: int) -> tuple[int, int, int, int]:
    return (amount,) * 4


CASES = [
    # First layers: ResNet (rows of whole vectors, and not), AlexNet, ZFNet, VGG, CIFAR, LeNet, at small sizes.
    Case(3, 64, (7, 7), (2, 24, 32), (2, 2), same(3)),
    Case(3, 64, (7, 7), (2, 24, 32), (2, 2), same(3), F16, SM90, out_extra=8, residual_extra=16),
    Case(3, 64, (7, 7), (1, 23, 29), (2, 2), same(3), out_extra=64),
    Case(3, 64, (7, 7), (1, 18, 224), (2, 2), same(3), BF16, SM90_LARGE),
    Case(3, 64, (11, 11), (1, 40, 64), (4, 4), same(2)),
    Case(3, 96, (11, 11), (1, 35, 47), (4, 4), same(0), F16),
    Case(3, 96, (7, 7), (2, 20, 40), (2, 2), same(1), F16, SM90),
    Case(3, 64, (3, 3), (1, 20, 24), (1, 1), same(1)),
    Case(3, 16, (3, 3), (3, 16, 16), (1, 1), same(1), F16),
    Case(1, 6, (5, 5), (3, 28, 28), (1, 1), same(2)),
    Case(1, 6, (5, 5), (2, 14, 15), (1, 1), same(0), F16, out_extra=3, residual_extra=1),
    # Every number of channels and stride; one filter, and several blocks of them.
    Case(4, 1, (3, 2), (2, 9, 10), (1, 3), (0, 1, 2, 0)),
    Case(2, 130, (2, 3), (1, 9, 10), (3, 1), (1, 2, 0, 1), F16, out_extra=5),
    Case(1, 200, (1, 1), (1, 5, 7), (2, 2), same(0)),
    Case(2, 70, (4, 5), (2, 11, 16), (4, 3), same(2), out_extra=2, out_start=8),
    Case(4, 40, (5, 5), (1, 13, 12), (3, 4), same(4), F16, SM90),
    Case(3, 33, (3, 3), (1, 12, 40), (2, 4), same(1)),
    # Images smaller than the filter, down to one pixel; padding as wide as the filter.
    Case(3, 64, (7, 7), (2, 1, 1), (2, 2), same(3)),
    Case(3, 8, (5, 5), (1, 2, 3), (1, 1), same(5), F16),
    Case(1, 9, (3, 7), (3, 4, 2), (2, 2), (3, 7, 3, 7)),
    Case(4, 12, (1, 3), (1, 1, 1), (1, 2), same(3)),
    # No epilogue; an input that is not aligned.
    Case(3, 64, (7, 7), (1, 24, 32), (2, 2), same(3), epilogue=False),
    Case(3, 64, (7, 7), (1, 24, 32), (2, 2), same(3), x_start=1),
    Case(4, 16, (3, 3), (1, 10, 16), (1, 1), same(1), F16, x_start=3),
    # Output rows cut into several tiles; tiles of one row.
    Case(2, 8, (3, 3), (1, 3, 1030), (1, 1), same(1)),
    Case(3, 64, (3, 3), (1, 40, 56), (1, 1), same(1), F16, SM80_LARGE),
]


def random_cases(count: int) -> list[Case]:
    rng = random.Random(7)
    cases = []
    while len(cases) < count:
        r, s = rng.randint(1, 7), rng.randint(1, 7)
        padding = (rng.randint(0, r), rng.randint(0, s), rng.randint(0, r), rng.randint(0, s))
        image = (rng.randint(1, 3), rng.randint(1, 20), rng.choice([1, 3, 8, 16, 21, 24, 40]))
        if image[1] + padding[0] + padding[2] < r or image[2] + padding[1] + padding[3] < s:
            continue
        cases.append(
            Case(
                rng.randint(1, 4), rng.choice([1, 6, 16, 32, 40, 64, 96, 130]), (r, s), image,
                (rng.randint(1, 4), rng.randint(1, 4)), padding, rng.choice([BF16, F16]),
                rng.choice([SM80, SM80_LARGE, SM90, SM90_LARGE]), rng.random() < 0.5, rng.choice([0, 3, 8]),
                rng.choice([0, 1, 8]), x_start=rng.choice([0, 0, 1, 8]),
            )
        )  # fmt: skip
    return cases


def integers(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, most: int = 2) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


def with_kernels(cases: list[Case]) -> list[tuple[str, Case]]:
    """Each case with every stem kernel that serves it, the rule's choice first."""
    return [(kernel, case) for case in cases for kernel in case.kernels()]


@pytest.mark.parametrize(("kernel", "case"), with_kernels([*CASES, *random_cases(60)]), ids=str)
def test_stem_is_exact(kernel: str, case: Case, emulated, pixels) -> None:
    g = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    n, h, w = case.image
    top, left, bottom, right = case.padding
    x = integers(g, (n, case.c, h, w), case.dtype)
    weight = integers(g, (case.k, case.c, *case.filter), case.dtype)
    expected = F.conv2d(F.pad(x.double(), (left, right, top, bottom)), weight.double(), None, case.stride)
    scale = bias = residual = None
    if case.epilogue:
        scale = torch.tensor(2.0) ** integers(g, (case.k,), torch.float32, 1)
        bias = integers(g, (case.k,), torch.float32)
        values = integers(g, tuple(expected.shape), case.dtype)
        residual = pixels.of(values, case.residual_extra)
        expected = expected * scale.double()[:, None, None] + bias.double()[:, None, None] + values.double()
        expected = F.relu(expected)
    out = pixels.empty(n, *expected.shape[2:], case.k, case.dtype, case.out_extra, case.out_start)
    name = emulated.conv2d(
        out, pixels.of(x, start=case.x_start), weight, stride=case.stride, padding=(top, left), scale=scale, bias=bias,
        residual=residual, relu=case.epilogue, device=case.device, kernel=kernel,
    )  # fmt: skip
    assert name == case.kernels()[0]
    torch.testing.assert_close(out.nchw.double(), expected.to(case.dtype).double(), rtol=0, atol=0)
    assert out.untouched_around()


@pytest.mark.parametrize(
    ("c", "stride", "padding", "size"),
    [(3, 2, 3, 7), (3, 2, 2, 7), (3, 4, 2, 11), (3, 1, 1, 3), (1, 2, 1, 3), (1, 1, 2, 5), (2, 1, 0, 2), (4, 3, 1, 3)],
)
@pytest.mark.parametrize("width", [24, 25])
@pytest.mark.parametrize(("kernel", "device", "k"), [("stem", SM80, 8), ("stem wgmma", SM90, 40)])
def test_nan_stays_within_its_windows(
    kernel: str, device: int, k: int, c: int, stride: int, padding: int, size: int, width: int, emulated, pixels
) -> None:
    """A pair at a window's edge reaches into the neighbouring pixel; its value must not."""
    x = torch.ones(1, c, 13, width, dtype=BF16)
    weight = torch.ones(k, c, size, size, dtype=BF16)
    for channel, column in itertools.product(range(c), (0, 9, width - 1)):
        dirty = x.clone()
        dirty[0, channel, 6, column] = float("nan")
        expected = F.conv2d(dirty.float(), weight.float(), None, stride, padding)
        out = pixels.empty(1, *expected.shape[2:], k, BF16)
        name = emulated.conv2d(
            out, pixels.of(dirty), weight, stride=(stride,) * 2, padding=(padding,) * 2, device=device
        )
        assert name == kernel
        torch.testing.assert_close(out.nchw.float(), expected.to(BF16).float(), rtol=0, atol=0, equal_nan=True)


def test_wide_filters_leave_the_stem_kernel(emulated_once, pixels) -> None:
    """Filters that do not fit in shared memory."""
    g = torch.Generator().manual_seed(3)
    x, weight = integers(g, (1, 3, 66, 67), BF16, 1), integers(g, (64, 3, 65, 65), BF16, 1)
    out = pixels.empty(1, 2, 3, 64, BF16)
    assert emulated_once.conv2d(out, pixels.of(x), weight, device=SM80) == "mma 64x64 elements"
    expected = F.conv2d(x.double(), weight.double())
    torch.testing.assert_close(out.nchw.double(), expected.to(BF16).double(), rtol=0, atol=0)
