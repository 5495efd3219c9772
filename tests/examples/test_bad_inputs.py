"""The example that feeds bad inputs to every operator finds nothing unclear."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fastcnn import ops

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "bad_inputs.py"


def run_example(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, timeout=300
    )


def test_every_operator_answers_or_refuses_clearly() -> None:
    run = run_example("--json")
    assert run.stdout, run.stderr
    report = json.loads(run.stdout)
    assert [r for r in report["results"] if not r["clear"]] == []
    assert run.returncode == 0, run.stderr
    assert report["cases"] == len(report["results"]) >= 150
    assert {r["operator"].split()[0] for r in report["results"]} == set(ops.__all__)


def test_table_ends_with_the_verdict() -> None:
    run = run_example("--operator", "linear")
    assert run.returncode == 0, run.stdout + run.stderr
    last = run.stdout.splitlines()[-1]
    assert last.endswith(" cases: all clear"), last
    assert "TypeError: weight must be" in run.stdout
    assert "same as PyTorch" in run.stdout
