"""Relative error of every network's frozen fp32 logits against float64, at default settings. Writes a raw JSON file.

    python benchmarks/measure_logits.py               every network of `fastcnn list` that is not in the file yet
    python benchmarks/measure_logits.py 'resnet*'     some of them

Weights are random, batch norms calibrated (fastcnn.verification.calibrate) on images as those that are measured: noise
with the spectrum of photographs. In white noise all images are alike to an untrained network, so that its batch norms
divide by nearly nothing and multiply every engine's rounding (ResNet-152: PyTorch's by 16). Exit code 1 when a network
is beyond the limit.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from raw_rows import RESULTS, read_rows, write_rows

import fastcnn
from fastcnn import _native
from fastcnn.measurement.conditions import commit, conditions
from fastcnn.measurement.logits import LIMIT, logit_error
from fastcnn.models import model_info
from fastcnn.verification import calibrate

CALIBRATION_IMAGES = 16


def photograph_like(count: int, size: tuple[int, int, int]) -> torch.Tensor:
    """Random images whose amplitude falls as one over the frequency: noise summed over octaves."""
    channels, height, width = size
    octaves = []
    for octave in range(max(height, width).bit_length()):
        coarse = torch.randn(count, channels, max(1, height >> octave), max(1, width >> octave))
        octaves.append(2.0**octave * F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False))
    images = torch.stack(octaves).sum(0)
    return images / images.std()


@torch.no_grad()
def measure(name: str, batch: int) -> dict[str, Any]:
    torch.manual_seed(0)
    size = model_info(name).input_size
    model = calibrate(fastcnn.create_model(name).eval(), photograph_like(CALIBRATION_IMAGES, size))
    found = logit_error(model, photograph_like(batch, size))
    described = conditions(torch.device("cpu"), torch.float32, batch).to_dict()
    return {
        "what": "logits", "model": name, "images_are": "noise with the spectrum of photographs",
        **found.to_dict(), **described,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of networks, or patterns (all)")
    parser.add_argument("--batch", type=int, default=2, help="images (%(default)s)")
    parser.add_argument("--file", type=Path, default=RESULTS / f"cpu-logits-{_native.cpu_instruction_set()}.json")
    parser.add_argument("--fresh", action="store_true", help="measure what the file has of this commit, too")
    options = parser.parse_args()
    rows = read_rows(options.file)
    names = [n for n in fastcnn.list_models() if any(fnmatch.fnmatch(n, p) for p in options.patterns)]
    if not names:
        parser.error(f"no network's name matches {' '.join(options.patterns)}")
    failed = []
    for name in names:
        known = next((row for row in rows if row["model"] == name), None)
        if options.fresh or known is None or known["commit"] != commit():
            started = time.perf_counter()
            known = measure(name, options.batch)
            rows = sorted([*(row for row in rows if row["model"] != name), known], key=lambda row: row["model"])
            write_rows(options.file, rows)
            seconds = f"   ({time.perf_counter() - started:.0f} s)"
        else:
            seconds = "   (from the file)"
        verdict = "" if known["passed"] else f"   BEYOND {LIMIT:g}"
        print(f"{name:28} {known['frozen']:.1e}   PyTorch {known['pytorch']:.1e}{seconds}{verdict}", flush=True)
        if not known["passed"]:
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
