"""``fastcnn env``: what is installed, what it was built for, and what can run here."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

import fastcnn
from fastcnn.backends import BACKENDS, proven, unavailable
from fastcnn.commands._common import add_command, print_json
from fastcnn.measurement.conditions import commit, cpu_name, triton_version
from fastcnn.tuning import shipping
from fastcnn.tuning.store import cache_folder, files


def add_to(commands: Any) -> None:
    add_command(commands, "env", run, "show versions, the native build, and what can run on this machine")


def run(options: argparse.Namespace) -> int:
    report = environment_report()
    if options.json:
        print_json(report)
    else:
        print(as_text(report))
    return 0


def environment_report() -> dict[str, Any]:
    return {
        "versions": {
            "fastcnn": fastcnn.__version__,
            "commit": commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": _version("torchvision"),
            "triton": triton_version(),
            "cuda of torch": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        },
        "native": _native_report(),
        "cpu": {
            "name": cpu_name(),
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
            "processors": os.cpu_count(),
        },
        "gpus": _gpus(),
        "backends": {name: unavailable(name) or "available" for name in BACKENDS},
        "proven": {"record": proven.record(), "unproven": proven.unproven(proven.record())},
        "cache": {
            "folder": str(cache_folder()),
            "tuning_files": [path.name for path in files()],
            "shipped": [path.name for path in shipping.files()],
        },
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTCNN_")},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native_report() -> dict[str, Any]:
    try:
        from fastcnn import _native
    except ImportError as error:
        return {"loaded": False, "reason": str(error)}
    try:
        used: str = _native.cpu_instruction_set()
    except ValueError as error:  # FASTCNN_CPU_ISA names one that cannot run
        used = f"none: {error}"
    info = dict(_native.build_info())
    return {
        "loaded": True,
        "file": _native.__file__,
        **info,
        "instruction_set": used,
        "instruction_sets": list(_native.cpu_instruction_sets()),
    }


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append({
            "index": index,
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        })  # fmt: skip
    return found


def as_text(report: dict[str, Any]) -> str:
    rows: list[tuple[str, str]] = [(name, value or "not installed") for name, value in report["versions"].items()
                                   if name not in ("commit", "cudnn") or value]  # fmt: skip
    native = report["native"]
    if native["loaded"]:
        built = f"built for {native['cuda_architectures']} with {native['cuda_toolkit']}"
        cuda = built if native["cuda"] else "not built"
        rows += [
            ("native module", native["file"]),
            ("compiler", f"{native['compiler']}, OpenMP {'yes' if native['openmp'] else 'no'}"),
            ("CUDA kernels", f"{cuda} ({native['cuda_reason']})"),
            ("CPU kernels", f"{native['instruction_set']} (can run: {', '.join(native['instruction_sets'])})"),
        ]
    else:
        rows.append(("native module", f"not loaded: {native['reason']}"))
    cpu = report["cpu"]
    rows.append(("CPU", f"{cpu['name']}, {cpu['processors']} processors, {cpu['threads']} threads in use"))
    for gpu in report["gpus"]:
        rows.append((
            f"GPU {gpu['index']}",
            f"{gpu['name']}, compute capability {gpu['capability']}, "
            f"{gpu['multiprocessors']} SMs, {gpu['memory_gib']} GiB",
        ))  # fmt: skip
    if not report["gpus"]:
        rows.append(("GPU", "none that PyTorch can use"))
    for name, state in report["backends"].items():
        rows.append((f"backend {name}", state if state == "available" else f"not available: {state}"))
    rows += list(proven.summary().items())
    count = len(report["cache"]["tuning_files"])
    rows.append(("cache folder", f"{report['cache']['folder']} ({count or 'no'} tuning file{'s' * (count != 1)})"))
    rows.append(("shipped choices", ", ".join(report["cache"]["shipped"]) or "none"))
    rows += list(report["variables"].items())
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)
