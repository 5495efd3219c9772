"""The record of kernels proven on a GPU: what the GPU tests write, what is made of it, and who reads it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import record_proven_kernels as script
import torch
from support import gpu_record

from fastcnn import backends, ops
from fastcnn.backends import proven
from fastcnn.cli import main

FACTS = {"rehearsal": False, "device": "H100", "date": "2026-01-02", "commit": "abcdef0", "versions": {"torch": "2.11"}}


def run(passed: dict, failed: dict, **facts) -> dict:
    return {**FACTS, **facts, "passed": passed, "failed": failed}


def test_record_counts_what_passed_and_never_failed():
    first = run({"cuda": {"linear": ["fp32", "bf16"], "conv2d simt": ["fp32"]}}, {"cuda": {"linear": ["bf16"]}})
    second = run({"triton": {"linear": ["fp16"]}}, {"cuda": {"conv2d simt": ["fp32"]}}, commit="1234567")
    record = script.record_of([first, second])
    assert record["kernels"] == {"cuda": {"linear": ["fp32"]}, "triton": {"linear": ["fp16"]}}
    assert (record["device"], record["commit"]) == ("H100", "1234567")


def test_record_refuses_rehearsals_and_a_mixture_of_gpus():
    with pytest.raises(SystemExit, match="rehearsal"):
        script.record_of([run({}, {}, rehearsal=True)])
    with pytest.raises(SystemExit, match="one kind"):
        script.record_of([run({}, {}), run({}, {}, device="A100")])


def test_script_writes_the_record(tmp_path, capsys):
    source, target = tmp_path / "gpu-kernels.json", tmp_path / "proven.json"
    source.write_text(json.dumps(run({"triton": {"conv2d stem": ["bf16"]}}, {})))
    script.main([str(source), "--to", str(target)])
    assert json.loads(target.read_text())["kernels"] == {"triton": {"conv2d stem": ["bf16"]}}
    assert "not proven, triton: conv2d pointwise" in capsys.readouterr().out
    source.write_text(json.dumps(run({"triton": {"conv2d new": ["bf16"]}}, {})))
    with pytest.raises(SystemExit, match="conv2d new"):
        script.main([str(source), "--to", str(target)])


def env(capsys) -> str:
    assert main(["env"]) == 0
    return capsys.readouterr().out


def test_env_tells_what_is_proven(tmp_path, monkeypatch, capsys):
    record = script.record_of([run({"triton": {name: ["bf16"] for name in proven.KERNELS["triton"]}}, {})])
    (tmp_path / "proven.json").write_text(json.dumps(record))
    monkeypatch.setattr(proven, "RECORD", tmp_path / "proven.json")
    proven.record.cache_clear()
    try:
        shown = env(capsys)
        assert f"{len(proven.KERNELS['triton'])} triton kernels (H100, 2026-01-02, commit abcdef0, torch 2.11)" in shown
        assert "not yet proven" in shown
        assert "cuda: conv2d depthwise" in shown
        assert "triton: " not in shown
        monkeypatch.setattr(proven, "RECORD", tmp_path / "none.json")
        proven.record.cache_clear()
        assert "no kernel yet" in env(capsys)
    finally:
        proven.record.cache_clear()


def test_committed_record_names_known_kernels():
    record = proven.record()
    if record is not None:
        assert all(name in proven.KERNELS[b] for b, names in record["kernels"].items() for name in names)
        assert record["commit"] != "unknown"


def report(outcome: str, entry: str, when: str = "call") -> SimpleNamespace:
    return SimpleNamespace(
        when=when, outcome=outcome, passed=outcome == "passed", failed=outcome == "failed", duration=1.0,
        nodeid=f"tests/x.py::{entry}",
        longreprtext="def test():\n>   assert 1 == 2\nE   assert 1 == 2", worker_id="gw3",
        user_properties=[(gpu_record.PROPERTY, entry)],
    )  # fmt: skip


def test_recorder_writes_as_reports_arrive(tmp_path):
    recorder = gpu_record.Recorder(tmp_path, rehearsal=True)
    recorder.pytest_runtest_logreport(report("passed", "cuda|linear|fp32", when="setup"))
    recorder.pytest_runtest_logreport(report("passed", "cuda|linear|fp32"))
    recorder.pytest_runtest_logreport(report("failed", "cuda|conv2d simt|fp32"))
    document = json.loads((tmp_path / "gpu-kernels.json").read_text())
    assert document["passed"] == {"cuda": {"linear": ["fp32"]}}
    assert document["failed"] == {"cuda": {"conv2d simt": ["fp32"]}}
    assert document["counts"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert document["rehearsal"] is True
    failures = (tmp_path / "gpu-failures.txt").read_text()
    assert "tests/x.py::cuda|conv2d simt|fp32 (call, gw3, 1.0 s" in failures
    assert "E   assert 1 == 2" in failures
    assert "def test" not in failures


def test_calls_are_noted_with_their_kernels(monkeypatch):
    properties: list = []
    monkeypatch.setattr(backends.backend_module("cpp"), "kernel_name", lambda op, *args: f"{op} one", raising=False)
    with backends.use_backend("cpp", strict=True), backends.intercept(gpu_record.noting(properties)), torch.no_grad():
        for _ in range(2):
            ops.linear(torch.ones(1, 4), torch.ones(3, 4))
        ops.residual_add(torch.ones(1, 4, 2, 2).bfloat16(), torch.ones(1, 4, 2, 2).bfloat16())
    assert [value for _, value in properties] == ["cpp|linear one|fp32", "cpp|residual_add one|bf16"]
