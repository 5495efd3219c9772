"""CIFAR ResNets: the real checkpoint on real images, shortcuts, plain networks, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from support.accuracy import assert_accurate, relative_error
from support.data import cifar10_test_images, data_file
from support.plain_twin import plain_twin, randomise_batch_norms
from support.steps import assert_step_equal
from torch import nn

import fastcnn
from fastcnn.models import CifarResNet


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return fastcnn.create_model("resnet20_cifar", weights=data_file("resnet20-12fca82f.th")).eval()


@torch.no_grad()
def test_trained_network_classifies_365_of_400(trained: nn.Module) -> None:
    images, labels = cifar10_test_images()
    fastcnn.reset_fallbacks()
    with fastcnn.use_backend("cpp", strict=True):
        logits = trained(images)
    assert fastcnn.fallbacks() == {}
    assert int((logits.argmax(1) == labels).sum()) == 365
    with fastcnn.use_backend("reference"):
        reference = trained(images)
    assert torch.equal(logits.argmax(1), reference.argmax(1))
    assert relative_error(logits, reference) <= 1e-5
    assert relative_error(logits, plain_twin(trained)(images)) <= 1e-5


@torch.no_grad()
def test_trained_network_in_bf16_and_layouts(trained: nn.Module) -> None:
    images, labels = cifar10_test_images()
    images, labels = images[:128], labels[:128]
    expected = trained(images)
    assert torch.equal(trained(images.contiguous(memory_format=torch.channels_last)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        agree = trained(images).argmax(1) == expected.argmax(1)
    assert agree.float().mean() > 0.97
    model = copy.deepcopy(trained).bfloat16()
    assert (model(images.bfloat16()).argmax(1) == expected.argmax(1)).float().mean() > 0.97


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("option", ["A", "B", "C", None])
def test_equals_twin(option: str | None, training: bool) -> None:
    torch.manual_seed(0)
    block = fastcnn.nn.PlainBlock if option is None else fastcnn.nn.BasicBlock
    ours = randomise_batch_norms(CifarResNet(8, shortcut=option, block=block)).train(training)
    models = [ours, plain_twin(ours), plain_twin(ours).double(), copy.deepcopy(ours).double()]
    x = torch.randn(4, 3, 32, 32)
    outputs = []
    for model in models:
        with fastcnn.use_backend("reference" if model is models[3] else None):
            y = model(x.to(next(model.parameters()).dtype))
            y.square().mean().backward()
        outputs.append(y)
    assert_accurate(*outputs[:3])
    assert_accurate(*[torch.cat([b.flatten() for b in m.buffers() if b.is_floating_point()]) for m in models[:3]])
    # A value that rounding moves across ReLU's kink switches its gradient on or off: no bound in fp32, exact in fp64.
    gradients = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in models]
    assert relative_error(gradients[0], gradients[2]) <= 1e-2
    assert relative_error(gradients[3], gradients[2]) <= 1e-11


@pytest.mark.parametrize("option", ["A", "B", "C", None])
def test_one_optimisation_step_equals_twin(option: str | None) -> None:
    torch.manual_seed(0)
    block = fastcnn.nn.PlainBlock if option is None else fastcnn.nn.BasicBlock
    ours = randomise_batch_norms(CifarResNet(8, shortcut=option, block=block))
    assert_step_equal(ours, plain_twin(ours), torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 6, 2]))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiles_without_graph_breaks(mode: str) -> None:
    torch.manual_seed(0)
    model = fastcnn.create_model("resnet20_cifar") if mode == "eval" else CifarResNet(8)
    randomise_batch_norms(model).train(mode == "train")
    eager, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode == "train"):
        assert relative_error(compiled(x), eager(x)) <= 1e-5
        for m in (model, eager):
            m.bn1.weight.data.mul_(2)
        assert relative_error(compiled(x), eager(x)) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_inductor() -> None:
    model, x = CifarResNet(8).eval(), torch.randn(2, 3, 32, 32)
    assert relative_error(torch.compile(model, fullgraph=True)(x), model(x)) <= 1e-5


def test_depth_and_small_images() -> None:
    model = CifarResNet(8, num_classes=4).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 9, 7)).shape == (2, 4)
        assert model(torch.randn(0, 3, 32, 32)).shape == (0, 4)
        assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 64, 8, 8)
