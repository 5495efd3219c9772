"""GPU time of networks whose kernels begin before the one ahead of them has ended, and as ever, in bf16.

    python benchmarks/measure_gpu_early_starts.py
    python benchmarks/measure_gpu_early_starts.py --networks resnet50 --batches 1,256

A network is captured four times: on one stream and with branches on streams of their own, with and without early starts
(`docs/internals.md`), by fastcnn's own choice of kernels; `freeze`, which fuses operators too and chooses among these,
is not part of it. The replays of all four are first compared, ten times with other inputs: a graph whose result has
other bits than the first one's is recorded and not timed. Writes a row a graph to gpu-early-starts.json in $OUT or in
benchmarks/results.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from gpu_candidates import NETWORKS, network
from gpu_facts import gpu_facts
from raw_rows import RESULTS, Row, write_rows
from torch import Tensor

from fastcnn.graph.freezing.gpu.cuda_graph import CudaCapturer, CudaGraph

COMPARED, ROUNDS = 10, 15
ROUND_MS = 2.0
MOST_LANES = 4


def graphs_of(capturer: CudaCapturer, run: Any) -> dict[tuple[int, bool], tuple[CudaGraph, Tensor]]:
    for _ in range(2):
        capturer.warm_up(run)
    kinds = [(lanes, early) for lanes in (1, MOST_LANES) for early in (False, True)]
    return {(lanes, early): capturer.capture(run, lanes, early) for lanes, early in kinds}


def wrong(graphs: dict[tuple[int, bool], tuple[CudaGraph, Tensor]], x: Tensor) -> set[tuple[int, bool]]:
    """Graphs that gave other bits than the first one for some input."""
    found = set()
    for _ in range(COMPARED):
        x.copy_(torch.randn(x.shape, device=x.device))
        results = {}
        for key, (graph, result) in graphs.items():
            graph.replay()
            results[key] = result.clone()
        expected = results[1, False]
        found |= {key for key, result in results.items() if not torch.equal(result, expected)}
    return found


def times(capturer: CudaCapturer, graph: CudaGraph) -> list[float]:
    """Milliseconds a replay, one value a round of replays in a row."""
    repeats = max(1, int(ROUND_MS / capturer.milliseconds(graph)))
    found = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / repeats)
    return found


@torch.no_grad()
def measure(name: str, batch: int, facts: Row) -> list[Row]:
    device = torch.device("cuda", torch.cuda.current_device())
    net = network(name, device, torch.bfloat16, None)
    x = torch.randn(batch, *net.size, device=device).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    capturer = CudaCapturer(device)
    graphs = graphs_of(capturer, lambda: net.ours(x))
    bad = wrong(graphs, x)
    rows: list[Row] = []
    for (lanes, early), (graph, _) in graphs.items():
        row = {
            "what": "gpu_early_starts", "model": name, "batch": batch, "most_streams": lanes, "early_starts": early,
            "replays_compared": COMPARED, **facts,
        }  # fmt: skip
        if (lanes, early) in bad:
            row["left_out"] = "its result has other bits"
        else:
            samples = times(capturer, graph)
            row |= {"median_ms": statistics.median(samples), "least_ms": min(samples), "samples": len(samples)}
        rows.append(row)
        print({key: row[key] for key in row if key not in facts}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=lambda text: text.split(","), default=NETWORKS[:4])
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1])
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or RESULTS) / "gpu-early-starts.json")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        parser.error("needs an NVIDIA GPU of sm_90 or newer")
    facts = gpu_facts(torch.device("cuda"), torch.bfloat16)
    rows: list[Row] = []
    for name in options.networks:
        for batch in options.batches:
            rows += measure(name, batch, facts)
            write_rows(options.output, rows)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
