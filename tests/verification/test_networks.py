"""verify, calibrate and torchvision's twins on registered networks."""

from __future__ import annotations

import pytest
import torch

import fastcnn
from fastcnn.models import create_model
from fastcnn.verification import calibrate, torchvision_twin

torchvision = pytest.importorskip("torchvision")


def test_resnet18_against_torchvision():
    torch.manual_seed(0)
    model = calibrate(create_model("resnet18").eval(), torch.randn(2, 3, 64, 64))
    twin = torchvision_twin("resnet18", model)
    assert type(twin).__module__.startswith("torchvision")
    found = fastcnn.verify(model, torch.randn(2, 3, 64, 64), reference=twin)
    assert found.passed, str(found)
    assert found.reference == "torchvision ResNet"
    assert sum(layer.operator == "conv2d" for layer in found.layers) == 20
    names = {layer.name for layer in found.layers}
    assert {"conv1", "maxpool", "layer1.0.conv1", "layer4.1.conv2", "avgpool", "fc"} <= names
    assert len(found.layers) == 20 + 1 + 2, "verification must watch the fused path that users run"


def test_a_network_that_torchvision_lacks_has_no_twin():
    assert torchvision_twin("resnet20_cifar", create_model("resnet20_cifar")) is None


def test_a_twin_has_the_models_classes_and_mode():
    model = create_model("resnet18", num_classes=7).eval()
    twin = torchvision_twin("resnet18", model)
    assert twin.fc.out_features == 7
    assert not twin.training


def test_calibration_makes_every_batch_norm_term_count_and_keeps_modes():
    torch.manual_seed(0)
    model = create_model("resnet20_cifar").eval()
    images = torch.randn(4, 3, 32, 32)
    state = torch.get_rng_state()
    calibrate(model, images)
    assert torch.equal(torch.get_rng_state(), state)
    norm = model.layer1[0].bn1
    assert norm.running_mean.abs().min() > 0
    assert (norm.running_var - 1).abs().min() > 0
    assert norm.bias.abs().max() > 0.01
    assert norm.momentum == 0.1
    assert not model.training
    with torch.no_grad():
        assert model(torch.randn(4, 3, 32, 32)).abs().max() < 1e3


def test_calibration_is_repeatable():
    inputs = torch.randn(4, 3, 32, 32)
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(calibrate(create_model("resnet20_cifar"), inputs).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
