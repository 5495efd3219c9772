"""The accuracy rule of the project, as an assertion."""

from __future__ import annotations

import torch
from torch import Tensor

# Rounding of one result in each storage format: what an exactly computed result may still be off by.
TINY = {
    torch.float64: 1e-14,
    torch.float32: 2.5e-7,
    torch.complex64: 2.5e-7,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||, infinite when a NaN or infinity stands where the exact result has none."""
    wide = torch.complex128 if exact.is_complex() else torch.float64
    actual, exact = actual.to(wide), exact.to(wide)
    if not torch.equal(torch.isnan(actual), torch.isnan(exact)):
        return float("inf")
    finite = torch.isfinite(exact)
    if not torch.equal(actual[~finite].nan_to_num(), exact[~finite].nan_to_num()):
        return float("inf")
    difference = (actual[finite] - exact[finite]).norm().item()
    scale = exact[finite].norm().item()
    return difference / scale if scale > 0 else difference


def assert_accurate(ours: Tensor, reference: Tensor, exact: Tensor) -> None:
    """err(ours, float64) <= 2 x err(reference in the same dtype, float64) + tiny; same shape, dtype and device too."""
    assert ours.shape == reference.shape == exact.shape, (ours.shape, reference.shape, exact.shape)
    assert ours.dtype == reference.dtype, (ours.dtype, reference.dtype)
    if ours.numel() == 0:
        return
    ours_error, reference_error = relative_error(ours, exact), relative_error(reference, exact)
    bound = 2 * reference_error + TINY[ours.dtype]
    assert ours_error <= bound, f"relative error {ours_error:.3e} > {bound:.3e} (reference: {reference_error:.3e})"
