"""Networks taken apart into PyTorch's own operators: what the peers are given to run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastcnn
from fastcnn.measurement.plain import plain_program

# One of each family, with an input that keeps it quick.
NETWORKS = {
    "lenet5": (1, 32, 32),
    "alexnet_owt": (3, 64, 64),
    "zfnet": (3, 224, 224),
    "vgg11_bn": (3, 32, 32),
    "googlenet": (3, 64, 64),
    "googlenet_lrn": (3, 64, 64),
    "resnet20_cifar": (3, 32, 32),
    "resnet18": (3, 64, 64),
    "preresnet18": (3, 64, 64),
    "resnext29_8x64d_cifar": (3, 8, 8),
    "wrn16_8_cifar": (3, 8, 8),
    "resnet110_sd_cifar": (3, 8, 8),
    "densenet40_k12_cifar": (3, 32, 32),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_as_pytorchs_operators_with_the_same_result(name):
    torch.manual_seed(0)
    model = fastcnn.create_model(name).eval()
    input = torch.randn(2, *NETWORKS[name])
    with torch.no_grad():
        expected = model(input)
    keys = list(model.state_dict())
    program = plain_program(model, input)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(target.startswith("aten.conv2d") for target in called)
    assert not any("fastcnn" in target for target in called)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(input), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(next(m for m in model.modules() if isinstance(m, nn.Conv2d)), fastcnn.nn.Conv2d)  # left alone
    assert list(model.state_dict()) == keys


def test_an_operator_called_outside_a_module_is_refused():
    class Bare(nn.Module):
        def forward(self, x):
            return fastcnn.ops.conv2d(x, torch.ones(4, 3, 1, 1))

    with pytest.raises(ValueError, match=r"Bare calls fastcnn\.conv2d"):
        plain_program(Bare(), torch.randn(1, 3, 4, 4))
