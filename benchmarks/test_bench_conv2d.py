"""conv2d + batch norm + ReLU on layers of the classic networks, batch 1 (CPU) or 32 (GPU)."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from candidates import backend_names, dtypes

import fastcnn
from fastcnn import ops


class Layer(NamedTuple):
    name: str
    c: int
    size: int
    k: int
    filter: int
    stride: int = 1
    groups: int = 1

    @property
    def out_size(self) -> int:
        return (self.size + 2 * (self.filter // 2) - self.filter) // self.stride + 1

    def flops(self, batch: int) -> int:
        return 2 * batch * self.out_size**2 * self.k * self.filter**2 * self.c // self.groups

    def values(self, batch: int) -> int:
        """Input, weight and output values: the least that must be moved."""
        weights = self.k * self.filter**2 * self.c // self.groups
        return batch * (self.size**2 * self.c + self.out_size**2 * self.k) + weights


LAYERS = [
    Layer("resnet50.stem", 3, 224, 64, 7, 2),
    Layer("resnet50.layer1.reduce", 256, 56, 64, 1),
    Layer("resnet50.layer1.conv3x3", 64, 56, 64, 3),
    Layer("resnet50.layer1.expand", 64, 56, 256, 1),
    Layer("resnet50.layer2.downsample", 256, 56, 512, 1, 2),
    Layer("resnet50.layer3.conv3x3", 256, 14, 256, 3),
    Layer("resnet50.layer4.conv3x3", 512, 7, 512, 3),
    Layer("resnet50.layer4.reduce", 2048, 7, 512, 1),
    Layer("vgg16.conv2_2", 128, 112, 128, 3),
    Layer("resnext50.layer2.grouped", 256, 28, 256, 3, 1, 32),
    Layer("googlenet.3a.5x5", 16, 28, 32, 5),
]


@pytest.mark.parametrize("candidate", ["pytorch", "pytorch_folded", *backend_names()])
@pytest.mark.parametrize("dtype", dtypes(), ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_conv_bn_relu(measure, benchmark, device, layer: Layer, dtype: torch.dtype, candidate: str):
    batch = 32 if device.type == "cuda" else 1
    benchmark.group = f"conv_bn_relu {layer.name} n{batch} {dtype}"
    x = torch.randn(batch, layer.c, layer.size, layer.size, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(layer.k, layer.c // layer.groups, layer.filter, layer.filter, device=device, dtype=dtype)
    w = w.contiguous(memory_format=torch.channels_last)
    mean, var, gamma, beta = (torch.rand(layer.k, device=device) for _ in range(4))
    geometry = {"stride": layer.stride, "padding": layer.filter // 2, "groups": layer.groups}
    folded, bias = w.clone(), torch.randn(layer.k, device=device, dtype=dtype)
    norm = [v.to(dtype) for v in (mean, var, gamma, beta)]
    calls = {
        "pytorch": lambda: F.relu(F.batch_norm(F.conv2d(x, w, **geometry), *norm), inplace=True),
        "pytorch_folded": lambda: F.relu(F.conv2d(x, folded, bias, **geometry), inplace=True),
    }
    ours = lambda: ops.conv_bn_relu(x, w, mean, var, gamma, beta, **geometry)  # noqa: E731
    with fastcnn.use_backend(candidate if candidate not in calls else None):
        measure(
            calls.get(candidate, ours),
            flops=layer.flops(batch),
            bytes=layer.values(batch) * x.element_size(),
            items=batch,
        )
