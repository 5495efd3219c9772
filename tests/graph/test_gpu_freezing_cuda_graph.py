"""How CUDA graphs are made and ordered, with stubs for CUDA's streams, events and graphs: the calls and their order.

What the stubs cannot show is in tests/gpu/test_freezing.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastcnn
from fastcnn.graph.freezing.gpu import freeze_on_gpu
from fastcnn.graph.freezing.gpu.cuda_graph import CudaCapturer, StreamLanes
from fastcnn.graph.freezing.gpu.schedule import Schedule
from fastcnn.graph.freezing.gpu.watching import CannotBeCaptured

CPU = torch.device("cpu")


class Cuda:
    """Stands for torch.cuda; ``log`` says what was asked of it, in order."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.streams = 0
        self.current = self.Stream(self)
        self.capturing = False
        self.runs: list[Any] = []  # what replays do: nothing by themselves
        self.fails = False

    class Stream:
        def __init__(self, cuda: Cuda) -> None:
            self.cuda, self.number = cuda, cuda.streams
            cuda.streams += 1

        def wait_event(self, event: Any) -> None:
            self.cuda.log.append(("wait", self.number, event.where))

        def wait_stream(self, other: Any) -> None:
            self.cuda.log.append(("wait stream", self.number, other.number))

        def synchronize(self) -> None:
            self.cuda.log.append(("synchronize", self.number))

    class Event:
        def __init__(self, cuda: Cuda) -> None:
            self.cuda, self.where = cuda, None

        def record(self, stream: Any = None) -> None:
            stream = stream or self.cuda.current
            self.cuda.log.append(("record", stream.number))
            self.where = (stream.number, len(self.cuda.log))

        def synchronize(self) -> None:
            self.cuda.log.append(("synchronize event", self.where))

        def elapsed_time(self, other: Any) -> float:
            return 1.0

    class Graph:
        def __init__(self, cuda: Cuda) -> None:
            self.cuda = cuda

        def pool(self) -> tuple[int, int]:
            return (0, 7)

        def replay(self) -> None:
            self.cuda.log.append(("replay", self.cuda.current.number))

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.log.append(("begin", stream.number))
        with self.stream(stream):
            yield
            if self.fails:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        self.log.append(("end", stream.number))


class Guard:
    def __init__(self, device: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    stub = Cuda()
    for name, value in {
        "Stream": lambda device=None: stub.Stream(stub),
        "Event": lambda enable_timing=False: stub.Event(stub),
        "CUDAGraph": lambda: stub.Graph(stub),
        "stream": stub.stream,
        "graph": stub.graph,
        "device": Guard,
        "current_stream": lambda device=None: stub.current,
        "graph_pool_handle": lambda: (0, 7),
        "is_current_stream_capturing": lambda: stub.capturing,
        "memory_snapshot": lambda: [
            {"segment_pool_id": (0, 7), "total_size": 2048}, {"segment_pool_id": (0, 0), "total_size": 1 << 30}
        ],
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: stub.log.append(("clear",)), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *a: stub.log.append(("give up", *a)), raising=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: stub.log.append(("held", s.number)))
    return stub


def inception() -> tuple[torch.nn.Module, torch.Tensor]:
    model = fastcnn.nn.Inception(16, 8, 8, 8, 8, 8, 8).eval()
    x = torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        model(x)
    return model, x


@torch.no_grad()
def test_branches_fork_and_join(cuda: Cuda) -> None:
    model, x = inception()
    capturer = CudaCapturer(CPU)
    graph, result = capturer.capture(lambda: model(x), 4)
    assert torch.equal(result, model(x))
    assert graph.lanes == 3
    assert graph.bytes() == 2048
    names = [entry[0] for entry in cuda.log]
    assert names[0] == names[-1] == "clear", "workspaces are the graph's own"
    begin, end = names.index("begin"), names.index("end")
    origin = cuda.log[begin][1]
    inside = cuda.log[begin + 1 : end]
    used = {entry[1] for entry in inside if entry[0] == "record"}
    assert len(used) == 3
    for stream in used - {origin}:
        mine = [entry for entry in inside if entry[1] == stream and entry[0] != "held"]
        assert mine[0][0] == "wait", "a stream joins the capture before it is used"
        assert mine[-1][0] == "record"
    recorded = {entry[1] for entry in inside if entry[0] == "record"} - {origin}
    joined = {entry[2][0] for entry in inside if entry[:2] == ("wait", origin)}
    assert joined == recorded, "the capture's stream waits for all others in the end"
    assert any(entry[0] == "held" for entry in inside)


@torch.no_grad()
def test_one_lane_is_the_captures_own_stream(cuda: Cuda) -> None:
    model, x = inception()
    graph, _ = CudaCapturer(CPU).capture(lambda: model(x), 1)
    assert graph.lanes == 1
    assert "wait" not in {entry[0] for entry in cuda.log}


def test_what_cuda_refuses(cuda: Cuda) -> None:
    cuda.fails = True
    before = cuda.current
    with pytest.raises(CannotBeCaptured, match="CUDA refuses it: CUDA error: operation not permitted when stream is"):
        CudaCapturer(CPU).capture(lambda: None, 1)
    assert cuda.current is before
    assert ("give up", None, (0, 7)) in cuda.log
    assert cuda.log[-1] == ("clear",)


def test_streams_are_not_taken_twice(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch hands out 32 streams in turn: the capture's own may come again."""
    fresh = [cuda.Stream(cuda) for _ in range(3)]
    handed_out = iter([cuda.current, *fresh])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: next(handed_out))
    assert StreamLanes(CPU, 4)._streams == [cuda.current, *fresh]


@torch.no_grad()
def test_a_call_waits_copies_replays_and_says_so(cuda: Cuda) -> None:
    model, x = inception()
    frozen = freeze_on_gpu(model, [x], None, capturer=CudaCapturer(CPU), most_lanes=1)
    assert frozen.memory().graph == 2048
    cuda.log.clear()
    elsewhere = cuda.Stream(cuda)
    frozen(x)
    with cuda.stream(elsewhere):
        frozen.replay()
    home = cuda.current.number
    steps = [entry[:2] for entry in cuda.log]
    one = [("wait", home), ("replay", home), ("record", home)]
    assert steps == one + [(name, elsewhere.number) for name, _ in one]
    assert cuda.log[3] == ("wait", elsewhere.number, (home, 3)), "the second waits for the end of the first"
    cuda.capturing = True
    with pytest.raises(RuntimeError, match="another CUDA graph is captured"):
        frozen(x)
    cuda.capturing = False
    frozen(x)  # the lock was given back
    del frozen
    assert cuda.log[-1][0] == "synchronize event"


@torch.no_grad()
def test_timing_replays(cuda: Cuda) -> None:
    model, x = inception()
    capturer = CudaCapturer(CPU)
    graph, _ = capturer.capture(lambda: model(x), 1)
    assert capturer.milliseconds(graph) == 1.0
    assert capturer.warm_up(lambda: 3) == 3
    assert Schedule(1).ends() == []
