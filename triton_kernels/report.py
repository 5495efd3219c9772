"""Compiles every kernel ahead of time, without a GPU, and reports what the compiler made of it.

    python -m fastcnn.triton_kernels.report [--capability 90] [--thorough]

Columns: registers a thread; spill: bytes of stack a thread (these kernels have no arrays, so stack means spilled
registers); shared memory a program; how many `wgmma` (sm_90) and `mma.sync` instructions the PTX has; programs resident
on a multiprocessor and the share of its warps that they fill, from registers, shared memory and threads.

Must run without TRITON_INTERPRET.
"""

import argparse
import inspect
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial

import torch
import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import configs
from ._common import Launch, conv_precision, is_interpreted
from .batch_statistics import plan_batch_statistics
from .channel_affine import plan_channel_affine
from .configs import Tile
from .conv2d import plan_conv2d
from .linear import plan_linear
from .local_response_norm import plan_local_response_norm
from .pool2d import plan_adaptive_avg_pool2d, plan_avg_pool2d, plan_max_pool2d
from .residual_add import plan_residual_add

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_POINTER_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_RESERVED_SHARED = 1024  # bytes of shared memory that the system takes from each program
# Shared memory in bytes, warps, and programs that a multiprocessor holds.
_MULTIPROCESSOR = {80: (164 * 1024, 64, 32), 86: (100 * 1024, 48, 16), 90: (228 * 1024, 64, 32)}


@dataclass(frozen=True)
class Case:
    """A launch worth compiling. `tile` is the shipped tile it stands for, if it has one."""

    name: str
    launch: Launch
    dtype: torch.dtype
    tile: Tile | None = None

    @property
    def uses_tensor_cores(self) -> bool:
        return "PRECISION" in self.launch.arguments and not (
            self.dtype == torch.float32 and self.launch.arguments["PRECISION"] == "ieee"
        )


@dataclass(frozen=True)
class Row:
    """What one kernel compiled to."""

    kernel: str
    dtype: str
    config: str
    capability: int
    registers: int
    spill: int
    shared: int
    wgmma: int
    mma: int
    programs: int
    occupancy: float

    def to_dict(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


# ------------------------------------------------------------------------------------------------------ the cases


def nhwc(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> torch.Tensor:
    """A channels-last tensor without memory."""
    return torch.empty((n, h, w, c), dtype=dtype, device="meta").permute(0, 3, 1, 2)


def vector(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.float32, device="meta")


def conv_case(
    name: str, dtype: torch.dtype, capability: int, tile: Tile | None = None, *,
    channels: int = 256, filters: int = 256, filter_size: int = 3, stride: int = 1, groups: int = 1,
    prologue: bool = False, residual: bool = True,
) -> Case:  # fmt: skip
    """A convolution with the whole epilogue: the one that needs the most registers."""
    size, padding = 28 * stride, filter_size // 2
    input, out = nhwc(32, channels, size, size, dtype), nhwc(32, filters, 28, 28, dtype)
    weight = torch.empty((filters, filter_size, filter_size, channels // groups), dtype=dtype, device="meta")
    launch = plan_conv2d(
        out, input, weight, vector(filters), vector(filters), out if residual else None,
        vector(channels) if prologue else None, vector(channels) if prologue else None, prologue, "relu",
        (stride, stride), (padding, padding), (1, 1), groups, config=tile, capability=capability,
    )  # fmt: skip
    return Case(name, launch, dtype, tile)


def conv_cases(capability: int, thorough: bool) -> Iterator[Case]:
    """Every shipped tile through the dense kernels, and the other kernels with the tiles chosen for known layers."""
    for dtype in DTYPES:
        make = partial(conv_case, dtype=dtype, capability=capability)
        for index, tile in enumerate(shipped_tiles(capability, dtype)):
            if dtype == torch.float16 and index > 1 and not thorough:
                break  # the same code as bf16
            yield make("implicit_gemm", tile=tile)
            if thorough or dtype != torch.float16:
                yield make("implicit_gemm prologue", tile=tile, prologue=True)
            if thorough or tile.block_m * tile.block_n >= 128 * 128:
                yield make("pointwise prologue", tile=tile, filter_size=1, prologue=True)
            if thorough:
                yield make("pointwise", tile=tile, filter_size=1)
                yield make("pointwise strided", tile=tile, filter_size=1, stride=2)
        if dtype == torch.float16 and not thorough:
            continue
        yield make("pointwise strided", filter_size=1, stride=2)
        for tile in configs.tiles(capability, dtype, conv_precision(dtype), gathers=True):
            yield make("stem 7x7x3", tile=tile, channels=3, filters=64, filter_size=7, stride=2)
        yield make("stem 3x3x3", channels=3, filters=32, filter_size=3, prologue=True)
        yield make("grouped 16", channels=512, filters=512, groups=32)
        yield make("packed_groups 4", channels=128, filters=128, groups=32)
        yield make("packed_groups 8", channels=256, filters=256, groups=32, prologue=True)
        yield make("depthwise", channels=256, filters=256, groups=256)
        yield make("depthwise prologue", channels=256, filters=256, groups=256, prologue=True)


def shipped_tiles(capability: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """All tiles of a dtype; for fp32 those of the precision that is set now."""
    return configs.tiles(capability, dtype, conv_precision(dtype))


def other_cases(capability: int) -> Iterator[Case]:
    """The memory-bound operators and the linear layer, dense and (LRN apart) with every optional argument."""
    for dtype in (torch.bfloat16, torch.float32):
        x, wide = nhwc(32, 256, 28, 28, dtype), nhwc(32, 512, 28, 28, dtype)[:, :256]
        halved, one = nhwc(32, 256, 14, 14, dtype), nhwc(32, 256, 1, 1, dtype)
        scale = vector(256)
        first, second = plan_batch_statistics(scale, scale, x)
        matrix = partial(torch.empty, dtype=dtype, device="meta")
        linear = plan_linear(matrix(64, 1000), matrix(64, 2048), matrix(1000, 2048), vector(1000), "none",
                             capability=capability)  # fmt: skip
        yield Case("linear", linear, dtype)
        yield Case("channel_affine", plan_channel_affine(wide, wide, scale, scale, x, "relu"), dtype)
        yield Case("batch_statistics 1", first, dtype)
        yield Case("batch_statistics 2", second, dtype)
        yield Case("max_pool2d", plan_max_pool2d(halved, x, (3, 3), (2, 2), (1, 1), (1, 1)), dtype)
        yield Case("avg_pool2d", plan_avg_pool2d(halved, x, (2, 2), (2, 2), (0, 0), (0, 0), False, 0), dtype)
        yield Case("adaptive_avg_pool2d", plan_adaptive_avg_pool2d(one, x), dtype)
        yield Case("local_response_norm", plan_local_response_norm(x, x, 5, 1e-4, 0.75, 2.0), dtype)
        yield Case("local_response_norm any beta", plan_local_response_norm(x, x, 5, 1e-4, 0.5, 2.0), dtype)
        yield Case("residual_add", plan_residual_add(x, x, x, 1.0, "relu"), dtype)
        yield Case("residual_add slice", plan_residual_add(wide, x, x, 1.0, "relu"), dtype)


def cases(capability: int, thorough: bool = False) -> Iterator[Case]:
    """What the tests compile; `thorough` adds the combinations that repeat the others' code."""
    yield from conv_cases(capability, thorough)
    yield from other_cases(capability)


# --------------------------------------------------------------------------------------------------- the compiler


def compile_launch(launch: Launch, capability: int):
    """Triton's compiled kernel for a launch whose tensors need no memory, as the launch itself would compile it."""
    if is_interpreted():
        raise RuntimeError("kernels cannot be compiled while TRITON_INTERPRET is set")
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(inspect.signature(launch.kernel.fn).parameters.values()):
        value = launch.arguments[parameter.name]
        if parameter.annotation is tl.constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTER_TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]  # PyTorch's allocations are aligned to more than 16 bytes
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG (registers), STACK and LOCAL (bytes a thread) of the one kernel in a cubin, as cuobjdump reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "cuobjdump")
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    lines = [line for line in text.stdout.splitlines() if "REG:" in line]
    if len(lines) != 1:
        raise RuntimeError(f"cuobjdump named {len(lines)} kernels, expected one:\n{text.stdout}")
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", lines[0])}


def residency(capability: int, registers: int, shared: int, num_warps: int) -> tuple[int, float]:
    """(programs that fit on a multiprocessor, share of its warps they fill)."""
    shared_limit, warp_limit, program_limit = _MULTIPROCESSOR[capability]
    registers_a_warp = -(-registers * 32 // 256) * 256
    # Registers are handed out by each of the four quarters of a multiprocessor: 16384 apiece.
    by_registers = 16384 // registers_a_warp * 4 // num_warps
    by_shared = shared_limit // (shared + _RESERVED_SHARED)
    programs = min(by_registers, by_shared, warp_limit // num_warps, program_limit)
    return programs, programs * num_warps / warp_limit


def compile_case(case: Case, capability: int) -> Row:
    compiled = compile_launch(case.launch, capability)
    usage = resource_usage(compiled.asm["cubin"])
    registers, shared = usage["REG"], compiled.metadata.shared
    programs, occupancy = residency(capability, registers, shared, case.launch.num_warps)
    ptx = compiled.asm["ptx"]
    return Row(
        kernel=case.name,
        dtype=str(case.dtype).removeprefix("torch."),
        config=describe(case.launch),
        capability=capability,
        registers=registers,
        spill=usage["STACK"] + usage["LOCAL"],
        shared=shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        programs=programs,
        occupancy=occupancy,
    )


def describe(launch: Launch) -> str:
    blocks = [launch.arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in launch.arguments]
    return f"{'x'.join(map(str, blocks))} w{launch.num_warps} s{launch.num_stages}"


def ahead_of_time_report(capabilities: Iterable[int] = (80, 90), thorough: bool = False) -> list[Row]:
    """One row for each kernel and configuration."""
    return [compile_case(case, capability) for capability in capabilities for case in cases(capability, thorough)]


def as_table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| sm | kernel | dtype | tile | registers | spill | shared | wgmma | mma.sync | programs | occupancy |",
        "|---:|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.capability} | {row.kernel} | {row.dtype} | {row.config} | {row.registers} | {row.spill} | "
            f"{row.shared} | {row.wgmma} | {row.mma} | {row.programs} | {row.occupancy:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel without a GPU and report its resources.")
    parser.add_argument("--capability", type=int, action="append", choices=sorted(_MULTIPROCESSOR))
    parser.add_argument("--thorough", action="store_true", help="every tile with every kernel and type")
    arguments = parser.parse_args()
    print(as_table(ahead_of_time_report(arguments.capability or (80, 90), arguments.thorough)))


if __name__ == "__main__":
    main()
