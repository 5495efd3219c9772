"""Measures whole networks on the CPU against every peer: times, and the peak memory of each. Writes one raw JSON file.

    python benchmarks/measure_cpu_networks.py                          everything that is not in the file yet
    python benchmarks/measure_cpu_networks.py resnet50 --cases fp32x1  one network, fp32, batch 1
    python benchmarks/measure_cpu_networks.py --what memory            the memory only
    python benchmarks/measure_cpu_networks.py --list                   what is measured, and what is still to do

A network and case (dtype, batch) is timed in a process of its own that builds every candidate, checks its result
against the network in float64, and then times all in turns: a pause, in which the threads of the one before fall
asleep, an untimed run, and runs for about a tenth of a second. Peak memory is the high-water mark of a process that
builds one candidate and runs it five times; `--what alone` times candidates in such processes, to show that taking
turns changes nothing. Every entry is written when it is there, so a run may be stopped and begun again; entries of
another commit are measured anew. Threads: as many as cores, each engine told so. OMP_WAIT_POLICY is left as it is, and
recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from raw_rows import RESULTS, read_rows, write_rows

import fastcnn
from fastcnn.measurement.candidates import CHANNELS_LAST, FROZEN, OURS, candidates
from fastcnn.measurement.comparison import ENGINE_TURNS, Comparison
from fastcnn.measurement.conditions import commit, conditions
from fastcnn.measurement.flops import count_flops
from fastcnn.measurement.limits import machine_limits
from fastcnn.measurement.peers import PEERS, engine_versions
from fastcnn.measurement.timing import interleave
from fastcnn.models import model_info
from fastcnn.verification import calibrate, torchvision_twin

NETWORKS = [
    "alexnet_owt", "vgg16", "googlenet", "resnet18", "resnet50", "resnet152", "wide_resnet50_2", "resnext50_32x4d",
    "densenet121", "lenet5", "resnet20_cifar",
]  # fmt: skip
CANDIDATES = [OURS, FROZEN, CHANNELS_LAST, *PEERS]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEMORY_RUNS = 5


class Case(NamedTuple):
    dtype: str
    batch: int

    @classmethod
    def parse(cls, text: str) -> Case:
        dtype, _, batch = text.partition("x")
        if dtype not in DTYPES or not batch.isdigit() or int(batch) < 1:
            raise argparse.ArgumentTypeError(f"a case is fp32x1, fp32x8, bf16x1 or the like, not {text!r}")
        return cls(dtype, int(batch))

    def __str__(self) -> str:
        return f"{self.dtype}x{self.batch}"


CASES = [Case("fp32", 1), Case("fp32", 8), Case("bf16", 1)]


# ---- in the process of one network ---------------------------------------------------------------------------------


def network(name: str, case: Case, *, calibrated: bool) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = fastcnn.create_model(name).eval()
    size = model_info(name).input_size
    if calibrated:
        calibrate(model, torch.randn(2, *size))
    dtype = DTYPES[case.dtype]
    return model.to(dtype), torch.randn(case.batch, *size).to(dtype)


@contextlib.contextmanager
def holding(command: str | None) -> Iterator[None]:
    """While this lasts, ``command`` runs: it has printed a line, and its standard input is still open."""
    if command is None:
        yield
        return
    with subprocess.Popen(shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit(f"--hold: {command!r} ended without printing a line")
        yield  # closing the pipes ends it


class Elsewhere:
    """Processor time that was not this process's, as a share of the machine's."""

    def __init__(self) -> None:
        self._busy, self._all, self._own = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        per_second = os.sysconf("SC_CLK_TCK")
        own = os.times()
        return (sum(ticks) - idle) / per_second, sum(ticks) / per_second, own.user + own.system

    def share(self) -> float:
        busy, whole, own = self._now()
        return round(max(0.0, (busy - self._busy) - (own - self._own)) / max(whole - self._all, 1e-9), 3)


def time_network(name: str, case: Case, only: list[str], options: argparse.Namespace) -> dict[str, Any]:
    model, images = network(name, case, calibrated=True)
    twin = torchvision_twin(name, model)
    started = time.perf_counter()
    runners, left_out = candidates(
        model, images, reference=twin, engines=True, frozen=True, only=only,
        tell=lambda text: print(text, file=sys.stderr),
    )  # fmt: skip
    prepared = time.perf_counter() - started
    flops = count_flops(model, images)
    with holding(options.hold):
        load, elsewhere = os.getloadavg()[0], Elsewhere()
        started = time.perf_counter()
        limits = machine_limits(memory=False)
        timings = interleave(
            runners, rounds=options.rounds, least=5, seconds=options.seconds, round_ms=0.0, **ENGINE_TURNS
        )
        timed = time.perf_counter() - started
        busy_elsewhere = elsewhere.share()
    comparison = Comparison(
        model=name,
        peer="PyTorch's operators" if twin is None else "torchvision",
        conditions=conditions(images.device, images.dtype, case.batch),
        input_shape=tuple(images.shape),
        flops=flops,
        timings=timings,
        left_out=tuple(left_out),
    )
    compared = comparison.ours in timings and len(timings.keys() - {OURS, FROZEN}) > 0
    described = {"best_peer": comparison.best_peer, "speedup": comparison.speedup()} if compared else {}
    if compared:
        print(comparison, file=sys.stderr)
    return {
        "case": str(case), "flops": flops, "peak_flops_per_second": limits.peak(images.dtype), **described,
        "timings": {key: timing.to_dict() for key, timing in timings.items()}, "left_out": left_out,
        "load_average": load, "busy_elsewhere": busy_elsewhere,
        "prepared_s": round(prepared, 1), "timed_s": round(timed, 1), "turns": ENGINE_TURNS,
        "checked": "against the network in float64: at most 1e-4 off, or twice as far as PyTorch in the same dtype",
        **comparison.conditions.to_dict(),
    }  # fmt: skip


def memory_of(name: str, case: Case, candidate: str) -> dict[str, Any]:
    (imported,) = status_mib("VmRSS")
    model, images = network(name, case, calibrated=False)
    twin = torchvision_twin(name, model) if candidate == CHANNELS_LAST else None
    runners, left_out = candidates(
        model, images, reference=twin, engines=True, frozen=True, only=[candidate], check=False
    )
    del model, twin
    if candidate not in runners:
        return {"left_out": left_out}
    with torch.no_grad():
        for _ in range(MEMORY_RUNS):
            runners[candidate]()
    peak, after = status_mib("VmHWM", "VmRSS")
    return {"peak_mib": peak, "after_mib": after, "imported_mib": imported}


def status_mib(*keys: str) -> list[float]:
    """Of this process, at one moment."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    values = {words[0]: words[1] for words in lines if len(words) > 1}
    return [round(int(values[key + ":"]) / 1024, 1) for key in keys]


def child(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    what, name, case, only = options.child
    case = Case.parse(case)
    with torch.no_grad():
        found = memory_of(name, case, only) if what == "memory" else time_network(name, case, only.split(","), options)
    print("\n" + json.dumps(found))


# ---- in the process that was called --------------------------------------------------------------------------------


class Job(NamedTuple):
    what: str
    network: str
    case: Case
    candidate: str | None  # None: all of them

    @property
    def key(self) -> dict[str, Any]:
        return {"what": self.what, "model": self.network, "case": str(self.case), "candidate": self.candidate}


def jobs(options: argparse.Namespace) -> list[Job]:
    found = []
    for what in options.what:
        for name in options.networks:
            for case in options.cases:
                alone = options.candidates if what != "times" else [None]
                found += [Job(what, name, case, candidate) for candidate in alone]
    return found


def measure(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    only = job.candidate or ",".join(options.candidates)
    command = [sys.executable, __file__, "--child", job.what, job.network, str(job.case), only]
    command += ["--threads", str(options.threads), "--rounds", str(options.rounds), "--seconds", str(options.seconds)]
    if options.hold is not None:
        command += ["--hold", options.hold]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(str(part) for part in job if part)} failed: {shlex.join(command)}")
    found = json.loads(done.stdout.splitlines()[-1])
    described = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"), "commit": commit(), "threads": options.threads,
        "engines": engine_versions(), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
    }  # fmt: skip
    return {**job.key, **described, **found}


def is_of(entry: dict[str, Any], job: Job) -> bool:
    return {key: entry.get(key) for key in job.key} == job.key


def is_done(entries: list[dict[str, Any]], job: Job, threads: int) -> bool:
    return any(is_of(e, job) and e["commit"] == commit() and e["threads"] == threads for e in entries)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="(all of the table's)")
    parser.add_argument("--cases", nargs="+", type=Case.parse, default=CASES, metavar="CASE",
                        help="(fp32x1 fp32x8 bf16x1)")  # fmt: skip
    parser.add_argument(
        "--what", nargs="+", choices=("times", "memory", "alone"), default=["times", "memory"], help="(times memory)"
    )
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=CANDIDATES, help="(all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each candidate, at most (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="no turn after this, but 5 at least (%(default)s)")
    parser.add_argument("--file", type=Path, help="(benchmarks/results/cpu-networks-ISA-THREADS-threads.json)")
    parser.add_argument("--fresh", action="store_true", help="measure what the file has, too")
    parser.add_argument("--list", action="store_true", help="only say what there is to do")
    parser.add_argument(
        "--hold", metavar="COMMAND",
        help="keep a command running while times are taken, such as one that stops all other work: it prints a "
        "line when it is ready, and ends when its standard input is closed",
    )  # fmt: skip
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options)
        return 0
    unknown = [name for name in options.networks if name not in fastcnn.list_models()]
    if unknown:
        parser.error(f"no such network: {', '.join(unknown)}")
    options.candidates = [name for name in CANDIDATES if name in options.candidates]
    from fastcnn import _native

    file = options.file or RESULTS / f"cpu-networks-{_native.cpu_instruction_set()}-{options.threads}-threads.json"
    entries = read_rows(file)
    todo = [job for job in jobs(options) if options.fresh or not is_done(entries, job, options.threads)]
    for number, job in enumerate(todo):
        print(f"[{number + 1}/{len(todo)}]", job.what, job.network, job.case, job.candidate or "", flush=True)
        if options.list:
            continue
        started = time.perf_counter()
        entry = measure(job, options)
        entries = [*(e for e in entries if not is_of(e, job)), entry]
        order = {name: i for i, name in enumerate(NETWORKS)}
        entries.sort(key=lambda e: (e["what"], order.get(e["model"], 99), e["case"], e["candidate"] or ""))
        write_rows(file, entries)
        print(f"    {summary(entry)}   ({time.perf_counter() - started:.0f} s)", flush=True)
    return 0


def summary(entry: dict[str, Any]) -> str:
    if "peak_mib" in entry:
        return f"peak {entry['peak_mib']:.0f} MiB, {entry['after_mib']:.0f} after the runs"
    times = ", ".join(f"{name} {t['median_ms']:.3g}" for name, t in entry.get("timings", {}).items())
    over = f"; {entry['speedup']:.2f}x {entry['best_peer']}" if "speedup" in entry else ""
    return f"{times} ms{over}" + "".join(f"; without {reason}" for reason in entry.get("left_out", []))


if __name__ == "__main__":
    sys.exit(main())
