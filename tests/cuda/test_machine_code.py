"""Reads the machine code of the CUDA kernels: tensor-core instructions where they belong, no spills anywhere.

Needs nvcc and cuobjdump, but no GPU. Compiles csrc/cuda for sm_80 and sm_90a (about a minute), once per content of the
sources. `pytest -s` prints the table.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURES = {"sm_80": "arch=compute_80,code=sm_80", "sm_90a": "arch=compute_90a,code=sm_90a"}
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)


@dataclass
class Kernel:
    architecture: str
    symbol: str
    registers: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)
    loads_in_flight: int = 0  # most 16-byte loads from global memory that stand before a use of any of them

    def count(self, prefix: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefix))

    @property
    def name(self) -> str:
        """The symbol as a person would write it: conv2d_mma<bf16, 128, 64, 64, 0>."""
        symbol = self.symbol.replace("13__nv_bfloat16", "Tbf16_").replace("6__half", "Tf16_").replace("If", "ITf32_")
        base = re.match(r"_ZN7fastcnn4cuda(\d+)", symbol)
        assert base, self.symbol
        start, length = base.end(), int(base.group(1))
        kernel, rest = symbol[start : start + length], symbol[start + length :].split("EEv")[0]
        arguments = re.findall(r"T(bf16|f16|f32)_|L[ib](\d+)E|LoadPathE(\d)|7(Maximum)|4(Mean)", rest)
        return f"{kernel}<{', '.join(next(filter(None, a)) for a in arguments)}>"


REGISTER = re.compile(r"\bR(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);", re.MULTILINE)


def loads_in_flight(code: str) -> int:
    """In the order in which the instructions stand, which is nearly that of a pass through the kernel's loop."""
    most, pending = 0, set()
    loads = 0
    for opcode, operands in INSTRUCTION.findall(code):
        load = opcode.startswith("LDG") and ".128" in opcode
        destination, _, sources = operands.partition(",")
        if pending & {int(r) for r in REGISTER.findall(sources if load else operands)}:
            pending, loads = set(), 0
        if load:
            first = int(REGISTER.findall(destination)[0])
            pending |= set(range(first, first + 4))
            loads += 1
            most = max(most, loads)
    return most


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def find_cuobjdump(nvcc: str) -> str | None:
    """Beside nvcc, on the PATH, or in triton's package. nvdisasm, which it calls, must lie beside it."""
    places = [Path(nvcc).resolve().parent]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for place in places:
        if (place / "cuobjdump").exists() and (place / "nvdisasm").exists():
            return str(place / "cuobjdump")
    return shutil.which("cuobjdump") if shutil.which("nvdisasm") else None


def inspect(nvcc: str, cuobjdump: str, source: Path, architecture: str, folder: Path) -> tuple[list[Kernel], str]:
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    command = [nvcc, "-std=c++17", "-O3", "-gencode", ARCHITECTURES[architecture], "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([*command, "-o", str(cubin), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "PATH": f"{Path(cuobjdump).parent}{os.pathsep}{os.environ['PATH']}"}
    sass = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, env=environment, check=True)
    kernels = {}
    for block in re.split(r"Function : ", sass.stdout)[1:]:
        symbol, code = block.split("\n", 1)
        kernels[symbol] = Kernel(architecture, symbol, opcodes=dict(Counter(OPCODE.findall(code))))
        kernels[symbol].loads_in_flight = loads_in_flight(code)
    for block in re.split(r"Compiling entry function '", done.stderr)[1:]:
        kernel = kernels[block.split("'", 1)[0]]
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        registers = re.search(r"Used (\d+) registers", block)
        assert numbers is not None, block
        assert registers is not None, block
        kernel.stack_bytes = int(numbers[1])
        kernel.spill_bytes = int(numbers[2]) + int(numbers[3])
        kernel.registers = int(registers[1])
    return list(kernels.values()), done.stderr


@pytest.fixture(scope="session")
def machine_code() -> tuple[list[Kernel], str]:
    """Every kernel of every architecture, and what ptxas said."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc not found: no CUDA toolkit to compile the kernels with")
    cuobjdump = find_cuobjdump(nvcc)
    if cuobjdump is None:
        pytest.skip("cuobjdump and nvdisasm found neither beside nvcc, nor on the PATH, nor in triton")
    files = [p for p in sorted(SOURCES.glob("c*/**/*")) if p.is_file() and p.suffix in (".cu", ".cuh", ".h")]
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / f"fastcnn-machine-code-{os.getuid()}" / f"{digest}.json"
    if not cache.exists():
        cache.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            jobs = [(s, a) for a in ARCHITECTURES for s in sorted((SOURCES / "cuda").glob("*.cu"))]
            results = list(pool.map(lambda job: inspect(nvcc, cuobjdump, *job, Path(scratch)), jobs))
        kernels = [asdict(kernel) for found, _ in results for kernel in found]
        fresh = cache.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({"kernels": kernels, "log": "".join(log for _, log in results)}))
        fresh.replace(cache)
    stored = json.loads(cache.read_text())
    return [Kernel(**kernel) for kernel in stored["kernels"]], stored["log"]


def named(kernels: list[Kernel], *parts: str, architecture: str | None = None) -> list[Kernel]:
    found = [k for k in kernels if all(p in k.name for p in parts) and architecture in (None, k.architecture)]
    assert found, f"no kernel named {parts} for {architecture}"
    return found


def test_table(machine_code) -> None:
    kernels, _ = machine_code
    columns = ("HMMA", "HGMMA", "FFMA", "LDSM", "LDGSTS", "LDG", "STG", "LDL", "STL")
    print(f"\n{'kernel':44}{'arch':8}{'regs':>5}{'spill':>6}" + "".join(f"{c:>7}" for c in columns))
    for kernel in sorted(kernels, key=lambda k: (k.architecture, k.name)):
        counts = {c: kernel.count(c) for c in columns}
        counts["LDG"] -= kernel.count("LDGSTS") + kernel.count("LDGDEPBAR")  # asynchronous copies, counted apart
        row = f"{kernel.name:44}{kernel.architecture:8}{kernel.registers:5}{kernel.spill_bytes:6}"
        print(row + "".join(f"{counts[c]:7}" for c in columns))
    assert {k.architecture for k in kernels} == set(ARCHITECTURES)


def test_no_spills(machine_code) -> None:
    """No register array lives in local memory: not spilled, not indexed at run time."""
    for kernel in machine_code[0]:
        local = kernel.count("LDL") + kernel.count("STL")
        assert (kernel.spill_bytes, kernel.stack_bytes, local) == (0, 0, 0), (kernel.architecture, kernel.name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "opcode"), [("bf16", "HMMA.16816.F32.BF16"), ("f16", "HMMA.16816.F32"), ("f32", "HMMA.1688.F32.TF32")]
)
def test_mma_kernels_use_tensor_cores(machine_code, architecture: str, dtype: str, opcode: str) -> None:
    kernels = named(machine_code[0], f"conv2d_mma<{dtype}", architecture=architecture)
    assert len(kernels) == 8
    for kernel in kernels:
        # A k-step is 4 products of 16x8 for every 16 rows of the warp; a stage has two.
        assert kernel.opcodes.get(opcode, 0) >= 16, kernel.name
        assert kernel.count("LDSM.16.M88.4") >= 8, kernel.name
        asynchronous = kernel.name.endswith(", 0>")  # LoadPath::async_vectors
        assert (kernel.count("LDGSTS") > 0) == asynchronous, kernel.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "opcode"), [("bf16", "HMMA.16816.F32.BF16"), ("f16", "HMMA.16816.F32")])
def test_stem_kernels_read_fragments_in_place(machine_code, architecture: str, dtype: str, opcode: str) -> None:
    kernels = named(machine_code[0], f"conv2d_stem<{dtype}", architecture=architecture)
    assert len(kernels) == 3
    for kernel in kernels:
        columns = int(kernel.name.rstrip(">").split(", ")[1])
        # A k-step: two products of 16 rows for every 8 filters, with weights for four of them in one read, and the
        # pairs of both A fragments as they lie.
        assert kernel.opcodes[opcode] % (2 * columns // 8) == 0
        assert kernel.opcodes[opcode] > 0
        assert kernel.count("LDS.128") >= columns // 16
        assert kernel.opcodes["LDS"] >= 8
        assert kernel.count("LDSM") == 0
        assert kernel.count("LDGSTS.E.BYPASS") > 0  # asynchronous copies of the next band
        # Two blocks on a multiprocessor: four warps on each quarter of its registers, or two for 96 filters.
        assert kernel.registers <= (128 if columns < 96 else 255), kernel.name


def test_wgmma_kernels_use_hopper_tensor_cores(machine_code) -> None:
    kernels = named(machine_code[0], "conv2d_wgmma", architecture="sm_90a")
    for kernel in kernels:
        assert kernel.count("HGMMA.64x") >= 4, kernel.name
        assert kernel.count("HMMA") == 0, kernel.name
        assert kernel.count("FENCE.VIEW.ASYNC") > 0, kernel.name
    assert not any(k.count("HGMMA") for k in named(machine_code[0], "", architecture="sm_80"))


def test_stem_on_wgmma_takes_pairs_from_registers(machine_code) -> None:
    kernels = named(machine_code[0], "conv2d_stem_wgmma", architecture="sm_90a")
    assert len(kernels) == 4
    for kernel in kernels:
        columns = int(kernel.name.rstrip(">").split(", ")[1])
        assert kernel.count(f"HGMMA.64x{columns}x16") == 2, kernel.name  # two steps, each with its own pairs
        assert kernel.opcodes["LDS"] >= 8, kernel.name
        assert kernel.count("HMMA") == 0, kernel.name
        assert kernel.count("FENCE.VIEW.ASYNC") > 0, kernel.name
        assert kernel.registers <= 128, kernel.name  # two blocks of 256 threads


def test_a_stem_with_pooling_compares_pairs(machine_code) -> None:
    kernels = named(machine_code[0], "conv2d_stem_pool", architecture="sm_90a")
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel.count("HGMMA.64x64x16") == 2, kernel.name  # two steps, each with its own pairs
        # Maxima of two values at once: 16 of a second row, 16 of a third, and 3 columns of 16 bytes.
        assert kernel.count("HMNMX2") >= 16 + 16 + 3 * 4, kernel.name
        assert any(o.startswith("STG") and ".128" in o for o in kernel.opcodes), kernel.name
        assert kernel.count("FENCE.VIEW.ASYNC") > 0, kernel.name
        assert kernel.registers <= 128, kernel.name  # two blocks of 256 threads


def test_wgmma_is_not_serialized(machine_code) -> None:
    """ptxas warns when it must wait for each product in turn."""
    assert "serialized" not in machine_code[1]
    assert "wgmma" not in re.sub(r".*(Compiling|Function properties).*", "", machine_code[1])


def test_two_blocks_share_a_multiprocessor(machine_code) -> None:
    """The pipelines count on it: 65536 registers for 2 x 256 threads."""
    for kernel in [*named(machine_code[0], "conv2d_wgmma"), *named(machine_code[0], "conv2d_mma", "128, 128, 64")]:
        if "256" not in kernel.name:
            assert kernel.registers <= 128, (kernel.architecture, kernel.name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_fp32_uses_no_tensor_cores(machine_code, architecture: str) -> None:
    for kernel in named(machine_code[0], "conv2d_simt", architecture=architecture):
        assert kernel.count("HMMA") == 0
        assert kernel.opcodes["FFMA"] >= 8 * 8 * 16  # one tile of 16 values of j, unrolled
        assert kernel.count("LDS.128") >= 4 * 16


def moves_vectors(kernel: Kernel) -> bool:
    """And not single elements, for unaligned tensors: kernel<dtype, width, ...>."""
    return kernel.name.rstrip(">").split(", ")[1:2] != ["1"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory_bound_kernels_move_16_bytes(machine_code, architecture: str) -> None:
    families = (
        "elementwise<", "pool2d<", "global_mean<", "local_response_norm_of_5<", "local_response_norm_kernel<",
        "conv2d_depthwise<",
    )  # fmt: skip
    for family in families:
        for kernel in filter(moves_vectors, named(machine_code[0], family, architecture=architecture)):
            assert any(o.startswith("LDG") and ".128" in o for o in kernel.opcodes), kernel.name
            assert any(o.startswith("STG") and ".128" in o for o in kernel.opcodes), kernel.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("family", "registers"), [("elementwise<", 85), ("local_response_norm_of_5<", 64), ("batch_statistics_slabs<", 64)]
)
def test_memory_bound_kernels_keep_loads_in_flight(machine_code, architecture: str, family: str, registers: int):
    """Four of a thread, on three or four blocks of 256 threads: 48 KiB or more on a multiprocessor."""
    for kernel in filter(moves_vectors, named(machine_code[0], family, architecture=architecture)):
        assert kernel.loads_in_flight >= 4, kernel.name
        assert kernel.registers <= registers, kernel.name


def test_split_kernels_meet_in_clusters(machine_code) -> None:
    kernels = named(machine_code[0], "conv2d_tma_split", architecture="sm_90a")
    assert len(kernels) == 6
    for kernel in kernels:
        columns = "128" if ", 128, " in kernel.name else "64"
        assert kernel.count(f"HGMMA.64x{columns}x16") >= 4, kernel.name
        # Arriving and waiting, twice for each of the warps that copy and multiply.
        assert kernel.opcodes["UCGABAR_ARV"] >= 4, kernel.name
        assert kernel.opcodes["UCGABAR_WAIT"] >= 4, kernel.name
        assert kernel.count("LD.E.128") >= 2 * (2 + 4 + 8), kernel.name  # 8 columns from each of the cluster's blocks
        assert kernel.registers <= 168, kernel.name  # 65536 for 384 threads


def test_pair_kernels_multiply_twice(machine_code) -> None:
    kernels = named(machine_code[0], "conv2d_1x1_pair", architecture="sm_90a")
    assert len(kernels) == 6
    for kernel in kernels:
        _, columns, groups = kernel.name.rstrip(">").split(", ")
        # Four steps of 64 channels: 64 columns in product 1, those of the narrow result, at most 128 at once, in 2.
        second = min(int(columns), 128)
        counts = {size: kernel.count(f"HGMMA.64x{size}x16") for size in (64, second)}
        assert counts == ({64: 8} if second == 64 else {64: 4, second: 4 * int(columns) // second}), kernel.name
        assert kernel.registers <= 65536 // (128 * (int(groups) + 1)), kernel.name
        assert kernel.count("FENCE.VIEW.ASYNC") > 0, kernel.name
