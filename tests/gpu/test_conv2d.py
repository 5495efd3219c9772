"""conv2d's GPU kernels against float64 and cuDNN: awkward shapes, then layers of real networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.layout import GuardedSlice, sliced
from torch import Tensor

from fastcnn import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# n, c, h, w, k, filter, stride, padding, dilation, groups
AWKWARD = [
    (1, 1, 1, 1, 1, (1, 1), 1, 0, 1, 1),
    (1, 3, 7, 7, 5, (3, 3), 1, 1, 1, 1),
    (2, 7, 13, 11, 17, (1, 1), 1, 0, 1, 1),
    (1, 31, 5, 3, 33, (1, 1), 2, 0, 1, 1),
    (3, 13, 9, 17, 29, (3, 3), (2, 1), (2, 0), (1, 2), 1),
    (1, 3, 33, 29, 64, (7, 7), 2, 3, 1, 1),
    (2, 3, 35, 39, 19, (11, 11), 4, 0, 1, 1),
    (1, 24, 9, 9, 40, (2, 4), 1, 1, 1, 1),
    (2, 64, 6, 6, 64, (3, 3), 1, 1, 1, 16),
    (1, 24, 6, 6, 24, (3, 3), 1, 1, 1, 24),
    (1, 23, 6, 6, 46, (3, 3), 1, 1, 1, 23),
    (2, 96, 5, 5, 128, (5, 5), 1, 2, 1, 2),
    (1, 2, 3, 3, 4, (3, 3), 3, 3, 1, 1),
    (5, 16, 1, 1, 10, (1, 1), 1, 0, 1, 1),
    (2, 72, 14, 14, 136, (3, 3), 1, 1, 1, 1),
    (1, 520, 4, 4, 40, (1, 1), 1, 0, 1, 1),
]

REAL = [
    (8, 3, 224, 224, 64, (7, 7), 2, 3, 1, 1),
    (8, 64, 56, 56, 64, (1, 1), 1, 0, 1, 1),
    (8, 64, 56, 56, 64, (3, 3), 1, 1, 1, 1),
    (8, 256, 56, 56, 512, (1, 1), 2, 0, 1, 1),
    (1, 512, 7, 7, 512, (3, 3), 1, 1, 1, 1),
    (32, 2048, 7, 7, 512, (1, 1), 1, 0, 1, 1),
    (8, 128, 56, 56, 128, (3, 3), 1, 1, 1, 32),
]


def check(device: torch.device, dtype: torch.dtype, problem: tuple, *, fused: bool) -> None:
    n, c, h, w, k, (r, s), stride, padding, dilation, groups = problem
    generator = torch.Generator().manual_seed(hash(problem) % 2**31)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight = random(n, c, h, w).to(device, dtype), random(k, c // groups, r, s).to(device, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    geometry = (stride, padding, dilation, groups)
    scale, bias = random(k).to(device), random(k).to(device)
    input_scale, input_shift = random(c).to(device), random(c).to(device)
    shape = tuple(F.conv2d(x, weight, None, *geometry).shape)
    residual = random(*shape).to(device, dtype)

    def reference(dtype: torch.dtype) -> Tensor:
        y = x.to(dtype)
        if not fused:
            return F.conv2d(y, weight.to(dtype), None, *geometry)
        y = F.relu(y * input_scale.to(dtype).view(-1, 1, 1) + input_shift.to(dtype).view(-1, 1, 1))
        y = F.conv2d(y, weight.to(dtype), None, *geometry)
        return F.relu(y * scale.to(dtype).view(-1, 1, 1) + bias.to(dtype).view(-1, 1, 1) + residual.to(dtype))

    out = GuardedSlice(shape, dtype, device)
    options = {}
    if fused:
        options = {
            "scale": scale, "residual": sliced(residual), "activation": "relu", "input_scale": input_scale,
            "input_shift": input_shift, "input_activation": "relu",
        }  # fmt: skip
    with torch.no_grad():
        ops.conv2d(sliced(x), weight, bias if fused else None, *geometry, **options, out=out.view)
        assert_accurate(out.view.cpu(), reference(dtype).cpu(), reference(torch.float64).cpu())
        out.assert_guards_intact()
        again = torch.empty(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        ops.conv2d(x, weight, bias if fused else None, *geometry, **options, out=again)
        assert_accurate(again.cpu(), reference(dtype).cpu(), reference(torch.float64).cpu())
        repeated = again.clone()
        ops.conv2d(x, weight, bias if fused else None, *geometry, **options, out=again)
        assert torch.equal(again, repeated), "the same call must give the same bits"


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", AWKWARD, ids=str)
def test_awkward_shapes(backend, device, tf32, problem: tuple, dtype: torch.dtype, fused: bool):
    if tf32 and dtype != torch.float32:
        pytest.skip("TF32 concerns fp32 only")
    check(device, dtype, problem, fused=fused)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", REAL, ids=str)
def test_real_layers(backend, device, tf32, problem: tuple, dtype: torch.dtype, fused: bool):
    if tf32 and dtype != torch.float32:
        pytest.skip("TF32 concerns fp32 only")
    check(device, dtype, problem, fused=fused)
