"""The block of every family of networks, all its operators on Triton's kernels: against PyTorch's and float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.plain_twin import randomise_batch_norms
from torch import Tensor, nn

import fastcnn
import fastcnn.nn as fnn
from fastcnn.models.densenet import DenseBlock, Transition
from fastcnn.verification import judge

CHANNELS, SIZE = 12, (7, 6)  # odd and even, no multiple of a tile


def survives(block: nn.Module, probability: float) -> nn.Module:
    block.survival = probability
    return block


def shortcut(option: str, out_channels: int, stride: int = 2) -> nn.Module | None:
    return fnn.make_shortcut(option, CHANNELS, out_channels, stride)


def lenet() -> nn.Module:
    return fnn.FusedSequential(
        fnn.Conv2d(CHANNELS, 6, 5, padding=2), nn.ReLU(), fnn.MaxPool2d(2, 2), nn.Flatten(),
        fnn.Linear(54, 20), nn.ReLU(), fnn.Linear(20, 10),
    )  # fmt: skip


def alexnet() -> nn.Module:
    return fnn.FusedSequential(
        fnn.Conv2d(CHANNELS, 20, 5, padding=2, groups=2), nn.ReLU(), fnn.LocalResponseNorm(5, 0.1, 0.75, 2.0),
        fnn.MaxPool2d(3, 2, ceil_mode=True),
    )  # fmt: skip


def vgg(batch_norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for c, k in ((CHANNELS, 16), (16, 18)):
        norm = [fnn.BatchNorm2d(k)] if batch_norm else []
        layers += [fnn.Conv2d(c, k, 3, padding=1), *norm, nn.ReLU()]
    return fnn.FusedSequential(*layers, fnn.MaxPool2d(2, 2), fnn.AdaptiveAvgPool2d((2, 2)))


def inception(block: type[nn.Module], kernel_size: int) -> nn.Module:
    return fnn.Inception(CHANNELS, 8, 6, 10, 4, 5, 7, block, kernel_size=kernel_size)


def dense(bn_size: int) -> nn.Module:
    return nn.Sequential(DenseBlock(3, CHANNELS, 6, bn_size, 0.0), Transition(CHANNELS + 18, 15))


# Each with the operators that its evaluation consists of.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "lenet": (lenet, {"conv2d": 1, "max_pool2d": 1, "linear": 2}),
    "alexnet": (alexnet, {"conv2d": 1, "local_response_norm": 1, "max_pool2d": 1}),
    "vgg": (lambda: vgg(False), {"conv2d": 2, "max_pool2d": 1, "adaptive_avg_pool2d": 1}),
    "vgg-bn": (lambda: vgg(True), {"conv2d": 2, "max_pool2d": 1, "adaptive_avg_pool2d": 1}),
    "inception-lrn": (lambda: inception(fnn.ConvReLU, 5), {"conv2d": 4, "max_pool2d": 1}),
    "inception-bn": (lambda: inception(fnn.ConvBNReLU, 3), {"conv2d": 4, "max_pool2d": 1}),
    "inception-naive": (lambda: fnn.InceptionNaive(CHANNELS, 8, 10, 5), {"conv2d": 3, "max_pool2d": 1}),
    "plain": (lambda: fnn.PlainBlock(CHANNELS, 16, 2), {"conv2d": 2}),
    "basic": (lambda: fnn.BasicBlock(CHANNELS, CHANNELS), {"conv2d": 2}),
    "basic-A": (lambda: fnn.BasicBlock(CHANNELS, 24, 2, shortcut("A", 24)), {"conv2d": 2}),
    "basic-B": (lambda: fnn.BasicBlock(CHANNELS, 24, 2, shortcut("B", 24)), {"conv2d": 3}),
    "bottleneck": (lambda: fnn.Bottleneck(CHANNELS, 3), {"conv2d": 3}),
    "bottleneck-A": (lambda: fnn.Bottleneck(CHANNELS, 8, 2, shortcut("A", 32)), {"conv2d": 3}),
    "bottleneck-B": (lambda: fnn.Bottleneck(CHANNELS, 8, 2, shortcut("B", 32)), {"conv2d": 4}),
    "bottleneck-v1": (
        lambda: fnn.Bottleneck(CHANNELS, 8, 2, shortcut("B", 32), stride_in_1x1=True), {"conv2d": 4},
    ),
    "resnext": (lambda: fnn.Bottleneck(CHANNELS, 8, 2, shortcut("B", 32), 4, 24), {"conv2d": 4}),
    "preact-basic": (lambda: fnn.PreActBasicBlock(CHANNELS, CHANNELS), {"conv2d": 2}),
    "preact-bottleneck": (lambda: fnn.PreActBottleneck(CHANNELS, 3), {"conv2d": 3}),
    "preact-shared": (
        lambda: fnn.PreActBottleneck(CHANNELS, 5, 2, preactivation="shared", stride_in_1x1=True),
        {"channel_affine": 1, "conv2d": 4},
    ),
    "wide": (
        lambda: fnn.PreActBasicBlock(CHANNELS, 20, 2, preactivation="shared", dropout=0.3),
        {"channel_affine": 1, "conv2d": 3},
    ),
    "stochastic-depth": (
        lambda: survives(fnn.BasicBlock(CHANNELS, 24, 2, shortcut("A", 24)), 0.6), {"conv2d": 2},
    ),
    "stochastic-depth-preact": (lambda: survives(fnn.PreActBasicBlock(CHANNELS, CHANNELS), 0.6), {"conv2d": 2}),
    "dense": (lambda: dense(0), {"conv2d": 4, "avg_pool2d": 1}),
    "dense-bc": (lambda: dense(2), {"conv2d": 7, "avg_pool2d": 1}),
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


def make(case: str, dtype: torch.dtype) -> nn.Module:
    build, _ = BLOCKS[case]
    return randomise_batch_norms(build()).to(dtype)


def image(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, CHANNELS, *SIZE).to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BLOCKS)
def test_evaluation(case: str, dtype: torch.dtype) -> None:
    found = fastcnn.verify(make(case, dtype), image(dtype), backend="triton", strict=True)
    assert found.passed, str(found)
    assert {layer.backend for layer in found.layers} == {"triton"}
    operators = [layer.operator for layer in found.layers]
    assert {name: operators.count(name) for name in operators} == BLOCKS[case][1]


def trained_once(model: nn.Module, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The output in train mode, and the running statistics after it."""
    with fastcnn.use_backend(backend, strict=True):
        y = model.train()(x)
    return y, torch.cat([buffer.flatten() for buffer in model.buffers() if buffer.is_floating_point()])


@pytest.mark.parametrize("case", ["vgg-bn", "basic-A", "preact-shared", "dense-bc"])
def test_training_forward(case: str) -> None:
    ours, x = make(case, torch.float32), image(torch.float32)
    reference, exact = copy.deepcopy(ours), copy.deepcopy(ours).double()
    results = trained_once(ours, x, "triton"), trained_once(reference, x, "reference")
    for outcome in zip(*results, trained_once(exact, x.double(), "reference"), strict=True):
        assert judge(*outcome).passed
