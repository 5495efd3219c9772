"""A fastcnn model's twin of torch.nn modules only, blocks written out as in the papers: an independent reference."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcnn.nn as fnn
from fastcnn.models import CifarResNet, ResNet


class TwinZeroPad(fnn.ZeroPadShortcut):
    def forward(self, input: Tensor) -> Tensor:
        kept = input[:, :, :: self.stride, :: self.stride]
        half = (self.out_channels - self.in_channels) // 2
        zeros = kept.new_zeros(kept.shape[0], half, *kept.shape[2:])
        return torch.cat([zeros, kept, zeros], 1)


class TwinPlainBlock(fnn.PlainBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)))


class TwinBasicBlock(fnn.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class TwinBottleneck(fnn.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class TwinResNet(ResNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class TwinCifarResNet(CifarResNet):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


TWINS: dict[type[nn.Module], type[nn.Module]] = {
    fnn.Conv2d: nn.Conv2d,
    fnn.Linear: nn.Linear,
    fnn.BatchNorm2d: nn.BatchNorm2d,
    fnn.MaxPool2d: nn.MaxPool2d,
    fnn.AvgPool2d: nn.AvgPool2d,
    fnn.AdaptiveAvgPool2d: nn.AdaptiveAvgPool2d,
    fnn.LocalResponseNorm: nn.LocalResponseNorm,
    fnn.Projection: nn.Sequential,
    fnn.ZeroPadShortcut: TwinZeroPad,
    fnn.PlainBlock: TwinPlainBlock,
    fnn.BasicBlock: TwinBasicBlock,
    fnn.Bottleneck: TwinBottleneck,
    ResNet: TwinResNet,
    CifarResNet: TwinCifarResNet,
}


def plain_twin(model: nn.Module) -> nn.Module:
    """A copy with the same parameters that runs none of fastcnn's code."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__class__ = TWINS.get(type(module), type(module))
        assert type(module).forward.__module__.startswith(("torch.", "support.")), f"no twin for {type(module)}"
    return twin


def randomise_batch_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine parameters as after training, so that a mistake in folding shows."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(uniform(module.running_mean, -0.3, 0.3))
                module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))
                if module.affine:
                    module.weight.copy_(uniform(module.weight, 0.4, 1.1))
                    module.bias.copy_(uniform(module.bias, -0.2, 0.2))
    return model
