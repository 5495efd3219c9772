"""torchvision's networks, frozen in one call: the same results by the accuracy rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.accuracy import assert_accurate, relative_error
from support.dropin import assert_frozen_well
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn

import fastcnn

torchvision = pytest.importorskip("torchvision")

# Name and image size.
NETWORKS = {
    "alexnet": 64,
    "vgg11_bn": 32,
    "googlenet": 64,
    "inception_v3": 75,
    "resnet18": 64,
    "wide_resnet50_2": 32,
    "resnext50_32x4d": 32,
    "densenet121": 32,
    "squeezenet1_1": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 32,
    "regnet_y_400mf": 64,
    "regnet_x_400mf": 64,
    "convnext_tiny": 32,
}
NARROW = ("squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    return randomise_batch_norms(model).eval()


def image(name: str) -> Tensor:
    size = NETWORKS[name]
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_results(name: str) -> None:
    assert_frozen_well(build(name), image(name))


@pytest.mark.parametrize("name", NARROW)
def test_bfloat16(name: str) -> None:
    assert_frozen_well(build(name).bfloat16(), image(name).bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_with_winograd_within_its_stated_error(name: str) -> None:
    model, x = build(name), image(name)
    frozen = fastcnn.freeze(model, x)
    assert any(step.operator == "conv2d_winograd" for step in frozen._recipe.steps)
    assert relative_error(frozen(x), model.double()(x.double())) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "googlenet", "densenet121"])
def test_bfloat16_with_winograd(name: str) -> None:
    model, x = build(name).bfloat16(), image(name).bfloat16()
    plain, frozen = model(x), fastcnn.freeze(model, x)
    assert any(step.operator == "conv2d_winograd" for step in frozen._recipe.steps)
    assert_accurate(frozen(x), plain, model.double()(x.double()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mobilenet_v3_small"])
def test_a_plain_model_an_optimized_one_and_a_copy_give_the_same_bits(name: str) -> None:
    model, x = build(name), image(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    expected = fastcnn.freeze(model, x)(x)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    optimized = fastcnn.optimize(model, x)
    assert torch.equal(fastcnn.freeze(optimized, x)(x), expected)
    assert torch.equal(fastcnn.freeze(copy.deepcopy(optimized), x)(x), expected)  # it has no graphs yet


# What is left: the image's own conversion, and what the network itself moves (ShuffleNet's shuffles, an activation that
# is both kept and overwritten).
COPIES = {
    "resnet18": 1,
    "googlenet": 1,
    "densenet121": 1,
    "squeezenet1_1": 1,
    "mobilenet_v2": 1,
    "mobilenet_v3_small": 1,
    "regnet_y_400mf": 1,
    "efficientnet_b0": 2,
    "shufflenet_v2_x0_5": 49,
}


@pytest.mark.parametrize("name", COPIES)
def test_contiguous_images_are_converted_once(name: str) -> None:
    """Between layers nothing is copied, whatever the layout of the input; nor are concatenations."""
    frozen = fastcnn.freeze(build(name), image(name))
    recipe = frozen._recipe
    assert [step.operator for step in recipe.steps].count("copy") <= COPIES[name] * recipe.lanes
