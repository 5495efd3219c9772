"""Which memory an operator touches, and whether two of them touch the same.

Tensors are compared by address, not by storage: when a tensor dies, another may get its memory, and must wait for the
readers of the first. Different channel slices of one channels-last buffer interleave and yet share nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastcnn.ops._layout import pixel_stride


class Region(NamedTuple):
    """Bytes ``start`` to ``end``; of these, in each ring of ``ring`` bytes counted from ``start``, the first ``width``.

    ``ring`` is 0 where all of it counts.
    """

    start: int
    end: int
    ring: int = 0
    width: int = 0

    def meets(self, other: Region) -> bool:
        """Whether two regions may share a byte."""
        if self.end <= other.start or other.end <= self.start:
            return False
        if self.ring == 0 or self.ring != other.ring:
            return True
        distance = (other.start - self.start) % self.ring
        return distance < self.width or distance + other.width > self.ring


def region_of(tensor: Tensor) -> Region:
    """The memory of a tensor's values; nothing for an empty one."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return Region(start, start)
    item = tensor.element_size()
    reach = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    pixel = pixel_stride(tensor)
    if pixel is None or pixel == tensor.shape[1]:
        return Region(start, start + reach * item)
    return Region(start, start + reach * item, pixel * item, tensor.shape[1] * item)


def whole_storage(tensor: Tensor) -> Region:
    """All memory that a tensor's storage has, whatever part of it the tensor shows."""
    storage = tensor.untyped_storage()
    return Region(storage.data_ptr(), storage.data_ptr() + storage.nbytes())
