"""What a captured model is lowered to: buffers, views of them, and native steps in the order they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastcnn import _native
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

    def pixel_stride(self) -> int | None:
        """Elements from one pixel to the next where kernels can use the view as it lies, else None."""
        return pixel_stride(torch.empty_strided(self.shape, self.strides, device="meta"))

    def as_row(self) -> View:
        """All values of a dense view as one pixel's channels, in memory order: for work that knows no channels."""
        return replace(self, shape=(1, self.values, 1, 1), strides=(self.values, 1, self.values, self.values))

    def narrowed(self, dim: int, start: int, length: int) -> View:
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return replace(self, offset=self.offset + start * self.strides[dim], shape=shape)


@dataclass
class Step:
    """One call of the native plan: ``plan.operator(out, *inputs, *attributes)``.

    For ``conv2d`` the packed weight ``weight`` (its place in :attr:`Program.weights`) follows the first input.
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
    """A convolution's weight, packed for this processor's instruction set."""

    packed: _native.PackedConv2dWeight
    shape: tuple[int, int, int, int]
    groups: int
    dtype: torch.dtype


@dataclass
class Program:
    """A model with static shapes. ``steps`` run in order; ``outputs`` are views of what they computed."""

    inputs: list[View] = field(default_factory=list)
    outputs: list[View] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    weights: list[PackedWeight] = field(default_factory=list)


def channels_last_strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    _, c, h, w = shape
    return (h * w * c, 1, w * c, c)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides[: len(shape)])
