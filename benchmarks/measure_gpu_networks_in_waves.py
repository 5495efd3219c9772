"""Measures whole networks as `measure_gpu_networks.py` does, but prepares many cases at a time: for scarce GPU time.

    python benchmarks/measure_gpu_networks_in_waves.py --deadline 200
    python benchmarks/measure_gpu_networks_in_waves.py --waves all:1,32 resnet50:256 --candidates compile_graphs
    python benchmarks/measure_gpu_networks_in_waves.py --rehearse     on the CPU, tiny, with processes that fail

A wave is networks and batch sizes, `NETWORK,...:BATCH,...`. Each of its networks has a process (`gpu_wave.py`), which
builds, compiles, checks and warms up the candidates of its batch sizes. When all are ready, they are timed, one process
at a time, each alone on the GPU, a case's candidates in turns. A wave's processes end with it, and free their memory.

What is not ready in time (--prepare, less when the deadline is near) is left out: a process gives up the candidate that
it is compiling and keeps those that it has; one that does not is ended. A process that crashes or hangs takes its own
candidates with it, no others; the exit status is then 1. The rows go into the same file as `measure_gpu_networks.py`'s,
as they come, with the `method`. A case whose rows are all in the file, from the same commit, is not measured again.
Those marked `again` do not count, which were late or lost with their process: with inductor's cache
(TORCHINDUCTOR_CACHE_DIR) they may be ready the second time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import gpu_wave
import measure_gpu_networks as one
from gpu_facts import commit, nvidia_smi
from raw_rows import Row

LARGE = (
    "resnet50,densenet121,googlenet,resnext50_32x4d:256",
    "vgg16,wide_resnet50_2,resnet18,resnet152,alexnet_owt:256",
)
CANDIDATES = ["eager_graph", "compile_graphs", "fastcnn_frozen"]
REHEARSED = ("resnet18,googlenet:1,2", "alexnet_owt,googlenet,resnet18:3")
REHEARSED_FAULTS = {"alexnet_owt": "fails", "googlenet": "late"}  # in the last wave
STOP_SECONDS = 6.0  # for a process that is late to give up what it is at
TURN_SECONDS = 10.0  # allowed to a turn beside twice its expected time
CASE_SECONDS = 1.0  # of a case's turn, beside its timing
METHOD = "prepared in several processes at a time, timed one process at a time, alone on the GPU"


@dataclasses.dataclass
class Member:
    """A process of a wave, as seen from outside."""

    task: gpu_wave.Task
    process: ForkServerProcess
    connection: Connection
    state: str = "preparing"  # then "ready", then "over"
    trying: str = "start"
    facts: Row = dataclasses.field(default_factory=dict)
    owed: list[Row] = dataclasses.field(default_factory=list)  # keys of the rows that it has not sent

    def end(self) -> None:
        """With everything that it started, at once."""
        self.state = "over"
        if self.process.pid is not None and self.process.is_alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.join()


class Waves:
    """All waves, one after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._known: Row = {
            "commit": commit(), "driver": None if options.rehearse else nvidia_smi("driver_version"), "method": METHOD,
            "image": options.size, "rehearsal": options.rehearse,
        }  # fmt: skip
        self._results = one.Results(options.output, self._known["commit"])
        self._members: list[Member] = []
        self._new: list[Row] = []
        self._broken = False  # whether a process did what none was asked to pretend
        self.clock = one.Clock(options.deadline, self.end)

    def end(self) -> None:
        for member in self._members:
            member.end()

    def run(self) -> int:
        path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))  # for what is imported before the processes
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["gpu_wave"])  # imported once for all processes
        with tempfile.TemporaryDirectory() as folder:
            for number, wave in enumerate(self._options.waves):
                tasks = self._tasks(wave, Path(folder) / "gpu", last=number == len(self._options.waves) - 1)
                if self.clock.left() <= STOP_SECONDS:
                    print(f"no time for the waves from {wave} on", flush=True)
                    break
                try:
                    if tasks:
                        self._wave(context, tasks)
                finally:
                    self.end()
                    self._members.clear()
        for row in sorted(self._new, key=lambda row: (row["batch"], one.NETWORKS.index(row["model"]))):
            print(one.shown(row))
        return int(self._broken)

    def _tasks(self, wave: str, lock: Path, last: bool) -> list[gpu_wave.Task]:
        options = self._options
        networks, batches = parts(wave)
        found: dict[str, list[one.Case]] = {}
        for network in networks:
            for batch in batches:
                case = one.Case("waves", network, batch, tuple(options.candidates))
                if not all(self._results.has(one.key(options, case, name)) for name in case.candidates):
                    found.setdefault(network, []).append(case)
        faults = options.faults if last else {}
        return [
            gpu_wave.Task(network, cases, options, len(found), lock, self._known, faults.get(network))
            for network, cases in found.items()
        ]

    def _wave(self, context: Any, tasks: list[gpu_wave.Task]) -> None:
        began = time.monotonic()
        for task in tasks:
            ours, theirs = context.Pipe()
            process = context.Process(target=gpu_wave.work, args=(theirs, task), daemon=False)
            process.start()
            theirs.close()
            owed = [one.key(self._options, case, name) for case in task.cases for name in case.candidates]
            self._members.append(Member(task, process, ours, owed=owed))
        turns = (self._options.seconds + CASE_SECONDS) * sum(len(task.cases) for task in tasks)
        seconds = max(0.0, min(self._options.prepare, self.clock.left() - turns - STOP_SECONDS))
        self._receive("preparing", seconds)
        for member in self._in("preparing"):
            if member.process.pid is not None and member.trying != "start":  # before, it would end by the signal
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.process.pid, signal.SIGUSR1)
        self._receive("preparing", STOP_SECONDS)
        for member in self._in("preparing"):
            self._lose(member, f"not ready in time: still at {member.trying}")
        print(f"-- timing after {time.monotonic() - began:.1f} s of preparing", flush=True)
        for member in self._in("ready"):
            if self.clock.left() <= 0:
                self._lose(member, "ready, but there was no time for its timing")
                continue
            member.state = "timing"
            member.connection.send("time")
            expected = (self._options.seconds + CASE_SECONDS) * len(member.task.cases)
            allowed = min(TURN_SECONDS + 2 * expected, self.clock.left())
            self._receive("timing", allowed)
            if member.state == "timing":
                self._broken = self._broken or member.task.fault is None
                self._lose(member, f"it did not come back from {member.trying}")
        print(f"-- the wave took {time.monotonic() - began:.1f} s", flush=True)

    def _in(self, state: str) -> list[Member]:
        return [member for member in self._members if member.state == state]

    def _receive(self, state: str, seconds: float) -> None:
        """What processes say, until none is in this state any more or the time is over."""
        until = time.monotonic() + seconds
        while members := self._in(state):
            left = until - time.monotonic()
            if left <= 0:
                return
            ready = wait([member.connection for member in members], timeout=left)
            for member in members:
                if member.connection in ready:
                    self._hear(member)

    def _hear(self, member: Member) -> None:
        try:
            kind, what = member.connection.recv()
        except (EOFError, OSError):
            member.process.join(5)
            self._broken = self._broken or member.task.fault is None
            self._lose(member, f"its process ended at {member.trying}, exit status {member.process.exitcode}")
            return
        if kind == "facts":
            member.facts = what
        elif kind == "trying":
            member.trying = what
        elif kind == "row":
            self._add(member, what)
        else:
            print(f"{member.task.network:16s} {kind}: {what}", flush=True)
            member.state = "ready" if kind == "ready" else "over"
        if kind == "done":
            self._lose(member, "not ready in time")

    def _add(self, member: Member, row: Row) -> None:
        key = {name: row[name] for name in one.KEY}
        member.owed.remove(key)
        self._results.add(row)
        self._new.append(row)

    def _lose(self, member: Member, reason: str) -> None:
        """The process ends; rows say why there is nothing of what it still owes."""
        member.end()
        if member.owed:
            print(f"{member.task.network:16s} {reason}: {len(member.owed)} left out", flush=True)
        facts = member.facts or self._known
        for key in list(member.owed):
            if not self._results.has(key):  # from an earlier run
                self._add(member, {**facts, **key, "left_out": reason, "again": True})


def parts(wave: str) -> tuple[list[str], list[int]]:
    networks, _, batches = wave.partition(":")
    return (one.NETWORKS if networks == "all" else networks.split(",")), [int(batch) for batch in batches.split(",")]


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    def faults(text: str) -> dict[str, str]:
        return dict(pair.split("=") for pair in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waves", nargs="+", metavar="NETWORKS:BATCHES", help=f"default: all:1,32 {' '.join(LARGE)}")
    parser.add_argument("--prepare", type=float, default=100.0, metavar="SECONDS", help="for preparing a wave, at most")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small images and few networks")
    parser.add_argument("--faults", type=faults, metavar="NETWORK=FAULT", help="in the last wave of a rehearsal: "
                        f"{', '.join(gpu_wave.FAULTS)}")  # fmt: skip
    one.add_options(parser, CANDIDATES)
    options = parser.parse_args(arguments)
    usual = ["eager_graph", "fastcnn_frozen"] if options.rehearse else CANDIDATES
    options.faults = options.faults or (REHEARSED_FAULTS if options.rehearse and not options.waves else {})
    options.waves = options.waves or (REHEARSED if options.rehearse else ["all:1,32", *LARGE])
    try:
        networks = [network for wave in options.waves for network in parts(wave)[0]]
    except ValueError:
        parser.error(f"--waves: each is NETWORK,...:BATCH,..., not {' '.join(options.waves)}")
    one.complete(parser, options, networks, usual)
    if unknown := set(options.faults.values()) - set(gpu_wave.FAULTS):
        parser.error(f"--faults: unknown {', '.join(sorted(unknown))}; there are {', '.join(gpu_wave.FAULTS)}")
    if options.faults and not options.rehearse:
        parser.error("--faults: only in a rehearsal")
    return options


def main(arguments: list[str] | None = None) -> int:
    waves = Waves(parsed(arguments))
    try:
        return waves.run()
    finally:
        waves.end()
        waves.clock.stop()


if __name__ == "__main__":
    sys.exit(main())
