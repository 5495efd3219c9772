"""Measures whole networks on a GPU against what PyTorch offers. Writes one raw JSON file, row by row as it goes.

    python benchmarks/measure_gpu_networks.py                                 everything that is not in the file yet
    python benchmarks/measure_gpu_networks.py --networks resnet50 --batches 1 --candidates eager_graph,fastcnn_frozen
    python benchmarks/measure_gpu_networks.py --deadline 300                  stop after five minutes
    python benchmarks/measure_gpu_networks.py --rehearse                      the same steps on the CPU, tiny

A case is a network and a batch size. Its candidates have the same weights and are timed in turns, in one process:

    eager                 torchvision's network, channels_last, cudnn.benchmark
    eager_graph           the same in a CUDA graph, with a copy of the input into it and of the result out of it
    fastcnn_eager         fastcnn's network
    fastcnn_frozen        the same after fastcnn.freeze; copies as eager_graph's
    compile               torch.compile(eager)
    compile_graphs        the same with mode="reduce-overhead": CUDA graphs, but no templates of convolution and GEMM
    compile_max_autotune  the same with mode="max-autotune", which uses CUDA graphs
    compile_freezing      (only when asked for) the same with inductor's freezing, which folds batch norms too
    fastcnn_frozen_cuda, fastcnn_frozen_triton   (only when asked for) frozen with the kernels of one backend

Before it is timed, a candidate's first three results are compared with the fp32 network's (float64 for fp32) on the
first and last images, by the accuracy rule: at most twice as far off as eager in the same dtype. A wrong one is
recorded, not timed. (torch.compile's second call records its CUDA graph, the third replays it.)

The order is that of importance: first the quick candidates of every network, ResNet-50 before all; then the compiled
ones, each beside fastcnn_frozen and eager_graph once more. Rows that the file has from the same commit are not measured
again, so a run may be stopped and begun anew. Exit status 3: a candidate broke the process's CUDA context. Begun anew,
the program records that and leaves it alone.

`measure_gpu_networks_in_waves.py` does the same for many cases at a time: preparing them takes far longer than timing.

gpu_ms: CUDA events around runs in a row, a run, medians over rounds. latency_ms (batch 1): from the call to the end of
a synchronisation, by the wall clock. first_call_s: building and the first call, compilation and all.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_candidates import (
    COMPILE_MODES,
    COMPILED,
    NETWORKS,
    ONE_BACKEND,
    QUICK,
    Expected,
    Network,
    Runner,
    build,
    network,
)
from gpu_facts import gpu_facts
from raw_rows import RESULTS, Row, read_rows, write_rows
from torch import Tensor

from fastcnn.measurement.timing import Timing, interleave

BESIDE_COMPILED = ["eager_graph", "fastcnn_frozen"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COMPILE_SECONDS = 45.0  # compiling is not begun with less left
GRACE_SECONDS = 15.0  # the process ends this long after its deadline, whatever it does

KEY = ("what", "phase", "model", "dtype", "batch", "candidate")  # what a row is found by


class Case(NamedTuple):
    phase: str  # "quick", "compiled" or "waves"
    network: str
    batch: int
    candidates: tuple[str, ...]


def cases(options: argparse.Namespace) -> list[Case]:
    found = []
    for phase, members in (("quick", [*QUICK, *ONE_BACKEND]), ("compiled", COMPILED)):
        asked = tuple(name for name in members if name in options.candidates)
        if not asked:
            continue
        beside = tuple(name for name in BESIDE_COMPILED if name in options.candidates) if phase == "compiled" else ()
        found += [Case(phase, name, batch, beside + asked) for name in options.networks for batch in options.batches]
    return found


class Clock:
    """Counts down to the deadline, and ends the process if something does not come back from beyond it."""

    def __init__(self, seconds: float | None, at_the_end: Callable[[], None]) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._at_the_end = at_the_end
        self._guard = threading.Timer((seconds or 0) + GRACE_SECONDS, self._end_all)
        self._guard.daemon = True
        if seconds is not None:
            self._guard.start()

    def stop(self) -> None:
        self._guard.cancel()

    def left(self) -> float:
        return float("inf") if self._end is None else self._end - time.monotonic()

    def _end_all(self) -> None:
        self._at_the_end()
        print("past the deadline: what was measured is in the file", file=sys.stderr, flush=True)
        os._exit(0)


# ---- measuring -----------------------------------------------------------------------------------------------------


class Results:
    """The raw file. What is being tried stands in a file beside it, and is found there if it ended the process."""

    def __init__(self, file: Path, commit: str | None) -> None:
        self._file, self._commit = file, commit
        self._trying = file.with_name(file.name + ".trying")
        file.parent.mkdir(parents=True, exist_ok=True)
        self.rows = read_rows(file)
        if self._trying.exists():
            key = json.loads(self._trying.read_text("utf-8"))
            for candidate in key["candidate"].split(","):
                self.add({**key, "candidate": candidate, "left_out": "it ended the process"})
            self._trying.unlink()

    def has(self, key: Row) -> bool:
        """Whether there is a row, other than one of what is to be tried again."""
        return any(self._same(key, row) and not row.get("again") for row in self.rows)

    def _same(self, key: Row, row: Row) -> bool:
        return row.get("commit") == self._commit and key.items() <= row.items()

    def trying(self, key: Row) -> None:
        self._trying.write_text(json.dumps({**key, "commit": self._commit}), "utf-8")

    def tried(self) -> None:
        self._trying.unlink(missing_ok=True)

    def add(self, row: Row) -> None:
        """In place of an older one of the same commit."""
        key = {name: row[name] for name in KEY if name in row}
        self.rows = [old for old in self.rows if not self._same(key, old)]
        self.rows.append(row)
        write_rows(self._file, self.rows)


class Sharing:
    """Who else works on the GPU while a case is prepared: nobody. :mod:`gpu_wave` has the other answer."""

    waited = 0.0  # seconds

    def beside_others(self) -> contextlib.AbstractContextManager[None]:
        """Around work on the GPU that measures nothing."""
        return contextlib.nullcontext()

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Around work that measures, to choose a kernel by it say."""
        return contextlib.nullcontext()

    def alone_once_compiled(self) -> contextlib.AbstractContextManager[None]:
        """Around a first call that torch.compile compiles, which is work of the CPU, and then runs."""
        return contextlib.nullcontext()


class Prepared:
    """A case on its way: candidates that are right, and the rows of all."""

    def __init__(self, case: Case, net: Network, x: Tensor) -> None:
        self.case, self.net, self.x = case, net, x
        self.expected = Expected(net.twin, x)
        self.runners: dict[str, Runner] = {}
        self.rows: dict[str, Row] = {}


class Measuring:
    """How a case is prepared and timed."""

    def __init__(self, options: argparse.Namespace, facts: Row, sharing: Sharing | None = None) -> None:
        self._options, self._facts = options, facts
        self._sharing = sharing or Sharing()
        self._device, self._dtype = torch.device("cpu" if options.rehearse else "cuda"), DTYPES[options.dtype]
        self._network: Network | None = None

    def begin(self, case: Case) -> Prepared:
        if self._network is None or self._network.name != case.network:
            self._network = None
            with self._sharing.beside_others():
                self._network = network(case.network, self._device, self._dtype, self._options.size)
        net = self._network
        with self._sharing.alone():  # eager mode's first run chooses algorithms by their times
            x = torch.randn(case.batch, *net.size, device=self._device).to(self._dtype)
            return Prepared(case, net, x.contiguous(memory_format=torch.channels_last))

    def add(self, prepared: Prepared, name: str) -> Row | None:
        """Makes a candidate ready to be timed. One that is not right has no time: its row, with the reason."""
        row = {**key(self._options, prepared.case, name), **self._facts, "eager_error": prepared.expected.eager_error}
        prepared.rows[name] = row
        quietly = name in COMPILE_MODES  # the other modes measure while they compile
        try:
            with self._sharing.alone_once_compiled() if quietly else self._sharing.alone():
                runner = self._checked(name, prepared, row)
        except Exception as error:  # whatever a compiler raises, the others can still be timed
            _require_context(self._device, error)
            row["left_out"] = f"{type(error).__name__}: {first_line(error)}"
            return row
        if row["error"] > prepared.expected.bound:
            row["left_out"] = f"its result is off by {row['error']:.2e}, allowed are {prepared.expected.bound:.2e}"
            return row
        prepared.runners[name] = runner
        return None

    def _checked(self, name: str, prepared: Prepared, row: Row) -> Runner:
        expected = prepared.expected
        started, waited = time.perf_counter(), self._sharing.waited
        runner = build(name, prepared.net, prepared.x, row)
        result = runner()
        if prepared.x.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started - (self._sharing.waited - waited)
        row["first_call_s"] = round(seconds, 3)
        row["error"], row["error_bound"] = expected.error(result), expected.bound
        for _ in range(2):
            del result  # torch.compile's graphs use its memory again
            result = runner()
            row["error"] = max(row["error"], expected.error(result))
        if name in COMPILED:
            from torch._dynamo.utils import counters

            row["graphs_skipped"] = counters["inductor"].pop("cudagraph_skips", 0)  # asked for and not made
        return runner

    def time(self, prepared: Prepared, seconds: float) -> list[Row]:
        """The rows of all candidates that are ready, timed in turns for about so long."""
        runners, rows, options = prepared.runners, prepared.rows, self._options
        times = interleave(runners, self._device, rounds=options.rounds, least=5, seconds=seconds, round_ms=2.0)
        for name, timing in times.items():
            rows[name]["gpu_ms" if prepared.x.is_cuda else "ms"] = timing.to_dict()
            rows[name]["images_per_s"] = timing.throughput(len(prepared.x))
        if prepared.case.batch == 1:
            for name, timing in self._latencies(runners).items():
                rows[name]["latency_ms"] = timing.to_dict()
        return [rows[name] for name in runners]

    def _latencies(self, runners: dict[str, Runner]) -> dict[str, Timing]:
        """Wall time of single calls, to the end of a synchronisation, in turns."""

        def waiting(run: Runner) -> Callable[[], None]:
            def call() -> None:
                run()
                if self._device.type == "cuda":
                    torch.cuda.synchronize()

            return call

        calls = {name: waiting(run) for name, run in runners.items()}
        return interleave(calls, "cpu", rounds=4 * self._options.rounds, least=5, seconds=2.0, round_ms=0.0)


def key(options: argparse.Namespace, case: Case, candidate: str | None) -> Row:
    values = ("network", case.phase, case.network, options.dtype, case.batch, candidate)
    return dict(zip(KEY, values, strict=True))


class Session:
    """One case after the other, in this process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._facts = all_facts(options)
        self._measuring = Measuring(options, self._facts)
        self._results = Results(options.output, self._facts["commit"])
        self.clock = Clock(options.deadline, self._results.tried)

    @torch.no_grad()
    def run(self) -> int:
        todo = cases(self._options)
        for number, case in enumerate(todo):
            if self.clock.left() <= (COMPILE_SECONDS if case.phase == "compiled" else 0):
                print(f"no time for {len(todo) - number} of {len(todo)} cases", flush=True)
                break
            try:
                self._measure(case)
            except torch.cuda.OutOfMemoryError as error:
                self._results.add({**key(self._options, case, None), **self._facts, "left_out": first_line(error)})
            torch._dynamo.reset()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self._results.tried()
        return 0

    def _measure(self, case: Case) -> None:
        keys = {name: key(self._options, case, name) for name in case.candidates}
        names = [name for name in case.candidates if not self._results.has(keys[name])]
        if not set(names) - set(BESIDE_COMPILED if case.phase == "compiled" else ()):
            return
        prepared = self._measuring.begin(case)
        for name in names:
            if name in COMPILED and self.clock.left() < COMPILE_SECONDS:
                print(f"{case.network} x{case.batch}: no time for {name}", flush=True)
                continue
            self._results.trying(keys[name])
            left_out = self._measuring.add(prepared, name)
            if left_out is not None:
                self._results.add(left_out)
                print(shown(left_out), flush=True)
        if not prepared.runners:
            return
        self._results.trying(key(self._options, case, ",".join(prepared.runners)))
        for row in self._measuring.time(prepared, min(self._options.seconds, max(1.0, self.clock.left()))):
            self._results.add(row)
            print(shown(row), flush=True)
        self._results.tried()


def all_facts(options: argparse.Namespace) -> Row:
    """What each row says of where and how it was measured."""
    device = torch.device("cpu" if options.rehearse else "cuda")
    return {
        **gpu_facts(device, DTYPES[options.dtype]), "dtype": options.dtype, "cudnn_benchmark": device.type == "cuda",
        "image": options.size, "rehearsal": options.rehearse,
    }  # fmt: skip


def _require_context(device: torch.device, error: Exception) -> None:
    """After an illegal access nothing works any more: end, so that another process can go on behind this candidate."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            print(f"the CUDA context is lost: {first_line(error)}", file=sys.stderr, flush=True)
            os._exit(3)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:300]


def shown(row: Row) -> str:
    start = f"{row['model']:16s} x{row['batch']:<4d} {row['candidate']:21s}"
    if "left_out" in row:
        return f"{start} left out: {row['left_out']}"
    timing = row.get("gpu_ms") or row["ms"]
    latency = f", latency {row['latency_ms']['median_ms']:.3f} ms" if "latency_ms" in row else ""
    return (
        f"{start} {timing['median_ms']:9.4f} ms {row['images_per_s']:10.1f} images/s{latency}, "
        f"off by {row['error']:.1e} (eager {row['eager_error']:.1e}), first call {row['first_call_s']:.1f} s"
        + (f", WITHOUT {row['graphs_skipped']} CUDA graphs" if row.get("graphs_skipped") else "")
        + _choices(row.get("frozen", {}))
    )


def _choices(frozen: Row) -> str:
    """What freezing on a GPU chose by its own times."""
    if "branches" not in frozen:
        return ""
    return "; ".join(["; early starts" if frozen["early_starts"] else "", frozen["branches"], *frozen["fusions"]])


def names(text: str) -> list[str]:
    return text.split(",")


def add_options(parser: argparse.ArgumentParser, usual: list[str]) -> None:
    """Those of this program and of `measure_gpu_networks_in_waves.py`."""
    parser.add_argument("--candidates", type=names, help=f"default: {','.join(usual)}")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=15, help="turns that each candidate has, at most")
    parser.add_argument("--seconds", type=float, default=4.0, help="for the timing of a case, about")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="stop after this long")
    parser.add_argument("--size", type=int, help="height and width of images; default: the network's")
    parser.add_argument("--output", type=Path, help="default: gpu-networks-DTYPE.json in $OUT or benchmarks/results")


def complete(
    parser: argparse.ArgumentParser, options: argparse.Namespace, networks: list[str], usual: list[str]
) -> None:
    """Fills in what depends on other options, and refuses what there is not."""
    options.candidates = options.candidates or usual
    options.size = options.size or (64 if options.rehearse else None)
    options.output = options.output or Path(os.environ.get("OUT") or RESULTS) / (
        f"gpu-networks-{options.dtype}{'-rehearsal' if options.rehearse else ''}.json"
    )
    for given, known, what in (
        (networks, NETWORKS, "networks"), (options.candidates, [*QUICK, *ONE_BACKEND, *COMPILED], "candidates"),
    ):  # fmt: skip
        if unknown := set(given) - set(known):
            parser.error(f"--{what}: unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU; --rehearse runs the same steps on the CPU")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=names, help=f"default: {','.join(NETWORKS)}")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], help="default: 1,32,256")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small images of two networks")
    add_options(parser, QUICK + COMPILED[:3])
    options = parser.parse_args(arguments)
    rehearse = options.rehearse
    options.networks = options.networks or (["resnet18", "googlenet"] if rehearse else NETWORKS)
    options.batches = options.batches or ([1, 2] if rehearse else [1, 32, 256])
    complete(parser, options, options.networks, QUICK if rehearse else QUICK + COMPILED[:3])
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    torch.backends.cudnn.benchmark = True
    session = Session(options)
    try:
        return session.run()
    finally:
        session.clock.stop()


if __name__ == "__main__":
    sys.exit(main())
