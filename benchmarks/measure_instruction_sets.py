"""Times frozen networks with each instruction set that this processor can run. Writes a raw JSON file.

    python benchmarks/measure_instruction_sets.py                  the networks below, fp32 and bf16
    python benchmarks/measure_instruction_sets.py vgg16 --dtypes fp32

The instruction set is chosen once a process, so each has a process of its own; all hold the frozen network, and take
turns. A turn is a pause, an untimed run, and runs for about a tenth of a second.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from raw_rows import RESULTS, read_rows, write_rows

import fastcnn
from fastcnn import _native
from fastcnn.measurement.comparison import ENGINE_TURNS
from fastcnn.measurement.conditions import commit, conditions
from fastcnn.measurement.timing import interleave
from fastcnn.models import model_info
from fastcnn.verification import calibrate

NETWORKS = ["vgg16", "googlenet", "resnet18", "resnet50", "resnext50_32x4d", "densenet121"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@torch.no_grad()
def worker(name: str, dtype: str, threads: int) -> None:
    """Freezes the network, says so, and times one turn for each line of input."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    size = model_info(name).input_size
    model = calibrate(fastcnn.create_model(name).eval(), torch.randn(2, *size)).to(DTYPES[dtype])
    images = torch.randn(1, *size).to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
    frozen = fastcnn.freeze(model, images)
    print("ready", flush=True)
    while sys.stdin.readline():
        turn = interleave(
            {"frozen": lambda: frozen(images)}, rounds=1, least=1, warmup=1, round_ms=0.0, **ENGINE_TURNS
        )
        print(turn["frozen"].median_ms, flush=True)


def measure(name: str, dtype: str, rounds: int, threads: int) -> dict[str, Any]:
    """Medians over the turns' medians, in milliseconds, by instruction set."""
    processes = {
        isa: subprocess.Popen(
            [sys.executable, __file__, "--worker", name, dtype, "--threads", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "FASTCNN_CPU_ISA": isa},
        )
        for isa in _native.cpu_instruction_sets()
    }  # fmt: skip
    turns: dict[str, list[float]] = {isa: [] for isa in processes}

    def answer(isa: str) -> str:
        line = processes[isa].stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(f"{name} in {dtype} with {isa}: the process ended")
        return line

    try:
        for isa in processes:
            answer(isa)
        for _ in range(rounds):
            for isa, process in processes.items():
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                turns[isa].append(float(answer(isa)))
    finally:
        for process in processes.values():
            process.communicate()
    described = conditions(torch.device("cpu"), DTYPES[dtype], 1).to_dict()
    del described["instruction_set"]
    return {
        "what": "instruction_sets", "model": name, **described, "threads": threads, "rounds": rounds,
        "turns": ENGINE_TURNS, "median_ms": {isa: statistics.median(times) for isa, times in turns.items()},
        "date": datetime.datetime.now().isoformat(timespec="seconds"), "commit": commit(),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="(some of the table's)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(fp32 bf16)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    parser.add_argument("--file", type=Path, help="(benchmarks/results/cpu-instruction-sets-THREADS-threads.json)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(*options.worker, options.threads)
        return 0
    unknown = [name for name in options.networks if name not in fastcnn.list_models()]
    if unknown:
        parser.error(f"no such network: {', '.join(unknown)}")
    file = options.file or RESULTS / f"cpu-instruction-sets-{options.threads}-threads.json"
    rows = read_rows(file)
    for name in options.networks:
        for dtype in options.dtypes:
            row = measure(name, dtype, options.rounds, options.threads)
            rows = [other for other in rows if (other["model"], other["dtype"]) != (name, row["dtype"])] + [row]
            write_rows(file, rows)
            print(name, dtype, ", ".join(f"{isa} {ms:.3g}" for isa, ms in row["median_ms"].items()), "ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
