"""Fixtures of the benchmarks: the device, and one way to time a call and to record what it achieved.

`pytest benchmarks/ --benchmark-only` runs everything on a GPU when there is one, else on the CPU. Each group holds one
problem; its members are the candidates, PyTorch's own operators (`pytorch`) among them. On a GPU the figure that
counts is `extra_info["gpu_ms"]`, from CUDA events around many launches; the wall time also holds Python.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import pytest
import torch

import fastcnn
from fastcnn import _native

LAUNCHES = 20  # calls between two CUDA events


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    # Not inference_mode: weights made in it have no version counter, and real parameters are not made in it.
    with torch.no_grad():
        yield


def gpu_milliseconds(call: Callable[[], object], rounds: int = 15) -> float:
    """Median GPU time of one call, by CUDA events over batches of launches."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(LAUNCHES):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / LAUNCHES)
    return statistics.median(times)


@pytest.fixture
def measure(benchmark, device: torch.device):
    """``measure(call, flops=, bytes=, items=)``: time a call, record achieved FLOP/s, bytes/s and items/s."""

    def run(call: Callable[[], object], *, flops: float = 0, bytes: float = 0, items: int = 0) -> None:
        for _ in range(3):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()

            def synchronous() -> None:
                call()
                torch.cuda.synchronize()

            benchmark.pedantic(synchronous, rounds=10, warmup_rounds=2)
            seconds = gpu_milliseconds(call) / 1e3
            benchmark.extra_info["gpu_ms"] = seconds * 1e3
        else:
            benchmark.pedantic(call, rounds=15, iterations=1, warmup_rounds=2)
            seconds = benchmark.stats.stats.median
        for name, amount in (("flop_per_s", flops), ("bytes_per_s", bytes), ("items_per_s", items)):
            if amount:
                benchmark.extra_info[name] = amount / seconds

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["fastcnn"] = fastcnn.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["instruction_set"] = _native.cpu_instruction_set()
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["cudnn"] = torch.backends.cudnn.version()
