"""Which kernels serve an operator: the choice of backend, and the record of every case that none covered.

A backend is a module of this package that provides the functions of the kernel contract (docs/internals.md). The
native module is imported after torch, so that both share one OpenMP runtime.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

import torch

from fastcnn.backends import preference

BACKENDS = ("reference", "cpp", "cuda", "triton", "cudnn")

logger = logging.getLogger("fastcnn")


class UnsupportedError(RuntimeError):
    """A case that the chosen backend does not cover, under ``strict=True``."""


class Fallback(NamedTuple):
    """A kind of call that took the reference path because a backend did not cover it."""

    operator: str
    backend: str
    reason: str


class Call(NamedTuple):
    """One operator call of the kernel contract, as an interceptor sees it: ``args`` are the contract function's."""

    operator: str
    device: torch.device
    dtype: torch.dtype
    args: tuple[object, ...]
    facts: dict[str, object]
    backend: str  # what serves it
    refused: Fallback | None  # why it is "reference" although another backend was to serve it
    fresh: bool = False  # the operator made the output itself and nothing else refers to it

    def run(self) -> None:
        _serve(self.backend, self.operator, self.args, self.fresh)


class _Choice(NamedTuple):
    backend: str | None
    strict: bool


def _choice_from_environment() -> _Choice:
    name = os.environ.get("FASTCNN_BACKEND") or None
    if name is not None:
        _require_known(name, "FASTCNN_BACKEND")
    return _Choice(name, False)


def _require_known(name: str, argument: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, is {name!r}")


_choice: ContextVar[_Choice | None] = ContextVar("fastcnn_backend", default=None)
_environment_choice = _choice_from_environment()
_fallbacks: Counter[Fallback] = Counter()
_exact: ContextVar[bool | None] = ContextVar("fastcnn_exact", default=None)
_environment_exact = os.environ.get("FASTCNN_EXACT", "") not in ("", "0")
_recording: ContextVar[bool] = ContextVar("fastcnn_recording", default=False)
_interceptor: ContextVar[Callable[[Call], None] | None] = ContextVar("fastcnn_interceptor", default=None)


@contextlib.contextmanager
def use_backend(name: str | None, *, strict: bool = False) -> Iterator[None]:
    """Make fastcnn's operators run on one backend inside a ``with`` block, in this thread.

    Args:
        name: ``"cpp"``, ``"cuda"``, ``"triton"``, ``"cudnn"`` (cuDNN's own fused convolutions), ``"reference"``, or
            None for the default choice by device.
        strict: raise :class:`UnsupportedError` for a case that the backend does not cover, where it would otherwise
            take the reference path and be counted in :func:`fallbacks`.

    Raises:
        ValueError: the name is not a backend's.
        RuntimeError: the backend cannot be used on this machine; the message says why.
    """
    if name is not None:
        _require_known(name, "name")
        reason = unavailable(name)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot be used here: {reason}")
    token = _choice.set(_Choice(name, strict))
    try:
        yield
    finally:
        _choice.reset(token)


@contextlib.contextmanager
def exact(on: bool = True) -> Iterator[None]:
    """Say whether fastcnn's operators keep to ordinary algorithms inside a ``with`` block, in this thread.

    They do not by default: a 3x3, 5x5 or strided convolution on the CPU may be computed by Winograd's algorithm, with
    fewer multiplications, with a relative error of about 6e-7, with a stride 8e-7 (stated limit: 1e-5) where the
    ordinary sum has 3e-7 (in bf16, on a processor with bf16 dot products, about 4e-3 where the ordinary sum, rounded,
    has 1.7e-3), and so that a NaN or infinity of the input reaches a whole tile of the output. A large 1x1 convolution
    on the CPU in fp32 may be computed by Strassen's algorithm, with a relative error of about 7e-7, and so that a NaN
    or infinity of a pixel reaches another pixel of its image too. Calls that record a gradient never use them, except
    in a graph made by torch.compile. ``exact()``, or ``FASTCNN_EXACT=1`` for the whole process, rules them out;
    ``exact(False)`` allows it again inside. A model is frozen as the setting says when :func:`fastcnn.freeze` runs.
    """
    token = _exact.set(on)
    try:
        yield
    finally:
        _exact.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """What runs inside is the forward pass of an operation that autograd records."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)


def allows_fast_algorithms() -> bool:
    """Whether a call may be served by a fast algorithm (Winograd, Strassen): not under ``exact()``, and not where a
    gradient is recorded."""
    wanted = _exact.get()
    return not (_environment_exact if wanted is None else wanted) and not _recording.get()


@contextlib.contextmanager
def intercept(interceptor: Callable[[Call], None]) -> Iterator[None]:
    """Hand every operator call in this thread to ``interceptor``, which must run it (``call.run()`` or its equal).

    This is how verification and tuning see the operators of a network. Calls it makes itself are not intercepted.
    """
    token = _interceptor.set(interceptor)
    try:
        yield
    finally:
        _interceptor.reset(token)


@functools.cache
def backend_module(name: str) -> ModuleType:
    """The backend's functions. ``"backend:variant"`` names one of the configurations that the tuner may choose."""
    if ":" in name:
        from fastcnn.backends.variants import variant

        return variant(name)
    return importlib.import_module(f"fastcnn.backends.{name}")


def unavailable(name: str) -> str | None:
    """Why a backend cannot be used on this machine at all, or None when it can."""
    return backend_module(name).unavailable()


def current_choice() -> tuple[str | None, bool]:
    """The backend that was asked for (None: by device) and whether fallbacks raise."""
    return _choice.get() or _environment_choice


def fallbacks() -> dict[Fallback, int]:
    """How often each kind of call took the reference path because a kernel did not cover it, since the last reset."""
    return dict(_fallbacks)


def reset_fallbacks() -> None:
    _fallbacks.clear()


def _note_fallback(fallback: Fallback, strict: bool) -> None:
    message = f"{fallback.operator}: backend {fallback.backend!r} does not cover this case ({fallback.reason})"
    if strict:
        raise UnsupportedError(message)
    if fallback not in _fallbacks:
        logger.warning("%s; using PyTorch's own operator", message)
    _fallbacks[fallback] += 1


def note_reference(operator: str, device: torch.device, reason: str) -> None:
    """Count a call that an operator hands to PyTorch before any backend is asked; raises under ``strict=True``."""
    name, strict = current_choice()
    backend = name or next(iter(preference.DEFAULT_ORDER.get(device.type, ())), "reference")
    if backend != "reference" and not torch.compiler.is_compiling():
        _note_fallback(Fallback(operator, backend, reason), strict)


def not_implemented(operator: str, dtype: torch.dtype, error: Exception) -> TypeError:
    """The error for a dtype that neither a kernel nor PyTorch's own operator covers."""
    return TypeError(f"{operator}: input is {dtype}, which neither fastcnn's kernels nor PyTorch cover here ({error})")


def run(
    operator: str, device: torch.device, dtype: torch.dtype, *args: object, fresh: bool = False, **facts: object
) -> None:
    """Run one operator of the kernel contract on the backend that serves it.

    ``facts`` are what a backend may need to know to decide (groups, whether there is a residual, ...); ``args`` go to
    its function. ``fresh`` says that the output is dense, was made for this call, and that nothing else refers to it or
    to its memory: a backend may then give it other memory instead of filling it.
    """
    served_by, refused = resolve(operator, device, dtype, args, facts)
    if refused is not None:
        _note_fallback(refused, current_choice()[1])
    interceptor = _interceptor.get()
    if interceptor is None:
        try:
            _serve(served_by, operator, args, fresh)
        except NotImplementedError as error:  # PyTorch's "not implemented for 'Byte'"
            raise not_implemented(operator, dtype, error) from error
        return
    token = _interceptor.set(None)
    try:
        interceptor(Call(operator, device, dtype, args, facts, served_by, refused, fresh))
    finally:
        _interceptor.reset(token)


def resolve(
    operator: str, device: torch.device, dtype: torch.dtype, args: tuple[object, ...], facts: dict[str, object]
) -> tuple[str, Fallback | None]:
    """Which backend serves a call, and why it is the reference where another one was to."""
    name = current_choice()[0]
    if name == "reference":
        order: tuple[str, ...] = ("reference",)
    elif name is not None:
        order = (name,)
    else:
        order = _preferred(operator, device, dtype, args)
    refused: Fallback | None = None
    for candidate in order:
        reason = backend_module(candidate).unsupported(operator, device, dtype, **facts)
        if reason is None:
            return candidate, None
        refused = refused or Fallback(operator, candidate, reason)
    if not order:
        refused = Fallback(operator, "none", f"no kernels for {device.type} on this machine")
    return "reference", refused


def settings() -> tuple[object, ...]:
    """Everything in this thread that :func:`resolve` and the backends' functions look at besides a call's arguments."""
    return (_choice.get(), _exact.get(), _recording.get(), torch.get_num_threads(), tuning.generation())


def is_intercepted() -> bool:
    return _interceptor.get() is not None


def _serve(backend: str, operator: str, args: tuple[object, ...], fresh: bool) -> None:
    """One call of a backend's function; those in its ``REPLACES_OUTPUT`` learn whether they may replace the output."""
    module = backend_module(backend)
    if fresh and operator in getattr(module, "REPLACES_OUTPUT", ()):
        getattr(module, operator)(*args, fresh=True)
    else:
        getattr(module, operator)(*args)


def _preferred(operator: str, device: torch.device, dtype: torch.dtype, args: tuple[object, ...]) -> tuple[str, ...]:
    order = _usable(preference.order(operator, device.type, dtype, args))
    chosen = tuned_backend(operator, device, dtype, args)
    return order if chosen is None else (chosen, *order)


@functools.cache
def _usable(order: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in order if unavailable(name) is None)


# Last, because the tuner's table knows nothing of backends but is consulted on every call.
from fastcnn import tuning  # noqa: E402
from fastcnn.tuning import tuned_backend  # noqa: E402
