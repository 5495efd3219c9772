"""The GPU measurement of layers, rehearsed on a CPU: what it measures, what it refuses to time, and its page."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import gpu_replay
import measure_gpu_layers as script
import pytest
import torch
from gpu_layers import NETWORKS, Layer, jobs, layers_of
from gpu_problems import Tensors, conv_calls, kernel_names, launch_triton
from gpu_tables import gpu_page, is_gpu, is_network
from triton_ahead import AheadCompiler, _NoDriver
from write_performance_page import page

import fastcnn
from fastcnn import backends
from fastcnn.backends import cpp, variants
from fastcnn.measurement.flops import count_flops

CPU = torch.device("cpu")
EXPAND = Layer(64, 56, 56, 256, (1, 1), residual=True)
DOWN = Layer(256, 56, 56, 512, (1, 1), stride=(2, 2), relu=False)
STEM = Layer(3, 224, 224, 64, (7, 7), stride=(2, 2), padding=(3, 3))


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The script on arguments, in this process, without compiling; gives its rows."""

    def run(*arguments: str, status: int = 0) -> list[dict]:
        file = tmp_path / "rows.json"
        options = ["--rehearse", "--processes", "0", "--file", str(file), *arguments]
        monkeypatch.setattr(sys, "argv", ["measure", *options])
        threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        on_end = signal.getsignal(signal.SIGTERM)
        try:
            assert script.main() == status
        finally:
            signal.signal(signal.SIGTERM, on_end)
            torch.set_num_threads(threads)
            torch.backends.cudnn.benchmark = benchmark
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
        return json.loads(file.read_text())

    return run


def test_layers_are_those_that_the_network_runs() -> None:
    layers = layers_of("resnet50")
    assert sum(layers.values()) == 53
    assert layers[EXPAND] == 3
    assert layers[DOWN] == layers[STEM] == 1
    x = torch.zeros(1, 3, 224, 224)
    every = count_flops(fastcnn.create_model("resnet50").eval(), x)
    assert sum(count * layer.flops(1) for layer, count in layers.items()) == every - 2 * 2048 * 1000
    assert any(layer.prologue for layer in layers_of("densenet121"))


def test_bytes_are_what_must_move() -> None:
    assert EXPAND.bytes(1) == 2 * (64 * 56**2 + 64 * 256 + 2 * 256 * 56**2)
    assert DOWN.bytes(2) == 2 * (2 * 256 * 28**2 + 256 * 512 + 2 * 512 * 28**2)  # a quarter of the input is read
    assert STEM.bytes(1) == 2 * (3 * 224**2 + 64 * 3 * 49 + 64 * 112**2)
    assert STEM.out_size == (112, 112)


def test_the_first_network_comes_first_and_shared_layers_once() -> None:
    found = jobs(["resnet50", "densenet121"], [256, 1])
    assert len({(job.layer, job.batch) for job in found}) == len(found)
    own = len(layers_of("resnet50"))
    assert {job.layer for job in found[:own]} == set(layers_of("resnet50"))
    assert [job.batch for job in found[: 2 * own]] == [256] * own + [1] * own
    (stem,) = {job.networks for job in found if job.layer == STEM}
    assert dict(stem) == {"resnet50": 1, "densenet121": 1}


@pytest.mark.parametrize("layer", [EXPAND, DOWN, Layer(16, 9, 7, 24, (3, 3), (2, 2), (1, 1), groups=4, prologue=True)])
def test_candidates_compute_the_same(layer: Layer) -> None:
    with torch.no_grad():
        t = Tensors.random(layer, 2, CPU)
        exact = t.exact(layer, slice(0, 2))
        for name, call in conv_calls(layer, t, ("cpp",)).items():
            if name != "cudnn":
                result = call().float()
                assert ((result - exact).norm() / exact.norm()).item() < 5e-3, name
        assert torch.equal(t.exact(layer, slice(1, 2)), exact[1:])


def test_a_rehearsal_gives_a_page(measured) -> None:
    rows = measured("resnet50", "densenet121", "--batches", "2", "1")
    layers = [row for row in rows if row["what"] == "gpu_layer"]
    assert {row["what"] for row in rows} == {"gpu_ceiling", "gpu_layer"}
    assert all(row["verdicts"] == {name: "right" for name in ("cudnn", "cudnn_fused", "cpp")} for row in layers)
    assert all(set(row["timings"]) == {"cudnn", "cudnn_fused", "cpp"} for row in layers)
    assert any(row["prologue"] for row in layers)
    written = page({"cpu": [], "gpu-layers": rows})
    assert "[Performance on a GPU](performance-gpu.md)" in written["performance.md"]
    text = written["performance-gpu.md"]
    assert "**a rehearsal on a CPU: no figures**" in text
    for heading in ("resnet50, batch 2", "resnet50, batch 1", "densenet121, batch 2", "densenet121, batch 1"):
        assert f"## {heading}\n" in text
    assert "| 8x8x8 to 8, 1x1, residual, ReLU |" in text
    drawn = ElementTree.fromstring(written["images/gpu-layers.svg"])
    assert {"resnet50", "densenet121", "cuDNN, fused"} <= {e.text for e in drawn.iter() if e.tag.endswith("text")}
    assert "the roof" in written["images/gpu-layers-resnet50-2.svg"]


def test_operators_are_measured(measured) -> None:
    rows = measured("--operators")
    operators = {row["operator"]: row for row in rows if row["what"] == "gpu_operator"}
    assert set(operators) == set(script.OPERATORS)
    assert all(row["verdicts"] == {"pytorch": "right", "cpp": "right"} for row in operators.values())
    text = gpu_page({"gpu-operators": rows})["performance-gpu.md"]
    assert all(f"| `{name}` | 2 |" in text for name in operators)


def test_a_wrong_kernel_is_not_timed(measured, monkeypatch) -> None:
    right = cpp.conv2d

    def slightly_wrong(out, *arguments):
        right(out, *arguments)
        out[-1].mul_(1.05)

    monkeypatch.setattr(cpp, "conv2d", slightly_wrong)
    rows = measured("vgg16", "--batches", "2")
    layers = [row for row in rows if row["what"] == "gpu_layer"]
    assert layers
    for row in layers:
        assert row["verdicts"]["cpp"].startswith("wrong: error ")
        assert set(row["timings"]) == {"cudnn", "cudnn_fused"}
    text = gpu_page({"gpu-layers": rows})["performance-gpu.md"]
    assert "| wrong |" in text
    assert "Without a time: " in text


def test_what_is_not_written_is_noticed(measured, monkeypatch) -> None:
    monkeypatch.setattr(cpp, "conv2d", lambda *arguments: None)
    rows = measured("vgg16", "--batches", "1")
    assert all(row["verdicts"]["cpp"].startswith("wrong") for row in rows if row["what"] == "gpu_layer")


def test_a_failing_kernel_does_not_stop_the_run(measured, monkeypatch) -> None:
    def fails(*arguments):
        raise RuntimeError("no such tile\nmore")

    monkeypatch.setattr(cpp, "conv2d", fails)
    rows = measured("vgg16", "--batches", "1")
    layers = [row for row in rows if row["what"] == "gpu_layer"]
    assert layers
    assert all(row["verdicts"]["cpp"] == "failed: RuntimeError: no such tile" for row in layers)
    assert all(set(row["timings"]) == {"cudnn", "cudnn_fused"} for row in layers)


def test_a_layer_that_cannot_be_made_is_told(measured, monkeypatch, capsys) -> None:
    def fails(layer, batch, device):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Tensors, "random", fails)
    rows = measured("vgg16", "--batches", "1", status=1)
    assert {row["what"] for row in rows} == {"gpu_ceiling"}
    assert "FAILED" in capsys.readouterr().out


def test_the_deadline_ends_a_run(measured, capsys) -> None:
    rows = measured("resnet50", "--deadline", "0")
    assert {row["what"] for row in rows} == {"gpu_ceiling"}
    assert "out of time with " in capsys.readouterr().out


def test_a_time_limit_leaves_the_rows(measured, monkeypatch, tmp_path) -> None:
    at_work = script.Measurement.measure_layer

    def stopped(self, job) -> None:
        at_work(self, job)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(script.Measurement, "measure_layer", stopped)
    with pytest.raises(SystemExit):
        measured("vgg16", "--batches", "1")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["what"] for row in rows].count("gpu_layer") == 1


def test_every_kernel_of_a_backend_can_take_part(measured, monkeypatch) -> None:
    wrong = SimpleNamespace(conv2d=lambda out, *rest: out.zero_())
    modules = {"cuda:one": cpp, "cuda:two": wrong}
    monkeypatch.setattr(variants, "names", lambda backend, operator, arguments: list(modules))
    find = backends.backend_module
    monkeypatch.setattr(backends, "backend_module", lambda name: modules.get(name) or find(name))
    rows = measured("vgg16", "--batches", "1", "--variants", "cuda")
    layers = [row for row in rows if row["what"] == "gpu_layer"]
    assert layers
    for row in layers:
        assert row["verdicts"]["cuda:two"].startswith("wrong")
        assert set(row["timings"]) == {"cudnn", "cudnn_fused", "cpp", "cuda:one"}
        row["timings"]["cuda:one"]["median_ms"] = 1e-4
    text = gpu_page({"gpu-layers": rows})["performance-gpu.md"]
    assert "| fastest of all kernels |" in text
    assert "| 0.1 cuda:one |" in text


def test_kernels_are_named(monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "unavailable", lambda name: None if name == "triton" else "not here")
    layer = Layer(64, 9, 7, 32, (1, 1), prologue=True)
    names = kernel_names(layer, Tensors.random(layer, 2, CPU))
    assert re.fullmatch(r"pointwise \d+x(16|32)x64 w\d s\d", names["triton"])


# ---- graphs, by a stand-in for CUDA ----------------------------------------------------------------------------------


class _Event:
    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = _Event.clock

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        return end.time - self.time


class _Graph:
    """Knows how long what was called while it captured takes."""

    capturing: _Graph | None = None

    def __init__(self) -> None:
        self.length = 0.0

    def capture_begin(self, capture_error_mode: str) -> None:
        _Graph.capturing = self

    def capture_end(self) -> None:
        assert _Graph.capturing is self
        _Graph.capturing = None

    def replay(self) -> None:
        _Event.clock += self.length


class _Stream:
    def wait_stream(self, other: _Stream) -> None: ...


@pytest.fixture
def pretended_cuda(monkeypatch) -> None:
    for name, value in {
        "Event": _Event, "CUDAGraph": _Graph, "Stream": _Stream, "current_stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)


def launch_of(ms: float, log: list[int], index: int = 0, eager_ms: float | None = None):
    def launch() -> torch.Tensor:
        if _Graph.capturing is None:
            _Event.clock += ms if eager_ms is None else eager_ms
        else:
            _Graph.capturing.length += ms
            log.append(index)
        return torch.empty(0)

    return launch


@pytest.mark.parametrize(("ms", "sets", "launches"), [(0.1, 1, 10), (0.1, 7, 14), (0.004, 1, 250), (5.0, 1, 3)])
def test_a_graph_goes_round_the_sets(pretended_cuda, ms: float, sets: int, launches: int) -> None:
    log: list[int] = []
    replay = gpu_replay.Replay([launch_of(ms, log, i) for i in range(sets)], torch.device("cuda"))
    assert replay.launches == launches
    assert log == list(range(sets)) * (launches // sets)
    times = gpu_replay.in_turns({"a": replay, "b": replay}, 3)
    assert times["a"]["median_ms"] == pytest.approx(ms)
    assert times["b"] | {"samples": 3, "launches": launches} == times["b"]


def test_launches_that_the_host_slows_are_counted_again(pretended_cuda) -> None:
    log: list[int] = []
    replay = gpu_replay.Replay([launch_of(1 / 64, log, eager_ms=1 / 16)], torch.device("cuda"))
    assert replay.launches == 64
    assert len(log) == 16 + 64
    assert replay.milliseconds() == pytest.approx(1 / 64)


def test_a_failed_capture_is_ended(pretended_cuda) -> None:
    def fails_in_capture() -> None:
        if _Graph.capturing is not None:
            raise RuntimeError("not in a capture")

    with pytest.raises(RuntimeError, match="not in a capture"):
        gpu_replay.Replay([fails_in_capture], torch.device("cuda"))
    assert _Graph.capturing is None


# ---- compiling ahead -------------------------------------------------------------------------------------------------


def test_what_is_compiled_ahead_is_found_by_a_launch(tmp_path, monkeypatch) -> None:
    pytest.importorskip("triton")
    from fastcnn.triton_kernels import _common
    from triton.runtime.driver import driver

    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        pytest.skip("kernels cannot be compiled while TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ahead = AheadCompiler(90, processes=1)
    layer = Layer(24, 9, 7, 40, (3, 3), padding=(1, 1), prologue=True)
    ahead.submit("key", launch_triton, layer, 4)
    ahead.submit("bad", launch_triton, None, 4)
    ahead.wait("key")
    ahead.wait("bad")
    ahead.wait("unknown")
    ahead.close()
    assert ahead.kernels == 2
    assert len(ahead.faults) == 1
    compiled = sorted(tmp_path.iterdir())
    assert len(compiled) >= 2

    launched = []

    def compile_only(launch) -> None:
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        launched.append(launch.kernel.warmup(grid=launch.grid, **launch.arguments, **options))

    monkeypatch.setattr(_common.Launch, "run", compile_only)
    before = driver._active
    driver.set_active(_NoDriver(90))
    try:
        launch_triton(layer, 4, device="cpu")  # with memory, as where kernels really run
    finally:
        driver._active = before
        for kernel in launched:
            assert kernel is not None
    assert len(launched) == 2
    assert sorted(tmp_path.iterdir()) == compiled


# ---- networks --------------------------------------------------------------------------------------------------------


def test_networks_have_a_table_a_case() -> None:
    def row(network: str, candidate: str, ms: float | None, batch: int = 32, **more) -> dict:
        timed = {} if ms is None else {"gpu_ms": {"median_ms": ms}, "images_per_s": batch / ms * 1e3}
        return {"what": "network", "model": network, "batch": batch, "dtype": "bf16", "candidate": candidate,
                "device": "a GPU", **timed, **more}  # fmt: skip

    rows = [
        row("resnet50", "eager", 10.0), row("resnet50", "compile", 5.0),
        row("resnet50", "fastcnn", 4.0), row("vgg16", "eager", 2.0), row("vgg16", "fastcnn", None, left_out="too big"),
        row("vgg16", "eager", 1.0, 1, latency_ms={"median_ms": 1.25}),
    ]  # fmt: skip
    assert is_gpu(rows)
    assert all(map(is_network, rows))
    written = gpu_page({"gpu-networks": rows})
    text = written["performance-gpu.md"]
    assert "| `resnet50` | 10.0 (3200) | **5.00** (6400) | 4.00 (8000) | 1.25x |" in text
    assert "| `vgg16` | **2.00** (16000) |  | too big |  |" in text
    assert "## bf16, batch 1\n" in text
    assert "| `vgg16`, 1 | 1.250 |" in text
    assert "1.25x" in written["images/gpu-networks.svg"]
    assert "`compile` is `torch.compile`.\n" in text
    rows.append(row("resnet50", "compile_graphs", 4.8, method="alone"))
    text = gpu_page({"gpu-networks": rows})["performance-gpu.md"]
    assert "| `resnet50` | 10.0 (3200) | 5.00 (6400) | 4.00 (8000) | **4.80** (6667) | 1.20x |" in text
    assert '`compile_graphs` is `torch.compile(mode="reduce-overhead")`: with CUDA graphs.\n' in text
    assert "; alone.\n" in text


def test_every_network_is_known() -> None:
    assert set(NETWORKS) <= set(fastcnn.list_models())
