"""Choices that ship, made from the rows of measured layers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import ship_layer_choices as script
import torch
from gpu_layers import Layer
from raw_rows import RESULTS, read_rows, write_rows

import fastcnn
from fastcnn.backends import Call, intercept
from fastcnn.tuning import shipping
from fastcnn.tuning.key import key_of

BF16 = torch.bfloat16
DEVICE = "NVIDIA H100 80GB HBM3"
CONV = Layer(256, 14, 14, 256, (3, 3), padding=(1, 1))


def row(layer: Layer = CONV, batch: int = 64, **times: float) -> dict[str, Any]:
    return {
        "what": "gpu_layer", "layer": layer.name, "networks": {"resnet50": 5}, "batch": batch, "device": DEVICE,
        "prologue": layer.prologue, "kernels": {"cuda": "tma 256x128"},
        "timings": {name: {"median_ms": ms} for name, ms in times.items()},
    }  # fmt: skip


def test_the_fastest_is_chosen() -> None:
    times = {"cudnn": 0.1, "cudnn_fused": 0.5, "triton": 0.9, "cuda": 0.6, "cuda:patch held": 0.7}
    (entry, _) = script.entries_of(row(**times), CONV)
    assert entry.choice == "cudnn:benchmark"
    ours = {"triton": 0.9, "cuda:tma 256x128": 0.6, "cuda:patch held": 0.7}
    assert entry.milliseconds == {"cudnn:benchmark": 0.5, **ours}
    assert next(script.entries_of(row(**times | {"cuda": 0.4}), CONV)).choice == "cuda:tma 256x128"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_keys_are_those_of_the_networks_calls(memory_format: torch.memory_format) -> None:
    """Of a network's own tensors, on the CPU: but for the threads that a key has there."""
    model = fastcnn.create_model("resnet50").eval().to(BF16).to(memory_format=memory_format)
    calls: list[Call] = []
    with torch.no_grad(), intercept(calls.append):  # no call is run
        model(torch.empty(2, 3, 224, 224, dtype=BF16).contiguous(memory_format=torch.channels_last))
    keys = {key_of("conv2d", torch.device("cuda"), BF16, call.args) for call in calls if call.operator == "conv2d"}
    rows = [row(layer, 2, cuda=1.0) for layer in script.layers_of("resnet50")]
    made = {entry.key for one in rows for entry in script.entries_of(one, script.layer_of(one))}
    assert keys <= made


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Other choices of the file stay, batches that are too small are left alone."""
    target = tmp_path / "shipped.json"
    before = shipping.files()[0].read_text("utf-8")
    target.write_text(before, "utf-8")
    times = {"cuda": 0.6, "cuda:patch held": 0.5}
    write_rows(tmp_path / "rows.json", [row(**times), row(batch=2, **times), {"what": "gpu_ceiling"}])
    monkeypatch.setattr(sys, "argv", ["ship", str(tmp_path / "rows.json"), "--to", str(target)])
    script.main()
    header, entries = shipping.read(target.read_text("utf-8"), target)
    old_header, old = shipping.read(before, target)
    assert header == old_header
    new = [entry for entry in entries if entry not in old]
    assert [entry.choice for entry in new] == ["cuda:patch held"] * 2
    assert entries[: len(old)] == old
    assert "2 of them from these files, 2 fastcnn's own kernels" in capsys.readouterr().out


def test_what_ships_is_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers at batch 256 in the package's file are those of the committed results."""
    shipped = shipping.files()[0]
    target = tmp_path / "shipped.json"
    target.write_text(shipped.read_text("utf-8"), "utf-8")
    file = RESULTS / "gpu-h100-layers-256.json"
    assert any(":" in name for one in read_rows(file) if one["what"] == "gpu_layer" for name in one["timings"])
    monkeypatch.setattr(sys, "argv", ["ship", str(file), "--to", str(target)])
    script.main()
    assert target.read_text("utf-8") == shipped.read_text("utf-8")
