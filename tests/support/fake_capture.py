"""What stands for CUDA graphs where there is no GPU: replaying a capture runs the same function again.

A real replay does not run Python, reads the tensors that the capture saw, and writes its results where they were. The
fake one keeps to that as far as can be seen: results are written into the tensors of the first run, and what a function
decides in Python is checked to be what it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fastcnn.graph.freezing.gpu.schedule import Place, Schedule, Step
from fastcnn.graph.freezing.gpu.watching import Watching


class RecordingLanes:
    """Lanes that write down who ran where and after whom."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.shared: list[tuple[int, int]] = []  # (address, lane) of memory used away from home
        self.lane = 0

    @contextlib.contextmanager
    def running(self, step: Step) -> Iterator[None]:
        self.steps.append(step)
        with self.on(step.place.lane):
            yield

    @contextlib.contextmanager
    def on(self, lane: int) -> Iterator[None]:
        before, self.lane = self.lane, lane
        yield
        self.lane = before

    def used(self, tensor: Tensor, lane: int) -> None:
        self.shared.append((tensor.data_ptr(), lane))

    def precedes(self, schedule: Schedule) -> Callable[[Place, Place], bool]:
        """Whether one step must have ended before another begins: by lanes and waits alone."""
        after: dict[Place, set[Place]] = {Place(0, 0): set()}
        for step in self.steps:
            place = step.place
            direct = set(step.waits)
            if (before := Place(place.lane, place.number - 1)) in after:
                direct.add(before)
            after[place] = direct.union(*(after[p] for p in direct))
        return lambda first, second: first in after[second]


class FakeGraph:
    def __init__(self, run: Callable[[], Any], result: Any, lanes: int, early: bool) -> None:
        self._run, self._outputs, self.lanes, self.early = run, tree_flatten(result)[0], lanes, early
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for mine, new in zip(self._outputs, tree_flatten(self._run())[0], strict=True):
                mine.copy_(new)

    def bytes(self) -> int:
        return 4096


class FakeTurn:
    """Counts turns; two at once are an error, which the model's lock must prevent."""

    def __init__(self) -> None:
        self.taken, self.held = 0, False

    def __enter__(self) -> None:
        assert not self.held, "two threads at once"
        self.held = True
        self.taken += 1

    def __exit__(self, *error: object) -> None:
        self.held = False


class FakeCapturer:
    """A capturer on the CPU."""

    def __init__(
        self, *, times: dict[int, float] | None = None, early_starts: bool = False, slower_when_early: float = 0.0
    ) -> None:
        self.device = torch.device("cpu")
        self.early_starts = early_starts
        self.turn = FakeTurn()
        self.warm_ups = 0
        self.captures: list[tuple[int, RecordingLanes, Schedule]] = []  # (most lanes, what ran where, schedule)
        self._times, self._slower_when_early = times or {}, slower_when_early

    def warm_up(self, run: Callable[[], Any]) -> Any:
        self.warm_ups += 1
        return run()

    def capture(self, run: Callable[[], Any], most_lanes: int, early: bool = False) -> tuple[FakeGraph, Any]:
        lanes, schedule = RecordingLanes(), Schedule(most_lanes)
        with Watching(self.device, schedule, lanes):
            result = run()
        self.captures.append((most_lanes, lanes, schedule))
        return FakeGraph(run, result, schedule.lanes, early), result

    def milliseconds(self, graph: FakeGraph) -> float:
        return self._times.get(graph.lanes, float(graph.lanes)) + self._slower_when_early * graph.early

    def wait(self) -> None:
        pass
