"""How one operator changes what its values see of the network's input.

A tensor carries a :class:`Window` (for each spatial axis of the input: which of its dimensions that axis is, and the
receptive field along it), or :data:`WHOLE`, or :data:`UNKNOWN`; a tensor that does not come from the input, none.

- A convolution or pooling with filter k, dilation d, stride s and padding p makes, of a field (size, stride, offset),
  ``(size + (k-1) d stride, stride s, offset + ((k-1) d / 2 - p) stride)``.
- Where branches meet (sum, concatenation, product), the field is the smallest that covers all of theirs: the largest of
  them where their middles agree.
- Views keep, move, shift or subsample the axes. Padding shifts.
- Global pooling, flattening, and a linear layer over an axis see the whole input, and so does all that follows.
- A normalisation's statistics do not count: only its own position does.
- Everything else gives UNKNOWN: transposed convolutions, resizing, adaptive pooling into unequal windows, joining along
  an axis, operators without a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor


class Field(NamedTuple):
    """Along one axis, as in :class:`fastcnn.analysis.ReceptiveField`."""

    size: int
    stride: int
    offset: float


class Window(NamedTuple):
    dims: tuple[int, ...]  # of the tensor, one a spatial axis of the input
    fields: tuple[Field, ...]


class Scope(Enum):
    WHOLE = "whole"
    UNKNOWN = "unknown"


WHOLE, UNKNOWN = Scope.WHOLE, Scope.UNKNOWN
Seen = Window | Scope


class Operation(NamedTuple):
    """One operator call that has run."""

    name: str  # without the marks of in-place and out variants
    pointwise: bool
    arguments: dict[str, Any]  # by the schema's names
    shape: tuple[int, ...]  # of the first output
    seen: Callable[[Tensor], Seen | None]

    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for value in self.arguments.values():
            found += [t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, Tensor)]
        return found


def at_input(tensor: Tensor) -> Seen | None:
    """Of an input (N, C, ...): each pixel sees itself."""
    axes = tuple(range(2, tensor.dim()))
    return Window(axes, tuple(Field(1, 1, 0.0) for _ in axes)) if axes else WHOLE


def merge(values: Sequence[Seen | None]) -> Seen | None:
    """The smallest field that covers all of several."""
    present = [v for v in values if v is not None]
    if not present:
        return None
    if WHOLE in present:
        return WHOLE
    windows = [v for v in present if isinstance(v, Window)]
    if len(windows) < len(present) or any(w.dims != windows[0].dims for w in windows):
        return UNKNOWN
    return Window(windows[0].dims, tuple(_hull(fields) for fields in zip(*(w.fields for w in windows), strict=True)))


def after_linear(value: Seen | None, dim: int) -> Seen | None:
    """A linear layer over the last of ``dim`` dimensions."""
    if isinstance(value, Window):
        return WHOLE if dim - 1 in value.dims else value
    return value


def _hull(fields: Sequence[Field]) -> Field:
    low = min(f.offset - (f.size - 1) / 2 for f in fields)
    high = max(f.offset + (f.size - 1) / 2 for f in fields)
    return Field(round(high - low) + 1, max(f.stride for f in fields), (low + high) / 2)


def changed(window: Window, change: Callable[[int, Field], Field]) -> Window:
    pairs = zip(window.dims, window.fields, strict=True)
    return Window(window.dims, tuple(change(dim, field) for dim, field in pairs))


def moved(window: Window, places: Callable[[int], int | None]) -> Seen:
    """The axes at other dimensions; WHOLE when all are gone, UNKNOWN when some are."""
    dims = [places(dim) for dim in window.dims]
    if all(d is None for d in dims):
        return WHOLE
    if any(d is None for d in dims):
        return UNKNOWN
    return Window(tuple(d for d in dims if d is not None), window.fields)


def first(operation: Operation) -> tuple[Tensor, Window]:
    """The first tensor that sees a window, and the window."""
    for tensor in operation.tensors():
        value = operation.seen(tensor)
        if isinstance(value, Window):
            return tensor, value
    raise AssertionError(f"{operation.name} has no tensor with a window")
