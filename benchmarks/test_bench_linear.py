"""Fully connected layers + bias + ReLU. At batch 1 they only stream weights from memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from candidates import backend_names, dtypes

import fastcnn
from fastcnn import ops

LAYERS = {"vgg16.fc7": (4096, 4096), "vgg16.fc6": (25088, 4096), "resnet50.fc": (2048, 1000)}


@pytest.mark.parametrize("candidate", ["pytorch", *backend_names()])
@pytest.mark.parametrize("dtype", dtypes(), ids=str)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("layer", LAYERS)
def test_linear_relu(measure, benchmark, device, layer: str, batch: int, dtype: torch.dtype, candidate: str):
    features, outputs = LAYERS[layer]
    benchmark.group = f"linear_relu {layer} n{batch} {dtype}"
    x = torch.randn(batch, features, device=device, dtype=dtype)
    w = torch.randn(outputs, features, device=device, dtype=dtype)
    bias = torch.randn(outputs, device=device, dtype=dtype)
    calls = {"pytorch": lambda: F.relu(F.linear(x, w, bias), inplace=True)}
    ours = lambda: ops.linear(x, w, bias, activation="relu")  # noqa: E731
    with fastcnn.use_backend(None if candidate in calls else candidate):
        measure(
            calls.get(candidate, ours),
            flops=2 * batch * features * outputs,
            bytes=(w.numel() + x.numel() + batch * outputs) * x.element_size(),
            items=batch,
        )
