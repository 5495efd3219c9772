"""GPU time of pairs of 1x1 convolutions in one kernel (conv2d_1x1_pair) and in two, in bf16.

    python benchmarks/measure_gpu_pairs.py                      batch 256 and 32
    python benchmarks/measure_gpu_pairs.py --batches 256 --rounds 5
    python benchmarks/measure_gpu_pairs.py --rehearse           the same on a CPU with tiny sizes: no figures

Writes a row a pair to gpu-pairs.json in $OUT or in benchmarks/results. A pair whose results break the accuracy rule,
with those of two calls as the reference, is not timed. How calls are timed: gpu_replay.py. The floor is the time for
the bytes that one kernel must move at 3.0 TB/s.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_replay import Replay, in_turns, sets_against_cache
from measure_gpu_layers import commit, nvidia_smi
from raw_rows import RESULTS, Row, write_rows
from torch import Tensor

from fastcnn import backends, ops
from fastcnn.backends import cuda
from fastcnn.measurement.conditions import conditions
from fastcnn.verification.accuracy import judge

# Channels of input, wide and narrow, picture size, and how often a network has it.
PAIRS = (
    ((64, 256, 64), 56, "resnet50 stage 1, twice"),
    ((64, 256, 128), 56, "resnet50 stage 1 to 2"),
    ((128, 512, 128), 28, "resnet50 stage 2, three times"),
    ((128, 512, 256), 28, "resnet50 stage 2 to 3"),
    ((128, 256, 128), 56, "wide_resnet50_2, resnext50 stage 1, twice"),
    ((128, 256, 256), 56, "wide_resnet50_2, resnext50 stage 1 to 2"),
)
BANDWIDTH = 3.0e12


class Tensors:
    def __init__(self, channels: tuple[int, int, int], batch: int, size: int, device: torch.device) -> None:
        c, j, k = channels
        shapes = ((batch, c, size, size), (batch, j, size, size), (j, c, 1, 1), (k, j, 1, 1))
        self.x, self.residual, self.expand, self.reduce = (
            torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
            for shape in shapes
        )
        self.expand, self.reduce = self.expand / c**0.5, self.reduce / j**0.5
        self.vectors = [torch.rand(length, device=device) + 0.5 for length in (j, j, k, k)]

    def one_kernel(self) -> tuple[Tensor, Tensor]:
        names = ("expand_scale", "expand_bias", "reduce_scale", "reduce_bias")
        vectors = dict(zip(names, self.vectors, strict=True))
        return ops.conv2d_1x1_pair(self.x, self.residual, self.expand, self.reduce, **vectors)

    def two_calls(self) -> tuple[Tensor, Tensor]:
        scale1, bias1, scale2, bias2 = self.vectors
        wide = ops.conv2d(self.x, self.expand, bias1, scale=scale1, residual=self.residual, activation="relu")
        return wide, ops.conv2d(wide, self.reduce, bias2, scale=scale2, activation="relu")

    def double(self) -> tuple[Tensor, Tensor]:
        def layer(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | float) -> Tensor:
            sums = torch.nn.functional.conv2d(x[:1].double(), weight.double())
            return (sums * scale.double()[:, None, None] + bias.double()[:, None, None] + residual).relu()

        wide = layer(self.x, self.expand, *self.vectors[:2], self.residual[:1].double())
        return wide, layer(wide.bfloat16(), self.reduce, *self.vectors[2:], 0.0)


def on(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with backends.use_backend(backend, strict=True):
            return call()

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="256,32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS) / "gpu-pairs.json")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    facts = {
        **conditions(device, torch.bfloat16).to_dict(), "commit": commit(), "driver": nvidia_smi("driver_version"),
        "dtype": "bf16", "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "rehearsal": arguments.rehearse,
    }  # fmt: skip
    rows: list[Row] = []
    faults = 0
    for batch in map(int, arguments.batches.split(",")):
        for channels, size, note in PAIRS:
            batch, size = (1, 5) if arguments.rehearse else (batch, size)
            tensors = Tensors(channels, batch, size, device)
            served = cuda.conv2d_1x1_pair_weights(device, torch.bfloat16, channels)
            backend = "cpp" if arguments.rehearse else "cuda"
            with torch.no_grad():
                ours, theirs = on(backend, tensors.one_kernel)(), on(backend, tensors.two_calls)()
                wrong = [
                    str(verdict)
                    for a, b, exact in zip(ours, theirs, tensors.double(), strict=True)
                    for verdict in [judge(a[:1], b[:1], exact)]
                    if not verdict.passed
                ] + [
                    f"images beyond the first differ from two calls: {difference:.1e}"
                    for a, b in zip(ours, theirs, strict=True)
                    for difference in [((a - b).float().norm() / b.float().norm()).item()]
                    if not difference < 8e-3
                ]
                del ours, theirs
                row: Row = {
                    **facts, "what": "gpu_pair", "channels": channels, "batch": batch, "size": size, "note": note,
                    "weights": served,
                }  # fmt: skip
                pixels = batch * size * size
                c, j, k = channels
                row["floor_ms"] = 2e3 * pixels * (c + 2 * j + k) / BANDWIDTH
                if wrong:
                    faults += 1
                    row["wrong"] = wrong
                else:
                    bytes_of_set = 2 * pixels * (c + 2 * j + k)
                    sets = [tensors]
                    count = min(8, sets_against_cache(bytes_of_set, device))
                    sets += [Tensors(channels, batch, size, device) for _ in range(count - 1)]
                    candidates = {"one kernel": [on(backend, s.one_kernel) for s in sets]}
                    for name in (backend,) if arguments.rehearse else ("cuda", "triton"):
                        candidates[f"two calls {name}"] = [on(name, s.two_calls) for s in sets]
                    replays = {name: Replay(calls, device) for name, calls in candidates.items()}
                    row["times"] = in_turns(replays, arguments.rounds)
                    del replays, sets
                rows.append(row)
                times = {name: round(t["median_ms"], 4) for name, t in row.get("times", {}).items()}
                print(batch, channels, served or "not served", f"floor {row['floor_ms']:.4f}", row.get("wrong", times))
                sys.stdout.flush()
            write_rows(arguments.out, rows)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
