"""The engines that networks are timed against: each gives the network's result, and a wrong one is never timed."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.networks import small_input
from torch import nn

import fastcnn
import fastcnn.nn as fnn
from fastcnn.cli import main
from fastcnn.measurement import compare, peers
from fastcnn.measurement.plain import plain_program


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return fnn.FusedSequential(
        fnn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), fnn.MaxPool2d(2), nn.Flatten(), fnn.Linear(16 * 64, 10)
    )  # fmt: skip


@pytest.fixture
def program_and_input():
    input = small_input(batch=1)
    return plain_program(small_network(), input), input


@pytest.mark.parametrize("name", ["compile_frozen", "onnxruntime", "openvino"])
def test_a_peer_computes_the_network(name, program_and_input):
    program, input = program_and_input
    packages, _, make = peers._PEERS[name]
    for package in packages:
        pytest.importorskip(package)
    if name == "compile_frozen" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    expected = program.module()(input)
    torch.testing.assert_close(make(program, input)().contiguous(), expected, rtol=1e-4, atol=1e-5)


def _peers(monkeypatch, **makers):
    table = {name: ((), (torch.float32,), maker) for name, maker in makers.items()}
    monkeypatch.setattr(peers, "_PEERS", table)


def test_a_wrong_missing_or_failing_peer_is_left_out_and_said_so(monkeypatch, program_and_input):
    program, input = program_and_input

    def failing(program, input):
        raise RuntimeError("no such operator\nand more")

    _peers(
        monkeypatch,
        right=lambda program, input: lambda: program.module()(input),
        wrong=lambda program, input: lambda: program.module()(input) * 1.01,
        failing=failing,
    )
    peers._PEERS["missing"] = (("a_package_that_is_not_there",), (torch.float32,), failing)
    peers._PEERS["narrow"] = ((), (torch.bfloat16,), failing)
    runners, left_out = peers.cpu_peers(program, input)
    assert list(runners) == ["right"]
    assert left_out[0].startswith("wrong: its result is off by 1.0e-02")
    assert left_out[1] == "failing: failed (RuntimeError: no such operator)"
    assert "a_package_that_is_not_there not installed" in left_out[2]
    assert left_out[3] == "narrow: not timed in torch.float32"


def test_engines_are_timed_in_the_same_run(monkeypatch):
    _peers(monkeypatch, engine=lambda program, input: lambda: program.module()(input))
    found = compare(small_network(), small_input(), engines=True, rounds=2)
    assert list(found.timings) == ["fastcnn", "eager", "channels_last", "engine"]


def test_the_command_times_peers_and_names_those_left_out(monkeypatch, capsys):
    _peers(monkeypatch, engine=lambda program, input: lambda: program.module()(input))
    peers._PEERS["absent"] = (("a_package_that_is_not_there",), (torch.float32,), None)
    assert main(["bench", "lenet5", "--peers", "--no-verify", "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "engine ms" in out
    assert "lenet5, absent: a_package_that_is_not_there not installed" in out


def test_engines_want_a_cpu():
    with pytest.raises(ValueError, match="engines are timed on a CPU only, input is on meta"):
        compare(fastcnn.nn.Conv2d(3, 4, 1), torch.empty(1, 3, 8, 8, device="meta"), engines=True)
