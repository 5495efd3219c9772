"""Writes fastcnn/backends/proven.json: which kernels tests/gpu ran on a GPU with right results.

    python benchmarks/record_proven_kernels.py gpu-results/gpu-kernels.json [...]

Each argument is a file that tests/gpu wrote into $OUT. A kernel counts in a precision when at least one test that used
it so passed and none failed, in all the files together; the last file says where and with what they ran.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcnn.backends import proven

TARGET = Path(__file__).resolve().parents[1] / "fastcnn" / "backends" / "proven.json"


def record_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if any(run["rehearsal"] for run in runs):
        raise SystemExit("a rehearsal on the CPU proves nothing about a GPU")
    if len({run["device"] for run in runs}) != 1:
        raise SystemExit("the files must come from one kind of GPU")
    passed, failed = (_union(run[key] for run in runs) for key in ("passed", "failed"))
    kernels: dict[str, dict[str, list[str]]] = {}
    for backend, names in sorted(passed.items()):
        for name, precisions in sorted(names.items()):
            good = sorted(precisions - failed.get(backend, {}).get(name, set()))
            if good:
                kernels.setdefault(backend, {})[name] = good
    last = runs[-1]
    return {**{key: last[key] for key in ("device", "date", "commit", "versions")}, "kernels": kernels}


def _union(parts: Any) -> dict[str, dict[str, set[str]]]:
    whole: dict[str, dict[str, set[str]]] = {}
    for part in parts:
        for backend, names in part.items():
            for name, precisions in names.items():
                whole.setdefault(backend, {}).setdefault(name, set()).update(precisions)
    return whole


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="gpu-kernels.json of a run of tests/gpu")
    parser.add_argument("--to", type=Path, default=TARGET, help="the record to write")
    options = parser.parse_args(arguments)
    record = record_of([json.loads(path.read_text()) for path in options.runs])
    options.to.write_text(json.dumps(record, indent=2) + "\n")
    ran = [(backend, name) for backend, names in record["kernels"].items() for name in names]
    unknown = sorted(f"{backend}: {name}" for backend, name in ran if name not in proven.KERNELS.get(backend, ()))
    print(f"{options.to}: " + ", ".join(f"{len(names)} {backend}" for backend, names in record["kernels"].items()))
    for backend, names in proven.unproven(record).items():
        print(f"not proven, {backend}: {', '.join(names) or 'none'}")
    if unknown:
        sys.exit(f"kernels that fastcnn.backends.proven does not list: {', '.join(unknown)}")


if __name__ == "__main__":
    main()
