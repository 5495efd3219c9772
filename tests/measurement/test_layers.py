"""The time of each operator call of a network."""

from __future__ import annotations

import json

import pytest
import torch
from support.networks import small_input, small_network
from torch import nn

import fastcnn
from fastcnn.backends import cpp
from fastcnn.cli import main
from fastcnn.measurement.layers import layer_times, layers_table


def test_every_call_has_its_row_in_order():
    layers = layer_times(small_network(), small_input(batch=2), rounds=2)
    assert [layer.name for layer in layers] == ["0", "1.conv1", "1.conv2", "2"]
    assert {layer.operator for layer in layers} == {"conv2d"}
    assert {layer.backend for layer in layers} == {"cpp"}
    assert layers[0].out_shape == (2, 16, 16, 16)
    assert layers[0].flops == 2 * 2 * 16 * 256 * 27
    assert layers[0].bytes == 4 * (2 * 3 * 256 + 2 * 16 * 256 + 16 * 27 + 16)
    assert all(layer.median_ms > 0 and layer.gigabytes_per_second > 0 for layer in layers)
    json.dumps([layer.to_dict() for layer in layers])


def test_a_slow_call_is_seen_where_it_is(monkeypatch):
    """The third of four calls is made to wait: its row, and no other, must show it."""
    import time

    plain, count = cpp.conv2d, 0

    def slow(*args):
        nonlocal count
        count += 1
        if count % 4 == 3:
            time.sleep(0.05)
        plain(*args)

    monkeypatch.setattr(cpp, "conv2d", slow)
    layers = layer_times(small_network(), small_input(batch=1), rounds=3)
    assert layers[2].median_ms >= 50
    assert max(layers[i].median_ms for i in (0, 1, 3)) < layers[2].median_ms


def test_a_backend_may_be_forced():
    assert {layer.backend for layer in layer_times(small_network(), small_input(), backend="reference", rounds=1)} == {
        "reference"
    }


def test_the_table_ends_in_the_sum():
    layers = layer_times(small_network(), small_input(), rounds=1)
    last = layers_table(layers).splitlines()[-1].split()
    assert last[0] == "all"
    assert float(last[1]) == pytest.approx(sum(layer.median_ms for layer in layers), abs=1e-3)


def test_a_network_that_changes_its_calls_is_refused():
    class Fickle(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x if self.calls % 2 else fastcnn.ops.max_pool2d(x, 2)

    with pytest.raises(ValueError, match="Fickle does not make the same operator calls"):
        layer_times(Fickle(), torch.randn(1, 3, 8, 8), rounds=2)
    with pytest.raises(ValueError, match="rounds must be at least 1, is 0"):
        layer_times(small_network(), small_input(), rounds=0)


def test_the_command_prints_layers(capsys):
    assert main(["bench", "lenet5", "--layers", "--no-verify", "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "lenet5, each operator call" in out
    assert "1x6x28x28" in out
    assert main(["bench", "lenet5", "--layers", "--no-verify", "--rounds", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["results"][0]["layers"][0]["operator"] == "conv2d"
