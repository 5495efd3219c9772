"""Frozen models of torchvision and timm: how many native steps of which kind, and their memory. Writes a raw JSON file.

    python benchmarks/count_frozen_steps.py --timm tf_efficientnet_b0:65 dm_nfnet_f0:64 --torchvision resnet50:224

Names with image sizes. Random weights, one contiguous fp32 image. Rows of networks that are not named stay in the file.
"""

from __future__ import annotations

import argparse
import datetime
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from raw_rows import RESULTS, read_rows, write_rows
from torch import nn

import fastcnn
from fastcnn import _native
from fastcnn.measurement.conditions import conditions

KINDS = {
    "conv2d": "convolutions", "conv2d_winograd": "convolutions", "conv2d_strassen": "convolutions",
    "linear": "linear", "linear_short": "linear", "map": "functions of values", "copy": "copies", "fill": "copies",
}  # fmt: skip


def count(library: str, name: str, size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model: nn.Module
    if library == "timm":
        model = timm.create_model(name, pretrained=False)
    else:
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **options)
    frozen = fastcnn.freeze(model.eval(), torch.randn(1, 3, size, size))
    kinds = Counter(KINDS.get(step.operator, "others") for step in frozen._recipe.steps)
    return {
        "what": "frozen steps", "library": library, "model": name, "size": size, "steps": len(frozen._recipe.steps),
        "kinds": dict(kinds), "memory": frozen.memory()._asdict(),
        "version": {"timm": timm, "torchvision": torchvision}[library].__version__,
        **conditions(torch.device("cpu"), torch.float32, 1).to_dict(),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm", nargs="*", default=[], metavar="NAME:SIZE")
    parser.add_argument("--torchvision", nargs="*", default=[], metavar="NAME:SIZE")
    parser.add_argument(
        "--file", type=Path, default=RESULTS / "dropin" / f"cpu-frozen-steps-{_native.cpu_instruction_set()}.json"
    )
    options = parser.parse_args()
    rows = read_rows(options.file)
    for library in ("torchvision", "timm"):
        for name, _, size in (given.partition(":") for given in getattr(options, library)):
            row = count(library, name, int(size))
            rows = [r for r in rows if (r["library"], r["model"]) != (library, name)] + [row]
            rows.sort(key=lambda r: (r["library"] != "torchvision", r["model"]))
            write_rows(options.file, rows)
            print(library, name, row["steps"], row["kinds"], flush=True)


if __name__ == "__main__":
    main()
