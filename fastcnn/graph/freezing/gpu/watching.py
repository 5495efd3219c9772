"""Sees the operators of a run as PyTorch dispatches them, sends each to its lane, and refuses what no graph can hold.

A CUDA graph replays launches. What waits for the GPU and looks at values, or copies between devices, cannot be in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcnn.graph.freezing.gpu.accesses import region_of, whole_storage
from fastcnn.graph.freezing.gpu.schedule import Schedule, Step

_aten = torch.ops.aten
_LOOKS_AT_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_MASKS = (torch.bool, torch.uint8)
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_ALSO_VIEWS = (_aten._unsafe_view.default,)  # their schemas do not say so
_ALLOCATES = (_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default)


class CannotBeCaptured(ValueError):
    """An operator of the model cannot be part of a CUDA graph."""


class Lanes(Protocol):
    """Streams, as the watching mode needs them."""

    def running(self, step: Step) -> AbstractContextManager[None]:
        """Inside, work goes to the step's lane, after what it waits for; on leaving, others can wait for it."""

    def on(self, lane: int) -> AbstractContextManager[None]:
        """Inside, memory is allocated for a lane."""

    def used(self, tensor: Tensor, lane: int) -> None:
        """The memory of a tensor, allocated for another lane, is used in this one: it must outlive that work."""


class OneLane:
    """No lanes: for a run that only shows what the schedule would be."""

    def running(self, step: Step) -> AbstractContextManager[None]:
        return nullcontext()

    def on(self, lane: int) -> AbstractContextManager[None]:
        return nullcontext()

    def used(self, tensor: Tensor, lane: int) -> None:
        pass


class Watching(TorchDispatchMode):
    """A mode for one run of a model on one device.

    Args:
        device: of the model; operators on tensors elsewhere run as ever.
        schedule, lanes: who decides on lanes, and what they are; None: everything runs where it would.
    """

    def __init__(self, device: torch.device, schedule: Schedule | None = None, lanes: Lanes | None = None) -> None:
        super().__init__()
        self._device, self._schedule, self._lanes = device, schedule, lanes
        self._lane_of: dict[int, int] = {}  # by a storage's address: where it was allocated
        self.may_draw = False  # whether an operator was seen that can draw random numbers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._refuse(func, given, kwargs)
        self.may_draw |= torch.Tag.nondeterministic_seeded in func.tags
        if self._schedule is None or self._lanes is None or func.is_view or func in _ALSO_VIEWS:
            return func(*args, **kwargs)
        if func in _ALLOCATES:
            with self._lanes.on(self._schedule.latest):
                result = func(*args, **kwargs)
            self._note_new(result, self._schedule.latest)
            return result
        given = [tensor for tensor in given if tensor.device == self._device]
        if not given and not self._makes_one(kwargs):
            return func(*args, **kwargs)
        written = [t for t in _written(func, args, kwargs) if t.device == self._device]
        reads = [region_of(t) for t in given if all(t is not w for w in written)]
        step = self._schedule.add(reads, [region_of(t) for t in written])
        with self._lanes.running(step):
            result = func(*args, **kwargs)
        for tensor in given:
            home = self._lane_of.get(tensor.untyped_storage().data_ptr())
            if home is not None and home != step.place.lane:
                self._lanes.used(tensor, step.place.lane)
        known = {t.untyped_storage().data_ptr() for t in given}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self._note_new(leaf, step.place.lane)
        return result

    def _note_new(self, tensor: Tensor, lane: int) -> None:
        if tensor.device == self._device and self._schedule is not None:
            self._schedule.made(lane, whole_storage(tensor))
            self._lane_of[tensor.untyped_storage().data_ptr()] = lane

    def _makes_one(self, kwargs: Mapping[str, Any]) -> bool:
        device = kwargs.get("device")
        return device is not None and torch.device(device).type == self._device.type

    def _refuse(self, func: Any, given: Sequence[Tensor], kwargs: Mapping[str, Any]) -> None:
        """Raise where an operator waits for the GPU."""
        here = [tensor for tensor in given if tensor.device == self._device]
        if not here and not self._makes_one(kwargs):
            return
        by_numbers = func is _aten.index.Tensor and all(t.dtype not in _MASKS for t in given[1:])
        if here and any(tag in func.tags for tag in _LOOKS_AT_VALUES) and not by_numbers:
            raise CannotBeCaptured(f"{func} looks at values that are yet to be computed")
        if func in _COPIES:
            places = {tensor.device.type for tensor in given}
            if kwargs.get("device") is not None:
                places.add(torch.device(kwargs["device"]).type)
            if len(places) > 1:
                raise CannotBeCaptured(f"{func} copies between {' and '.join(sorted(places))}")


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operator writes, by its schema."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
