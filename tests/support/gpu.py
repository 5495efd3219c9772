"""What the GPU tests share: precisions, reproducible data, and a reference that is right about TF32.

Small tensors are drawn on the CPU, so that a rehearsal without a GPU sees the very values; large ones where they are
used.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcnn.commands.verify import allowing_tf32
from fastcnn.verification.tf32 import round_to_tf32
from support.accuracy import assert_accurate, relative_error

SMALL = 2**18


@dataclass(frozen=True)
class Precision:
    """A dtype, and for fp32 whether tensor cores may round its operands to TF32."""

    name: str
    dtype: torch.dtype
    tf32: bool = False

    def __str__(self) -> str:
        return self.name

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """PyTorch's settings for it, which fastcnn follows as cuDNN and cuBLAS do."""
        with allowing_tf32(self.tf32):
            yield


FP32 = Precision("fp32", torch.float32)
TF32 = Precision("tf32", torch.float32, tf32=True)
BF16 = Precision("bf16", torch.bfloat16)
FP16 = Precision("fp16", torch.float16)
PRECISIONS = (FP32, TF32, BF16, FP16)


class Random:
    """Normal values that depend on a name alone (not on Python's salted hashes, or on what ran before)."""

    def __init__(self, name: object, device: torch.device) -> None:
        self.device = device
        seed = zlib.crc32(repr(name).encode())
        self._small = torch.Generator().manual_seed(seed)
        self._large = torch.Generator(device).manual_seed(seed + 1)  # not the same values again on a CPU

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if math.prod(shape) <= SMALL:
            return torch.randn(shape, generator=self._small).to(self.device, dtype)
        return torch.randn(shape, generator=self._large, device=self.device).to(dtype)

    def factors(self, size: int) -> Tensor:
        """Of either sign, 0.5 to 1.5 in size: no channel outweighs all others, as with normal values one can."""
        return self(size).sign() * (0.5 + torch.rand(size, generator=self._small).to(self.device))


# A formula in plain PyTorch, as a function of the dtype its tensors are converted to and of what is applied to the two
# factors of its products.
Formula = Callable[[torch.dtype, Callable[[Tensor], Tensor]], Tensor]


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def references(formula: Formula, precision: Precision) -> tuple[Tensor, Tensor]:
    """(reference, exact) for the accuracy rule.

    Where TF32 is allowed the reference is the less precise of PyTorch's result and of a product whose operands are
    rounded to TF32 (to nearest) and summed in float64: the setting permits TF32, but for odd shapes cuDNN and cuBLAS
    choose exact fp32, which no use of the permission could keep up with.
    """
    exact = formula(torch.float64, as_it_is)
    reference = formula(precision.dtype, as_it_is)
    if precision.tf32:
        emulated = formula(torch.float64, lambda t: round_to_tf32(t.float()).double()).float()
        reference = max(reference, emulated, key=lambda result: relative_error(result, exact))
    return reference, exact


def assert_follows(ours: Tensor, formula: Formula, precision: Precision) -> None:
    """The accuracy rule for one result."""
    assert_accurate(ours, *references(formula, precision))


def cases_id(case: object) -> str:
    return str(case).replace("torch.", "")
