"""Whole networks against PyTorch's eager mode on channels-last memory, in the same group."""

from __future__ import annotations

import copy

import pytest
import torch
from candidates import dtypes

import fastcnn

NETWORKS = {"resnet18": 224, "resnet50": 224, "resnext50_32x4d": 224, "resnet20_cifar": 32}


@pytest.mark.parametrize("candidate", ["pytorch", "fastcnn"])
@pytest.mark.parametrize("dtype", dtypes(), ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_network(measure, benchmark, device, network: str, dtype: torch.dtype, candidate: str):
    """``pytorch`` is torchvision's own model where it has the network, else ours on PyTorch's operators."""
    batch = 32 if device.type == "cuda" else 1
    benchmark.group = f"{network} n{batch} {dtype}"
    size = NETWORKS[network]
    x = torch.randn(batch, 3, size, size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    model = fastcnn.create_model(network).eval().to(device, dtype)
    backend = None
    if candidate == "pytorch":
        theirs = _torchvision(network)
        if theirs is None:
            backend = "reference"
        else:
            theirs.load_state_dict(copy.deepcopy(model.state_dict()))
            model = theirs.eval().to(device, dtype, memory_format=torch.channels_last)
    with fastcnn.use_backend(backend):
        measure(lambda: model(x), items=batch)


def _torchvision(network: str) -> torch.nn.Module | None:
    try:
        from torchvision import models
    except ImportError:
        return None
    return getattr(models, network)(weights=None) if hasattr(models, network) else None
