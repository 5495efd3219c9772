"""The concatenating operators: what writing into channel slices saves over torch.cat."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from candidates import backend_names, dtypes
from torch import Tensor

import fastcnn
from fastcnn import ops

# GoogLeNet's block 3a: (input channels, filter, output channels) of each branch's last convolution.
BRANCHES = [(192, 1, 64), (96, 3, 128), (16, 5, 32), (192, 1, 32)]


def _branches(batch: int, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    inputs, weights, biases = [], [], []
    for c, r, k in BRANCHES:
        x = torch.randn(batch, c, 28, 28, device=device, dtype=dtype)
        inputs.append(x.contiguous(memory_format=torch.channels_last))
        weights.append(torch.randn(k, c, r, r, device=device, dtype=dtype))
        biases.append(torch.randn(k, device=device))
    return inputs, weights, biases


def _inception_concat(inputs: list[Tensor], weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return ops.inception_concat(inputs, weights, biases, paddings=[w.shape[2] // 2 for w in weights])


@pytest.mark.parametrize("candidate", ["pytorch", *backend_names()])
@pytest.mark.parametrize("dtype", dtypes(), ids=str)
def test_inception_concat(measure, benchmark, device, dtype: torch.dtype, candidate: str):
    batch = 32 if device.type == "cuda" else 1
    benchmark.group = f"inception_concat googlenet.3a n{batch} {dtype}"
    inputs, weights, biases = _branches(batch, device, dtype)
    flops = sum(2 * batch * 28 * 28 * c * r * r * k for c, r, k in BRANCHES)

    def pytorch() -> Tensor:
        parts = [
            F.relu(F.conv2d(x, w, b.to(dtype), padding=w.shape[2] // 2), inplace=True)
            for x, w, b in zip(inputs, weights, biases, strict=True)
        ]
        return torch.cat(parts, 1)

    ours = lambda: _inception_concat(inputs, weights, biases)  # noqa: E731
    with fastcnn.use_backend(None if candidate == "pytorch" else candidate):
        measure(pytorch if candidate == "pytorch" else ours, flops=flops, items=batch)


@pytest.mark.parametrize("way", ["convolutions_then_cat", "inception_concat"])
@pytest.mark.parametrize("dtype", dtypes(), ids=str)
def test_concat_against_cat(measure, benchmark, device, dtype: torch.dtype, way: str):
    """The same kernels with and without the copy of a concatenation."""
    batch = 32 if device.type == "cuda" else 1
    benchmark.group = f"concat or slices googlenet.3a n{batch} {dtype}"
    inputs, weights, biases = _branches(batch, device, dtype)

    def convolutions_then_cat() -> Tensor:
        parts = [
            ops.conv2d(x, w, b, padding=w.shape[2] // 2, activation="relu")
            for x, w, b in zip(inputs, weights, biases, strict=True)
        ]
        return torch.cat(parts, 1)

    calls = {
        "convolutions_then_cat": convolutions_then_cat,
        "inception_concat": lambda: _inception_concat(inputs, weights, biases),
    }
    measure(calls[way], items=batch)
