"""Logits of networks frozen with default settings, against float64: within 1e-5.

One or two of each family here; benchmarks/measure_logits.py does all networks.
"""

from __future__ import annotations

import pytest
import torch
from support.networks import small_input, small_network

import fastcnn
from fastcnn.measurement import logits
from fastcnn.measurement.logits import LIMIT, logit_error
from fastcnn.models import model_info
from fastcnn.verification import calibrate

NETWORKS = [
    "lenet5", "lenet5_1998", "resnet20_cifar", "resnet32_cifar", "plain20_cifar", "densenet40_k12_cifar", "resnet18",
    "googlenet", "zfnet", "preresnet18", "vgg11_bn",
]  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_frozen_logits_are_float64s(name):
    torch.manual_seed(0)
    size = model_info(name).input_size
    model = calibrate(fastcnn.create_model(name).eval(), torch.randn(2, *size))
    found = logit_error(model, torch.randn(1, *size))
    assert found.frozen <= LIMIT == 1e-5
    assert found.agreeing == found.images == 1


def test_a_wrong_result_is_seen(monkeypatch):
    true_freeze = logits.freeze
    monkeypatch.setattr(logits, "freeze", lambda model, x: lambda y: true_freeze(model, x)(y) * (1 + 2e-5))
    found = logit_error(small_network().eval(), small_input())
    assert found.frozen == pytest.approx(2e-5, rel=0.1)
    assert not found.passed
    assert found.pytorch < 1e-6


@torch.no_grad()
def test_rounding_each_result_is_the_least_error():
    model = calibrate(small_network().eval(), small_input())
    found = logit_error(model, small_input())
    assert 0 < found.rounded <= min(found.frozen, found.pytorch)
    assert found.rounded < 2.0**-23


def test_results_written_in_place_are_rounded_as_well():
    x = torch.full((2, 2), 1 / 3, dtype=torch.float64)
    with logits._ResultsKeptInFp32():
        doubled = x * 2
        x.add_(1)
    assert torch.equal(doubled, doubled.float().double())
    assert torch.equal(x, torch.full((2, 2), 4 / 3, dtype=torch.float64).float().double())


def test_only_fp32_is_judged():
    with pytest.raises(ValueError, match="must be float32"):
        logit_error(small_network(torch.bfloat16), small_input())
