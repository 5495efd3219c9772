"""The engines that networks are timed against: each gives the network's result, and a wrong one is never timed."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from support.networks import small_input
from torch import nn

import fastcnn
import fastcnn.nn as fnn
from fastcnn.backends import cpp
from fastcnn.cli import main
from fastcnn.measurement import candidates, compare, peers
from fastcnn.measurement.peers import Network


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return fnn.FusedSequential(
        fnn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), fnn.MaxPool2d(2), nn.Flatten(), fnn.Linear(16 * 64, 10)
    )  # fmt: skip


def network_and_result(dtype=torch.float32) -> tuple[Network, torch.Tensor]:
    model, input = small_network().to(dtype), small_input(batch=1).to(dtype)
    with torch.no_grad(), fastcnn.use_backend("reference"):
        return Network.of(model, input), copy.deepcopy(model).double()(input.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["compile_frozen", "onnxruntime", "openvino"])
def test_a_peer_computes_the_network(name, dtype):
    packages, dtypes, make = peers.PEERS[name]
    if dtype not in dtypes:
        pytest.skip(f"{name} is not timed in {dtype}")
    for package in packages:
        pytest.importorskip(package)
    if name == "compile_frozen" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    network, expected = network_and_result(dtype)
    result = make(network)().contiguous()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert peers.distance(result, expected) < tolerance
    # What is asked for is what runs: bf16 leaves its mark on the result, fp32 does not. OpenVINO computes in fp32 all
    # the same where a processor has no bf16 arithmetic.
    marked = dtype == torch.bfloat16 and (name != "openvino" or cpp.has_bf16_dot_products())
    assert (peers.distance(result, expected) > 1e-4) == marked


def running(factor: float):
    """A peer that gives the network's result times a factor."""
    return lambda network: lambda: network.program.module()(network.input) * factor


def _peers(monkeypatch, **makers):
    table = {name: ((), (torch.float32,), maker) for name, maker in makers.items()}
    monkeypatch.setattr(peers, "PEERS", table)
    monkeypatch.setattr(candidates, "PEERS", table)


def test_a_wrong_missing_or_failing_peer_is_left_out_and_said_so(monkeypatch):
    network, expected = network_and_result()

    def failing(network):
        raise RuntimeError("no such operator\nand more")

    _peers(
        monkeypatch,
        right=running(1),
        wrong=running(1.01),
        undefined=running(float("nan")),
        failing=failing,
    )
    peers.PEERS["missing"] = (("a_package_that_is_not_there",), (torch.float32,), failing)
    peers.PEERS["narrow"] = ((), (torch.bfloat16,), failing)
    runners, left_out = peers.cpu_peers(network, peers.Expected.of(expected, expected))
    assert list(runners) == ["right"]
    assert left_out[0].startswith("wrong: its result is off by 1.0e-02")
    assert left_out[1] == "undefined: its result is off by nan"
    assert left_out[2] == "failing: failed (RuntimeError: no such operator)"
    assert "a_package_that_is_not_there not installed" in left_out[3]
    assert left_out[4] == "narrow: not timed in torch.float32"


def test_a_result_may_be_twice_as_far_off_as_pytorch_in_the_same_dtype():
    exact = torch.ones(4)
    assert peers.Expected.of(exact, exact).tolerance == 1e-4
    expected = peers.Expected.of(exact, (exact * 1.0625).bfloat16())
    assert expected.tolerance == pytest.approx(0.125)
    assert expected.fault(exact * 1.12) is None
    assert expected.fault(exact * 1.13) == "its result is off by 1.3e-01"


def test_engines_are_timed_in_the_same_run(monkeypatch):
    _peers(monkeypatch, engine=running(1))
    found = compare(small_network(), small_input(), engines=True, rounds=2)
    assert list(found.timings) == ["fastcnn", "eager", "channels_last", "engine"]


def test_the_frozen_network_is_what_is_compared(monkeypatch):
    _peers(monkeypatch, engine=running(1))
    found = compare(small_network(), small_input(), engines=True, frozen=True, rounds=2)
    assert list(found.timings) == ["fastcnn", "fastcnn_frozen", "eager", "channels_last", "engine"]
    assert found.ours == "fastcnn_frozen"
    assert found.best_peer not in ("fastcnn", "fastcnn_frozen")
    times = {name: timing.median_ms for name, timing in found.timings.items()}
    assert found.speedup() == times[found.best_peer] / times["fastcnn_frozen"]
    assert found.speedup("eager", of="fastcnn") == times["eager"] / times["fastcnn"]
    assert found.to_dict()["timings"]["fastcnn_frozen"]["ratio"] == 1


def test_a_wrong_frozen_network_is_not_timed(monkeypatch):
    true_freeze = candidates.freeze

    def off(model, example):
        frozen = true_freeze(model, example)
        return lambda x: frozen(x) * 1.001

    monkeypatch.setattr(candidates, "freeze", off)
    found = compare(small_network(), small_input(), frozen=True, rounds=1)
    assert "fastcnn_frozen" not in found.timings
    assert found.left_out == ("fastcnn_frozen: its result is off by 1.0e-03",)


def test_a_network_that_cannot_be_frozen_is_said_so():
    class Random(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    found = compare(Random(), small_input(), frozen=True, rounds=1)
    assert "fastcnn_frozen" not in found.timings
    assert found.left_out[0].startswith("fastcnn_frozen: cannot be frozen (")


def test_only_what_is_asked_for_is_built(monkeypatch):
    _peers(monkeypatch, engine=running(1), other=None)
    model, input = small_network(), small_input()
    for only in (["engine"], ["fastcnn_frozen"], ["channels_last", "fastcnn"]):
        runners, left_out = candidates.candidates(model, input, engines=True, frozen=True, only=only)
        assert sorted(runners) == sorted(only)
        assert left_out == []


def test_the_command_times_peers_and_names_those_left_out(monkeypatch, capsys):
    _peers(monkeypatch, engine=running(1))
    peers.PEERS["absent"] = (("a_package_that_is_not_there",), (torch.float32,), None)
    assert main(["bench", "lenet5", "--peers", "--no-verify", "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "engine ms" in out
    assert "fastcnn_frozen ms" in out
    assert "lenet5, absent: a_package_that_is_not_there not installed" in out


def test_engines_want_a_cpu():
    with pytest.raises(ValueError, match="engines and frozen models are timed on a CPU only, input is on meta"):
        compare(fastcnn.nn.Conv2d(3, 4, 1), torch.empty(1, 3, 8, 8, device="meta"), engines=True)
