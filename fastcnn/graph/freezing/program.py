"""What a captured model is lowered to: buffers, views of them, and native steps in the order they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastcnn.backends import cpp
from fastcnn.ops._layout import pixel_stride

Attribute = int | float | bool | str | tuple[int, ...]


@dataclass(eq=False)
class Buffer:
    """Memory of its own. Activations go to the arena, unless the buffer is one of the model's inputs or outputs."""

    length: int  # elements
    dtype: torch.dtype
    kind: str = "activation"  # "activation" | "constant" | "input" | "output"
    data: Tensor | None = None  # a constant's values, contiguous

    @property
    def bytes(self) -> int:
        return self.length * self.dtype.itemsize


@dataclass(frozen=True)
class View:
    """A tensor in a buffer. ``offset`` and ``strides`` count elements."""

    buffer: Buffer
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.buffer.dtype

    @property
    def values(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def extent(self) -> int:
        """Elements from the first to behind the last in memory."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_dense(self) -> bool:
        """Whether the values fill their extent, in whatever order."""
        ordered = sorted((st, s) for s, st in zip(self.shape, self.strides, strict=True) if s > 1)
        expected = 1
        for stride, size in ordered:
            if stride != expected:
                return False
            expected *= size
        return True

    @property
    def is_broadcast(self) -> bool:
        return any(size > 1 and stride == 0 for size, stride in zip(self.shape, self.strides, strict=True))

    def pixel_stride(self) -> int | None:
        """Elements from one pixel to the next where kernels can use the view as it lies, else None."""
        return pixel_stride(torch.empty_strided(self.shape, self.strides, device="meta"))

    def as_row(self) -> View:
        """All values of a dense view as one pixel's channels, in memory order: for work that knows no channels."""
        return row_of(self.buffer, self.offset, self.values)

    def reshaped(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> View:
        return replace(self, shape=shape, strides=strides)

    def permuted(self, dims: Sequence[int]) -> View:
        """Dimensions in another order; those left out must have size 1 or are dropped by the caller's intent."""
        return replace(self, shape=tuple(self.shape[d] for d in dims), strides=tuple(self.strides[d] for d in dims))

    def unsqueezed(self, dim: int) -> View:
        """With a dimension of size 1 before ``dim``."""
        shape = (*self.shape[:dim], 1, *self.shape[dim:])
        return replace(self, shape=shape, strides=(*self.strides[:dim], 0, *self.strides[dim:]))

    def selected(self, dim: int, index: int) -> View:
        """One index of a dimension, without it."""
        rest = [d for d in range(len(self.shape)) if d != dim]
        return replace(self.permuted(rest), offset=self.offset + index * self.strides[dim])

    def split(self, dim: int, sizes: tuple[int, int]) -> View:
        """One dimension as two, the second of which moves fastest."""
        stride = self.strides[dim]
        shape = (*self.shape[:dim], *sizes, *self.shape[dim + 1 :])
        return replace(
            self, shape=shape, strides=(*self.strides[:dim], stride * sizes[1], stride, *self.strides[dim + 1 :])
        )

    def merged(self, first: int, last: int) -> View | None:
        """Dimensions ``first`` up to ``last`` as one, or None where no single stride reaches their values."""
        size, stride = 1, 1
        for have, step in zip(reversed(self.shape[first:last]), reversed(self.strides[first:last]), strict=True):
            if have == 1:
                continue
            if size == 1:
                stride = step
            elif step != size * stride:
                return None
            size *= have
        return replace(
            self,
            shape=(*self.shape[:first], size, *self.shape[last:]),
            strides=(*self.strides[:first], stride, *self.strides[last:]),
        )

    def as_matrix(self, first: int) -> View | None:
        """Dimensions before ``first`` as rows, the others as adjacent columns; None where memory does not allow it."""
        columns = self.merged(first, len(self.shape))
        matrix = None if columns is None else columns.merged(0, first)
        if matrix is None or (matrix.shape[1] > 1 and matrix.strides[1] != 1):
            return None
        rows, width = matrix.shape
        if rows > 1 and matrix.strides[0] < width:
            return None
        return replace(matrix, strides=(matrix.strides[0] if rows > 1 else width, 1))

    def expanded(self, shape: tuple[int, ...]) -> View:
        """Broadcast to a shape: stride 0 where a size-1 dimension is repeated."""
        missing = len(shape) - len(self.shape)
        sizes, strides = (1,) * missing + self.shape, (0,) * missing + self.strides
        new = tuple(0 if have == 1 != want else st for have, want, st in zip(sizes, shape, strides, strict=True))
        return replace(self, shape=shape, strides=new)

    def narrowed(self, dim: int, start: int, length: int) -> View:
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return replace(self, offset=self.offset + start * self.strides[dim], shape=shape)


@dataclass
class Step:
    """One call of the native plan: ``plan.operator(out, *inputs, *attributes)``.

    For convolutions and ``linear_short`` the packed weight (its place in :attr:`Program.weights`) follows the
    first input.
    """

    operator: str
    out: View
    inputs: tuple[View | None, ...]
    attributes: tuple[Attribute, ...] = ()
    weight: int | None = None

    def views(self) -> list[View]:
        return [self.out, *(v for v in self.inputs if v is not None)]


@dataclass
class PackedWeight:
    """A weight packed for this processor's instruction set and one of the C++ backend's algorithms.

    ``shape`` is (K, C // groups, R, S) of a convolution's, (K, C) of a fully connected layer's.
    """

    packed: cpp.PackedWeight
    shape: tuple[int, ...]
    groups: int
    algorithm: str
    dtype: torch.dtype


@dataclass
class Program:
    """A model with static shapes. ``steps`` run in order; ``outputs`` are views of what they computed.

    With several lanes, each equal part of the steps is one, and lanes run side by side (:mod:`.lanes`).
    """

    inputs: list[View] = field(default_factory=list)
    outputs: list[View] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    weights: list[PackedWeight] = field(default_factory=list)
    lanes: int = 1


def row_of(buffer: Buffer, offset: int, values: int) -> View:
    """Adjacent values as one pixel's channels."""
    return View(buffer, offset, (1, values, 1, 1), (values, 1, values, values))


def channels_last_strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    _, c, h, w = shape
    return (h * w * c, 1, w * c, c)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return tuple(strides)
