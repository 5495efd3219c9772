"""Whether two runs gave the same result."""

from __future__ import annotations

import torch
from torch import Tensor

# How far a replay's result may be from the model's, relative: the same kernels ran, but PyTorch's libraries may choose
# another algorithm in a capture.
_NEAR = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def near(ours: Tensor, theirs: Tensor) -> bool:
    if not ours.is_floating_point() or not torch.equal(ours.isfinite(), theirs.isfinite()):
        return equal(ours, theirs)
    wide, exact = (t.nan_to_num(0, 0, 0).double() for t in (ours, theirs))
    return bool((wide - exact).norm() <= _NEAR.get(ours.dtype, 1e-9) * exact.norm())


def equal(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours, theirs) or torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)
