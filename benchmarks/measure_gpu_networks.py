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
    compile_max_autotune  the same with mode="max-autotune", which uses CUDA graphs
    compile_freezing      (only when asked for) the same with inductor's freezing, which folds batch norms too
    fastcnn_frozen_cuda, fastcnn_frozen_triton   (only when asked for) frozen with the kernels of one backend

Before it is timed, a candidate's result is compared with the fp32 network's (float64 for fp32) on the first and last
images, by the accuracy rule: at most twice as far off as eager in the same dtype. A wrong one is recorded, not timed.

The order is that of importance: first the quick candidates of every network, ResNet-50 before all; then the compiled
ones, each beside fastcnn_frozen and eager_graph once more. Rows that the file has from the same commit are not measured
again, so a run may be stopped and begun anew. Exit status 3: a candidate broke the process's CUDA context. Begun anew,
the program records that and leaves it alone.

gpu_ms: CUDA events around runs in a row, a run, medians over rounds. latency_ms (batch 1): from the call to the end of
a synchronisation, by the wall clock. first_call_s: building and the first call, compilation and all.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from raw_rows import RESULTS, Row, read_rows, write_rows
from torch import Tensor, nn

import fastcnn
from fastcnn.measurement.conditions import conditions
from fastcnn.measurement.timing import Timing, interleave
from fastcnn.models import model_info
from fastcnn.verification import calibrate, torchvision_twin

# In the order of importance. alexnet_owt is torchvision's alexnet.
NETWORKS = [
    "resnet50", "densenet121", "googlenet", "vgg16", "resnext50_32x4d", "wide_resnet50_2", "resnet18", "resnet152",
    "alexnet_owt",
]  # fmt: skip
QUICK = ["eager", "eager_graph", "fastcnn_eager", "fastcnn_frozen"]
ONE_BACKEND = {"fastcnn_frozen_cuda": "cuda", "fastcnn_frozen_triton": "triton"}
COMPILED = ["compile", "compile_max_autotune", "compile_freezing"]
BESIDE_COMPILED = ["eager_graph", "fastcnn_frozen"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TINY = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2.5e-7}  # the accuracy rule's
COMPILE_SECONDS = 45.0  # compiling is not begun with less left
GRACE_SECONDS = 15.0  # the process ends this long after its deadline, whatever it does

Runner = Callable[[], Tensor]


class Case(NamedTuple):
    phase: str  # "quick" or "compiled"
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


# ---- networks and candidates ---------------------------------------------------------------------------------------


class Network(NamedTuple):
    name: str
    ours: nn.Module
    twin: nn.Module  # torchvision's
    size: tuple[int, ...]  # of an image


@torch.no_grad()
def network(name: str, device: torch.device, dtype: torch.dtype, size: int | None) -> Network:
    """Both networks with the same weights, in the dtype, channels-last."""
    torch.manual_seed(0)
    channels, height, width = model_info(name).input_size
    shape = (channels, size or height, size or width)
    with torch.device(device):  # initialised there, which is quicker
        model = fastcnn.create_model(name).eval()
    calibrate(model, torch.randn(8, *shape, device=device))
    with torch.device(device):
        twin = torchvision_twin(name, model)
    if twin is None:
        raise SystemExit(f"torchvision has no network of {name}'s state dict")
    ours, twin = (m.to(dtype=dtype, memory_format=torch.channels_last) for m in (model, twin.eval()))
    return Network(name, ours, twin, shape)


class Expected:
    """What a candidate has to compute: the result for a few images of the batch, and how far off eager mode is."""

    def __init__(self, twin: nn.Module, x: Tensor) -> None:
        self._few = sorted({*range(min(4, len(x))), *range(max(0, len(x) - 4), len(x))})
        wide = torch.float64 if x.dtype == torch.float32 else torch.float32
        with _exactly():
            self._exact = copy.deepcopy(twin).to(wide)(x[self._few].to(wide)).double()
        self.eager_error = self.error(twin(x))
        self.bound = 2 * self.eager_error + TINY[x.dtype]

    def error(self, result: Tensor) -> float:
        """Relative distance, infinite where a value is not finite."""
        off = float((result[self._few].double() - self._exact).norm() / self._exact.norm())
        return off if off == off else float("inf")


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """Without TF32, and without trying algorithms for a single run."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = False, False, False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def build(candidate: str, net: Network, x: Tensor, note: dict[str, Any]) -> Runner:
    """A function without arguments that runs a batch; what is to be known of it goes into ``note``."""
    if candidate == "eager":
        return lambda: net.twin(x)
    if candidate == "eager_graph":
        return _in_graph(net.twin, x)
    if candidate == "fastcnn_eager":
        return lambda: net.ours(x)
    if candidate == "fastcnn_frozen" or candidate in ONE_BACKEND:
        one = ONE_BACKEND.get(candidate)
        with fastcnn.use_backend(one, strict=True) if one else contextlib.nullcontext():
            frozen = fastcnn.freeze(net.ours, x)
        note["frozen"] = {"memory": frozen.memory()._asdict()}
        if x.is_cuda:
            note["frozen"] |= {"branches": frozen.branches, "streams": frozen.lanes, "recomputed": frozen.recomputed}
        return lambda: frozen(x)
    options: dict[str, Any] = {} if candidate == "compile" else {"mode": "max-autotune"}
    plain = copy.deepcopy(net.twin)
    if candidate != "compile_freezing":
        faster = torch.compile(plain, dynamic=False, **options)
        return lambda: faster(x)
    import torch._inductor.config as inductor

    faster = torch.compile(plain, dynamic=False, **options)
    with inductor.patch(freezing=True):
        faster(x)
    return lambda: faster(x)


def _in_graph(model: nn.Module, x: Tensor) -> Runner:
    """The model in a CUDA graph; on the CPU, the model."""
    if not x.is_cuda:
        return lambda: model(x)
    static = x.clone(memory_format=torch.preserve_format)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = model(static)

    def run() -> Tensor:
        static.copy_(x)
        graph.replay()
        return result.clone()

    return run


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
        return any(row.get("commit") == self._commit and key.items() <= row.items() for row in self.rows)

    def trying(self, key: Row) -> None:
        self._trying.write_text(json.dumps({**key, "commit": self._commit}), "utf-8")

    def tried(self) -> None:
        self._trying.unlink(missing_ok=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        write_rows(self._file, self.rows)


class Session:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._device = torch.device("cpu" if options.rehearse else "cuda")
        self._dtype = DTYPES[options.dtype]
        self._facts = _facts(self._device, self._dtype, options)
        self._results = Results(options.output, self._facts["commit"])
        self.clock = Clock(options.deadline, self._results.tried)
        self._network: Network | None = None

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
                self._results.add({**self._key(case, None), **self._facts, "left_out": _first_line(error)})
            torch._dynamo.reset()
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        self._results.tried()
        return 0

    def _key(self, case: Case, candidate: str | None) -> Row:
        options = self._options
        return {
            "what": "network", "phase": case.phase, "model": case.network, "dtype": options.dtype,
            "batch": case.batch, "candidate": candidate,
        }  # fmt: skip

    def _measure(self, case: Case) -> None:
        keys = {name: self._key(case, name) for name in case.candidates}
        names = [name for name in case.candidates if not self._results.has(keys[name])]
        if not set(names) - set(BESIDE_COMPILED if case.phase == "compiled" else ()):
            return
        if self._network is None or self._network.name != case.network:
            self._network = None
            self._network = network(case.network, self._device, self._dtype, self._options.size)
        net = self._network
        x = torch.randn(case.batch, *net.size, device=self._device).to(self._dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        expected = Expected(net.twin, x)
        runners: dict[str, Runner] = {}
        found: dict[str, Row] = {}
        for name in names:
            if name in COMPILED and self.clock.left() < COMPILE_SECONDS:
                print(f"{case.network} x{case.batch}: no time for {name}", flush=True)
                continue
            self._results.trying(keys[name])
            row = found[name] = {**keys[name], **self._facts, "eager_error": expected.eager_error}
            runner = self._checked(name, net, x, expected, row)
            if runner is None:
                self._results.add(row)
                print(_shown(row), flush=True)
            else:
                runners[name] = runner
        if not runners:
            return
        self._results.trying(self._key(case, ",".join(runners)))
        for name, timing in self._times(runners).items():
            found[name]["gpu_ms" if x.is_cuda else "ms"] = timing.to_dict()
            found[name]["images_per_s"] = timing.throughput(len(x))
        if case.batch == 1:
            for name, timing in self._latencies(runners).items():
                found[name]["latency_ms"] = timing.to_dict()
        for name in runners:
            self._results.add(found[name])
            print(_shown(found[name]), flush=True)
        self._results.tried()

    def _checked(self, name: str, net: Network, x: Tensor, expected: Expected, row: Row) -> Runner | None:
        """A candidate whose first result is right; else None, with the reason in its row."""
        started = time.perf_counter()
        try:
            runner = build(name, net, x, row)
            result = runner()
            if x.is_cuda:
                torch.cuda.synchronize()
            row["first_call_s"] = round(time.perf_counter() - started, 3)
            row["error"], row["error_bound"] = expected.error(result), expected.bound
        except Exception as error:  # whatever a compiler raises, the others can still be timed
            _require_context(x.device, error)
            row["left_out"] = f"{type(error).__name__}: {_first_line(error)}"
            return None
        if row["error"] > expected.bound:
            row["left_out"] = f"its result is off by {row['error']:.2e}, allowed are {expected.bound:.2e}"
            return None
        return runner

    def _times(self, runners: dict[str, Runner]) -> dict[str, Timing]:
        options = self._options
        seconds = min(options.seconds, max(1.0, self.clock.left()))
        return interleave(runners, self._device, rounds=options.rounds, least=5, seconds=seconds, round_ms=2.0)

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


def _facts(device: torch.device, dtype: torch.dtype, options: argparse.Namespace) -> Row:
    """What each row says of where and how it was measured."""
    facts = conditions(device, dtype).to_dict()
    commit = os.environ.get("FASTCNN_COMMIT") or facts["commit"]
    del facts["batch"]
    driver = None
    if device.type == "cuda":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    return {
        **facts, "dtype": options.dtype, "commit": commit, "driver": driver, "cudnn_benchmark": device.type == "cuda",
        "image": options.size, "rehearsal": options.rehearse,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _require_context(device: torch.device, error: Exception) -> None:
    """After an illegal access nothing works any more: end, so that another process can go on behind this candidate."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            print(f"the CUDA context is lost: {_first_line(error)}", file=sys.stderr, flush=True)
            os._exit(3)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:300]


def _shown(row: Row) -> str:
    start = f"{row['model']:16s} x{row['batch']:<4d} {row['candidate']:21s}"
    if "left_out" in row:
        return f"{start} left out: {row['left_out']}"
    timing = row.get("gpu_ms") or row["ms"]
    latency = f", latency {row['latency_ms']['median_ms']:.3f} ms" if "latency_ms" in row else ""
    return (
        f"{start} {timing['median_ms']:9.4f} ms {row['images_per_s']:10.1f} images/s{latency}, "
        f"off by {row['error']:.1e} (eager {row['eager_error']:.1e}), first call {row['first_call_s']:.1f} s"
    )


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=names, help=f"default: {','.join(NETWORKS)}")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], help="default: 1,32,256")
    parser.add_argument("--candidates", type=names, help=f"default: {','.join(QUICK + COMPILED[:2])}")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=15, help="turns that each candidate has, at most")
    parser.add_argument("--seconds", type=float, default=4.0, help="for the timing of a case, about")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="stop after this long")
    parser.add_argument("--size", type=int, help="height and width of images; default: the network's")
    parser.add_argument("--output", type=Path, help="default: gpu-networks-DTYPE.json in $OUT or benchmarks/results")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small images of two networks")
    options = parser.parse_args(arguments)
    rehearse = options.rehearse
    options.networks = options.networks or (["resnet18", "googlenet"] if rehearse else NETWORKS)
    options.batches = options.batches or ([1, 2] if rehearse else [1, 32, 256])
    options.candidates = options.candidates or (QUICK if rehearse else QUICK + COMPILED[:2])
    options.size = options.size or (64 if rehearse else None)
    options.output = options.output or Path(os.environ.get("OUT") or RESULTS) / (
        f"gpu-networks-{options.dtype}{'-rehearsal' if rehearse else ''}.json"
    )
    for given, known, what in (
        (options.networks, NETWORKS, "networks"), (options.candidates, [*QUICK, *ONE_BACKEND, *COMPILED], "candidates"),
    ):  # fmt: skip
        if unknown := set(given) - set(known):
            parser.error(f"--{what}: unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if not rehearse and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU; --rehearse runs the same steps on the CPU")
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
