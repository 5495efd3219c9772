"""Training on a GPU: gradients through fused operators, their registration with PyTorch, and autocast."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate
from support.gpu import Random
from torch import Tensor, nn
from torch.library import opcheck

import fastcnn
import fastcnn.nn as fnn
from fastcnn import ops


def conv_bn_relu_of_torch(x: Tensor, t: dict[str, Tensor], stride: int) -> Tensor:
    y = F.conv2d(x, t["weight"], None, stride, 1)
    return F.relu(F.batch_norm(y, t["mean"], t["var"], t["gamma"], t["beta"], training=True))


def conv_bn_relu_of_ours(x: Tensor, t: dict[str, Tensor], stride: int) -> Tensor:
    return ops.conv_bn_relu(
        x, t["weight"], t["mean"], t["var"], t["gamma"], t["beta"], stride=stride, padding=1, training=True
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_backward_of_conv_bn_relu_in_training(backend, device, stride: int):
    """Output, running statistics and every gradient in fp32, by the accuracy rule."""
    random = Random(("conv_bn_relu", stride), device)
    x = random(4, 24, 14, 14).contiguous(memory_format=torch.channels_last)
    tensors = {
        "weight": random(40, 24, 3, 3) * 0.1, "gamma": 1 + 0.1 * random(40), "beta": random(40),
        "mean": torch.zeros(40, device=device), "var": torch.ones(40, device=device),
    }  # fmt: skip
    size = (14 - 1) // stride + 1
    upstream = random(4, 40, size, size)

    def step(function, dtype: torch.dtype) -> list[Tensor]:
        t = {name: value.to(dtype).clone() for name, value in tensors.items()}
        leaves = [x.to(dtype).requires_grad_(), *(t[n].requires_grad_() for n in ("weight", "gamma", "beta"))]
        y = function(leaves[0], t, stride)
        return [y.detach(), t["mean"], t["var"], *torch.autograd.grad(y, leaves, upstream.to(dtype))]

    ours, theirs = step(conv_bn_relu_of_ours, torch.float32), step(conv_bn_relu_of_torch, torch.float32)
    exact = step(conv_bn_relu_of_torch, torch.float64)
    for mine, reference, wide in zip(ours, theirs, exact, strict=True):
        assert_accurate(mine, reference, wide)


REGISTERED = {
    "conv2d": lambda x, v: (
        x, v.view(1, -1, 1, 1).repeat(8, 1, 3, 3), None, [1, 1], [1, 1, 1, 1], [1, 1], 1, None, None, "relu", v, v,
        True,
    ),
    "linear": lambda x, v: (x[:, :, 0, 0], v.view(1, -1).repeat(5, 1), None, "relu"),
    "channel_affine": lambda x, v: (x, v, v, x.clone(), "relu"),
    "residual_add": lambda x, v: (x, x.clone(), 0.5, "relu"),
    "max_pool2d": lambda x, v: (x, [2, 2], [2, 2], [0, 0], [1, 1], False),
    "adaptive_avg_pool2d": lambda x, v: (x, [2, 2]),
    "local_response_norm": lambda x, v: (x, 5, 1e-2, 0.75, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("name", REGISTERED)
def test_operators_are_registered(backend, device, name: str):
    """Schema, fake kernel and autograd registration on the device's own tensors."""
    random = Random(name, device)
    x, v = random(2, 16, 6, 6).contiguous(memory_format=torch.channels_last), random(16)
    operator = getattr(torch.ops.fastcnn, name).default
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    opcheck(operator, REGISTERED[name](x, v), test_utils=checks)


@torch.no_grad()
def test_autocast(backend, device):
    """bf16 where PyTorch's own modules would compute in it."""
    torch.manual_seed(0)
    ours = nn.Sequential(fnn.Conv2d(16, 24, 3, padding=1), nn.Flatten(), fnn.Linear(24 * 64, 10)).to(device)
    theirs = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.Flatten(), nn.Linear(24 * 64, 10)).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = Random("autocast", device)(4, 16, 8, 8)
    with torch.autocast(device.type, torch.bfloat16):
        actual, expected = ours(x), theirs(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert_accurate(actual, expected, theirs.double()(x.double()))


@pytest.mark.cost(4)
def test_training_step_of_a_network(backend, device):
    """One step of SGD: finite, and near the step of the same network on PyTorch's operators.

    A value that rounding moves across ReLU's kink switches its gradient: a loose bound (as support/steps.py has it).
    """
    torch.manual_seed(0)
    model = fastcnn.create_model("resnet20_cifar").to(device).train()
    x, target = Random("step", device)(8, 3, 16, 16), torch.arange(8, device=device)

    def gradients(net: nn.Module) -> Tensor:
        F.cross_entropy(net(x), target).backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    mine = gradients(copy.deepcopy(model))
    with fastcnn.use_backend("reference"):
        theirs = gradients(copy.deepcopy(model))
    assert mine.isfinite().all()
    assert (mine - theirs).norm() <= 1e-2 * theirs.norm()
