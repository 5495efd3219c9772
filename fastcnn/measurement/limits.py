"""The machine's own limits: what a kernel's speed is a share of. CPU only.

Native loops do nothing but multiply-adds in registers, loads or copies (``csrc/cpu/isa/machine_limits.cpp``), with the
threads and the instruction set that the kernels use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastcnn import _native

_MEMORY_BYTES = 1 << 28  # more than caches hold


@dataclass(frozen=True)
class MachineLimits:
    """The best of several short runs each: a limit is what was reached, not what is usual."""

    threads: int
    instruction_set: str
    flops_per_second: float  # fp32 multiply-adds, two operations each
    bf16_flops_per_second: float | None  # bf16 dot products into fp32; None where the processor has no such instruction
    read_bytes_per_second: float
    copy_bytes_per_second: float  # read plus written

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s that arithmetic on ``dtype`` in memory can reach. Without bf16 instructions that is fp32's."""
        wide = self.bf16_flops_per_second if dtype == torch.bfloat16 else None
        return wide or self.flops_per_second

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        bf16 = f", bf16 {self.bf16_flops_per_second / 1e9:.0f} GFLOP/s" if self.bf16_flops_per_second else ""
        return (
            f"{self.threads} threads, {self.instruction_set}: fp32 {self.flops_per_second / 1e9:.0f} GFLOP/s{bf16}, "
            f"memory read {self.read_bytes_per_second / 1e9:.0f} GB/s, "
            f"copied {self.copy_bytes_per_second / 1e9:.0f} GB/s (read + written)"
        )


def machine_limits(threads: int | None = None, *, rounds: int = 8, memory: bool = True) -> MachineLimits:
    """Measure the limits of ``threads`` threads (default: PyTorch's number). Takes about half a second.

    Args:
        rounds: short runs of each; the best counts.
        memory: False leaves the two bandwidths out (they are NaN then), and with them 512 MiB of memory.
    """
    threads = torch.get_num_threads() if threads is None else threads
    fp32 = _best_rate(_native.cpu_fma_limit, threads, rounds)
    bf16 = _best_rate(_native.cpu_bf16_dot_limit, threads, rounds)
    read = copied = float("nan")
    if memory:
        source = torch.ones(_MEMORY_BYTES // 4)
        target = torch.zeros_like(source)  # every page is met before the watch runs
        read = _MEMORY_BYTES / min(_seconds(lambda: _native.cpu_read_limit(source, threads)) for _ in range(rounds))
        copied = 2 * _MEMORY_BYTES / min(
            _seconds(lambda: _native.cpu_copy_limit(target, source, threads)) for _ in range(rounds)
        )  # fmt: skip
    return MachineLimits(threads, _native.cpu_instruction_set(), fp32, bf16 or None, read, copied)


Limit = Callable[[int, int], tuple[float, float]]


def _best_rate(limit: Limit, threads: int, rounds: int) -> float:
    """Operations a second, the most of several runs of about 4 ms: long against opening threads, short against a
    scheduler's slice."""
    few = 20_000
    if limit(few, 1)[0] == 0:
        return 0.0
    iterations = int(few * 4e-3 / min(_seconds(lambda: limit(few, 1)) for _ in range(5)))
    operations, _ = limit(iterations, threads)
    return operations / min(_seconds(lambda: limit(iterations, threads)) for _ in range(rounds))


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
