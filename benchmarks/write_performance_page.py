"""Writes docs/performance.md from the raw results in benchmarks/results. No figure on that page has another source.

python benchmarks/write_performance_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"

INTRODUCTION = """# Performance

Written by `python benchmarks/write_performance_page.py` from the raw files in `benchmarks/results/`; do not edit.
Within a group every candidate was timed in the same run. `ratio` is PyTorch's median time over the candidate's: above
1 is faster than PyTorch. `pytorch` is eager mode on channels-last memory; `pytorch_folded` has batch norm folded into
the weights by hand.
"""


def main() -> None:
    files = sorted(RESULTS.glob("*.json"))
    parts = [INTRODUCTION]
    for file in files:
        parts.append(section(file.stem, json.loads(file.read_text())))
    if not any("NVIDIA" in json.loads(f.read_text())[0]["device"] for f in files):
        parts.append("## GPU\n\nNo GPU has run these kernels yet: there are no figures.\n")
    PAGE.write_text("\n".join(parts))


def section(name: str, rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    shown = ("device", "threads", "instruction_set", "torch", "triton", "cudnn", "driver", "commit", "date")
    text = [f"## {name}\n", ", ".join(f"{key} {first[key]}" for key in shown if first.get(key) is not None) + ".\n"]
    text.append("| group | candidate | median ms | quartiles | GFLOP/s | GB/s | ratio |\n|---|---|---|---|---|---|---|")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    for group in sorted(groups):
        members = groups[group]
        baseline = next((r for r in members if r["candidate"] in ("pytorch", "convolutions_then_cat")), None)
        for row in members:
            text.append(line(group, row, baseline))
    return "\n".join(text) + "\n"


def line(group: str, row: dict[str, Any], baseline: dict[str, Any] | None) -> str:
    def scaled(key: str) -> str:
        return f"{row[key] / 1e9:.0f}" if key in row else ""

    quartiles = f"{row['q1_ms']:.3f} .. {row['q3_ms']:.3f}" if row["q1_ms"] is not None else ""
    ratio = f"{baseline['median_ms'] / row['median_ms']:.2f}" if baseline else ""
    cells = [group, row["candidate"], f"{row['median_ms']:.3f}", quartiles, scaled("flop_per_s"), scaled("bytes_per_s")]
    return "| " + " | ".join([*cells, ratio]) + " |"


if __name__ == "__main__":
    main()
