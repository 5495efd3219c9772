"""GPU time of every distinct convolution of five networks, and of memory-bound operators, in bf16.

    python benchmarks/measure_gpu_layers.py                       all layers, batch 256, 32 and 1
    python benchmarks/measure_gpu_layers.py resnet50 --batches 1 --deadline 60
    python benchmarks/measure_gpu_layers.py resnet50 --batches 256 --variants cuda triton     every kernel and tile too
    python benchmarks/measure_gpu_layers.py --operators           memory-bound operators instead
    python benchmarks/measure_gpu_layers.py --rehearse            the same on a CPU with tiny sizes: no figures

Writes a raw JSON file, a row a layer and batch size, as it goes; rows of an earlier run in it are replaced. Candidates:
gpu_problems.py; how they are timed: gpu_replay.py. fastcnn's result is first checked against fp32 under the accuracy
rule, with cuDNN's bf16 result as the reference; a wrong one is recorded as wrong and not timed.

The roof of a layer is the time that the card needs for its bytes or for its operations, whichever is longer, at the
best bandwidth and the matrix rate that the same run measured.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_facts import gpu_facts, nvidia_smi
from gpu_layers import NETWORKS, Job, Layer, jobs
from gpu_operators import OPERATORS, launch_triton_operator
from gpu_problems import Call, Tensors, chunks, conv_calls, kernel_names, launch_triton, on_backend
from gpu_replay import Replay, in_turns, sets_against_cache
from raw_rows import Row, write_rows
from torch import Tensor
from triton_ahead import AheadCompiler

from fastcnn import backends, ops
from fastcnn.verification.accuracy import judge, relative_error

BATCHES = (256, 32, 1)
PEER_LIMIT = 1e-2  # relative error of a peer's bf16 result above which the comparison itself is broken
MEMORY_LIMIT = 24 << 30  # what PyTorch may hold between two layers
WRITE_SECONDS = 5.0


class Measurement:
    """One run of this script: the device, the ceilings, the rows so far."""

    def __init__(self, file: Path, device: torch.device, rounds: int, varied: Sequence[str] = ()) -> None:
        self.file, self.device, self.rounds, self.varied = file, device, rounds, varied
        self.rehearsal = device.type != "cuda"
        self.rows: list[Row] = []
        self.bandwidth = self.rate = 0.0
        self.faults = 0
        self.spent: dict[str, float] = {}
        self._written = 0.0
        wanted = ("cpp",) if self.rehearsal else ("triton", "cuda")
        self.ours = tuple(name for name in wanted if backends.unavailable(name) is None)
        self.conditions = gpu_facts(device, torch.bfloat16)

    def clocked(self, what: str, started: float) -> float:
        now = time.perf_counter()
        self.spent[what] = self.spent.get(what, 0.0) + now - started
        return now

    def add(self, row: Row, *, now: bool = False) -> None:
        self.rows.append(row | self.conditions)
        if now or time.perf_counter() - self._written > WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        write_rows(self.file, self.rows)
        self._written = time.perf_counter()

    # ---- ceilings -------------------------------------------------------------------------------------------------

    def measure_ceilings(self) -> None:
        """Bytes a second of several ways to move more memory than caches hold, and the rate of a large product."""
        count = 1 << (20 if self.rehearsal else 30)
        size = 512 if self.rehearsal else 8192
        self._move_memory(count)
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        self._ceiling(f"flops: matmul {size}", lambda: a @ b, 2 * size**3)
        self.bandwidth = self._best("bytes")
        self.rate = self._best("flops")
        self.write()

    def _move_memory(self, count: int) -> None:
        x = torch.ones(count, dtype=torch.bfloat16, device=self.device)
        y = torch.empty_like(x)
        picture, out = (t.view(1, 256, count // 65536, 256).permute(0, 3, 1, 2) for t in (x, y))
        moves: dict[str, tuple[int, Call]] = {
            "copy_": (2, lambda: y.copy_(x)),
            "element-wise, PyTorch": (2, lambda: torch.neg(x, out=y)),
            "read, PyTorch's amax": (1, lambda: x.amax()),
        }
        for name in self.ours:
            copy = functools.partial(ops.channel_affine, picture, None, None, activation="relu", out=out)
            moves[f"element-wise, {name}"] = 2, on_backend(name, copy)
        for name, (passes, call) in moves.items():
            self._ceiling(f"bytes: {name}", call, passes * count * 2)

    def _ceiling(self, name: str, call: Call, amount: int) -> None:
        try:
            times = in_turns({name: Replay([call], self.device)}, self.rounds)[name]
        except Exception as error:
            self._give_up_if_broken()
            print(f"ceiling {name}: {first_line(error)}")
            return
        rate = amount / times["median_ms"] * 1e3
        self.add({"what": "gpu_ceiling", "name": name, "per_second": rate, **times})
        print(f"{name:34} {rate / 1e12:8.3f} T/s", flush=True)

    def _best(self, kind: str) -> float:
        rates = [r["per_second"] for r in self.rows if r["what"] == "gpu_ceiling" and r["name"].startswith(kind)]
        return max(rates)

    def roof(self, bytes: int, flops: int) -> Row:
        by_bytes, by_flops = bytes / self.bandwidth * 1e3, flops / self.rate * 1e3
        return {
            "bytes": bytes, "flops": flops, "roof_ms": round(max(by_bytes, by_flops), 7),
            "bound": "memory" if by_bytes >= by_flops else "compute",
        }  # fmt: skip

    # ---- layers ---------------------------------------------------------------------------------------------------

    def measure_layer(self, job: Job) -> None:
        layer, batch = job.layer, job.batch
        began = time.perf_counter()
        sets = sets_against_cache(layer.bytes(batch), self.device)
        tensors = [Tensors.random(layer, batch, self.device) for _ in range(sets)]
        of_sets = [conv_calls(layer, t, self.ours, self.varied) for t in tensors]
        began = self.clocked("tensors", began)
        verdicts = self._check_layer(layer, batch, tensors[0], of_sets[0])
        began = self.clocked("checks", began)
        timings, kernels = self._timed(of_sets, verdicts), self._kernel_names(layer, tensors[0])
        began = self.clocked("timing", began)
        row = {
            "what": "gpu_layer", "layer": layer.name, "networks": dict(job.networks), "batch": batch,
            "in_channels": layer.in_channels, "in_size": [layer.height, layer.width],
            "out_channels": layer.out_channels, "filter": list(layer.filter), "stride": list(layer.stride),
            "padding": list(layer.padding), "groups": layer.groups, "relu": layer.relu, "residual": layer.residual,
            "prologue": layer.prologue, **self.roof(layer.bytes(batch), layer.flops(batch)), "sets": sets,
            "timings": timings, "verdicts": verdicts, "kernels": kernels,
        }  # fmt: skip
        self.add(row)
        print(described(row), flush=True)
        del tensors, of_sets
        if not self.rehearsal and torch.cuda.memory_reserved(self.device) > MEMORY_LIMIT:
            torch.cuda.empty_cache()

    def _kernel_names(self, layer: Layer, tensors: Tensors) -> dict[str, str]:
        try:
            return {} if self.rehearsal else kernel_names(layer, tensors)
        except Exception as error:
            return {"unknown": first_line(error)}

    def _check_layer(self, layer: Layer, batch: int, t: Tensors, calls: dict[str, Call]) -> dict[str, str]:
        """A word on each candidate: "right" or what is wrong with it. The bare convolution is nothing to check."""
        pieces = list(chunks(batch, t.out[0].numel()))
        return {"cudnn": "right"} | self._checked(
            calls, ("cudnn_fused", "cudnn_parts"), t.out,
            lambda i: t.exact(layer, pieces[i]), lambda y, i: y[pieces[i]], len(pieces),
        )  # fmt: skip

    def _checked(
        self, calls: dict[str, Call], peers: Sequence[str], out: Tensor | None,
        exact: Callable[[int], Tensor], piece: Callable[[Tensor, int], Tensor], pieces: int,
    ) -> dict[str, str]:  # fmt: skip
        """The reference is the first of ``peers`` that runs; the ones behind it have no part then."""
        results: dict[str, Tensor] = {}
        verdicts: dict[str, str] = {}
        reference = next((name for name in peers if self._runs(name, calls[name], results, verdicts, None)), None)
        ours = [name for name in calls if name in self.ours or ":" in name]
        for name in ours:
            self._runs(name, calls[name], results, verdicts, out)
        if reference is None:
            return verdicts | {name: "not checked: there is no reference" for name in ours}
        searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
        try:
            for i in range(pieces):
                expected, theirs = exact(i), piece(results[reference], i)
                if relative_error(theirs, expected).norm > PEER_LIMIT:
                    verdicts[reference] = f"wrong: error {relative_error(theirs, expected).norm:.1e}"
                for name in (name for name in ours if name in results):
                    judgement = judge(piece(results[name], i), theirs, expected)
                    if not judgement.passed and verdicts[name] == "right":
                        found = judgement.ours
                        verdicts[name] = f"wrong: error {found.norm:.1e}, largest {found.largest:.1e}"
        finally:
            torch.backends.cudnn.benchmark = searching
        if verdicts[reference] != "right":  # then it is nothing to judge others by
            verdicts |= {name: f"not checked: {reference} is wrong" for name in ours if verdicts[name] == "right"}
        return verdicts

    def _runs(
        self, name: str, call: Call, results: dict[str, Tensor], verdicts: dict[str, str], out: Tensor | None
    ) -> bool:
        """Run a candidate once, over NaNs where it writes into ``out``, and keep its result."""
        try:
            if out is not None:
                out.fill_(float("nan"))
            result = call()
            results[name] = result if out is None else result.clone()
            verdicts[name] = "right"
        except Exception as error:
            self._give_up_if_broken()
            verdicts[name] = f"failed: {first_line(error)}"
        return name in results

    def _timed(self, of_sets: list[dict[str, Call]], verdicts: dict[str, str]) -> dict[str, Row]:
        replays: dict[str, Replay] = {}
        for name in of_sets[0]:
            if verdicts.get(name) != "right":
                continue
            try:
                replays[name] = Replay([calls[name] for calls in of_sets], self.device)
            except Exception as error:
                self._give_up_if_broken()
                verdicts[name] = f"failed: {first_line(error)}"
        return in_turns(replays, self.rounds)

    def measure(self, item: Any, chosen: argparse.Namespace) -> None:
        """One layer, or the operator of that name. One that fails (out of memory, say) does not stop the others."""
        try:
            if chosen.operators:
                self.measure_operator(item, *operator_sizes(chosen))
            else:
                self.measure_layer(item)
        except Exception as error:
            self._failed(item, error)

    def _failed(self, item: Any, error: Exception) -> None:
        self._give_up_if_broken()
        self.faults += 1
        print(f"FAILED: {item}: {first_line(error)}", flush=True)
        if not self.rehearsal:
            torch.cuda.empty_cache()

    def _give_up_if_broken(self) -> None:
        """After a fault on the GPU nothing more can be measured in this process."""
        if self.rehearsal:
            return
        try:
            torch.cuda.synchronize()
        except Exception as error:
            self.write()
            sys.exit(f"the GPU is in error, {len(self.rows)} rows are written: {first_line(error)}")

    # ---- operators ------------------------------------------------------------------------------------------------

    def measure_operator(self, name: str, batch: int, size: int) -> None:
        first = OPERATORS[name](batch, size, self.device)
        more = sets_against_cache(first.bytes, self.device) - 1
        sets = [first, *(OPERATORS[name](batch, size, self.device) for _ in range(more))]
        of_sets = [operator.calls(self.ours) for operator in sets]
        verdicts = self._checked(of_sets[0], ("pytorch",), first.out, lambda i: first.exact(), lambda y, i: y, 1)
        row = {
            "what": "gpu_operator", "operator": name, "about": (OPERATORS[name].__doc__ or "").strip(), "batch": batch,
            **self.roof(first.bytes, first.flops), "sets": len(sets), "timings": self._timed(of_sets, verdicts),
            "verdicts": verdicts,
        }  # fmt: skip
        self.add(row)
        print(described(row), flush=True)


def first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def described(row: Row) -> str:
    times = " | ".join(f"{name} {timing['median_ms'] * 1e3:8.1f}" for name, timing in row["timings"].items())
    bad = [f"{name} {verdict}" for name, verdict in row["verdicts"].items() if verdict != "right"]
    title = row.get("layer") or row["operator"]
    return f"{row['batch']:4d} {title:50} roof {row['roof_ms'] * 1e3:8.1f} us | {times}" + (f" | {bad}" if bad else "")


def tiny(job: Job) -> Job:
    """A layer for rehearsals: everything but its sizes."""
    layer = job.layer
    groups = min(2, layer.groups)
    small = Layer(
        min(layer.in_channels, 8), min(layer.height, 8), min(layer.width, 8), min(layer.out_channels, 8), layer.filter,
        layer.stride, layer.padding, layer.dilation, groups, layer.scale, layer.bias, layer.relu, layer.residual,
        layer.prologue,
    )  # fmt: skip
    return Job(small, min(job.batch, 2), job.networks)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help=f"default: {' '.join(NETWORKS)}")
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES), help="(%(default)s)")
    parser.add_argument(
        "--variants", nargs="*", default=[], choices=("cuda", "triton"), help="backends to time every kernel or tile of"
    )
    parser.add_argument("--operators", action="store_true", help="memory-bound operators instead of layers")
    parser.add_argument("--deadline", type=float, help="seconds after which no further layer is begun")
    parser.add_argument("--rounds", type=int, help="replays of each candidate (9; rehearsals 2)")
    parser.add_argument("--processes", type=int, help="that compile ahead; 0: none (default: by cores)")
    parser.add_argument("--file", type=Path, help="default: gpu-layers.json or gpu-operators.json in $OUT")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, by the wall clock")
    return parser.parse_args()


def capability() -> int:
    """Of the GPU, found without using CUDA in this process; Hopper's where it cannot be found."""
    digits = (nvidia_smi("compute_cap") or "").replace(".", "")
    return int(digits) if digits.isdigit() else 90


def operator_sizes(chosen: argparse.Namespace) -> tuple[int, int]:
    """Images, and the side of the larger pictures."""
    return (2, 16) if chosen.rehearse else (256, 56)


def work(chosen: argparse.Namespace) -> tuple[list[Any], dict[Any, Any]]:
    """What to measure, in order, by the key of its compilation."""
    if chosen.operators:
        return list(OPERATORS), {name: (launch_triton_operator, name, *operator_sizes(chosen)) for name in OPERATORS}
    found = jobs(chosen.networks or NETWORKS, chosen.batches)
    if chosen.rehearse:
        found = list({(job.layer, job.batch): job for job in map(tiny, found)}.values())
    return found, {job: (launch_triton, job.layer, job.batch, "triton" in chosen.variants) for job in found}


def main() -> int:
    chosen = options()
    chosen.rounds = chosen.rounds or (2 if chosen.rehearse else 9)
    started = time.perf_counter()
    found, compilations = work(chosen)
    if chosen.file is None:
        name = "gpu-operators.json" if chosen.operators else "gpu-layers.json"
        chosen.file = Path(os.environ.get("OUT", ".")) / name
    ahead = None
    if compilations and chosen.processes != 0 and backend_compiles(chosen.rehearse):
        # Before CUDA is used: the compiling processes are forked from this one.
        ahead = AheadCompiler(capability(), chosen.processes)
        for key, job in compilations.items():
            ahead.submit(key, *job)
    device = torch.device("cpu" if chosen.rehearse else "cuda")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # for the exact results, in fp32
    torch.backends.cuda.matmul.allow_tf32 = False
    if chosen.rehearse:
        torch.set_num_threads(1)
    left = 0
    # What a time limit sends: the rows so far are then still written. Not sooner: the forked processes end by it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with torch.no_grad():
        run = Measurement(chosen.file, device, chosen.rounds, chosen.variants)
        run.clocked("start", started)
        try:
            began = time.perf_counter()
            run.measure_ceilings()
            run.clocked("ceilings", began)
            for number, item in enumerate(found):
                if chosen.deadline is not None and time.perf_counter() - started > chosen.deadline:
                    left = len(found) - number
                    break
                if ahead is not None:
                    began = time.perf_counter()
                    ahead.wait(item)
                    run.clocked("waiting for Triton", began)
                run.measure(item, chosen)
        finally:
            run.write()
            if ahead is not None:
                print(ahead)
                ahead.close()
    print(f"{len(run.rows)} rows in {chosen.file}; " + (f"out of time with {left} left" if left else "complete"))
    print(f"{time.perf_counter() - started:.1f} s: " + ", ".join(f"{k} {v:.1f}" for k, v in run.spent.items()))
    return 1 if run.faults else 0


def backend_compiles(rehearse: bool) -> bool:
    """Whether Triton is there to compile; a rehearsal compiles too, for a GPU that is not there."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return False
    import importlib.util

    return importlib.util.find_spec("triton") is not None and (rehearse or torch.version.cuda is not None)


if __name__ == "__main__":
    sys.exit(main())
