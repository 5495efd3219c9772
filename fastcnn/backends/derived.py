"""Values computed from weight tensors (packed, transposed, folded) and kept while those tensors live unchanged.

An entry is dropped when its owner dies, and replaced when one of its tensors is written in place (autograd's version
counter) or gets new storage (``.data = ...``, ``.to()``). Writes that bypass the version counter
(``weight.data.mul_(2)``) are noticed on the CPU by a fingerprint: of all values up to 4096 of them, and of some from
every filter and every input channel of a larger tensor. A write through ``.data`` to a few single elements of a large
tensor can escape it, and on a GPU any such write does: call :func:`forget` or :func:`clear` after one. PyTorch's fused
optimizers write so; their steps are watched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastcnn import _native

T = TypeVar("T")

PLAIN_TENSORS = (Tensor, torch.nn.Parameter, torch.nn.Buffer)  # no subclasses: fake, distributed, functionalised ...

_MODE_KEYS = torch._C._TorchDispatchModeKey
_REPLACING_MODES = (_MODE_KEYS.FAKE, _MODE_KEYS.PROXY, _MODE_KEYS.FUNCTIONAL)


class _Entry(NamedTuple):
    owner: weakref.ref[Tensor]
    identities: frozenset[int]  # of the owner and the others
    states: tuple[object, ...]
    # Keeps the storages alive: an address seen again is then the same storage, never a recycled one.
    storages: list[torch.UntypedStorage]
    value: object


_entries: dict[int, dict[Hashable, _Entry]] = {}
_generation = 0


@dataclass
class Kept:
    """What was derived in a :func:`keeping` block. Holding it keeps the values' memory, whatever is forgotten here."""

    values: list[object] = field(default_factory=list)
    made: int = 0  # those that were not there before, or could not be made


_kept: ContextVar[Kept | None] = ContextVar("fastcnn_kept", default=None)


@contextmanager
def keeping() -> Iterator[Kept]:
    """Collect every value that :func:`derived` hands out inside a ``with`` block, in this thread."""
    kept = Kept()
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


def states_of(tensors: tuple[Tensor | None, ...]) -> tuple[object, ...]:
    """What must be unchanged for an entry to be valid: versions, addresses, dtypes, geometry and sampled values."""
    try:
        return (*[None if t is None else t._version for t in tensors], _native.tensor_states(tensors))
    except RuntimeError:  # an inference tensor has no version: only its values tell
        pass
    return (*[_version_of(t) for t in tensors], *[_native.tensor_states((t,), _version_of(t) is None) for t in tensors])


def _version_of(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def operations_are_replaced() -> bool:
    """Whether PyTorch's operations give something else than values here: under tracers, torch.func and fake tensors.

    What is computed then (a fake tensor, a wrapper, a node of a graph) must not be kept, and nothing kept may take its
    place.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or (
            torch._C._len_torch_dispatch_stack() > 0
            and any(torch._C._get_dispatch_mode(mode) is not None for mode in _REPLACING_MODES)
        )
    )


def derived(tensor: Tensor, key: Hashable, make: Callable[..., T], *others: Tensor | None) -> T:
    """``make(tensor, *others)``, computed once for each state of these tensors. ``key`` names the kind of value.

    ``tensor`` owns the entry. Temporaries (an activation, a cast made by autocast) may be passed too: their entries
    die with them. On a GPU an inference tensor, whose writes cannot be seen, is never cached.
    """
    tensors = (tensor, *others)
    if any(t is not None and t.is_meta for t in tensors):  # there is no state to compare
        return make(*tensors)
    states = states_of(tensors)
    identity = id(tensor)
    kept = _kept.get()
    of_owner = _entries.get(identity)
    if of_owner is not None:
        found = of_owner.get(key)
        if found is not None and found.states == states and found.owner() is tensor:
            if kept is not None:
                kept.values.append(found.value)
            return found.value  # type: ignore[return-value]
    if kept is not None:
        kept.made += 1
    value = make(*tensors)
    if kept is not None:
        kept.values.append(value)
    if any(t is not None and not t.is_cpu and t.is_inference() for t in tensors):
        return value

    def drop(reference: weakref.ref[Tensor]) -> None:
        current = _entries.get(identity)
        if current is not None and all(entry.owner() is None for entry in list(current.values())):
            _entries.pop(identity, None)

    if of_owner is None or any(entry.owner() is not tensor for entry in list(of_owner.values())):
        of_owner = _entries[identity] = {}
    storages = [t.untyped_storage() for t in tensors if t is not None]
    identities = frozenset(id(t) for t in tensors if t is not None)
    of_owner[key] = _Entry(weakref.ref(tensor, drop), identities, states, storages, value)
    return value


class _CapturingError(Exception):
    """A value would have to be computed while a CUDA graph is being captured."""


def derived_for_streams(tensor: Tensor, key: Hashable, make: Callable[[Tensor], T]) -> T:
    """:func:`derived` for what GPU kernels read, on any stream and in CUDA graphs.

    The next reader may be on another stream: the maker's is waited for, once, here, rather than ordered at every
    launch. What is made while a graph is captured has no value yet and lies in the graph's memory: it is not kept, and
    every replay makes it anew.
    """

    def make_and_wait(tensor: Tensor) -> T:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            raise _CapturingError
        value = make(tensor)
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
        return value

    try:
        return derived(tensor, key, make_and_wait)
    except _CapturingError:
        return make(tensor)


def forget(tensor: Tensor) -> None:
    """Forget what was derived with this tensor as the owner."""
    _entries.pop(id(tensor), None)
    _count_forgetting()


def generation() -> int:
    """A number that changes whenever something is forgotten before its tensors show that they were written."""
    return _generation


def is_keeping() -> bool:
    """Whether a :func:`keeping` block collects what is handed out."""
    return _kept.get() is not None


def _count_forgetting() -> None:
    global _generation
    _generation += 1


def _forget_after_step(optimizer: torch.optim.Optimizer, *arguments: object) -> None:
    """Forget what was derived from an optimizer's parameters: fused ones write them without counting a version."""
    if torch.compiler.is_compiling() or not _entries:
        return
    written = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for identity, of_owner in list(_entries.items()):
        if any(not written.isdisjoint(entry.identities) for entry in list(of_owner.values())):
            _entries.pop(identity, None)
    _count_forgetting()


register_optimizer_step_post_hook(_forget_after_step)


def clear() -> None:
    """Forget every derived value; they are computed again when next needed."""
    _entries.clear()
    _count_forgetting()
