"""3x3 convolutions with stride 1 on the CPU: every algorithm, and PyTorch.

FLOP/s count the plain sum's operations for every candidate, so that they compare as times do.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcnn
from fastcnn import ops
from fastcnn.backends import backend_module
from fastcnn.backends.cpp import ALGORITHMS

# (channels in and out, height and width) of VGG, ResNet and wider ones
SHAPES = [
    (64, 224), (128, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (512, 14), (512, 7),
]  # fmt: skip

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU benchmark")


@pytest.mark.parametrize("candidate", ["pytorch", "cpp", *(f"cpp:{name}" for name in ALGORITHMS)])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[1]}x{s[1]}x{s[0]}")
def test_conv3x3_bias_relu(measure, benchmark, shape: tuple[int, int], batch: int, candidate: str):
    channels, size = shape
    benchmark.group = f"conv3x3 {size}x{size}x{channels} n{batch} fp32"
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    bias, out = torch.randn(channels), torch.empty_like(x)

    def pytorch() -> Tensor:
        return F.relu(F.conv2d(x, w, bias, padding=1), inplace=True)

    def chosen() -> Tensor:
        return ops.conv2d(x, w, bias, padding=1, activation="relu", out=out)

    def variant() -> None:
        backend_module(candidate).conv2d(
            out, x, w, None, bias, None, None, None, False, "relu", (1, 1), (1, 1), (1, 1), 1
        )

    run = {"pytorch": pytorch, "cpp": chosen}.get(candidate, variant)
    with torch.no_grad(), fastcnn.use_backend("cpp"):
        measure(
            run,
            flops=2 * 9 * batch * size * size * channels * channels,
            bytes=4 * (2 * batch * size * size + 9 * channels) * channels,
            items=batch,
        )
