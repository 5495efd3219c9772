"""Which GPU kernels have been proven: run on a GPU by tests/gpu, with right results. Read from ``proven.json``.

The tests write what ran (``gpu-kernels.json``); ``benchmarks/record_proven_kernels.py`` makes the committed record of
it. Names are those of the backends' ``kernel_name``: the operator, and for conv2d which of its kernels.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("proven.json")

_OPERATORS = (
    "linear", "channel_affine", "batch_statistics", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d",
    "local_response_norm", "residual_add",
)  # fmt: skip
_CUDA_CONV2D = (
    "depthwise", "grouped", "simt", "simt elements", "stem", "stem wgmma",
    "tma 256x128", "tma 256x64", "tma 128x128", "tma 128x64", "tma 128x32", "tma 128x128 staged", "tma 128x64 staged",
    "tma 128x128 in turns", "tma 128x64 in turns", "tma 128x32 in turns", "patch 256x64", "patch 256x32",
    "patch held",
    "tma 128x64 split 2", "tma 128x64 split 4", "tma 128x64 split 8",
    "tma 128x128 split 2", "tma 128x128 split 4", "tma 128x128 split 8",
    "tma 128x64 staged split 2", "tma 128x64 staged split 4", "tma 128x64 staged split 8",
    "tma 256x128 by 32", "tma 128x128 in turns by 32", "tma 128x64 in turns by 32",
    "tma 256x128 by 96", "tma 128x128 in turns by 96", "tma 128x64 in turns by 96",
    "wgmma 128x64", "wgmma 128x128", "wgmma 128x256", "wgmma 128x64 staged", "wgmma 128x128 staged",
    "mma 64x64", "mma 128x32", "mma 128x64", "mma 128x128",
    "mma 64x64 staged", "mma 128x32 staged", "mma 128x64 staged", "mma 64x64 elements",
)  # fmt: skip
_TRITON_CONV2D = ("pointwise", "implicit_gemm", "stem", "packed_groups", "depthwise")

# Every GPU kernel there is.
KERNELS: dict[str, tuple[str, ...]] = {
    "cuda": (
        *(f"conv2d {name}" for name in _CUDA_CONV2D), "conv2d_1x1_pair", "conv2d_max_pool2d", *_OPERATORS,
    ),
    "triton": (*(f"conv2d {name}" for name in _TRITON_CONV2D), *_OPERATORS),
}


@functools.cache
def record() -> dict[str, Any] | None:
    """The committed record: device, date, commit, versions, and by backend and kernel the precisions that passed."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else None


def unproven(found: dict[str, Any] | None) -> dict[str, list[str]]:
    """By backend, the kernels that no test has passed with on a GPU."""
    ran = {} if found is None else found["kernels"]
    return {backend: [name for name in names if name not in ran.get(backend, {})] for backend, names in KERNELS.items()}


def summary() -> dict[str, str]:
    """Rows for ``fastcnn env``: what is proven, where, and what is not."""
    found = record()
    missing = unproven(found)
    rest = "; ".join(f"{backend}: {', '.join(names)}" for backend, names in missing.items() if names)
    if found is None:
        return {"proven on a GPU": "no kernel yet"}
    counts = ", ".join(f"{len(ran)} {backend}" for backend, ran in sorted(found["kernels"].items()))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    where = f"{found['device']}, {found['date']}, commit {found['commit']}, {versions}"
    return {
        "proven on a GPU": f"{counts} kernels ({where})",
        "not yet proven": rest or "none",
    }
