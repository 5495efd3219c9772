"""`benchmarks/measure_gpu_networks_in_waves.py` and its processes, rehearsed on the CPU."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_wave
import measure_gpu_networks_in_waves as script
import pytest
import torch
from raw_rows import Row, read_rows, write_rows

QUICK = ["--rehearse", "--rounds", "2", "--seconds", "0.1", "--size", "32"]
CANDIDATES = ("eager_graph", "fastcnn_frozen")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # the script adds to it
    monkeypatch.setenv("FASTCNN_COMMIT", "abc")
    monkeypatch.setattr(script, "TURN_SECONDS", 100.0)  # for machines that do other things too
    return tmp_path / "rows.json"


def found(rows: list[Row]) -> dict[tuple[str, int, str], str]:
    """The reasons of what was left out, "" for what was timed."""
    for row in rows:
        assert ("left_out" in row) != ("ms" in row)
        assert (row["commit"], row["dtype"], row["rehearsal"]) == ("abc", "bf16", True)
        assert "alone" in row["method"]
    return {(row["model"], row["batch"], row["candidate"]): row.get("left_out", "") for row in rows}


def test_a_process_that_fails_takes_no_other_with_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is well, one ends while it prepares, one in its turn, one does not come back from it, and one is late."""
    receive = script.Waves._receive

    def until_it_is_the_last(self: script.Waves, state: str, seconds: float) -> None:
        """Instead of a number of seconds: until only what never comes is left."""
        never = {"preparing": ("late", "begin"), "timing": ("hangs", "its turn")}[state]
        while any((member.task.fault, member.trying) != never for member in self._in(state)):
            receive(self, state, 0.1)

    wave = "alexnet_owt,resnet18,googlenet,resnet50,resnext50_32x4d:1"
    faults = "alexnet_owt=fails,resnet18=late,googlenet=dies,resnet50=hangs"
    arguments = [*QUICK, "--output", str(file), "--prepare", "300", "--waves", wave]
    with monkeypatch.context() as patch:
        patch.setattr(script.Waves, "_receive", until_it_is_the_last)
        assert script.main([*arguments, "--faults", faults]) == 0
    reasons = found(read_rows(file))
    expected = {
        "alexnet_owt": "its process ended at begin, exit status -6",
        "resnet18": "not ready in time: still at begin",
        "googlenet": "its process ended at its turn, exit status -6",
        "resnet50": "it did not come back from its turn",
        "resnext50_32x4d": "",
    }
    assert reasons == {(name, 1, candidate): reason for name, reason in expected.items() for candidate in CANDIDATES}

    before = read_rows(file)
    assert script.main([*arguments, "--faults", "alexnet_owt=fails"]) == 0
    after = read_rows(file)
    timed = [row for row in before if row["model"] == "resnext50_32x4d"]
    assert [row for row in after if row["model"] == "resnext50_32x4d"] == timed, "what was timed is not timed again"
    assert len(after) == len(before)
    assert {key[0] for key, reason in found(after).items() if reason} == {"alexnet_owt"}


def test_waves_and_their_rows(file: Path) -> None:
    arguments = [*QUICK, "--output", str(file), "--waves", "resnet18:1,2", "resnet18:3"]
    assert script.main(arguments) == 0
    rows = read_rows(file)
    assert list(found(rows).items()) == [(("resnet18", b, c), "") for b in (1, 2, 3) for c in CANDIDATES]
    for row in rows:
        assert 0 < row["error"] <= row["error_bound"]
        assert ("latency_ms" in row) == (row["batch"] == 1)
        assert {"device", "driver", "torch", "triton", "cudnn", "first_call_s", "date", "processes"} <= row.keys()
    assert script.main(arguments) == 0
    assert read_rows(file) == rows, "nothing was left to measure"

    del rows[-1]["ms"]
    write_rows(file, [*rows[:-1], {**rows[-1], "left_out": "not ready in time", "again": True}])
    assert script.main([*arguments, "--faults", "resnet18=fails"]) == 0
    lost = read_rows(file)
    assert lost[:-1] == rows[:-1], "what there was is lost with the process"
    assert lost[-1]["left_out"] == "its process ended at begin, exit status -6"
    assert script.main(arguments) == 0
    again = read_rows(file)
    assert again[:4] == rows[:4]
    assert set(found(again).values()) == {""}
    assert all(new["date"] > rows[0]["date"] for new in again[4:]), "a case's candidates are timed together"


def test_no_time_no_rows(file: Path) -> None:
    assert script.main([*QUICK, "--output", str(file), "--deadline", "0"]) == 0
    assert read_rows(file) == []
    guards = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(guard.finished.is_set() for guard in guards)


def test_a_row_to_be_measured_again_gives_way(file: Path) -> None:
    key = {"what": "network", "phase": "waves", "model": "vgg16", "dtype": "bf16", "batch": 1, "candidate": "compile"}
    late = {**key, "commit": "abc", "left_out": "not ready in time", "again": True}
    other = {**late, "batch": 2}
    write_rows(file, [late, other])
    results = script.one.Results(file, "abc")
    assert not results.has(key)
    results.add({**key, "commit": "abc", "gpu_ms": 1.0})
    assert results.has(key)
    assert read_rows(file) == [other, {**key, "commit": "abc", "gpu_ms": 1.0}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--waves", "resnet51:1"], "unknown resnet51"),
        (["--waves", "resnet18"], "each is NETWORK"),
        (["--faults", "resnet18=sleeps"], "unknown sleeps"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parsed(["--rehearse", *arguments])
    assert words in capsys.readouterr().err


# ---- the GPU among processes ----------------------------------------------------------------------------------------


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def is_free(lock: Path) -> bool:
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_what_measures_is_alone(lock: Path) -> None:
    first, second = gpu_wave.SharedGpu(lock), gpu_wave.SharedGpu(lock)
    with first.beside_others(), second.beside_others():
        assert not is_free(lock)
    assert is_free(lock)
    order = []

    def measure() -> None:
        with second.alone():
            order.append("second")

    with first.alone():
        thread = threading.Thread(target=measure)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert second.waited > 0.1 > first.waited
    assert is_free(lock)


@pytest.fixture
def interrupting() -> Iterator[None]:
    def raise_late(*_: Any) -> None:
        raise gpu_wave.Late

    before = signal.signal(signal.SIGUSR1, raise_late)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("interrupting")
def test_waiting_can_be_interrupted(lock: Path) -> None:
    first, second = gpu_wave.SharedGpu(lock), gpu_wave.SharedGpu(lock)
    with first.alone():
        assert not first.patient
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        with pytest.raises(gpu_wave.Late), second.alone():
            pytest.fail("it had the GPU beside another")
        assert not second.patient
        assert not is_free(lock), "it gave back what another holds"
    assert is_free(lock)


def test_compiling_goes_on_beside_others_and_running_does_not(lock: Path) -> None:
    gpu = gpu_wave.SharedGpu(lock)
    seen = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(("compiling", is_free(lock), gpu.patient))

        def run(*tensors: torch.Tensor) -> Any:
            seen.append(("running", is_free(lock), gpu.patient))
            return graph(*tensors)

        return run

    twice = torch.compile(lambda x: x + x, backend=backend)
    with gpu.alone_once_compiled():
        twice(torch.ones(3))
    assert seen == [("compiling", True, True), ("running", False, False)]
    assert is_free(lock)
    with pytest.raises(RuntimeError, match="compiled nothing"), gpu.alone_once_compiled():
        twice(torch.ones(3))
    assert is_free(lock)
    torch._dynamo.reset()
