"""`benchmarks/measure_gpu_networks.py`, rehearsed on the CPU."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import measure_gpu_networks as script
import pytest
import torch
from raw_rows import read_rows

CANDIDATES = ["eager_graph", "fastcnn_frozen"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.json"


@pytest.fixture(autouse=True)
def commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCNN_COMMIT", "abc")


def run(file: Path, *arguments: str) -> list[dict[str, Any]]:
    before = torch.backends.cudnn.benchmark
    try:
        arguments = (*arguments, "--candidates", ",".join(CANDIDATES), "--networks", "resnet18", "--size", "32")
        assert script.main(["--rehearse", "--rounds", "2", "--seconds", "0.1", "--output", str(file), *arguments]) == 0
    finally:
        torch.backends.cudnn.benchmark = before
    return read_rows(file)


def test_rows_and_beginning_anew(file: Path) -> None:
    rows = run(file, "--batches", "1,2")
    assert [(row["batch"], row["candidate"]) for row in rows] == [(b, c) for b in (1, 2) for c in CANDIDATES]
    for row in rows:
        assert 0 < row["error"] <= row["error_bound"]
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["ms"]["median_ms"] * 1e3)
        assert ("latency_ms" in row) == (row["batch"] == 1)
        assert (row["commit"], row["model"], row["dtype"], row["rehearsal"]) == ("abc", "resnet18", "bf16", True)
        assert {"device", "driver", "torch", "triton", "cudnn", "first_call_s", "date"} <= row.keys()
    assert run(file, "--batches", "1,2") == rows, "nothing was left to measure"
    assert not file.with_name(file.name + ".trying").exists()


def test_what_ended_the_process_is_left_alone(file: Path) -> None:
    key = {"what": "network", "phase": "quick", "model": "resnet18", "dtype": "bf16", "batch": 1}
    trying = {**key, "candidate": "fastcnn_frozen", "commit": "abc"}
    file.with_name(file.name + ".trying").write_text(json.dumps(trying))
    rows = run(file, "--batches", "1")
    assert [row["candidate"] for row in rows] == ["fastcnn_frozen", "eager_graph"]
    assert rows[0]["left_out"] == "it ended the process"
    assert "ms" in rows[1]


@pytest.mark.parametrize("kind", ["wrong", "nan", "failing"])
def test_a_wrong_candidate_is_recorded_and_not_timed(file: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    build = script.build

    def broken(candidate: str, *arguments: Any) -> Any:
        runner = build(candidate, *arguments)
        if candidate != "fastcnn_frozen":
            return runner
        if kind == "failing":
            raise RuntimeError("no kernel\nmore lines")
        return lambda: runner() * (1.2 if kind == "wrong" else float("nan"))

    monkeypatch.setattr(script, "build", broken)
    by_name = {row["candidate"]: row for row in run(file, "--batches", "1")}
    assert "ms" in by_name["eager_graph"]
    assert "ms" not in by_name["fastcnn_frozen"]
    words = "RuntimeError: no kernel" if kind == "failing" else "its result is off by"
    assert by_name["fastcnn_frozen"]["left_out"].startswith(words)


def test_no_time_no_rows(file: Path) -> None:
    assert run(file, "--deadline", "0") == []
    guards = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(guard.finished.is_set() for guard in guards)


def test_the_order_is_that_of_importance() -> None:
    options = script.parsed(["--rehearse", "--networks", "resnet50,vgg16", "--batches", "1,256"])
    options.candidates = script.QUICK + script.COMPILED[:3]
    found = script.cases(options)
    assert [(c.phase, c.network, c.batch) for c in found] == [
        (phase, name, batch) for phase in ("quick", "compiled") for name in ("resnet50", "vgg16") for batch in (1, 256)
    ]
    assert found[-1].candidates == (
        "eager_graph",
        "fastcnn_frozen",
        "compile",
        "compile_graphs",
        "compile_max_autotune",
    )


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parsed(["--rehearse", "--networks", "resnet51"])
    assert "unknown resnet51" in capsys.readouterr().err
