"""Streams, CUDA graphs and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import fastcnn
from fastcnn import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams exist on a GPU only")


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(8, 64, 28, 28, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(128, 64, 3, 3, device="cuda", dtype=torch.bfloat16)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-1)


@torch.no_grad()
def test_runs_on_the_current_stream(backend):
    """The input is produced late on a side stream: only a kernel on that stream sees it."""
    x, w = problem()
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    ops.conv2d(x, w, padding=1)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        ours = ops.conv2d(late, w, padding=1)
    stream.synchronize()
    assert_close(ours, F.conv2d(x, w, padding=1))


@torch.no_grad()
def test_graph_replay_with_changed_input(backend):
    x, w = problem()
    static = x.clone(memory_format=torch.preserve_format)

    def block() -> torch.Tensor:
        y = ops.conv2d(static, w, padding=1, activation="relu")
        return ops.max_pool2d(ops.residual_add(y, y), 2)

    block()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block()
    for _ in range(3):
        fresh = torch.randn_like(x)
        static.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert_close(out, F.max_pool2d(F.relu(2 * F.relu(F.conv2d(fresh, w, padding=1))), 2))


@torch.no_grad()
def test_two_threads_on_two_streams(backend):
    x, w = problem()
    expected = F.conv2d(x, w, padding=1)
    torch.cuda.synchronize()

    def work(index: int) -> torch.Tensor:
        with fastcnn.use_backend(backend, strict=True), torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            result = ops.conv2d(x, w, padding=1)
            torch.cuda.current_stream().synchronize()
            return result

    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(work, range(20)):
            assert_close(result, expected)
