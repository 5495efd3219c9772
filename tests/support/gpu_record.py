"""What a run of the GPU tests leaves behind, written as it happens, so that a run that is cut short tells as much.

    $OUT/gpu-failures.txt   each failure with the end of its message, and how many tests had run
    $OUT/gpu-kernels.json   the kernels that passing and failing tests used, for benchmarks/record_proven_kernels.py
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastcnn.triton_kernels.precision import convolutions_use_tf32, matrix_products_use_tf32

from fastcnn import backends
from fastcnn.backends import Call
from fastcnn.measurement.conditions import commit, device_name, triton_version

PROPERTY = "gpu_kernel"
LAST_LINES = 15


def precision_name(call: Call) -> str:
    if call.dtype == torch.float32:
        rounds = {"conv2d": convolutions_use_tf32, "linear": matrix_products_use_tf32}.get(call.operator, lambda: False)
        return "tf32" if rounds() else "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(call.dtype, str(call.dtype))


def noting(properties: list[tuple[str, Any]]) -> Callable[[Call], None]:
    """An interceptor that runs calls and notes each one's kernel among a test's properties (which xdist carries)."""
    seen: set[str] = set()

    def run(call: Call) -> None:
        if call.backend == "reference":
            call.run()
            return
        name_of: Callable[..., str] = getattr(backends.backend_module(call.backend), "kernel_name", lambda op, *_: op)
        entry = "|".join((call.backend.partition(":")[0], name_of(call.operator, *call.args), precision_name(call)))
        if entry not in seen:
            seen.add(entry)
            properties.append((PROPERTY, entry))
        call.run()

    return run


class Recorder:
    """A pytest plugin of the process that receives all reports."""

    def __init__(self, folder: Path, rehearsal: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._failures, self._kernels = folder / "gpu-failures.txt", folder / "gpu-kernels.json"
        self._failures.write_text("")
        self._passed: dict[str, dict[str, set[str]]] = {}
        self._failed: dict[str, dict[str, set[str]]] = {}
        self._counts = {"passed": 0, "failed": 0, "skipped": 0}
        self._facts: dict[str, Any] = {"rehearsal": rehearsal}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._counts[report.outcome] += 1
        if report.failed:
            self._note_failure(report)
        used = [value for name, value in report.user_properties if name == PROPERTY]
        if report.when == "call" and used and report.outcome in ("passed", "failed"):
            target = self._passed if report.passed else self._failed
            for entry in used:
                backend, kernel, precision = entry.split("|")
                target.setdefault(backend, {}).setdefault(kernel, set()).add(precision)
            self._write_kernels()

    def _note_failure(self, report: pytest.TestReport) -> None:
        lines = report.longreprtext.splitlines()
        said = [line for line in lines if line.startswith("E")] or lines
        where = getattr(report, "worker_id", "") or "-"
        head = f"{report.nodeid} ({report.when}, {where}, {report.duration:.1f} s, {self._counts})"
        with self._failures.open("a") as file:
            file.write("\n".join([head, *said[-LAST_LINES:], ""]) + "\n")

    def _write_kernels(self) -> None:
        if "device" not in self._facts:
            self._facts |= facts()
        document = {
            **self._facts, "counts": self._counts, "passed": _listed(self._passed), "failed": _listed(self._failed),
        }  # fmt: skip
        partial = self._kernels.with_suffix(".part")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(self._kernels)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"{self._counts}; failures: {self._failures}; kernels: {self._kernels}")


def facts() -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": os.environ.get("FASTCNN_COMMIT", "")[:7] or commit() or "unknown",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "triton": triton_version(),
            "CUDA": torch.version.cuda,
        },
    }  # fmt: skip


def _listed(kernels: dict[str, dict[str, set[str]]]) -> dict[str, dict[str, list[str]]]:
    return {b: {k: sorted(p) for k, p in sorted(names.items())} for b, names in sorted(kernels.items())}
