"""Turns pytest-benchmark's JSON into the raw results kept in benchmarks/results: one row a measurement.

    python benchmarks/collect.py benchmarks.json benchmarks/results/NAME.json

Every row repeats the device, versions and commit it was measured with, so that rows from several runs can be mixed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from raw_rows import write_rows


def conditions(run: dict[str, Any]) -> dict[str, Any]:
    machine = run["machine_info"]
    cpu = machine.get("cpu", {})
    described = {
        "date": run["datetime"][:19],
        "commit": commit(),
        "device": machine.get("gpu") or cpu.get("brand_raw", "unknown CPU"),
        "python": machine["python_version"],
        "threads": machine.get("threads"),
    }
    for key in ("torch", "fastcnn", "triton", "cudnn", "driver", "instruction_set"):
        if machine.get(key) is not None:
            described[key] = machine[key]
    return described


def commit() -> str:
    here = Path(__file__).parent
    output = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return output.stdout.strip() or "unknown"


def rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    common = conditions(run)
    collected = []
    for benchmark in run["benchmarks"]:
        stats, extra = benchmark["stats"], benchmark["extra_info"]
        row = {
            "group": benchmark["group"],
            "candidate": benchmark["params"].get("candidate") or benchmark["params"].get("way"),
            "median_ms": extra.get("gpu_ms", stats["median"] * 1e3),
            "q1_ms": None if "gpu_ms" in extra else stats["q1"] * 1e3,
            "q3_ms": None if "gpu_ms" in extra else stats["q3"] * 1e3,
            "rounds": stats["rounds"],
        }
        kept = ("flop_per_s", "bytes_per_s", "items_per_s", "peak_flop_per_s", "share_of_peak")
        row |= {k: extra[k] for k in kept if k in extra}
        collected.append(row | common)
    return collected


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    run = json.loads(Path(sys.argv[1]).read_text())
    table = rows(run)
    write_rows(Path(sys.argv[2]), table)
    print(f"{len(table)} rows written to {sys.argv[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
