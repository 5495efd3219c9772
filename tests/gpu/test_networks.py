"""Whole networks on a GPU, every operator call and the output, against PyTorch and float64."""

from __future__ import annotations

import pytest
import torch
from support.gpu import BF16, FP16, FP32, TF32, Precision

import fastcnn


@pytest.mark.cost(60)
@pytest.mark.parametrize(
    ("name", "precision"),
    [("resnet50", BF16), ("resnext50_32x4d", FP16), ("resnet18", FP32), ("resnet18", TF32), ("densenet121", BF16)],
    ids=str,
)
def test_verifies(backend, device, name: str, precision: Precision):
    size = 64 if device.type == "cuda" else 32
    torch.manual_seed(0)
    model = fastcnn.create_model(name).eval().to(device, precision.dtype)
    x = torch.randn(2, 3, size, size, device=device, dtype=precision.dtype)
    with precision.applied():
        result = fastcnn.verify(model, x, backend=backend, strict=True)
    assert result.passed, f"{result}\n{result.table()}"
