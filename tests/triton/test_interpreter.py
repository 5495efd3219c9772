"""Runs tests/triton/interpreter in a process of its own, where Triton interprets kernels on the CPU.

Triton decides at import whether it interprets, so this process, which may compile kernels, cannot run them itself.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
numpy = pytest.importorskip("numpy")

FOLDER = Path(__file__).parent / "interpreter"
LIMIT_SECONDS = 600


def version(module) -> tuple[int, int]:
    major, minor = module.__version__.split(".")[:2]
    return int(major), int(minor)


@pytest.mark.skipif(
    version(triton) < (3, 7) and version(numpy) >= (2, 4),
    reason="the interpreter of Triton before 3.7 cannot run loops with NumPy 2.4 and later",
)
def test_kernels_in_interpreter_mode() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-p", "no:cacheprovider", "-rs"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    report = finished.stdout + finished.stderr
    assert finished.returncode == 0, report
    passed = re.search(r"(\d+) passed", finished.stdout)
    assert passed is not None, report
    assert int(passed.group(1)) > 50, report
    skipped = [line for line in finished.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all("FASTCNN_DATA" in line for line in skipped), report  # only for want of the real images
