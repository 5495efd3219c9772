"""Whether fp32 may be multiplied as TF32: exactly where cuDNN (convolutions) or cuBLAS (matrix products) would.

Shared by the Triton and the CUDA backend; imports no Triton. The legacy flags cannot be read once the newer
`fp32_precision` ones are in use (they raise), so those are asked first.
"""

from collections.abc import Callable
from typing import Any

import torch


def convolutions_use_tf32() -> bool:
    return _allowed(torch.backends.cudnn.conv, lambda: torch.backends.cudnn.allow_tf32)


def matrix_products_use_tf32() -> bool:
    return _allowed(torch.backends.cuda.matmul, lambda: torch.backends.cuda.matmul.allow_tf32)


def _allowed(flags: Any, legacy: Callable[[], bool]) -> bool:
    setting = getattr(flags, "fp32_precision", None)
    return setting == "tf32" if setting in ("tf32", "ieee") else legacy()
