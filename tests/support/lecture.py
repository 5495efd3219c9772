"""The lecture's networks in plain torch.nn, independent of fastcnn's own."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


def alexnet() -> nn.Sequential:
    """227x227, ungrouped, pooling before normalisation."""
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(3, 96, 11, 4), relu1=nn.ReLU(), pool1=nn.MaxPool2d(3, 2), norm1=nn.LocalResponseNorm(5),
        conv2=nn.Conv2d(96, 256, 5, padding=2), relu2=nn.ReLU(), pool2=nn.MaxPool2d(3, 2),
        norm2=nn.LocalResponseNorm(5),
        conv3=nn.Conv2d(256, 384, 3, padding=1), relu3=nn.ReLU(),
        conv4=nn.Conv2d(384, 384, 3, padding=1), relu4=nn.ReLU(),
        conv5=nn.Conv2d(384, 256, 3, padding=1), relu5=nn.ReLU(), pool3=nn.MaxPool2d(3, 2),
        flatten=nn.Flatten(), fc6=nn.Linear(9216, 4096), fc7=nn.Linear(4096, 4096), fc8=nn.Linear(4096, 1000),
    ))  # fmt: skip


def vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(25088, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 4096),
               nn.ReLU(inplace=True), nn.Linear(4096, 1000)]  # fmt: skip
    return nn.Sequential(*layers)


class NaiveInception(nn.Module):
    """28x28x256 to 28x28x672."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(256, 128, 1)
        self.conv3 = nn.Conv2d(256, 192, 3, padding=1)
        self.conv5 = nn.Conv2d(256, 96, 5, padding=2)
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv1(x), self.conv3(x), self.conv5(x), self.pool(x)], 1)


class BottleneckInception(NaiveInception):
    """With 1x1 convolutions to 64 channels around the expensive branches: 28x28x480."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce3, self.reduce5, self.project = (nn.Conv2d(256, 64, 1) for _ in range(3))
        self.conv3 = nn.Conv2d(64, 192, 3, padding=1)
        self.conv5 = nn.Conv2d(64, 96, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.conv1(x), self.conv3(self.reduce3(x)), self.conv5(self.reduce5(x))]
        return torch.cat([*branches, self.project(self.pool(x))], 1)


class Inception(nn.Module):
    """GoogLeNet's, with the paper's 5x5 and biases."""

    def __init__(self, c: int, c1: int, r3: int, c3: int, r5: int, c5: int, proj: int) -> None:
        super().__init__()
        self.branch1 = nn.Conv2d(c, c1, 1)
        self.branch2 = nn.Sequential(nn.Conv2d(c, r3, 1), nn.ReLU(), nn.Conv2d(r3, c3, 3, padding=1))
        self.branch3 = nn.Sequential(nn.Conv2d(c, r5, 1), nn.ReLU(), nn.Conv2d(r5, c5, 5, padding=2))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(c, proj, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([b(x) for b in (self.branch1, self.branch2, self.branch3, self.branch4)], 1).relu_()


def googlenet_lrn() -> nn.Sequential:
    def pool() -> nn.MaxPool2d:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return nn.Sequential(OrderedDict({
        "conv1": nn.Conv2d(3, 64, 7, 2, 3), "relu1": nn.ReLU(), "pool1": pool(), "norm1": nn.LocalResponseNorm(5),
        "conv2": nn.Conv2d(64, 64, 1), "relu2": nn.ReLU(), "conv3": nn.Conv2d(64, 192, 3, padding=1),
        "relu3": nn.ReLU(), "norm2": nn.LocalResponseNorm(5), "pool2": pool(),
        "3a": Inception(192, 64, 96, 128, 16, 32, 32), "3b": Inception(256, 128, 128, 192, 32, 96, 64),
        "pool3": pool(),
        "4a": Inception(480, 192, 96, 208, 16, 48, 64), "4b": Inception(512, 160, 112, 224, 24, 64, 64),
        "4c": Inception(512, 128, 128, 256, 24, 64, 64), "4d": Inception(512, 112, 144, 288, 32, 64, 64),
        "4e": Inception(528, 256, 160, 320, 32, 128, 128), "pool4": pool(),
        "5a": Inception(832, 256, 160, 320, 32, 128, 128), "5b": Inception(832, 384, 192, 384, 48, 128, 128),
        "avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(1024, 1000),
    }))  # fmt: skip
