"""In evaluation every layer of every network is an operator that the C++ backend serves: none is left to PyTorch.

Only the choice of kernels is asked, for the real sizes; nothing is computed, so that the largest networks take no time.
"""

from __future__ import annotations

import pytest
import torch
from support.counting import on_meta
from torch.utils._python_dispatch import TorchDispatchMode

import fastcnn
from fastcnn.backends import Call, intercept

LAYERS = ("conv", "addmm", "mm", "batch_norm", "pool", "linear", "relu", "mean")  # in the names of ATen's operators


class Layers(TorchDispatchMode):
    """Names of ATen's operators that compute a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        name = str(func)
        if name.startswith("aten.") and any(layer in name for layer in LAYERS):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", fastcnn.list_models())
@torch.no_grad()
def test_no_network_takes_the_reference_path(name: str, dtype: torch.dtype) -> None:
    model = on_meta(name).to(dtype).to_empty(device="cpu").eval()
    calls: list[Call] = []
    fastcnn.reset_fallbacks()
    with fastcnn.use_backend("cpp", strict=True), intercept(calls.append), Layers() as layers:
        model(torch.zeros(2, *fastcnn.models.model_info(name).input_size, dtype=dtype))
    assert layers.names == []
    assert {call.backend for call in calls} == {"cpp"}
    assert all(call.refused is None for call in calls)
    assert fastcnn.fallbacks() == {}
    operators = [call.operator for call in calls]
    assert operators.count("conv2d") >= 3
    assert "linear" in operators
