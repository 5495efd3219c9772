"""GPU time of pairs of 1x1 convolutions in one kernel (conv2d_1x1_pair) and in two, in bf16.

    python benchmarks/measure_gpu_pairs.py                      batch 256 and 32
    python benchmarks/measure_gpu_pairs.py --batches 256 --rounds 5
    python benchmarks/measure_gpu_pairs.py --rehearse           the same on a CPU with tiny sizes: no figures

Writes a row a pair to gpu-pairs.json in $OUT or in benchmarks/results. A pair whose results break the accuracy rule,
with those of two calls as the reference, is not timed. How calls are timed: gpu_replay.py. The floor is the time for
the bytes that one kernel must move, at the rate at which the same run moved memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_facts import gpu_facts
from gpu_replay import Replay, in_turns, sets_against_cache
from raw_rows import RESULTS, Row, write_rows
from torch import Tensor

from fastcnn import backends, ops
from fastcnn.backends import cuda
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


def bytes_per_second(device: torch.device, rounds: int) -> float:
    """Read and written, by PyTorch's fastest way to move more than caches hold."""
    x = torch.ones(1 << (20 if device.type == "cpu" else 30), dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    times = in_turns({"neg": Replay([lambda: torch.neg(x, out=y)], device)}, rounds)["neg"]
    return 2 * x.numel() * x.element_size() / times["median_ms"] * 1e3


class Measurement:
    def __init__(self, device: torch.device, rounds: int) -> None:
        self._device, self._rounds = device, rounds
        self._backends = ("cpp",) if device.type == "cpu" else ("cuda", "triton")  # the first has the one kernel
        self._facts = gpu_facts(device, torch.bfloat16) | {"dtype": "bf16", "rehearsal": device.type == "cpu"}
        self._bytes_per_second = bytes_per_second(device, rounds)

    @torch.no_grad()
    def pair(self, channels: tuple[int, int, int], batch: int, size: int, note: str) -> Row:
        tensors = Tensors(channels, batch, size, self._device)
        bytes_moved = 2 * batch * size * size * (channels[0] + 2 * channels[1] + channels[2])
        row: Row = self._facts | {
            "what": "gpu_pair", "channels": channels, "batch": batch, "size": size, "note": note,
            "weights": cuda.conv2d_1x1_pair_weights(self._device, torch.bfloat16, channels),
            "bytes_per_second": self._bytes_per_second, "floor_ms": bytes_moved / self._bytes_per_second * 1e3,
        }  # fmt: skip
        wrong = self._faults(tensors)
        if wrong:
            return row | {"wrong": wrong}
        count = min(8, sets_against_cache(bytes_moved, self._device))
        sets = [tensors] + [Tensors(channels, batch, size, self._device) for _ in range(count - 1)]
        candidates = {"one kernel": [on(self._backends[0], one.one_kernel) for one in sets]}
        for name in self._backends:
            candidates[f"two calls {name}"] = [on(name, one.two_calls) for one in sets]
        replays = {name: Replay(calls, self._device) for name, calls in candidates.items()}
        return row | {"times": in_turns(replays, self._rounds)}

    def _faults(self, tensors: Tensors) -> list[str]:
        """What is wrong with the one kernel's results."""
        ours, theirs = (on(self._backends[0], call)() for call in (tensors.one_kernel, tensors.two_calls))
        verdicts = [judge(a[:1], b[:1], exact) for a, b, exact in zip(ours, theirs, tensors.double(), strict=True)]
        differences = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(ours, theirs, strict=True)]
        return [str(verdict) for verdict in verdicts if not verdict.passed] + [
            f"images beyond the first differ from two calls: {difference:.1e}"
            for difference in differences
            if not difference < 8e-3
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[256, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS) / "gpu-pairs.json")
    options = parser.parse_args()
    measurement = Measurement(torch.device("cpu" if options.rehearse else "cuda"), options.rounds)
    rows: list[Row] = []
    for batch in options.batches:
        for channels, size, note in PAIRS:
            row = measurement.pair(channels, *((1, 5) if options.rehearse else (batch, size)), note)
            rows.append(row)
            times = {name: round(t["median_ms"], 4) for name, t in row.get("times", {}).items()}
            weights, floor = row["weights"] or "not served", f"floor {row['floor_ms']:.4f}"
            print(row["batch"], channels, weights, floor, row.get("wrong", times), flush=True)
            write_rows(options.out, rows)
    return 1 if any("wrong" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
