"""Writes docs/performance.md, docs/performance-gpu.md and their pictures from the raw results in benchmarks/results. No
figure on these pages has another source.

    python benchmarks/write_performance_page.py            writes them
    python benchmarks/write_performance_page.py --check    exits 1 when one on disk is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from gpu_tables import gpu_page, is_gpu
from network_tables import instruction_sets_section, logits_section, sections
from raw_rows import RESULTS, read_rows

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

INTRODUCTION = """# Performance

Written by `python benchmarks/write_performance_page.py` from the raw files in `benchmarks/results/`; do not edit.
"""

OPERATORS = """# Operators

Within a group every candidate was timed in the same run. `ratio` is PyTorch's median time over the candidate's: above
1 is faster than PyTorch. `pytorch` is eager mode on channels-last memory; `pytorch_folded` has batch norm folded into
the weights by hand. `of peak` is the share of the processor's peak, measured in the same run.
"""


def page(results: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """The pages and their pictures, by path below docs/, for raw files by name; those of a GPU have their own page."""
    written: dict[str, str] = {}
    on_gpu = {stem: rows for stem, rows in results.items() if is_gpu(rows)}
    results = {stem: rows for stem, rows in results.items() if rows and stem not in on_gpu}

    def of_kind(*kinds: str | None) -> dict[str, list[dict[str, Any]]]:
        return {stem: rows for stem, rows in results.items() if rows[0].get("what") in kinds}

    networks, operators = of_kind("times", "memory", "alone"), of_kind(None)
    parts = [INTRODUCTION]
    if networks:
        parts.append("# Networks\n")
    for stem, rows in networks.items():
        text, pictures = sections(stem, rows)
        parts.append(text)
        written.update({f"images/{name}": picture for name, picture in pictures.items()})
    parts += [instruction_sets_section(stem, rows) for stem, rows in of_kind("instruction_sets").items()]
    parts += [logits_section(stem, rows) for stem, rows in of_kind("logits").items()]
    if operators:
        parts.append(OPERATORS)
    parts += [section(stem, rows) for stem, rows in operators.items()]
    if on_gpu:
        parts.append("# GPU\n\n[Performance on a GPU](performance-gpu.md).\n")
        written |= gpu_page(on_gpu)
    else:
        parts.append("# GPU\n\nNo GPU has run these kernels yet: there are no figures.\n")
    written["performance.md"] = "\n".join(parts)
    return written


def section(name: str, rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    shown = ("device", "threads", "instruction_set", "torch", "triton", "cudnn", "driver", "commit", "date")
    text = [f"## {name}\n", ", ".join(f"{key} {first[key]}" for key in shown if first.get(key) is not None) + ".\n"]
    headings = ("group", "candidate", "median ms", "quartiles", "GFLOP/s", "GB/s", "of peak", "ratio")
    text.append("| " + " | ".join(headings) + " |\n" + "|---" * len(headings) + "|")
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
    share = f"{row['share_of_peak']:.0%}" if "share_of_peak" in row else ""
    cells = [group, row["candidate"], f"{row['median_ms']:.3f}", quartiles, scaled("flop_per_s"), scaled("bytes_per_s")]
    return "| " + " | ".join([*cells, share, ratio]) + " |"


def main() -> int:
    results = {file.stem: read_rows(file) for file in sorted(RESULTS.glob("*.json"))}
    stale = []
    for name, text in page(results).items():
        path = DOCS / name
        if "--check" in sys.argv[1:]:
            if not path.exists() or path.read_text("utf-8") != text:
                stale.append(name)
        else:
            path.write_text(text, "utf-8")
    for name in stale:
        print(f"docs/{name} is not what benchmarks/write_performance_page.py writes", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
