"""GPU time of calls: several launches captured in a CUDA graph, replayed between two events, candidates in turns.

A graph holds no Python and no launches from the host, so its time is the GPU's. Calls that do the same work on tensors
of their own follow each other in it, so that one does not find in the L2 cache what the one before left there.
On a CPU (rehearsals) the calls just run, by the wall clock.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

MOST_SETS = 256
LEAST_LAUNCHES, MOST_LAUNCHES = 3, 256
REPLAY_MS = 1.0  # a replay lasts about this long, so that starting it does not count


def sets_against_cache(bytes_of_set: int, device: torch.device) -> int:
    """Sets of tensors to go round, so that together they are twice what the L2 cache holds."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, math.ceil(2 * cache / bytes_of_set))


class Replay:
    """Calls, one for each set of tensors, as one thing to time."""

    def __init__(self, calls: Sequence[Callable[[], object]], device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._calls = calls
        for call in calls:
            call()
        self._graph: torch.cuda.CUDAGraph | None = None
        self.launches = len(calls)
        if self._on_gpu:
            self._capture(self._eager_milliseconds())
            once = self.milliseconds()
            if once * self.launches < REPLAY_MS / 2 and self.launches < MOST_LAUNCHES:
                self._capture(once)  # launching took most of the time before

    def _capture(self, milliseconds: float) -> None:
        """As many rounds of the calls as take about REPLAY_MS, at so many milliseconds a call."""
        wanted = max(LEAST_LAUNCHES, min(MOST_LAUNCHES, math.ceil(REPLAY_MS / max(milliseconds, 1e-3))))
        rounds = math.ceil(wanted / len(self._calls))
        self.launches = rounds * len(self._calls)
        self._graph = self._captured(rounds)
        self.milliseconds()  # the first replay also uploads the graph

    def _eager_milliseconds(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for call in self._calls[:3]:
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / len(self._calls[:3])

    def _captured(self, rounds: int) -> torch.cuda.CUDAGraph:
        # Not torch.cuda.graph, which empties PyTorch's memory cache every time.
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # Results that a call allocates live on for a round: otherwise every call would write the same, cached, memory.
        results: deque[Any] = deque(maxlen=len(self._calls))
        with torch.cuda.stream(side):
            self._calls[0]()  # whatever is made once a stream
            torch.cuda.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for _ in range(rounds):
                    for call in self._calls:
                        results.append(call())
            finally:
                graph.capture_end()
            results.clear()
        torch.cuda.current_stream().wait_stream(side)
        return graph

    def milliseconds(self) -> float:
        """Of one call, in one replay."""
        if self._graph is None:
            started = time.perf_counter()
            for i in range(self.launches):
                self._calls[i % len(self._calls)]()
            return (time.perf_counter() - started) * 1e3 / self.launches
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / self.launches


def in_turns(replays: Mapping[str, Replay], rounds: int) -> dict[str, dict[str, Any]]:
    """Median and quartiles of each, in milliseconds a call. Each round begins with another one."""
    samples: dict[str, list[float]] = {name: [] for name in replays}
    names = list(replays)
    for number in range(rounds):
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            samples[name].append(replays[name].milliseconds())
    return {name: summary(values) | {"launches": replays[name].launches} for name, values in samples.items()}


def summary(values: Sequence[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    rounded = [round(value, 7) for value in (middle, low, high)]
    return dict(zip(("median_ms", "q1_ms", "q3_ms"), rounded, strict=True)) | {"samples": len(values)}
