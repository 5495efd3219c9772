"""One process of a wave (`measure_gpu_networks_in_waves.py`): prepares the cases of a network beside other processes,
then times them when it is its turn.

What chooses by times (cuDNN's algorithms, `freeze`, inductor's Triton kernels) has the GPU for itself while it does: a
lock on a file, which waits without spinning and is given back when its process ends. Compiling goes on beside it.

A process says what it does in pairs: ("facts", row), ("trying", text), ("row", row), ("ready", text), ("done", text).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import measure_gpu_networks as one
import torch
from raw_rows import Row

FAULTS = ("fails", "late", "dies", "hangs")  # for rehearsals: the first two while it prepares, the others in its turn


class Task(NamedTuple):
    """What a process has to do."""

    network: str
    cases: list[one.Case]  # with the candidates that are not in the file yet
    options: argparse.Namespace
    processes: int  # of the wave
    lock: Path
    known: Row  # what every row says
    fault: str | None = None


class Late(BaseException):
    """The time for preparing is over. No Exception: a compiler would catch that."""


class SharedGpu(one.Sharing):
    """The GPU among several processes."""

    def __init__(self, lock: Path) -> None:
        self._file = lock.open("a")
        self._held = False
        self.patient = False  # whether nothing is lost when the process is interrupted now

    def _take(self, how: int) -> None:
        started, before = time.perf_counter(), self.patient
        self.patient = True
        fcntl.flock(self._file, how)
        self._held, self.patient = True, before
        self.waited += time.perf_counter() - started

    def _give_back(self) -> None:
        if self._held and torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what algorithms were tried with, others need
        self._held = self.patient = False
        fcntl.flock(self._file, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def _holding(self, how: int) -> Iterator[None]:
        try:
            self._take(how)
            yield
        finally:
            self._give_back()

    def beside_others(self) -> contextlib.AbstractContextManager[None]:
        return self._holding(fcntl.LOCK_SH)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        return self._holding(fcntl.LOCK_EX)

    @contextlib.contextmanager
    def alone_once_compiled(self) -> Iterator[None]:
        from torch._dynamo.callback import callback_handler

        def compiled(*_: Any) -> None:
            if not self._held:
                self._take(fcntl.LOCK_EX)
                self.patient = False

        callback_handler.register_end_callback(compiled)
        try:
            self.patient = True
            yield
            if not self._held:
                raise RuntimeError("torch.compile compiled nothing")
        finally:
            callback_handler.remove_end_callback(compiled)
            self._give_back()


def work(connection: Connection, task: Task) -> None:
    """The process's life."""
    os.setsid()  # so that it is ended together with what it started
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gpu, late = SharedGpu(task.lock), threading.Event()

    def too_late(*_: Any) -> None:
        late.set()
        if gpu.patient:
            raise Late

    signal.signal(signal.SIGUSR1, too_late)
    connection.send(("trying", "begin"))
    share = -(-len(os.sched_getaffinity(0)) // task.processes)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(share))
    if any(name in one.COMPILED for case in task.cases for name in case.candidates):
        importlib.import_module("torch._inductor.async_compile").maybe_warm_pool()  # its processes take a while
    torch.set_num_threads(1)  # there are processes enough
    torch.backends.cudnn.benchmark = True
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    dynamo.recompile_limit = 64  # batches and modes of one network are copies of the same code
    dynamo.fail_on_recompile_limit_hit = True  # instead of eager mode in silence
    with torch.no_grad():
        started = time.perf_counter()
        prepared = _prepare(connection, task, gpu, late)
        gc.collect()
        gpu_gib = torch.cuda.memory_reserved() / 2**30 if torch.cuda.is_initialized() else 0.0
        seconds = time.perf_counter() - started
        connection.send(("ready", f"{seconds:.1f} s, {gpu.waited:.1f} s of them waiting, {gpu_gib:.1f} GiB"))
        connection.recv()
        connection.send(("trying", "its turn"))
        _pretend(task.fault, "dies", "hangs")
        started, count = time.perf_counter(), 0
        for case in prepared:
            connection.send(("trying", f"timing batch {case.case.batch}"))
            for row in one.Measuring(task.options, {}).time(case, task.options.seconds):
                connection.send(("row", row))
                count += 1
        connection.send(("done", f"{count} rows timed in {time.perf_counter() - started:.1f} s"))


def _prepare(connection: Connection, task: Task, gpu: SharedGpu, late: threading.Event) -> list[one.Prepared]:
    """Cases with all their candidates that were ready in time; the others' rows are sent."""
    found: list[one.Prepared] = []
    facts: Row = {}
    with contextlib.suppress(Late):
        _pretend(task.fault, "fails", "late")
        facts = {**one.all_facts(task.options), **task.known, "processes": task.processes}
        connection.send(("facts", facts))
        measuring = one.Measuring(task.options, facts, gpu)
        for case in task.cases:
            if late.is_set():
                break
            connection.send(("trying", f"batch {case.batch}"))
            try:
                found.append(measuring.begin(case))
            except torch.cuda.OutOfMemoryError as error:
                reason = {**facts, "left_out": one.first_line(error)}
                for name in case.candidates:
                    connection.send(("row", {**one.key(task.options, case, name), **reason}))
        for compiled in (False, True):  # what takes longest is last, should the time run out
            for prepared in found:
                for name in prepared.case.candidates:
                    if (name in one.COMPILED) == compiled and not late.is_set():
                        connection.send(("trying", f"batch {prepared.case.batch}, {name}"))
                        row = measuring.add(prepared, name)
                        if row is not None:
                            connection.send(("row", row))
    return [prepared for prepared in found if prepared.runners]


def _pretend(fault: str | None, ends: str, stays: str) -> None:
    if fault == ends:
        os.abort()
    while fault == stays:
        time.sleep(60)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
