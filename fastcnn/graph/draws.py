"""Whether the code of a ``with`` block draws random numbers: a forward that does cannot be traced, its numbers would be
fixed. What it drew is given back when the block ends.

PyTorch's draws are seen by a dispatch mode, which knows only its own thread. Python's and NumPy's are seen by comparing
the generators' states, which are everybody's. Where there are other threads, a change is no proof: the block is to be
repeated (``in_doubt``). Only one that draws every time is held to draw, and the states are put back as they were before
the first time.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ATTEMPTS = 4


class Draws(TorchDispatchMode):
    """Watches a block. ``earlier``: those of the times before, if this is a repetition."""

    def __init__(self, earlier: Sequence[Draws] = ()) -> None:
        super().__init__()
        self._torch: torch.Tensor | None = None  # PyTorch's state before this thread's first draw
        self._numbers = random.getstate(), numpy.random.get_state()
        self._first = earlier[0]._numbers if earlier else self._numbers
        self._certain = threading.active_count() == 1 or len(earlier) + 1 >= _ATTEMPTS

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        super().__exit__(kind, error, trace)
        if self._torch is not None:
            torch.set_rng_state(self._torch)
        if self._certain and self._numbers_were_drawn():
            random.setstate(self._first[0])
            numpy.random.set_state(self._first[1])

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # fmt: skip
        if self._torch is None and torch.Tag.nondeterministic_seeded in func.tags:
            self._torch = torch.get_rng_state()
        return func(*args, **(kwargs or {}))

    def _numbers_were_drawn(self) -> bool:
        return _values(random.getstate(), numpy.random.get_state()) != _values(*self._numbers)

    @property
    def drawn(self) -> bool:
        """Whether numbers were drawn: by this block, unless :attr:`in_doubt`."""
        return self._torch is not None or self._numbers_were_drawn()

    @property
    def in_doubt(self) -> bool:
        """Whether it may have been another thread that drew."""
        return self._torch is None and not self._certain and self._numbers_were_drawn()


def _values(python: Any, numbers: Any) -> tuple[Any, ...]:
    return (python, numbers[1].tobytes(), numbers[2])
