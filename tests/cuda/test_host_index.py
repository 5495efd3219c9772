"""The kernels' index arithmetic (csrc/cuda/device/*.h) against Python's integers, at sizes no tensor here has."""

from __future__ import annotations

import random

import pytest

LAST = 2**31 - 1


def test_fast_division(emulated_once) -> None:
    rng = random.Random(0)
    divisors = [*range(1, 300), *(2**k + d for k in range(9, 31) for d in (-1, 0, 1)), LAST, LAST - 1]
    divisors += [rng.randrange(1, LAST) for _ in range(300)]
    wrong = {d: n for d in divisors if (n := emulated_once.fast_divide_error(d, 2000)) != -1}
    assert not wrong


def expected_gather(image, pixel_stride, geometry, output, row, column) -> int:
    n_images, height, width, c = image
    r_size, s_size, stride_h, stride_w, top, left, dil_h, dil_w, groups = geometry
    p_size, q_size = output
    channels = c // groups
    if row >= n_images * p_size * q_size or column >= r_size * s_size * channels:
        return -1
    n, p, q = row // (p_size * q_size), row // q_size % p_size, row % q_size
    r, s, channel = column // (s_size * channels), column // channels % s_size, column % channels
    h, w = p * stride_h - top + r * dil_h, q * stride_w - left + s * dil_w
    if not (0 <= h < height and 0 <= w < width):
        return -1
    return ((n * height + h) * width + w) * pixel_stride + channel


SHAPES = {
    # image (N, H, W, C), pixel stride, (R, S, stride, padding, dilation, groups), (P, Q)
    "stem": ((2, 224, 224, 3), 3, (7, 7, 2, 2, 3, 3, 1, 1, 1), (112, 112)),
    "beyond 2^31 elements": ((64, 512, 512, 256), 320, (3, 3, 1, 1, 1, 1, 1, 1, 1), (512, 512)),
    "beyond 2^32 elements in one image": ((1, 30000, 30000, 8), 16, (3, 3, 1, 1, 1, 1, 1, 1, 1), (30000, 30000)),
    "one long row": ((1, 1, 2**28 - 1, 8), 8, (1, 5, 1, 1, 0, 2, 1, 1, 1), (1, 2**28 - 1)),
    "wide dilation and padding": ((3, 50, 60, 32), 32, (3, 3, 2, 3, 40, 50, 20, 25, 2), (46, 37)),
    "filter larger than the image": ((4, 2, 3, 8), 8, (5, 5, 1, 1, 2, 2, 1, 1, 1), (2, 3)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_gather(name: str, emulated_once) -> None:
    image, pixel_stride, geometry, output = SHAPES[name]
    rng = random.Random(name)
    rows = image[0] * output[0] * output[1]
    columns = geometry[0] * geometry[1] * (image[3] // geometry[8])
    seen = set()
    for _ in range(4000):
        # The ends are where padding is, and past them lie the tails of a tile.
        near = rng.randrange(min(rows, 999))
        row = rng.choice((rng.randrange(rows), near, rows - 1 - near, rows + 5))
        column = rng.choice((rng.randrange(columns), columns - 1, 0, columns + 7))
        expected = expected_gather(image, pixel_stride, geometry, output, row, column)
        assert emulated_once.gather(image, pixel_stride, geometry, output, row, column) == expected, (row, column)
        seen.add(expected >= 0)
    assert seen == {True, False}
