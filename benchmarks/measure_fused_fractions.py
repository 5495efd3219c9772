"""How much of torchvision's and timm's networks runs on fastcnn's kernels once optimized. Writes a raw JSON file.

    python benchmarks/measure_fused_fractions.py --torchvision resnet18:64 inception_v3:96 --timm densenet121:64
    python benchmarks/measure_fused_fractions.py --page docs/drop-in.md    # writes the page's tables from the file

Names with image sizes. Random weights, a batch of 2, fp32, the C++ backend. Rows of networks that are not named stay in
the file, in which they keep their order.
"""

from __future__ import annotations

import argparse
import datetime
import re
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from raw_rows import RESULTS, Row, read_rows, write_rows
from torch import nn

import fastcnn
from fastcnn.measurement.conditions import conditions

LIBRARIES = {"torchvision": torchvision, "timm": timm}
HEADS = {"torchvision": "torchvision's", "timm": "timm's"}


def measure(library: str, name: str, size: int) -> Row:
    torch.manual_seed(0)
    model: nn.Module
    if library == "timm":
        model = timm.create_model(name, pretrained=False, num_classes=10)
    else:
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    with fastcnn.use_backend("cpp"):
        report = fastcnn.report(fastcnn.optimize(model.eval(), torch.randn(2, 3, size, size)))
    return {
        "what": "fused fraction", "library": library, "model": name, "size": size, "macs": report.macs,
        "fused_macs": report.fused_macs, "sites": len(report.sites),
        "chains": sum(len(site.modules) > 1 for site in report.sites),
        "into_slices": sum("into slice" in site.pattern for site in report.sites),
        "merged": sum(site.call == "pointwise" for site in report.sites),
        "fallbacks": sorted({site.fallback for site in report.sites if site.fallback}),
        "left": sorted({f"{entry.kind}: {entry.reason}" for entry in report.left}),
        "version": LIBRARIES[library].__version__,
        **conditions(torch.device("cpu"), torch.float32, 1).to_dict(),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }  # fmt: skip


def table(library: str, rows: list[Row]) -> str:
    """One of the tables of docs/drop-in.md."""
    version = max(row["version"] for row in rows).split("+")[0]
    lines = [f"| {HEADS[library]} ({version}) | fraction | fused calls | chains | into slices |", "|---" * 5 + "|"]
    for row in rows:
        fraction = row["fused_macs"] / row["macs"]
        shown = "1.00" if fraction == 1 else f"{fraction:.4f}"
        lines.append(f"| {row['model']} | {shown} | {row['sites']} | {row['chains']} | {row['into_slices']} |")
    return "\n".join(lines) + "\n"


def write_page(page: Path, rows: list[Row]) -> None:
    text = page.read_text("utf-8")
    for library, head in HEADS.items():
        of = [row for row in rows if row["library"] == library]
        pattern = rf"\| {re.escape(head)}[^|]*\| fraction \|.*\n(\|.*\n)+"
        text, count = re.subn(pattern, lambda _, of=of, library=library: table(library, of), text)
        if count != 1:
            raise SystemExit(f"{page} has no table of {library}")
    page.write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for library in LIBRARIES:
        parser.add_argument(f"--{library}", nargs="*", default=[], metavar="NAME:SIZE")
    parser.add_argument("--file", type=Path, default=RESULTS / "dropin" / "cpu-fused-fractions.json")
    parser.add_argument("--page", type=Path, help="write the tables of this page from the file")
    options = parser.parse_args()
    rows = read_rows(options.file)
    for library in LIBRARIES:
        for name, _, size in (given.partition(":") for given in getattr(options, library)):
            row: dict[str, Any] = measure(library, name, int(size))
            places = [i for i, r in enumerate(rows) if (r["library"], r["model"]) == (library, name)]
            if places:
                rows[places[0]] = row
            else:
                rows.append(row)
            write_rows(options.file, rows)
            print(f"{library} {name}: {row['fused_macs'] / row['macs']:.4f}", flush=True)
    if options.page is not None:
        write_page(options.page, rows)


if __name__ == "__main__":
    main()
