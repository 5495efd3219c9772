"""Measured choice of the kernel that serves an operator at one shape.

:func:`tune` records a network's operator calls, checks every kernel that covers a call against PyTorch's operators and
float64, times those that are right, and stores the fastest in a file that later processes read
(:mod:`fastcnn.tuning.store`). Choices for some devices ship with the package (:mod:`fastcnn.tuning.shipping`).
:func:`tuned_backend` consults both, on every operator call of the default backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastcnn import _native
from fastcnn.tuning.key import Key, key_of, settings_of

if TYPE_CHECKING:
    from fastcnn.tuning.tuner import CallTuning, Candidate, TuningReport, tune

__all__ = ["CallTuning", "Candidate", "TuningReport", "forget", "tune", "tuned_backend"]

# What was chosen, by device; a device's choices are read when it is first used, and there may be none.
_tables: dict[torch.device, dict[Key, str]] = {}
# What they say of calls seen before, by a description that is made faster than the tables' keys.
_found: dict[tuple[object, ...], str | None] = {}
_MOST_FOUND = 65536
_generation = 0


def tuned_backend(operator: str, device: torch.device, dtype: torch.dtype, args: tuple[object, ...]) -> str | None:
    """The backend (or ``"backend:variant"``) that the tuner chose for this call, or None when it was never tuned."""
    table = _tables.get(device)
    if table is None:
        table = _load(device)
    if not table:
        return None
    form = (operator, settings_of(operator, device, dtype), _native.signature(args))
    try:
        return _found[form]
    except KeyError:
        choice = table.get(key_of(operator, device, dtype, args))
    if form[-1] is not None:
        if len(_found) >= _MOST_FOUND:
            _found.clear()
        _found[form] = choice
    return choice


def forget() -> None:
    """Drop the choices held in memory; the next operator call reads the files again."""
    _tables.clear()
    _changed()


def generation() -> int:
    """A number that changes whenever choices do."""
    return _generation


def _changed() -> None:
    global _generation
    _generation += 1
    _found.clear()


def _load(device: torch.device) -> dict[Key, str]:
    from fastcnn.tuning.store import choices_for

    _tables[device] = {}
    _tables[device] = choices_for(device)
    return _tables[device]


def _adopt(device: torch.device, choices: dict[Key, str]) -> None:
    """Use new choices in this process at once."""
    if device not in _tables:
        _load(device)
    _tables[device].update(choices)
    _changed()


def __getattr__(name: str) -> object:
    # The tuner needs backends and measurement, which need this module: it is imported when first used.
    if name in ("CallTuning", "Candidate", "TuningReport", "tune"):
        from fastcnn.tuning import tuner

        return getattr(tuner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
