"""Who takes part in a benchmark on this machine."""

from __future__ import annotations

import torch

from fastcnn import backends


def backend_names() -> list[str]:
    """fastcnn's backends whose kernels can run on this machine's benchmark device."""
    wanted = ("triton", "cuda") if torch.cuda.is_available() else ("cpp",)
    return [name for name in wanted if backends.unavailable(name) is None]


def dtypes() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float32] if torch.cuda.is_available() else [torch.float32]
