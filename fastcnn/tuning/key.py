"""What makes two operator calls equal for the tuner: operator, threads, dtype, and each argument's form.

Values of tensors do not count; shapes and the class of their strides do. Keys are tuples of plain values, so that they
can be written to JSON and compared after reading.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from fastcnn.triton_kernels.precision import convolutions_use_tf32, matrix_products_use_tf32

Key: TypeAlias = tuple[object, ...]

_DTYPE_NAMES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}  # fmt: skip


def key_of(operator: str, device: torch.device, dtype: torch.dtype, args: tuple[object, ...]) -> Key:
    """The key of one call of the kernel contract."""
    name = _DTYPE_NAMES.get(dtype) or str(dtype)
    forms = [_form(a) if isinstance(a, torch.Tensor) else a for a in args]
    return (operator, name, *settings_of(operator, device, dtype), *forms)


def settings_of(operator: str, device: torch.device, dtype: torch.dtype) -> tuple[str, int]:
    """What a call's time depends on besides its arguments: ("tf32" where that is allowed, threads on a CPU)."""
    tf32 = device.type == "cuda" and dtype == torch.float32 and _uses_tf32(operator)
    return ("tf32" if tf32 else "", torch.get_num_threads() if device.type == "cpu" else 0)


def _uses_tf32(operator: str) -> bool:
    return matrix_products_use_tf32() if operator == "linear" else convolutions_use_tf32()


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    """Shape and class of strides. A channel slice counts as aligned when vectors of 16 bytes fit its pixels."""
    shape = tensor.shape
    if len(shape) != 4:
        return ("dense" if tensor.is_contiguous() else "strided", *shape)
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return ("nhwc", *shape)
    if tensor.is_contiguous():
        return ("nchw", *shape)
    stride = tensor.stride()
    aligned = stride[3] * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
    return ("slice16" if aligned else "slice", *shape)


def to_json(key: Key) -> list[object]:
    return [list(item) if isinstance(item, tuple) else item for item in key]


def from_json(items: list[object]) -> Key:
    """Raises TypeError where ``items`` is not what :func:`to_json` wrote."""
    key = tuple(tuple(item) if isinstance(item, list) else item for item in items)
    hash(key)
    return key


def describe(key: Key) -> str:
    """A short line for tables: ``conv2d float32 1x64x56x56 -> 1x64x56x56, 64x64x3x3 ...``."""
    operator, dtype, tf32, threads, *arguments = key
    tensors = ["x".join(map(str, a[1:])) for a in arguments if isinstance(a, tuple) and a and isinstance(a[0], str)]
    out, inputs = (tensors[0] if tensors else "?"), tensors[1:3]
    text = f"{operator} {dtype}{' tf32' if tf32 else ''} {', '.join(inputs)} -> {out}"
    return f"{text} ({threads} threads)" if threads else text
