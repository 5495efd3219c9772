"""Compiles Triton kernels before they are needed, in processes beside this one and without touching the GPU.

A job is a function that calls kernels on tensors without memory (device "meta"); where a kernel would be launched it is
compiled instead, into Triton's cache on disk, from which the measuring process then loads it. It is only a saving of
time: a kernel that is missing there is compiled when it is launched, as ever.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import torch


class AheadCompiler:
    """A pool of processes. Make it, and hand it its first job, before CUDA is used: the processes are forked."""

    def __init__(self, capability: int = 90, processes: int | None = None) -> None:
        self.processes = processes or max(1, (os.cpu_count() or 2) - 2)
        self.seconds_of_work = 0.0
        self.kernels = 0
        self.waited = 0.0
        self.faults: list[str] = []
        self._pool = ProcessPoolExecutor(
            self.processes, multiprocessing.get_context("fork"), _prepare, (capability,)
        )  # fmt: skip
        self._futures: dict[Any, Future[tuple[float, int]]] = {}

    def submit(self, key: Any, job: Callable[..., None], *arguments: Any) -> None:
        """Compile what ``job(*arguments)`` launches; both must be picklable."""
        if key not in self._futures:
            self._futures[key] = self._pool.submit(_compile, job, arguments)

    def wait(self, key: Any) -> None:
        """Until the job of this key has been done, well or not. Nothing is waited for without such a job."""
        future = self._futures.pop(key, None)
        if future is None:
            return
        started = time.perf_counter()
        try:
            seconds, kernels = future.result()
            self.seconds_of_work += seconds
            self.kernels += kernels
        except Exception as error:  # the kernel is then compiled when it is launched
            self.faults.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200])
        self.waited += time.perf_counter() - started

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __str__(self) -> str:
        text = (
            f"{self.kernels} Triton launches compiled ahead: {self.seconds_of_work:.0f} s of work in "
            f"{self.processes} processes, waited for {self.waited:.1f} s"
        )
        return text + (f"; {len(self.faults)} failed, first: {self.faults[0]}" if self.faults else "")


class _NoDriver:
    """What Triton asks of a driver to compile for a GPU that this process does not use."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


_compiled = 0


def _prepare(capability: int) -> None:
    from fastcnn.triton_kernels import _common
    from triton.runtime.driver import driver

    torch.set_num_threads(1)
    driver.set_active(_NoDriver(capability))  # type: ignore[arg-type]
    _common.Launch.run = _compile_launch  # type: ignore[method-assign]


def _compile_launch(launch: Any) -> None:
    global _compiled
    compiled = launch.kernel.warmup(
        grid=launch.grid, **launch.arguments, num_warps=launch.num_warps, num_stages=launch.num_stages
    )
    _compiled += 1
    # Triton 3.6 also compiles a few lines of C for each kind of argument list; newer ones do not.
    with contextlib.suppress(Exception):
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)


def _compile(job: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[float, int]:
    started, before = time.perf_counter(), _compiled
    with torch.no_grad():
        job(*arguments)
    return time.perf_counter() - started, _compiled - before
