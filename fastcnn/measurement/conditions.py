"""The conditions of a measurement: a time without them says nothing."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastcnn.triton_kernels.precision import convolutions_use_tf32


@dataclass(frozen=True)
class Conditions:
    """Where and with what something was measured."""

    device: str
    instruction_set: str | None  # of the CPU kernels; None on a GPU
    threads: int
    torch: str
    triton: str | None
    fastcnn: str
    cuda: str | None
    cudnn: int | None
    tf32: bool | None  # whether cuDNN may use TF32 for fp32; None on a CPU
    dtype: str
    batch: int | None
    commit: str | None  # of the git checkout that fastcnn runs from, "+" when it has changes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        parts = [self.device]
        if self.instruction_set:
            parts.append(f"{self.threads} threads, {self.instruction_set}")
        parts += [f"torch {self.torch}", f"fastcnn {self.fastcnn}" + (f" ({self.commit})" if self.commit else "")]
        if self.triton:
            parts.append(f"triton {self.triton}")
        if self.cuda:
            parts.append(f"CUDA {self.cuda}, cuDNN {self.cudnn}, TF32 {'on' if self.tf32 else 'off'}")
        parts.append(self.dtype + ("" if self.batch is None else f", batch {self.batch}"))
        return "; ".join(parts)


def conditions(device: torch.device, dtype: torch.dtype, batch: int | None = None) -> Conditions:
    """The conditions that hold now for work on ``device``."""
    import fastcnn
    from fastcnn import _native

    on_gpu = device.type == "cuda"
    return Conditions(
        device=device_name(device),
        instruction_set=None if on_gpu else str(_native.cpu_instruction_set()),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=triton_version(),
        fastcnn=fastcnn.__version__,
        cuda=torch.version.cuda if on_gpu else None,
        cudnn=torch.backends.cudnn.version() if on_gpu else None,
        tf32=convolutions_use_tf32() if on_gpu else None,
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        commit=commit(),
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


@functools.cache
def cpu_name() -> str:
    """The processor's model name, and its family and model numbers, which tell generations of one name apart."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, colon, value = line.partition(":")
            if not colon:
                break  # the first processor's block is over
            facts[name.strip()] = value.strip()
    except OSError:
        pass
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts and "model" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name


@functools.cache
def triton_version() -> str | None:
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def commit() -> str | None:
    """The git commit of the checkout that fastcnn's sources lie in, or None when they lie in none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        revision, changes = (
            subprocess.run(
                ["git", "-C", str(root), *arguments],
                capture_output=True, text=True, check=True, timeout=10, env=environment,
            ).stdout.strip()
            for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+" if changes else "")
