"""Builds the native module with CMake and Ninja, and decides whether its CUDA kernels are built.

FASTCNN_CUDA=auto|0|1    auto (default): build CUDA kernels when nvcc and an NVIDIA GPU are present; 1: build them
                         without a GPU too and fail where that cannot be done; 0: never.
FASTCNN_CUDA_ARCHS       for example "80;90a"; default: the architectures of the GPUs present, else 80 and 90a.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CudaDecision(NamedTuple):
    build: bool
    reason: str
    architectures: str
    nvcc: str | None


def find_nvcc() -> str | None:
    for variable in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        value = os.environ.get(variable)
        if value:
            candidate = Path(value) if variable == "CUDACXX" else Path(value) / "bin" / "nvcc"
            if candidate.is_file():
                return str(candidate)
    default = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(default) if default.is_file() else None)


def gpu_architectures() -> list[str]:
    """Compute capabilities of the GPUs present, such as ["90a"]; empty without a GPU."""
    try:
        output = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    capabilities = {line.strip().replace(".", "") for line in output.splitlines() if line.strip()}
    # 9.0 and later have features that only the "a" variant of the architecture offers (wgmma).
    return sorted(c + "a" if int(c) >= 90 else c for c in capabilities if c.isdigit())


def decide_cuda() -> CudaDecision:
    wish = os.environ.get("FASTCNN_CUDA", "auto").lower()
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"FASTCNN_CUDA must be auto, 0 or 1, is {wish!r}")
    architectures = os.environ.get("FASTCNN_CUDA_ARCHS", "").replace(",", ";")
    if wish == "0":
        return CudaDecision(False, "FASTCNN_CUDA=0", "", None)
    nvcc, present = find_nvcc(), gpu_architectures()
    architectures = architectures or ";".join(present) or "80;90a"
    if nvcc is None:
        if wish == "1":
            raise SystemExit("FASTCNN_CUDA=1 but nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
        return CudaDecision(False, "nvcc not found", "", None)
    if wish == "auto" and not present:
        return CudaDecision(False, "no NVIDIA GPU found, FASTCNN_CUDA=1 builds without one", "", None)
    return CudaDecision(True, "FASTCNN_CUDA=1" if wish == "1" else "nvcc and GPU found", architectures, nvcc)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cuda = decide_cuda()
        verdict = f"built for {cuda.architectures}" if cuda.build else "not built"
        print(f"fastcnn: CUDA kernels {verdict} ({cuda.reason})", file=sys.stderr, flush=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ("cuda" if cuda.build else "cpu")
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "PYBIND11_FINDPYTHON": "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FASTCNN_VERSION": self.distribution.get_version(),
            "FASTCNN_CUDA": "ON" if cuda.build else "OFF",
            "FASTCNN_CUDA_REASON": cuda.reason,
            "FASTCNN_CUDA_ARCHS": ";".join(f"{a}-real" for a in cuda.architectures.split(";") if a),
        }
        if cuda.nvcc:
            options["CMAKE_CUDA_COMPILER"] = cuda.nvcc
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("cmake was not found: pip install cmake ninja")
        ninja = shutil.which("ninja")
        generator = ["-G", "Ninja"] if ninja else []
        if ninja:  # a build folder kept from an isolated build remembers a ninja that is gone
            options["CMAKE_MAKE_PROGRAM"] = ninja
        subprocess.run(
            [cmake, "-S", ROOT, "-B", build, *generator, *(f"-D{k}={v}" for k, v in options.items())], check=True
        )
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True)


setup(
    packages=[
        "fastcnn",
        "fastcnn.analysis",
        "fastcnn.backends",
        "fastcnn.commands",
        "fastcnn.graph",
        "fastcnn.graph.freezing",
        "fastcnn.measurement",
        "fastcnn.models",
        "fastcnn.nn",
        "fastcnn.ops",
        "fastcnn.tuning",
        "fastcnn.verification",
        "fastcnn.triton_kernels",
    ],
    # A top-level package called triton_kernels belongs to the Triton project.
    package_dir={"fastcnn.triton_kernels": "triton_kernels"},
    package_data={"fastcnn": ["py.typed", "_native.pyi", "backends/proven.json", "tuning/shipped/*.json"]},
    ext_modules=[Extension("fastcnn._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
