"""docs/performance.md is what the raw results give, and the script that measures networks keeps what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import measure_cpu_networks as script
import pytest
from network_tables import geometric_mean, sections
from write_performance_page import page

from fastcnn import _native

ROOT = Path(__file__).resolve().parents[2]


def entry(model: str, case: str = "fp32x1", *, frozen: float = 2.0, peer: float = 4.0, **more) -> dict:
    def timing(ms: float) -> dict:
        return {"median_ms": ms, "q1_ms": 0.9 * ms, "q3_ms": 1.1 * ms}

    times = {"fastcnn": 3.0, "fastcnn_frozen": frozen, "onnxruntime": peer, "openvino": 2 * peer}
    return {
        "what": "times", "model": model, "case": case, "candidate": None, "device": "a processor", "threads": 2,
        "instruction_set": "avx512", "torch": "2.14", "commit": "abc", "date": "2026-01-02T03:04:05",
        "engines": {"onnxruntime": "1.32"}, "OMP_WAIT_POLICY": None, "load_average": 0.1, "busy_elsewhere": 0.01,
        "checked": "against the network in float64", "turns": {"pause_ms": 60.0, "block_ms": 100.0},
        "flops": 10**9, "peak_flops_per_second": 1e12,
        "timings": {name: timing(ms) for name, ms in times.items()}, "best_peer": "onnxruntime",
        "speedup": peer / frozen, "left_out": [], **more,
    }  # fmt: skip


def test_the_page_on_disk_is_up_to_date():
    command = [sys.executable, str(ROOT / "benchmarks" / "write_performance_page.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_networks_have_speedups_means_and_shares():
    rows = [
        entry("one", frozen=1.0),
        entry("two", frozen=4.0, left_out=["openvino: failed (x)"]),
        entry("one", "bf16x1"),
    ]
    text, pictures = sections("name", rows)
    assert "| fp32, batch 1 | 2 | 2.00x | two 1.00x | one 4.00x |" in text
    assert "| bf16, batch 1 | 1 | 2.00x |" in text
    assert "| `one` | 1.00 (0.90 .. 1.10) | 3.00 (2.70 .. 3.30) | **4.00** (3.60 .. 4.40)" in text
    assert "| 4.00x | 100% |" in text
    assert "Left out: `two`, openvino: failed (x)." in text
    assert "other processes took 1.0%" in text
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2)
    drawn = ElementTree.fromstring(pictures["name.svg"])
    texts = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert {"one", "two", "4.00x", "the best peer"} <= set(texts)


def test_memory_and_times_alone_are_shown():
    memory = [
        {"what": "memory", "model": "one", "case": "fp32x1", "candidate": name, "peak_mib": peak, "after_mib": 90.0,
         "imported_mib": 50.0}
        for name, peak in (("fastcnn_frozen", 100.0), ("onnxruntime", 130.0), ("openvino", 120.0))
    ]  # fmt: skip
    alone = entry("one", what="alone", candidate="onnxruntime")
    del alone["speedup"]
    alone["timings"] = {"onnxruntime": {"median_ms": 5.0, "q1_ms": 5.0, "q3_ms": 5.0}}
    text, _ = sections("name", [entry("one"), alone, *memory])
    assert "| `one`, fp32, batch 1 | 100 (90) | 130 (90) | **120** (90) |" in text
    assert "| `one`, fp32, batch 1 | ONNX Runtime | 4 | 5 | 0.80 |" in text


def test_every_kind_of_raw_file_has_its_part():
    logits = {"what": "logits", "model": "one", "frozen": 2e-6, "pytorch": 3e-7, "agreeing": 2, "images": 2,
              "device": "a processor", "instruction_set": "avx2", "torch": "2.14", "commit": "abc",
              "images_are": "noise"}  # fmt: skip
    operator = {"group": "g", "candidate": "pytorch", "median_ms": 1.0, "q1_ms": 1.0, "q3_ms": 1.0, "device": "p",
                "share_of_peak": 0.91}  # fmt: skip
    isa = {"what": "instruction_sets", "model": "one", "dtype": "float32", "device": "a processor", "threads": 2,
           "torch": "2.14", "commit": "abc", "median_ms": {"avx512": 1.0, "avx2": 1.75}}  # fmt: skip
    files = {"cpu-networks": [entry("one")], "cpu-logits": [logits], "cpu": [operator], "cpu-isa": [isa]}
    written = page(files)
    assert set(written) == {"performance.md", "images/cpu-networks.svg"}
    text = written["performance.md"]
    assert "1 of 1 networks are within" in text
    assert "largest 2.0e-06 (`one`, PyTorch 3.0e-07)" in text
    assert "| `one`, float32 | 1 (1.00x) | 1.75 (1.75x) |" in text
    assert "| g | pytorch | 1.000 | 1.000 .. 1.000 |  |  | 91% | 1.00 |" in text
    assert "No GPU has run these kernels" in text


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The script with its child processes replaced; calling it gives the jobs that it ran and the file's entries."""
    file = tmp_path / "results.json"
    commits = ["abc"]
    monkeypatch.setattr(script, "commit", lambda: commits[0])

    def run(*arguments: str) -> tuple[list[str], list[dict]]:
        ran = []

        def measure(job, options):
            ran.append(" ".join(str(part) for part in job if part is not None))
            return {**job.key, "commit": commits[0], "threads": options.threads, "peak_mib": 1.0, "after_mib": 1.0}

        monkeypatch.setattr(script, "measure", measure)
        monkeypatch.setattr(sys, "argv", ["measure", "--file", str(file), *arguments])
        assert script.main() == 0
        return ran, json.loads(file.read_text()) if file.exists() else []

    run.commits = commits
    return run


def test_what_was_measured_is_not_measured_again(measured):
    ran, entries = measured("lenet5", "resnet18", "--cases", "fp32x1", "--what", "times")
    assert ran == ["times lenet5 fp32x1", "times resnet18 fp32x1"]
    assert [row["model"] for row in entries] == ["resnet18", "lenet5"]  # the table's order
    ran, entries = measured("lenet5", "vgg16", "--cases", "fp32x1", "fp32x8", "--what", "times")
    assert ran == ["times lenet5 fp32x8", "times vgg16 fp32x1", "times vgg16 fp32x8"]
    assert len(entries) == 5
    ran, _ = measured("lenet5", "--cases", "fp32x1", "--what", "memory", "--candidates", "openvino", "fastcnn")
    assert ran == ["memory lenet5 fp32x1 fastcnn", "memory lenet5 fp32x1 openvino"]
    assert measured("lenet5", "--cases", "fp32x1", "--what", "times")[0] == []
    assert len(measured("lenet5", "--cases", "fp32x1", "--what", "times", "--fresh")[0]) == 1
    measured.commits[0] = "def"
    assert measured("lenet5", "--cases", "fp32x1", "--what", "times", "--list") == ([], entries_of(measured))
    ran, entries = measured("lenet5", "--cases", "fp32x1", "--what", "times")
    assert ran == ["times lenet5 fp32x1"]
    assert len([row for row in entries if row["what"] == "times"]) == 5


def entries_of(measured) -> list[dict]:
    return measured("lenet5", "--cases", "fp32x1", "--what", "times", "--list")[1]


def test_bad_names_are_refused(measured, capsys):
    for arguments in (["nothing"], ["lenet5", "--cases", "fp64x1"], ["lenet5", "--cases", "fp32"]):
        with pytest.raises(SystemExit) as refused:
            measured(*arguments)
        assert refused.value.code == 2
        assert arguments[-1] in capsys.readouterr().err


def test_a_held_command_runs_until_the_times_are_taken(tmp_path):
    mark = tmp_path / "ended"
    with script.holding(f"sh -c 'echo ready; cat; touch {mark}'"):
        assert not mark.exists()
    assert mark.exists()
    with pytest.raises(SystemExit, match="ended without printing a line"), script.holding("true"):
        pass


def test_instruction_sets_are_measured_for_real(tmp_path):
    file = tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "measure_instruction_sets.py"), "lenet5", "--dtypes", "fp32"]
    subprocess.run([*command, "--rounds", "1", "--file", str(file)], check=True, timeout=300, capture_output=True)
    (row,) = json.loads(file.read_text())
    assert list(row["median_ms"]) == _native.cpu_instruction_sets()
    assert all(ms > 0 for ms in row["median_ms"].values())


def test_one_network_is_measured_for_real(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    common = [sys.executable, str(ROOT / "benchmarks" / "measure_cpu_networks.py"), "lenet5", "--cases", "bf16x1"]
    common += ["--candidates", "fastcnn", "fastcnn_frozen", "channels_last", "--file", str(file)]
    for what in ("times", "memory"):
        subprocess.run([*common, "--what", what, "--seconds", "0.1"], check=True, timeout=300, capture_output=True)
    entries = json.loads(file.read_text())
    times = next(row for row in entries if row["what"] == "times")
    assert set(times["timings"]) == {"fastcnn", "fastcnn_frozen", "channels_last"}
    assert times["dtype"] == "bfloat16"
    assert times["best_peer"] == "channels_last"
    assert 0 <= times["busy_elsewhere"] <= 1
    memory = {row["candidate"]: row for row in entries if row["what"] == "memory"}
    assert set(memory) == {"fastcnn", "fastcnn_frozen", "channels_last"}
    for row in memory.values():
        assert row["peak_mib"] >= row["after_mib"] > 0
        assert row["peak_mib"] >= row["imported_mib"] > 0
    text, _ = sections("x", entries)
    assert "### bf16, batch 1" in text
