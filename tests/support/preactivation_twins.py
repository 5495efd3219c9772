"""Twins of dense, pre-activation, wide and stochastic-depth networks, for plain_twin: one module after another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcnn.nn as fnn
from fastcnn.models import CifarPreResNet, CifarResNeXt, CifarWideResNet, DenseNet, PreResNet
from fastcnn.models.densenet import DenseBlock, DenseFeatures, DenseLayer, Transition
from support.plain_twin import TWINS, plain_twin

__all__ = ["plain_twin"]


class TwinDenseLayer(DenseLayer):
    def forward(self, features: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(features)))
        if self.has_bottleneck:
            y = self.conv2(F.relu(self.norm2(y)))
        return F.dropout(y, self.drop_rate, self.training)


class TwinDenseBlock(DenseBlock):
    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class TwinTransition(Transition):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(F.relu(self.norm(x))))


class TwinDenseFeatures(DenseFeatures):
    def forward(self, x: Tensor) -> Tensor:
        for name, child in self.named_children():  # in the order of computation
            x = child.forward(x.clone()) if name == "relu0" else child(x)
        return F.relu(x)


class TwinDenseNet(DenseNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class TwinPreActBasicBlock(fnn.PreActBasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        a = x if self.preactivation == "none" else F.relu(self.bn1(x))
        y = F.relu(self.bn2(self.conv1(a)))
        if self.dropout is not None:
            y = self.dropout(y)
        shortcut = a if self.preactivation == "shared" else x
        y = self.branch_scale * self.conv2(y)
        return y + (shortcut if self.downsample is None else self.downsample(shortcut))


class TwinPreActBottleneck(fnn.PreActBottleneck):
    def forward(self, x: Tensor) -> Tensor:
        a = x if self.preactivation == "none" else F.relu(self.bn1(x))
        y = F.relu(self.bn2(self.conv1(a)))
        y = self.branch_scale * self.conv3(F.relu(self.bn3(self.conv2(y))))
        shortcut = a if self.preactivation == "shared" else x
        return y + (shortcut if self.downsample is None else self.downsample(shortcut))


class TwinPreResNet(PreResNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn_last(self.layer4(self.layer3(self.layer2(self.layer1(x))))))
        return self.fc(x.mean((2, 3)))


class TwinCifarPreResNet(CifarPreResNet):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_last(self.layer3(self.layer2(self.layer1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class TwinCifarWideResNet(CifarWideResNet):
    forward = TwinCifarPreResNet.forward


class TwinCifarResNeXt(CifarResNeXt):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class TwinSurvivingBasicBlock(fnn.BasicBlock):
    """Chooses nothing: always computed, scaled in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.branch_scale * y + (x if self.downsample is None else self.downsample(x)))


class TwinSurvivingBottleneck(fnn.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))))
        return F.relu(self.branch_scale * y + (x if self.downsample is None else self.downsample(x)))


ADDED: dict[type[nn.Module], type[nn.Module]] = {
    DenseLayer: TwinDenseLayer,
    DenseBlock: TwinDenseBlock,
    Transition: TwinTransition,
    DenseFeatures: TwinDenseFeatures,
    DenseNet: TwinDenseNet,
    fnn.PreActBasicBlock: TwinPreActBasicBlock,
    fnn.PreActBottleneck: TwinPreActBottleneck,
    PreResNet: TwinPreResNet,
    CifarPreResNet: TwinCifarPreResNet,
    CifarWideResNet: TwinCifarWideResNet,
    CifarResNeXt: TwinCifarResNeXt,
    fnn.BasicBlock: TwinSurvivingBasicBlock,
    fnn.Bottleneck: TwinSurvivingBottleneck,
}
TWINS.update(ADDED)
