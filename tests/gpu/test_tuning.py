"""The tuner on a GPU: a planted wrong candidate is rejected, times are the GPU's, kernels are compiled ahead."""

from __future__ import annotations

import pytest
import torch
from support.networks import Conv
from torch import nn

import fastcnn
from fastcnn import tuning
from fastcnn.backends import backend_module, intercept, unavailable
from fastcnn.measurement.timing import interleave
from fastcnn.tuning import shipping, store, tune

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's clock")


@pytest.fixture(autouse=True)
def own_choices(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTCNN_BACKEND", raising=False)
    monkeypatch.setattr(shipping, "FOLDER", tmp_path / "shipped")
    tuning.forget()
    yield
    tuning.forget()
    backend_module.cache_clear()


def network(device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(Conv(16, 32, 3, padding=1), nn.ReLU(), Conv(32, 32, 1)).eval().to(device)
    x = torch.randn(2, 16, 12, 12, device=device).contiguous(memory_format=torch.channels_last)
    return model, x


def owner(device: torch.device) -> str:
    """A backend that can own a planted variant."""
    if device.type == "cpu":
        return "cpp"
    names = [name for name in ("triton", "cuda") if unavailable(name) is None]
    if not names:
        pytest.skip("neither Triton nor CUDA kernels")
    return names[0]


class Planted:
    """A variant of a backend that is quick, because it leaves out the work, and wrong in one of several ways."""

    def __init__(self, text: str) -> None:
        self._text = text

    def unsupported(self, operator: str, *args: object, **facts: object) -> str | None:
        return None if operator == "conv2d" else f"no {operator}"

    def conv2d(self, out: torch.Tensor, *rest: object) -> None:
        if self._text == "zeros":
            out.zero_()
        elif self._text == "almost":  # one wrong value in all
            backend_module("reference").conv2d(out, *rest)
            out[-1, -1, -1, -1] += 1
        elif self._text == "raises":
            raise RuntimeError("planted")
        # "nothing": the output keeps what its memory held


def test_planted_wrong_candidates_are_rejected_and_recorded(device, monkeypatch):
    name = owner(device)
    monkeypatch.setattr(backend_module(name), "variant", Planted, raising=False)
    ways = ("zeros", "almost", "nothing", "raises")
    model, x = network(device)
    report = tune(model, x, rounds=3, extra={name: lambda call: ways if call.operator == "conv2d" else ()})
    assert len(report.calls) == 2
    for call in report.calls:
        reasons = {c.name.partition(":")[2]: c.rejected for c in call.candidates if c.name.startswith(f"{name}:")}
        assert set(reasons) == set(ways)
        for way in ("zeros", "almost", "nothing"):
            assert "wrong: relative error" in reasons[way], reasons
        assert "planted" in reasons["raises"]
        assert all(c.timing is None for c in call.candidates if c.rejected)
        assert call.choice in {c.name for c in call.candidates if not c.rejected}
        assert call.choice not in {f"{name}:{way}" for way in ways}
    for way in ways:
        assert f"{name}:{way}" in str(report)
    (entries,) = [store.load(call_device) for call_device in {call.device for call in report.calls}]
    assert all({f"{name}:{way}" for way in ways} <= set(entry.rejected) for entry in entries), "recorded on disk"

    seen = []

    def look(call):
        seen.append(call.backend)
        call.run()

    tuning.forget()
    with intercept(look), torch.no_grad():
        ours = model(x)
    assert seen == [call.choice for call in report.calls]
    with fastcnn.use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(ours, model(x), rtol=1e-2, atol=1e-2)  # TF32 on a GPU


def test_every_backend_takes_part(device):
    model, x = network(device)
    model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    report = tune(model, x, rounds=3, effort="quick", save=False)
    wanted = {"reference"} | {
        name for name in ("cpp", "triton", "cuda", "cudnn")
        if unavailable(name) is None and (name == "cpp") == (device.type == "cpu")
    }  # fmt: skip
    for call in report.calls:
        assert {c.name.split(":")[0] for c in call.candidates} == wanted
        assert not [c for c in call.candidates if c.rejected], call


@needs_gpu
def test_hidden_launches_are_those_of_a_graph():
    """Python runs while the graph is made, and not while it is timed."""
    x, runs = torch.zeros(64, device="cuda"), 0

    def run() -> None:
        nonlocal runs
        runs += 1
        x.add_(1)

    counted = []
    timing = interleave(
        {"x": run}, "cuda", rounds=5, hide_launches=True, between=lambda name, number: counted.append(runs)
    )["x"]
    assert counted == [runs] * 5
    assert timing.samples == 5
    assert timing.median_ms > 0
    # 2 untimed runs, 2 for an estimate, 1 before the capture and 1 replay of the graph: and then 5 replays.
    torch.cuda.synchronize()
    assert x[0].item() == 5 + 6 * timing.runs_per_sample


@needs_gpu
def test_variants_of_triton_are_compiled_and_right():
    if unavailable("triton") is not None:
        pytest.skip(str(unavailable("triton")))
    model = Conv(64, 64, 3, padding=1).eval().to("cuda", torch.bfloat16)
    x = torch.randn(4, 64, 28, 28, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    (call,) = tune(model, x, backends=["triton"], rounds=3, save=False).calls
    assert sum(c.name.startswith("triton:") for c in call.candidates) >= 3
    assert not [c for c in call.candidates if c.rejected], call
