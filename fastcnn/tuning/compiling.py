"""Compiling the candidates' kernels ahead of their checks, several at a time.

Triton compiles a kernel when it is first used: half a second to two seconds of one processor, a hundred times for a
network. Its compiler leaves Python's lock for most of that, so threads help (two: 1.6 to 1.8 times as quick).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from fastcnn.backends import Call, variants

logger = logging.getLogger("fastcnn")

_MOST_THREADS = 16


class CompilingAhead:
    """Compiles what it is given until the ``with`` block ends, which waits for all of it."""

    def __enter__(self) -> CompilingAhead:
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(min(_MOST_THREADS, processors), thread_name_prefix="fastcnn-compiling")
        return self

    def compile(self, call: Call, names: Sequence[str]) -> None:
        """Begin to compile what these backends and variants need for a call."""
        for name in names:
            try:
                job = variants.compilation(name, call.operator, call.args)
            except Exception as error:
                _leave_to_the_check(name, error)
                continue
            if job is not None:
                self._pool.submit(_run, name, job)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self._pool.shutdown(wait=True, cancel_futures=error is not None)


def _run(name: str, job: Callable[[], object]) -> None:
    try:
        job()
    except Exception as error:
        _leave_to_the_check(name, error)


def _leave_to_the_check(name: str, error: Exception) -> None:
    """What fails to compile fails again when its candidate is checked, and is recorded there."""
    logger.info("compiling %s ahead failed: %s", name, error)
