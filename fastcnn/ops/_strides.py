"""In which memory PyTorch's operators put their results: strides from the operands' strides, for (N, C, ...) tensors.

What a fused operator returns must lie where the chain that it replaces would have put it: later views, and random masks
that are drawn in the order of memory, depend on it. Dimensions of size 1 count: their strides say whether an operator
that follows takes its input for channels-last.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

Strides = tuple[int, ...]


def contiguous(shape: Sequence[int]) -> Strides:
    return _packed(shape, range(len(shape) - 1, -1, -1))


def channels_last(shape: Sequence[int]) -> Strides:
    return _packed(shape, (1, 3, 2, 0))


def _packed(shape: Sequence[int], order: Sequence[int]) -> Strides:
    """Without gaps, the first dimension of ``order`` innermost."""
    strides, step = [0] * len(shape), 1
    for dim in order:
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def is_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether PyTorch's operators would go on in channels-last memory from such a 4-D tensor (suggest_memory_format).

    That is decided by strides that grow in the order C, W, H, N, those of size-1 dimensions too: also a channel slice
    or a cropped view of channels-last memory is.
    """
    n, c, h, w = shape
    stride_n, stride_c, stride_h, stride_w = strides
    if stride_c == 0 or stride_w < stride_c * c:  # the common answer for contiguous memory
        return False
    if n == 0 or c == 0 or h == 0 or w == 0:
        return False
    image = stride_h * h
    return bool(stride_h >= stride_w * w and stride_n >= image and image != stride_c)


def of_convolution(result: Sequence[int], shape: Sequence[int], strides: Strides, weight: Tensor) -> Strides:
    """Of a convolution's result, from its input's shape and strides."""
    if 0 in shape:  # ATen looks at the input in the result's shape
        return _in_common_order(shape, (strides,)) if tuple(result) == tuple(shape) else contiguous(result)
    last = is_channels_last(shape, strides) or is_channels_last(weight.shape, weight.stride())
    return channels_last(result) if last else contiguous(result)


def of_batch_norm(shape: Sequence[int], strides: Strides) -> Strides:
    """Of a batch norm's result, from its input's."""
    if 0 in shape:
        return _in_common_order(shape, (strides,))
    if _is_packed(shape, strides, range(len(shape) - 1, -1, -1)):
        return contiguous(shape)
    packed = _is_packed(shape, strides, (1, 3, 2, 0))
    return channels_last(shape) if packed or is_channels_last(shape, strides) else contiguous(shape)


def elementwise(shape: Sequence[int], *operands: Strides) -> Strides:
    """Of a value-by-value operator's result (TensorIterator), from its operands', in their order.

    Each operand has the result's shape; one that was broadcast has strides 0.
    """
    try:
        return _elementwise(tuple(shape), operands)
    except TypeError:  # sizes without a value yet have no hash
        return _elementwise.__wrapped__(tuple(shape), operands)


@functools.lru_cache(4096)
def _elementwise(shape: tuple[int, ...], operands: tuple[Strides, ...]) -> Strides:
    backwards = range(len(shape) - 1, -1, -1)
    if 0 in shape or all(_is_packed(shape, strides, backwards) for strides in operands):
        return contiguous(shape)
    if len(shape) == 4 and all(_is_packed(shape, strides, (1, 3, 2, 0)) for strides in operands):
        return channels_last(shape)
    if all(strides == operands[0] for strides in operands) and is_dense(shape, operands[0]):
        return operands[0]
    return _in_common_order(shape, operands)


def _in_common_order(shape: Sequence[int], operands: Sequence[Strides]) -> Strides:
    """An insertion sort of the dimensions, innermost first, in which some pairs have no order."""
    order = list(range(len(shape) - 1, -1, -1))
    for i in range(1, len(order)):
        at = i
        for before in range(i - 1, -1, -1):
            compared = _compared(order[before], order[at], shape, operands)
            if compared > 0:
                order[before], order[at] = order[at], order[before]
                at = before
            elif compared < 0:
                break
    return _packed(shape, order)


def _compared(a: int, b: int, shape: Sequence[int], operands: Sequence[Strides]) -> int:
    """1 if dimension ``a`` belongs outside ``b``, -1 if inside, 0 if no operand says."""
    for strides in operands:
        if strides[a] == 0 or strides[b] == 0:
            continue
        if strides[a] != strides[b]:
            return -1 if strides[a] < strides[b] else 1
        if shape[a] > shape[b]:
            return 1
    return 0


def _is_packed(shape: Sequence[int], strides: Strides, order: Sequence[int]) -> bool:
    """``is_contiguous`` in a memory format: without regard to dimensions of size 1."""
    if len(order) != len(shape):
        return False
    step = 1
    for dim in order:
        if shape[dim] != 1:
            if strides[dim] != step:
                return False
            step *= shape[dim]
    return True


def is_dense(shape: Sequence[int], strides: Strides) -> bool:
    """Whether values fill their memory without gaps, each its own."""
    if 0 in shape:
        return True
    step = 1
    for stride, size in sorted((strides[i], size) for i, size in enumerate(shape) if size != 1):
        if stride != step:
            return False
        step *= size
    return True


def is_ambiguous(shape: Sequence[int]) -> bool:
    """Whether such images are contiguous and channels-last at once, but for the strides of dimensions of size 1."""
    return len(shape) == 4 and bool(shape[1] == 1 or shape[2] == shape[3] == 1 or 0 in shape)


def is_definite(shape: Sequence[int], strides: Strides) -> bool:
    """Whether these are the strides of one memory format, and values could not lie so in another."""
    try:
        return _is_definite(tuple(shape), strides)
    except TypeError:  # as in `elementwise`
        return _is_definite.__wrapped__(tuple(shape), strides)


@functools.lru_cache(4096)
def _is_definite(shape: tuple[int, ...], strides: Strides) -> bool:
    if len(shape) != 4 or 0 in shape:
        return strides == contiguous(shape) and 0 not in shape
    if strides == contiguous(shape):
        return not _is_packed(shape, strides, (1, 3, 2, 0))
    return strides == channels_last(shape) and not _is_packed(shape, strides, (3, 2, 1, 0))


def in_strides(tensor: Tensor, strides: Strides) -> Tensor:
    """The tensor itself, or one of the same values with these strides."""
    own = tensor.stride()
    if own == strides:
        return tensor
    shape = tensor.shape
    if strides == contiguous(shape):
        return tensor.clone(memory_format=torch.contiguous_format)
    if len(shape) == 4 and strides == channels_last(shape):
        return tensor.clone(memory_format=torch.channels_last)
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
