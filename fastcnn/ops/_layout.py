"""Memory layouts at the border of an operator. Kernels see channels-last views only (docs/internals.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn.ops import _strides


def is_channels_last(tensor: Tensor) -> bool:
    """Whether PyTorch's operators would go on in channels-last memory from this 4-D tensor."""
    return _strides.is_channels_last(tensor.shape, tensor.stride())


def pixel_stride(tensor: Tensor) -> int | None:
    """Elements from one pixel to the next when the tensor is a 4-D view that kernels can use, else None."""
    if tensor.dim() != 4:
        return None
    n, c, h, w = tensor.shape
    stride_n, stride_c, stride_h, stride_w = tensor.stride()
    pixel = stride_w if w > 1 else stride_h if h > 1 else stride_n if n > 1 else c
    fits = (
        (c == 1 or stride_c == 1)
        and pixel >= c
        and (h == 1 or stride_h == w * pixel)
        and (n == 1 or stride_n == h * w * pixel)
    )
    return pixel if fits else None


def to_kernel_layout(tensor: Tensor) -> Tensor:
    """The tensor itself when kernels can read it in place, else a channels-last copy."""
    if tensor.is_contiguous(memory_format=torch.channels_last) or pixel_stride(tensor) is not None:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def empty_channels_last(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def in_layout(out: Tensor, channels_last: bool) -> Tensor:
    """A kernel's output in the layout PyTorch would return. (`contiguous()` may leave odd strides at size 1.)"""
    return out if channels_last else _strides.in_strides(out, _strides.contiguous(out.shape))


def lies_alike(out: Tensor, residual: Tensor) -> bool:
    """Whether a kernel's output has the strides of the sum that it is of a channels-last value and this residual."""
    return out.stride() == residual.stride() and not out.is_contiguous()


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same values in the same order: what an in-place operator may read and write."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two of a tensor's values share memory, so that it cannot be written."""
    sizes_strides = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    extent = 1
    for size, stride in sorted(sizes_strides, key=lambda pair: pair[1]):
        if stride < extent:
            break
        extent += (size - 1) * stride
    else:
        return False
    if tensor.numel() == 0:
        return False
    if any(stride == 0 for _, stride in sizes_strides):
        return True
    offsets = torch.zeros(1, dtype=torch.int64)  # interleaved dimensions: look at every value's place
    for size, stride in sizes_strides:
        offsets = (offsets[:, None] + stride * torch.arange(size)).view(-1)
    return bool(offsets.unique().numel() < offsets.numel())
