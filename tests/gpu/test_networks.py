"""Whole networks on a GPU against cuDNN and float64."""

from __future__ import annotations

import pytest
import torch

import fastcnn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet18", "resnet50", "resnext50_32x4d"])
def test_verifies(backend, device, name: str, dtype: torch.dtype):
    size = 32 if name.endswith("cifar") else 96
    model = fastcnn.create_model(name).eval().to(device, dtype)
    x = torch.randn(2, 3, size, size, device=device, dtype=dtype)
    result = fastcnn.verify(model, x, backend=backend)
    assert result.passed, str(result)
