"""Interleaved timing: candidates take turns in one process, so that a machine that speeds up or slows down, or a
neighbour that comes and goes, meets all of them alike. Times are medians.

Engines keep threads of their own, which spin for a while after a run in case another comes. Where candidates are
engines, a pause lets the last one's threads fall asleep, and a turn is a block of runs whose first is not timed, so
that each is measured as a process that runs nothing else would run it.

CPU: wall time of one or, for short calls, several runs. GPU: CUDA events around a batch of launches, or around the
replay of a CUDA graph that holds them: a small layer takes 3 microseconds on the GPU and its launch from Python 20 to
60, so that events around launches show Python. Runs on the same tensors find them in the L2 cache where they fit.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch

logger = logging.getLogger("fastcnn")

# What is timed: a function without arguments, or several that do the same work on tensors of their own and take turns,
# so that a GPU's L2 cache does not hold the data from the run before.
Candidate: TypeAlias = Callable[[], object] | Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Times of one candidate, in milliseconds a run."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    samples: int
    runs_per_sample: int

    def throughput(self, items: int) -> float:
        """Items a second, where a run does ``items`` of them."""
        return items / self.median_ms * 1e3

    def flops_per_second(self, flops: float) -> float:
        """Achieved FLOP/s, where a run needs ``flops`` of them."""
        return flops / self.median_ms * 1e3

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def interleave(
    candidates: Mapping[str, Candidate],
    device: torch.device | str = "cpu",
    *,
    rounds: int = 20,
    least: int = 3,
    warmup: int = 2,
    seconds: float | None = None,
    round_ms: float = 1.0,
    block_ms: float = 0.0,
    pause_ms: float = 0.0,
    hide_launches: bool = False,
    between: Callable[[str, int], None] | None = None,
) -> dict[str, Timing]:
    """Time candidates against each other.

    Args:
        candidates: by name; each is run ``warmup`` times (at least once) before anything is timed.
        device: where they do their work.
        rounds: turns that each has; every round gives each of them one, each round starting with another.
        warmup: untimed runs of each candidate at the beginning.
        seconds: stop after about this long, though not before ``least`` rounds.
        round_ms: a candidate quicker than this is run several times to a sample, to outlast the clock's error.
        block_ms: a turn lasts about this long: an untimed run first (not of a candidate slower than this), then as many
            samples as fit, at least one. 0: a turn is one sample.
        pause_ms: sleep before every turn.
        hide_launches: GPU only: the time is the GPU's alone, without that of launching. A sample replays a CUDA graph
            of the runs; what cannot be captured in one queues up behind a waiting kernel. Without it, the time is what
            a caller of eager PyTorch waits for.
        between: called with a candidate's name and the round before it is timed.

    Raises:
        ValueError: there are no candidates, or no rounds.
    """
    if not candidates or rounds < 1:
        raise ValueError("there must be at least one candidate and one round")
    device = torch.device(device)
    clock = _Clock(device, hide_launches)
    turns = {name: itertools.cycle([c] if callable(c) else list(c)) for name, c in candidates.items()}
    runs: dict[str, int] = {}
    sample: dict[str, Callable[[], float]] = {}  # takes one: milliseconds for that many runs
    blocks: dict[str, int] = {}  # samples of a turn behind its untimed run; 0: one sample and no such run
    for name, turn in turns.items():
        for _ in range(max(1, warmup)):
            next(turn)()
        once = min(clock.run(turn, 1) for _ in range(2))
        runs[name] = max(1, min(clock.most_runs, round(round_ms / max(once, 1e-4))))
        sample[name] = clock.sampler(turn, runs[name])
        blocks[name] = min(100, int(block_ms / max(runs[name] * once, 1e-4)))
    samples: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    started = time.perf_counter()
    for number in range(rounds):
        if seconds is not None and number >= least and time.perf_counter() - started > seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if between is not None:
                between(name, number)
            time.sleep(pause_ms / 1e3)
            if blocks[name] > 0:
                clock.run(turns[name], 1)
            for _ in range(max(1, blocks[name])):
                samples[name].append(sample[name]() / runs[name])
    return {name: _summarised(values, runs[name]) for name, values in samples.items()}


class _Clock:
    """Milliseconds for a number of runs."""

    def __init__(self, device: torch.device, hide_launches: bool) -> None:
        self._device, self._hide = device, hide_launches and device.type == "cuda"
        # Hidden: a launch queue holds about a thousand kernels, and a run may be several.
        self.most_runs = 200 if self._hide else 1000

    def sampler(self, turn: itertools.cycle[Callable[[], object]], runs: int) -> Callable[[], float]:
        """What takes a sample of so many runs, prepared as far as it can be."""
        if self._hide:
            replay = captured(turn, runs, self._device)
            if replay is not None:
                return functools.partial(self._between_events, replay)
        return functools.partial(self.run, turn, runs)

    def run(self, turn: itertools.cycle[Callable[[], object]], runs: int) -> float:
        def all_runs() -> None:
            for _ in range(runs):
                next(turn)()

        if self._device.type == "cuda":
            return self._between_events(all_runs, launches=runs)
        started = time.perf_counter()
        all_runs()
        return (time.perf_counter() - started) * 1e3

    def _between_events(self, work: Callable[[], object], launches: int = 0) -> float:
        with torch.cuda.device(self._device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if self._hide and launches:
                # About 60 microseconds of launching a run at 2 GHz, 50 ms at most.
                torch.cuda._sleep(min(100_000_000, 120_000 * launches + 200_000))
            begin.record()
            work()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)


@functools.cache
def _capturing_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one, because the allocator keeps memory apart for each


def captured(
    turn: itertools.cycle[Callable[[], object]], runs: int, device: torch.device
) -> Callable[[], object] | None:  # fmt: skip
    """The replay of a CUDA graph of so many runs, or None where they cannot be captured. They must have run before."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.device(device), torch.cuda.stream(_capturing_stream(device)):
            torch.cuda.synchronize()
            next(turn)()  # what is made once for a stream (workspaces) is made outside the graph
            torch.cuda.synchronize()
            # Not torch.cuda.graph(), which collects garbage and empties the allocator's cache each time.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                for _ in range(runs):
                    next(turn)()
            finally:
                graph.capture_end()
            graph.replay()
            torch.cuda.synchronize()
    except RuntimeError as error:
        # After a failed capture the allocator goes on waiting for its end.
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end is not None:
            with contextlib.suppress(RuntimeError):
                end(torch.cuda.current_device() if device.index is None else device.index, pool)
        logger.info("a candidate cannot be captured in a CUDA graph, its launches are timed: %s", error)
        return None
    return graph.replay


def _summarised(values: list[float], runs: int) -> Timing:
    ordered = torch.tensor(values, dtype=torch.float64)
    low, middle, high = torch.quantile(ordered, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return Timing(middle, low, high, len(values), runs)
