"""Argument forms shared by the operators: PyTorch's int-or-pair, string padding, activations, vectors."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastcnn.backends.derived import derived

Pair = tuple[int, int]
IntOrPair = int | Sequence[int]

ACTIVATIONS = ("none", "relu")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pair(value: IntOrPair, name: str) -> Pair:
    """An int for both dimensions, or one a dimension."""
    if type(value) is tuple and len(value) == 2 and _is_small(value[0]) and _is_small(value[1]):
        return value
    if type(value) is int or not isinstance(value, Sequence) or isinstance(value, str):
        single = require_int(value, name, "an int or two ints")
        return (single, single)
    values = tuple(require_int(v, name, "an int or two ints") for v in value)
    if len(values) == 1:
        return (values[0], values[0])
    if len(values) != 2:
        raise ValueError(f"{name} must be an int or two ints, is {value!r}")
    return values  # type: ignore[return-value]


def _is_small(value: object) -> bool:
    """What nearly every argument is, told cheaply."""
    return type(value) is int and -(2**31) <= value < 2**31


def require_int(value: object, name: str, wanted: str = "an int") -> int:
    """The value as an int of 64 bits: NumPy's integers too, but no bool, which is a flag in the wrong place."""
    if _is_small(value):
        return value  # type: ignore[return-value]
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be {wanted}, is {value!r}")
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, is {number}")
    return number


def require_number(value: object, name: str) -> None:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)):
        raise TypeError(f"{name} must be a number, is {value!r}")


def require_addressable(shape: Sequence[int], name: str, value: object) -> None:
    """An output that has a size: the product of its dimensions fits into 64 bits, with the bytes of a value."""
    if not any(isinstance(size, torch.SymInt) for size in shape) and math.prod(shape) >= 2**60:
        raise ValueError(f"{name} {value} asks for an output of shape {tuple(shape)}, more than memory can address")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_at_least(values: Sequence[int], minimum: int, name: str) -> None:
    for value in values:  # on every call's path: a loop, not a generator
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, is {tuple(values)}")


def require_activation(activation: str, name: str = "activation") -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}, is {activation!r}")


def require_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, is {type(value).__name__}")
    if value.layout != torch.strided or value.is_quantized:
        kind = "quantized" if value.is_quantized else f"of layout {value.layout}"
        raise TypeError(f"{name} must be a dense torch.Tensor, is {kind}")


def require_optional_tensors(**values: object) -> None:
    """None or a tensor each."""
    for name, value in values.items():
        if value is not None:
            require_tensor(value, name)


def require_floating(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be a floating-point tensor (of 16, 32 or 64 bits), is {tensor.dtype}")


def renamed(error: Exception, names: Mapping[str, str]) -> Exception:
    """The error of an operator that another one calls, in the words of the caller's arguments."""
    pattern = rf"\b({'|'.join(names)})\b"
    return type(error)(re.sub(pattern, lambda match: names[match[0]], str(error)))


def require_same_place(tensor: Tensor | None, name: str, like: Tensor, *, dtype: bool = True) -> None:
    """Same device as the input and, unless it is a vector that may be fp32, the same dtype."""
    if tensor is None:
        return
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the input's device {like.device}, is on {tensor.device}")
    if dtype and tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the input's dtype {like.dtype}, has {tensor.dtype}")


def require_vector(vector: Tensor | None, name: str, length: int, like: Tensor) -> None:
    """None, or one value a channel in the input's dtype or fp32."""
    if vector is None:
        return
    require_same_place(vector, name, like, dtype=False)
    if vector.dtype not in (like.dtype, torch.float32):
        raise TypeError(f"{name} must be {_or_fp32(like.dtype)}, is {vector.dtype}")
    if vector.dim() != 1 or vector.shape[0] != length:
        raise ValueError(f"{name} must have shape ({length},), has {tuple(vector.shape)}")


def _or_fp32(dtype: torch.dtype) -> str:
    return str(dtype) if dtype == torch.float32 else f"{dtype} or torch.float32"


def require_residual(residual: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    if residual is None:
        return
    require_same_place(residual, "residual", like)
    if tuple(residual.shape) != tuple(shape):
        raise ValueError(f"residual must have the output's shape {tuple(shape)}, has {tuple(residual.shape)}")


def kernel_vector(vector: Tensor | None) -> Tensor | None:
    """A vector as kernels take it: fp32 and contiguous. Wider and other kinds stay as they are, for the reference."""
    if vector is None:
        return None
    if vector.dtype in (torch.bfloat16, torch.float16):
        # On a GPU a conversion is a kernel: for a parameter it is done once.
        keep = vector.is_cuda and isinstance(vector, torch.nn.Parameter)
        return derived(vector, "kernel_vector", _wide) if keep else _wide(vector)
    return vector.contiguous()


def _wide(vector: Tensor) -> Tensor:
    return vector.detach().float().contiguous()
