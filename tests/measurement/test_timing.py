"""Interleaved timing."""

from __future__ import annotations

import contextlib
import itertools
import time

import pytest
import torch

from fastcnn.measurement import Timing, interleave, timing


def test_medians_tell_a_slow_candidate_from_a_quick_one():
    found = interleave({"slow": lambda: time.sleep(0.004), "quick": lambda: time.sleep(0.001)}, rounds=9, round_ms=0.0)
    assert list(found) == ["slow", "quick"]
    assert found["slow"].median_ms > 3.5
    assert 0.9 < found["quick"].median_ms < found["slow"].median_ms
    for one in found.values():
        assert one.q1_ms <= one.median_ms <= one.q3_ms
        assert one.samples == 9
        assert one.runs_per_sample == 1


def test_candidates_take_turns_and_each_begins_a_round():
    order = []
    interleave({"a": lambda: None, "b": lambda: None, "c": lambda: None}, rounds=3,
               between=lambda name, number: order.append((number, name)))  # fmt: skip
    assert [name for _, name in order] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_short_runs_are_repeated_and_rotated():
    seen = []
    found = interleave({"x": [lambda: seen.append(0), lambda: seen.append(1)]}, rounds=2, round_ms=0.2)
    assert found["x"].runs_per_sample > 10
    assert seen[:6] == [0, 1, 0, 1, 0, 1]
    assert abs(seen.count(0) - seen.count(1)) <= 1


def test_a_time_limit_stops_after_three_rounds_at_least():
    found = interleave({"x": lambda: time.sleep(0.01)}, rounds=1000, seconds=0.05, round_ms=0.0)
    assert 3 <= found["x"].samples < 50


def test_a_turn_may_be_a_block_of_runs_behind_an_untimed_one_and_a_pause():
    runs = []

    def work():
        runs.append(time.perf_counter())
        time.sleep(0.01 if paused() else 0.004)  # slow when it comes first after a pause, as cold caches would make it

    def paused():
        return len(runs) < 2 or runs[-1] - runs[-2] > 0.03

    found = interleave({"x": work}, rounds=3, round_ms=0.0, block_ms=25, pause_ms=40)
    assert found["x"].samples % 3 == 0
    assert 9 <= found["x"].samples <= 18
    assert len(runs) == 2 + 2 + 3 + found["x"].samples
    assert found["x"].median_ms < 9


def test_a_candidate_slower_than_its_turn_has_one_timed_run():
    runs = []
    found = interleave({"x": lambda: (runs.append(0), time.sleep(0.01))}, rounds=3, block_ms=5)
    assert found["x"].samples == 3
    assert len(runs) == 2 + 2 + 3


def test_throughput_and_flops():
    timing = Timing(2.0, 1.9, 2.2, 5, 1)
    assert timing.throughput(8) == pytest.approx(4000)
    assert timing.flops_per_second(6e6) == pytest.approx(3e9)


def test_nothing_to_time_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        interleave({})
    with pytest.raises(ValueError, match="at least one"):
        interleave({"x": lambda: None}, rounds=0)


@pytest.mark.gpu
@pytest.mark.parametrize("hide_launches", [False, True])
def test_cuda_events(hide_launches):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    small, large = (torch.randn(n, n, device="cuda") for n in (256, 4096))
    found = interleave({"small": lambda: small @ small, "large": lambda: large @ large}, "cuda", rounds=5,
                       hide_launches=hide_launches)  # fmt: skip
    assert 0 < found["small"].median_ms < found["large"].median_ms


class FakeGPU:
    """Enough of torch.cuda for the clock: a graph replays the Python functions that ran while it was captured."""

    def __init__(self, monkeypatch, can_capture):
        self.sleeps, self.replays, gpu = [], 0, self

        class Event:
            def __init__(self, enable_timing):
                self.time = 0.0

            def record(self):
                self.time = gpu.now()

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.time - self.time

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                pass

            def capture_end(self):
                if not can_capture:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self):
                gpu.replays += 1

        self._ticks = itertools.count()
        timing._capturing_stream.cache_clear()
        for name, fake in {
            "Event": Event, "CUDAGraph": Graph, "synchronize": lambda *args: None, "_sleep": self.sleeps.append,
            "device": lambda device: contextlib.nullcontext(), "stream": lambda stream: contextlib.nullcontext(),
            "Stream": lambda device: object(), "graph_pool_handle": lambda: (0, 1), "current_device": lambda: 0,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: None, raising=False)

    def now(self):
        return next(self._ticks) * 0.1  # every sample takes 0.1 ms


@pytest.mark.parametrize("can_capture", [True, False])
def test_launches_are_hidden_in_a_graph_or_behind_a_sleeping_kernel(monkeypatch, can_capture):
    gpu = FakeGPU(monkeypatch, can_capture)
    calls = []
    found = interleave({"x": lambda: calls.append(1)}, "cuda", rounds=4, round_ms=1.0, hide_launches=True)["x"]
    timing._capturing_stream.cache_clear()
    assert found.runs_per_sample == 10
    assert found.median_ms == pytest.approx(0.01)
    estimates = 2
    assert gpu.replays == (1 + 4 if can_capture else 0)
    assert len(gpu.sleeps) == estimates + (0 if can_capture else 4)
    assert len(calls) == 2 + estimates + 1 + 10 + (0 if can_capture else 4 * 10)
