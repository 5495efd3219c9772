"""cuDNN's fused calls behind the kernel contract, on a GPU, against float64 and PyTorch's separate operators."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.cudnn_on_cpu import substitute_cudnn
from support.layout import GuardedSlice, sliced
from torch import Tensor

import fastcnn
from fastcnn import backends, ops
from fastcnn.backends import cudnn

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and graphs exist on a GPU only")

# n, c, h, w, k, filter, stride, padding, dilation, groups
PROBLEMS = [
    (2, 64, 14, 14, 128, (3, 3), 1, 1, 1, 1),
    (2, 64, 15, 13, 256, (1, 1), 1, 0, 1, 1),
    (2, 256, 14, 14, 64, (1, 1), 2, 0, 1, 1),
    (2, 3, 57, 57, 64, (7, 7), 2, 3, 1, 1),
    (1, 7, 9, 11, 17, (3, 3), (2, 1), (2, 0), (1, 2), 1),
    (2, 64, 8, 8, 64, (3, 3), 1, 1, 1, 16),
    (1, 24, 9, 9, 24, (3, 3), 1, 1, 1, 24),
    (5, 16, 1, 1, 10, (1, 1), 1, 0, 1, 1),
    (1, 1, 1, 1, 1, (1, 1), 1, 0, 1, 1),
]
FORMS = {  # scale, bias, residual, ReLU
    "relu": (False, False, False, True),
    "bias_relu": (False, True, False, True),
    "bn_relu": (True, True, False, True),
    "bn_add_relu": (True, True, True, True),
    "bn": (True, True, False, False),
    "plain": (False, False, False, False),
}


@pytest.fixture(autouse=True)
def backend_cudnn(monkeypatch):
    if os.environ.get("FASTCNN_REHEARSE", "0") != "0":
        substitute_cudnn(monkeypatch)
    reason = cudnn.unavailable()
    if reason is not None:
        pytest.skip(reason)
    with backends.use_backend("cudnn", strict=True):
        yield


@contextlib.contextmanager
def tf32(allowed: bool):
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def full_precision():
    with tf32(False):
        yield


def reference(x, weight, scale, bias, residual, relu, geometry, dtype) -> Tensor:
    y = F.conv2d(x.to(dtype), weight.to(dtype), None, *geometry)
    if scale is not None:
        y = y * scale.to(dtype).view(-1, 1, 1)
    if bias is not None:
        y = y + bias.to(dtype).view(-1, 1, 1)
    if residual is not None:
        y = y + residual.to(dtype)
    return F.relu(y) if relu else y


def check(device: torch.device, dtype: torch.dtype, problem: tuple, form: str) -> None:
    n, c, h, w, k, (r, s), stride, padding, dilation, groups = problem
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    geometry = (stride, padding, dilation, groups)
    x = random(n, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = random(k, c // groups, r, s).to(dtype)
    scaled, biased, added, relu = FORMS[form]
    scale, bias = random(k) if scaled else None, random(k) if biased else None
    shape = tuple(F.conv2d(x, weight, None, *geometry).shape)
    residual = random(*shape).to(dtype) if added else None
    results = [reference(x, weight, scale, bias, residual, relu, geometry, d).cpu() for d in (dtype, torch.float64)]
    options = {"scale": scale, "activation": "relu" if relu else "none"}

    # What the fused call leaves in memory must not depend on what was there: it reads its own output with factor 0.
    poison = torch.full(shape, float("nan"), dtype=dtype, device=device)
    del poison
    ours = ops.conv2d(x, weight, bias, *geometry, residual=residual, **options)
    assert_accurate(ours.cpu(), *results)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    out = GuardedSlice(shape, dtype, device)
    given = None if residual is None else sliced(residual)
    ops.conv2d(sliced(x), weight, bias, *geometry, residual=given, **options, out=out.view)
    assert_accurate(out.view.cpu(), *results)
    out.assert_guards_intact()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", cudnn.DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@torch.no_grad()
def test_forms(device, full_precision, problem: tuple, dtype: torch.dtype, form: str):
    check(device, dtype, problem, form)


@pytest.mark.parametrize("form", ["bn_relu", "bn_add_relu", "bn"])
@torch.no_grad()
def test_tf32(device, form: str):
    with tf32(True):  # cuDNN uses it for these channels, in the reference too
        check(device, torch.float32, PROBLEMS[0], form)


@torch.no_grad()
def test_no_copy_of_a_new_output(device, monkeypatch):
    results = []
    inner = torch.cudnn_convolution_relu

    def recorded(*args):
        results.append(inner(*args))
        return results[-1]

    monkeypatch.setattr(torch, "cudnn_convolution_relu", recorded)
    x = torch.randn(2, 64, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    ours = ops.conv2d(x, torch.randn(32, 64, 1, 1, device=device), activation="relu")
    assert [r.data_ptr() for r in results] == [ours.data_ptr()]


@pytest.mark.parametrize("benchmarks", [False, True])
@torch.no_grad()
def test_deterministic_and_benchmark(device, full_precision, monkeypatch, benchmarks: bool):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmarks)
    check(device, torch.float16, PROBLEMS[0], "bn_add_relu")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    check(device, torch.float16, PROBLEMS[0], "bn_add_relu")


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_a_network_verifies(device, name: str):
    model = fastcnn.create_model(name).eval().to(device, torch.bfloat16)
    x = torch.randn(2, 3, 64, 64, device=device, dtype=torch.bfloat16)
    with backends.use_backend("cudnn"):
        result = fastcnn.verify(model, x, backend="cudnn")
    assert result.passed, str(result)
    assert {layer.backend for layer in result.layers if layer.operator == "conv2d"} == {"cudnn"}


@needs_gpu
@torch.no_grad()
def test_other_streams_wait_for_the_folded_weight(full_precision):
    x = torch.randn(2, 64, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(32, 64, 3, 3, device="cuda"), torch.randn(32, device="cuda")
    scale = torch.ones(32, device="cuda")
    late, other = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(late):
        torch.cuda._sleep(50_000_000)
        scale.mul_(3)
        ops.conv2d(x, weight, bias, scale=scale, activation="relu")
    with torch.cuda.stream(other):
        ours = ops.conv2d(x, weight, bias, scale=scale, activation="relu")
    torch.cuda.synchronize()
    theirs = F.relu(F.conv2d(x, weight) * 3 + bias.view(-1, 1, 1))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-1)  # unscaled it would be off by a factor


@needs_gpu
@pytest.mark.parametrize("warm", [True, False], ids=["kept", "made in the graph"])
@torch.no_grad()
def test_graph_replay_with_changed_input_and_scale(warm: bool):
    x = torch.randn(2, 64, 8, 8, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16) / 24
    scale, bias = torch.rand(64, device="cuda"), torch.randn(64, device="cuda")

    def block(weight: Tensor) -> Tensor:
        y = ops.conv2d(x, weight, bias, 1, 1, scale=scale, activation="relu")
        return ops.conv2d(y, weight, bias, 1, 1, scale=scale, residual=x, activation="relu")

    block(weight if warm else weight.clone())  # cuDNN's plans are made outside the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(weight)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        with backends.use_backend("reference"):
            theirs = block(weight)
        torch.testing.assert_close(out, theirs, rtol=3e-2, atol=6e-2)
