"""What merging 1x1 convolutions of one input gains ``fastcnn.optimize``, on torchvision's GoogLeNet and Inception v3.

    python benchmarks/measure_merging.py

fp32, channels-last images, random weights, under inference_mode. The two take turns in one process. Writes a raw JSON
file.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from raw_rows import RESULTS, write_rows
from torch import nn

import fastcnn
from fastcnn import _native
from fastcnn.graph import merging
from fastcnn.measurement.conditions import conditions
from fastcnn.measurement.timing import interleave

NETWORKS = {"googlenet": 224, "inception_v3": 299}


def optimized(name: str, x: torch.Tensor, merged: bool) -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, init_weights=False).eval()
    with mock.patch.object(merging, "MERGED", merging.MERGED if merged else ()):
        return fastcnn.optimize(model, x, inplace=True)


def measure(name: str, batch: int, seconds: float) -> list[dict[str, Any]]:
    size = NETWORKS[name]
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    models = {"merged": optimized(name, x, True), "apart": optimized(name, x, False)}
    with torch.inference_mode():
        times = interleave({way: lambda m=m: m(x) for way, m in models.items()}, rounds=1000, seconds=seconds)
    described = conditions(torch.device("cpu"), torch.float32, batch).to_dict()
    date = datetime.datetime.now().isoformat(timespec="seconds")
    return [
        {"what": "merging", "model": name, "way": way, **timing.to_dict(), **described, "date": date}
        for way, timing in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="for each network and batch (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8], help="images (%(default)s)")
    name = f"cpu-merging-{_native.cpu_instruction_set()}-{torch.get_num_threads()}-threads.json"
    parser.add_argument("--file", type=Path, default=RESULTS / "dropin" / name)
    options = parser.parse_args()
    rows = []
    for network in NETWORKS:
        for batch in options.batches:
            found = measure(network, batch, options.seconds)
            rows += found
            merged, apart = (row["median_ms"] for row in found)
            print(f"{network:14} batch {batch}: {merged:.2f} ms merged, {apart:.2f} apart: {apart / merged:.3f}")
    write_rows(options.file, rows)


if __name__ == "__main__":
    main()
