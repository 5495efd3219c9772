"""A user's network made fast on a GPU: torch.compile, optimize."""

from __future__ import annotations

import copy

import pytest
import torch
from support.accuracy import assert_accurate
from support.gpu import Random
from support.networks import small_input, small_network
from support.plain_twin import randomise_batch_norms
from torch import nn

import fastcnn
from fastcnn.graph import dynamo


@torch.no_grad()
@pytest.mark.cost(4)
def test_compile_backend(backend, device):
    model = small_network().to(device).eval()
    x = small_input().to(device)
    with fastcnn.use_backend("reference"):
        plain = model(x)
        exact = copy.deepcopy(model).double()(x.double())
    torch._dynamo.reset()
    dynamo.register()
    assert_accurate(torch.compile(model, backend="fastcnn")(x), plain, exact)
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.cost(20)
def test_optimized_resnet18_of_torchvision(backend, device):
    """In bf16, all its multiply-accumulates on the backend's kernels; restored, it is a network again."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = randomise_batch_norms(torchvision.models.resnet18()).eval().to(device, torch.bfloat16)
    size = 96 if device.type == "cuda" else 32
    x = Random("resnet18", device)(2, 3, size, size, dtype=torch.bfloat16)
    plain, exact = model(x), copy.deepcopy(model).double()(x.double())
    optimized = fastcnn.optimize(model, x)
    assert_accurate(optimized(x), plain, exact)
    assert fastcnn.report(optimized).fused_fraction == 1
    assert_accurate(fastcnn.restore(optimized)(x), plain, exact)


@torch.no_grad()
def test_optimized_in_both_layouts(backend, device):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 1)
    )
    model = randomise_batch_norms(model).eval().to(device, torch.bfloat16)
    x = Random("layouts", device)(2, 3, 12, 12, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()(x.double())
    optimized = fastcnn.optimize(model, x)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        laid = x.contiguous(memory_format=memory_format)
        ours, plain = optimized(laid), model(laid)
        assert_accurate(ours, plain, exact)
        assert ours.stride() == plain.stride()


@torch.no_grad()
def test_an_optimized_model_moves_to_the_gpu_and_back(device):
    """What was folded and packed for one device is not used on the other."""
    torch.manual_seed(0)
    model = small_network().eval()
    optimized, x = fastcnn.optimize(model), small_input()
    exact = copy.deepcopy(model).double()(x.double())
    with fastcnn.exact():
        here = optimized(x)
        assert_accurate(here, model(x), exact)
        there = optimized.to(device)(x.to(device))
        assert there.device.type == device.type
        assert_accurate(there.cpu(), copy.deepcopy(model).to(device)(x.to(device)).cpu(), exact)
        assert torch.equal(optimized.to("cpu")(x), here)
