"""Streams, CUDA graphs and threads, for every operator."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.accuracy import assert_accurate
from support.gpu import Random
from support.gpu_operators import OPERATORS, SHAPE, Operands, operands
from torch import Tensor

import fastcnn

needs_streams = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams exist on a GPU only")
every_operator = pytest.mark.parametrize("name", list(OPERATORS))

DTYPE = torch.bfloat16


def inputs(device: torch.device, name: str) -> tuple[Tensor, Operands]:
    x = Random(name, device)(*SHAPE, dtype=DTYPE).contiguous(memory_format=torch.channels_last)
    return x, operands(device, DTYPE)


def check(ours: Tensor, name: str, x: Tensor, p: Operands) -> None:
    theirs = OPERATORS[name].theirs
    assert_accurate(ours, theirs(x, p), theirs(x.double(), {key: value.double() for key, value in p.items()}))


@torch.no_grad()
@every_operator
def test_repeats_bit_for_bit(backend, device, name: str):
    x, p = inputs(device, name)
    first = OPERATORS[name].ours(x, p)
    check(first, name, x, p)
    for _ in range(3):
        assert torch.equal(OPERATORS[name].ours(x, p), first)


@needs_streams
@torch.no_grad()
@every_operator
def test_runs_on_the_current_stream(backend, device, name: str):
    """The input is produced late on a side stream: only a kernel on that stream sees it."""
    x, p = inputs(device, name)
    expected = OPERATORS[name].ours(x, p)
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        ours = OPERATORS[name].ours(late, p)
    stream.synchronize()
    assert torch.equal(ours, expected)


@needs_streams
@torch.no_grad()
@every_operator
def test_graph_replay_with_changed_input(backend, device, name: str):
    x, p = inputs(device, name)
    static = x.clone(memory_format=torch.preserve_format)
    OPERATORS[name].ours(static, p)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OPERATORS[name].ours(static, p)
    random = Random((name, "fresh"), device)
    for _ in range(3):
        fresh = random(*SHAPE, dtype=DTYPE).contiguous(memory_format=torch.channels_last)
        static.copy_(fresh)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        check(out, name, fresh, p)


@needs_streams
@torch.no_grad()
@every_operator
def test_two_threads_on_two_streams(backend, device, name: str):
    """Each with an input of its own, in turns with the other's."""
    p = operands(device, DTYPE)
    own = [Random((name, i), device)(*SHAPE, dtype=DTYPE).contiguous(memory_format=torch.channels_last) for i in (0, 1)]
    expected = [OPERATORS[name].ours(x, p) for x in own]
    torch.cuda.synchronize()

    def work(index: int) -> list[Tensor]:
        stream = torch.cuda.Stream()
        with fastcnn.use_backend(backend, strict=True), torch.cuda.stream(stream), torch.no_grad():
            results = [OPERATORS[name].ours(own[index], p) for _ in range(20)]
            stream.synchronize()
        return results

    with ThreadPoolExecutor(2) as pool:
        for results, wanted in zip(pool.map(work, (0, 1)), expected, strict=True):
            assert all(torch.equal(result, wanted) for result in results)


@needs_streams
@torch.no_grad()
def test_a_weight_first_seen_inside_a_capture(backend, device):
    """What is derived from the weight there is made by each replay, and kept for no other call."""
    x, p = inputs(device, "conv2d")
    OPERATORS["conv2d"].ours(x, p)  # compiled outside
    p = {**p, "weight": p["weight"].clone()}
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = OPERATORS["conv2d"].ours(x, p)
    check(OPERATORS["conv2d"].ours(x, p), "conv2d", x, p)  # nothing has been replayed yet
    p["weight"].copy_(p["weight"].flip(0))
    graph.replay()
    torch.cuda.synchronize()
    check(out, "conv2d", x, p)
