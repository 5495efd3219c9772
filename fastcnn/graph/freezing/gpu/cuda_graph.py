"""CUDA graphs: how a run becomes one, on several streams, and how its replays are ordered among streams and threads."""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastcnn import _native
from fastcnn.graph.freezing.gpu.schedule import Place, Schedule, Step
from fastcnn.graph.freezing.gpu.watching import CannotBeCaptured, Watching

T = TypeVar("T")

_ONE_CAPTURE = threading.Lock()  # PyTorch has one at a time in a process


class Graph(Protocol):
    """A run that can be replayed."""

    lanes: int  # streams that its branches had
    early: bool  # whether its kernels begin before the one ahead of them has ended

    def replay(self) -> None: ...

    def bytes(self) -> int:
        """Of the memory in which its activations and results lie."""


class Capturer(Protocol):
    """What makes graphs, and orders their replays. :class:`CudaCapturer` is the real one."""

    device: torch.device
    early_starts: bool  # whether it can make graphs whose kernels begin before the one ahead of them has ended

    def warm_up(self, run: Callable[[], T]) -> T:
        """Run once, apart from the caller's stream but after its work, and wait for the end."""

    def capture(self, run: Callable[[], T], most_lanes: int, early: bool = False) -> tuple[Graph, T]:
        """The graph of a run and the run's result, which each replay computes again. Nothing was computed yet.

        Args:
            early: kernels begin early where they can. They read weights then while what is ahead of them still runs.
        """

    def milliseconds(self, graph: Graph) -> float: ...

    @property
    def turn(self) -> contextlib.AbstractContextManager[Any]:
        """Around a replay and what belongs to it: behind the last turn, on whatever stream that was. One at a time."""

    def wait(self) -> None:
        """Until the last turn is over."""


class StreamLanes:
    """Lanes as streams of a capture, or of an ordinary run. The first is the current stream."""

    def __init__(self, device: torch.device, most: int) -> None:
        self._streams = [torch.cuda.current_stream(device)]
        while len(self._streams) < most:
            stream = torch.cuda.Stream(device)
            if stream not in self._streams:  # PyTorch hands out 32 streams in turn
                self._streams.append(stream)
        self._ends: dict[Place, torch.cuda.Event] = {}
        self._note(Place(0, 0))

    def _note(self, place: Place) -> None:
        event = torch.cuda.Event()
        event.record(self._streams[place.lane])
        self._ends[place] = event

    @contextlib.contextmanager
    def running(self, step: Step) -> Iterator[None]:
        stream = self._streams[step.place.lane]
        for place in step.waits:
            stream.wait_event(self._ends[place])
        with torch.cuda.stream(stream):
            yield
        self._note(step.place)

    def on(self, lane: int) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._streams[lane])

    def used(self, tensor: Tensor, lane: int) -> None:
        tensor.record_stream(self._streams[lane])

    def join(self, schedule: Schedule) -> None:
        for place in schedule.ends():
            self._streams[0].wait_event(self._ends[place])


class CudaGraph:
    """A :class:`torch.cuda.CUDAGraph` and its memory pool."""

    def __init__(self, graph: torch.cuda.CUDAGraph, lanes: int, early: bool) -> None:
        self._graph, self.lanes, self.early = graph, lanes, early
        self.replay = graph.replay
        pool = tuple(graph.pool())
        segments = torch.cuda.memory_snapshot()
        self._bytes = sum(s["total_size"] for s in segments if tuple(s.get("segment_pool_id", ())) == pool)

    def bytes(self) -> int:
        return self._bytes


class Turn:
    """Orders replays among streams by an event; held by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._guard = torch.cuda.device(device)
        self.over = torch.cuda.Event()

    def __enter__(self) -> None:
        self._guard.__enter__()
        try:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a frozen model cannot run while another CUDA graph is captured: it is one itself")
            self._stream = torch.cuda.current_stream()
            self._stream.wait_event(self.over)
        except BaseException:
            self._guard.__exit__(None, None, None)
            raise

    def __exit__(self, *error: Any) -> None:
        self.over.record(self._stream)
        self._guard.__exit__(*error)


class CudaCapturer:
    """Makes CUDA graphs on one GPU, named as a tensor's ``device`` names it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.early_starts = _native.build_info()["cuda"] and torch.cuda.get_device_capability(device) >= (9, 0)
        with torch.cuda.device(self.device):
            self._stream = torch.cuda.Stream(self.device)
        self.turn = Turn(self.device)

    def warm_up(self, run: Callable[[], T]) -> T:
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = run()
            self._stream.synchronize()
        return result

    def capture(self, run: Callable[[], T], most_lanes: int, early: bool = False) -> tuple[CudaGraph, T]:
        """Raises CannotBeCaptured with CUDA's reason."""
        graph, schedule, pool = torch.cuda.CUDAGraph(), Schedule(most_lanes), torch.cuda.graph_pool_handle()
        # A capture that fails leaves its stream the current one; the outer block does not.
        with _ONE_CAPTURE, torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            # Workspaces belong to streams and are kept for later calls: those of the graph must be the graph's alone.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                # Only this thread's calls can spoil the capture: others may go on allocating and copying.
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                    lanes = StreamLanes(self.device, most_lanes)
                    with Watching(self.device, schedule, lanes), _early_starts(early):
                        result = run()
                    lanes.join(schedule)
            except torch.cuda.OutOfMemoryError:
                _give_up(self.device, pool)
                raise
            except RuntimeError as error:
                _give_up(self.device, pool)
                first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
                reason = next(iter(str(first).splitlines()), type(first).__name__)
                raise CannotBeCaptured(f"CUDA refuses it: {reason}") from error
            finally:
                torch._C._cuda_clearCublasWorkspaces()
            return CudaGraph(graph, schedule.lanes, early), result

    def milliseconds(self, graph: Graph) -> float:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            times = []
            for _ in range(3 + 15):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
        return statistics.median(times[3:])

    def wait(self) -> None:
        self.turn.over.synchronize()


@contextlib.contextmanager
def _early_starts(on: bool) -> Iterator[None]:
    """Inside, this thread's launches of fastcnn's CUDA kernels are such that they may begin early."""
    if not on:
        yield
        return
    before = _native.cuda_set_early_starts(True)
    try:
        yield
    finally:
        _native.cuda_set_early_starts(before)


def capturer_on(device: torch.device | None = None) -> Capturer | None:
    """For this GPU, or for the current one; None where there is none."""
    if not torch.cuda.is_available():
        return None
    return CudaCapturer(device or torch.device("cuda", torch.cuda.current_device()))


def _give_up(device: torch.device, pool: Any) -> None:
    """A capture that failed leaves the allocator in wait for its end, and freed memory in use."""
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        with contextlib.suppress(RuntimeError):
            end(device.index, pool)
