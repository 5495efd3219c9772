"""Tests under another instruction set of the C++ kernels, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastcnn import _native


def check_kernels_under(isa: str, file: str) -> None:
    """Call the test module's ``check_kernels()`` there; skipped where the kernels use it anyway, or the processor or
    the build lacks it."""
    _require(isa)
    path = Path(file)
    paths = [str(path.parent), str(path.parent.parent)]
    _run(isa, ["-c", f"import sys; sys.path[:0] = {paths!r}; import {path.stem} as t; t.check_kernels()"])


def run_tests_under(isa: str, file: str, selection: str) -> None:
    """Run a file's tests that ``pytest -k`` selects there; skipped as above."""
    _require(isa)
    _run(isa, ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", selection])


def _require(isa: str) -> None:
    if isa not in _native.cpu_instruction_sets():
        pytest.skip(f"this processor or build has no {isa}")
    if _native.cpu_instruction_set() == isa:
        pytest.skip(f"{isa} is the one in use")


def _run(isa: str, arguments: list[str]) -> None:
    environment = {**os.environ, "FASTCNN_CPU_ISA": isa}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
