"""FLOPs, conditions, and the comparison with peers."""

from __future__ import annotations

import json

import pytest
import torch
from support.networks import small_input, small_network
from torch import nn

import fastcnn
from fastcnn.measurement import compare, conditions, conv_flops, count_flops

SMALL_FLOPS = 2 * (16 * 256 * 27 + 16 * 256 * 144 + 16 * 256 * 16 + 24 * 64 * 144 + 24 * 64 * 10)


def test_conv_flops():
    assert conv_flops((1, 96, 55, 55), (96, 3, 11, 11)) == 2 * 105_415_200  # AlexNet's first layer, from the lecture
    assert conv_flops((2, 8, 4, 4), (8, 1, 3, 3)) == 2 * 2 * 8 * 16 * 9  # depthwise


@pytest.mark.parametrize("backend", [None, "reference"])
def test_flops_are_counted_in_our_operators_and_in_pytorchs(backend):
    with fastcnn.use_backend(backend):
        assert count_flops(small_network(), small_input(batch=1)) == SMALL_FLOPS
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
    assert count_flops(plain, small_input(batch=1)) == 2 * (8 * 196 * 27 + 8 * 196 * 5)


def test_resnet18_has_the_published_flops():
    model = fastcnn.models.create_model("resnet18").eval()
    assert count_flops(model, torch.randn(1, 3, 224, 224)) == pytest.approx(2 * 1.814e9, rel=1e-3)


def test_conditions_name_everything():
    found = conditions(torch.device("cpu"), torch.bfloat16, 8)
    assert found.torch == torch.__version__
    assert found.fastcnn == fastcnn.__version__
    assert found.threads == torch.get_num_threads()
    assert found.dtype == "bfloat16"
    assert found.batch == 8
    assert found.device
    assert found.instruction_set in ("avx512_bf16", "avx512", "avx2", "portable")
    assert found.cuda is None
    assert "bfloat16, batch 8" in str(found)
    json.dumps(found.to_dict())


def test_peers_are_timed_beside_us():
    found = compare(small_network(), small_input(), rounds=3, name="small")
    assert list(found.timings) == ["fastcnn", "eager", "channels_last"]
    assert found.flops == 4 * SMALL_FLOPS
    assert found.best_peer in ("eager", "channels_last")
    assert found.speedup() == found.timings[found.best_peer].median_ms / found.timings["fastcnn"].median_ms
    document = json.loads(json.dumps(found.to_dict()))
    assert document["timings"]["fastcnn"]["images_per_second"] > 0
    assert document["timings"]["fastcnn"]["ratio"] == 1
    assert "median ms" in str(found)


def test_each_candidate_runs_on_its_own_operators():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append((fastcnn.backends.current_choice()[0], x.is_contiguous()))
            return x

    compare(Spy(), small_input(), rounds=1, backend="cpp")
    assert set(seen) >= {("cpp", False), ("reference", True), ("reference", False)}
    seen.clear()
    reference = nn.ReLU()
    compare(Spy(), small_input(), reference=reference, rounds=1)
    assert set(seen) == {(None, False)}


def test_compiling_needs_a_reference():
    with pytest.raises(ValueError, match=r"torch\.compile needs a reference"):
        compare(small_network(), small_input(), compiled=True)
