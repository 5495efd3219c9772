"""The time of each step of a frozen network."""

from __future__ import annotations

import json
import time

import pytest
import torch
from support.networks import small_input, small_network
from torch import nn

import fastcnn
import fastcnn.nn as fnn
from fastcnn.cli import main
from fastcnn.graph.freezing import recipe
from fastcnn.measurement.frozen_layers import frozen_layer_times
from fastcnn.measurement.layers import LayerTime, layer_times, layers_table


@pytest.fixture(params=[1, 2], autouse=True)
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def test_every_step_has_its_row_in_order():
    model = fnn.FusedSequential(
        fnn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), fnn.MaxPool2d(2), fnn.Conv2d(16, 24, 3), nn.Flatten(),
        fnn.Linear(24 * 36, 10),
    ).eval()  # fmt: skip
    input = small_input(batch=2).contiguous(memory_format=torch.channels_last)
    eager = layer_times(model, input, rounds=1)
    plan = fastcnn.freeze(model, input)
    frozen = frozen_layer_times(plan, input, rounds=3)
    assert [row.name for row in frozen] == [f"step {i}" for i in range(len(frozen))]
    assert (
        sum(row.flops for row in frozen)
        == sum(row.flops for row in eager)
        == 2 * 2 * (16 * 256 * 27 + 24 * 36 * 144 + 24 * 36 * 10)
    )
    assert all(row.median_ms > 0 and row.bytes > 0 and row.backend == "frozen" for row in frozen)
    kinds = [
        row.operator.removesuffix("_winograd").removesuffix("_strassen")
        for row in frozen
        if row.operator in ("conv2d", "conv2d_winograd", "conv2d_strassen", "max_pool2d", "linear")
    ]
    assert kinds == ["conv2d", "max_pool2d", "conv2d", "linear"]
    first = frozen[0]
    assert first.out_shape == (2, 16, 16, 16)
    named = frozen_layer_times(plan, input, rounds=1, eager=eager)
    assert [row.name for row in named if row.flops] == [row.name for row in eager if row.flops] == ["0", "3", "5"]
    json.dumps([row.to_dict() for row in named])


def test_the_rows_add_up_to_the_run(monkeypatch):
    """Phases follow each other without a gap: their sum is nearly the whole call's time."""
    monkeypatch.setattr(recipe, "run_in_lanes", lambda program: False)
    model = fastcnn.create_model("resnet20_cifar").eval()
    input = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    frozen = fastcnn.freeze(model, input)
    memory = [torch.empty(10 * 4)]
    frozen(input)
    plan = frozen._plan
    for _ in range(2000):  # other processes may take the processors away in between: once is enough
        started = time.perf_counter()
        entries = plan.profile([input], memory, torch.get_num_threads())
        whole = time.perf_counter() - started
        if 0.8 * whole < sum(seconds for _, seconds in entries) <= whole:
            break
    else:
        pytest.fail("the phases' times never came near the whole")
    seen = [step for steps, _ in entries for step in steps]
    assert sorted(set(seen)) == list(range(plan.step_count))
    torch.testing.assert_close(memory[0].view(4, 10), frozen(input), rtol=0, atol=0)


def test_neighbours_that_run_side_by_side_share_a_row():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = (fnn.Conv2d(32, 64, 5, padding=2) for _ in range(2))

        def forward(self, x):
            return self.left(x), self.right(x)

    model = Branches().eval()
    input = torch.randn(1, 32, 64, 64).contiguous(memory_format=torch.channels_last)
    with fastcnn.exact():  # plain sums, a single work each
        frozen = fastcnn.freeze(model, input)
    rows = frozen_layer_times(frozen, input, rounds=1)
    convolutions = [(row.name, row.operator, row.flops) for row in rows if "conv2d" in row.operator]
    each = 2 * 64 * 64 * 64 * 32 * 25
    if torch.get_num_threads() == 1:
        assert convolutions == [("step 0", "conv2d", each), ("step 1", "conv2d", each)]
    else:
        assert convolutions == [("step 0 + step 1", "2 conv2d", 2 * each)]


def test_steps_are_named_by_operator_shape_and_flops():
    """Each convolution takes the name of its own layer, in whatever order the eager calls are given."""
    model = fastcnn.create_model("resnet18").eval()
    input = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    eager = layer_times(model, input, rounds=1)
    rows = frozen_layer_times(fastcnn.freeze(model, input), input, rounds=1, eager=eager)
    names = [name for row in rows if row.flops for name in row.name.split(" + ")]
    assert sorted(names) == sorted(row.name for row in eager if row.flops)
    flops = {row.name: row.flops for row in eager}
    assert all(sum(flops[name] for name in row.name.split(" + ")) == row.flops for row in rows if row.flops)
    half = [row for row in eager if "downsample" not in row.name]
    rows = frozen_layer_times(fastcnn.freeze(model, input), input, rounds=1, eager=half)
    assert sum("step " in row.name for row in rows if row.flops) >= 1


def test_too_few_rounds_are_refused():
    model, input = small_network(), small_input()
    with pytest.raises(ValueError, match="rounds must be at least 1, is 0"):
        frozen_layer_times(fastcnn.freeze(model, input), input, rounds=0)


def test_the_table_shows_shares_of_the_peak():
    layers = [
        LayerTime("a", "conv2d", "cpp", None, (1, 2), 2.0, 10**9, 8),
        LayerTime("p", "pool", "cpp", None, (1,), 2.0, 0, 8),
    ]
    lines = layers_table(layers, peak=1e12).splitlines()
    assert lines[0].split()[-3:] == ["of", "peak", "GB/s"]
    assert lines[2].split()[-3:-1] == ["500", "50%"]
    assert lines[3].split()[-3:-1] == ["-", "-"]
    assert lines[-1].split()[-2:] == ["250", "25%"]
    assert layers[0].share_of(1e12) == 0.5


def test_the_command_shows_both_tables_and_the_limits(capsys):
    assert main(["bench", "lenet5", "--layers", "--no-verify", "--rounds", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["limits"]["flops_per_second"] > 0
    for key in ("layers", "frozen_layers"):
        row = document["results"][0][key][0]
        assert row["share_of_peak"] == pytest.approx(
            row["flops"] / row["median_ms"] * 1e3 / document["limits"]["flops_per_second"]
        )
    assert main(["bench", "lenet5", "--layers", "--frozen", "--no-verify", "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "lenet5, each step of the frozen plan" in out
    assert "fastcnn_frozen ms" in out
    assert "of peak" in out
