"""Modules made of fastcnn's operators: drop-in layers, fused calls over ordinary modules, and residual blocks."""

from fastcnn.nn.blocks import BasicBlock, Bottleneck, PlainBlock, Projection, ZeroPadShortcut, make_shortcut
from fastcnn.nn.fusing import bn_act, bn_act_conv, conv_act, conv_bn, linear_act
from fastcnn.nn.inception import ConvBNReLU, ConvReLU, Inception, InceptionNaive
from fastcnn.nn.modules import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
)
from fastcnn.nn.preactivation import PreActBasicBlock, PreActBottleneck
from fastcnn.nn.sequential import FusedSequential
from fastcnn.nn.stochastic_depth import set_stochastic_depth

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BasicBlock",
    "BatchNorm2d",
    "Bottleneck",
    "Conv2d",
    "ConvBNReLU",
    "ConvReLU",
    "FusedSequential",
    "Inception",
    "InceptionNaive",
    "Linear",
    "LocalResponseNorm",
    "MaxPool2d",
    "PlainBlock",
    "PreActBasicBlock",
    "PreActBottleneck",
    "Projection",
    "ZeroPadShortcut",
    "bn_act",
    "bn_act_conv",
    "conv_act",
    "conv_bn",
    "linear_act",
    "make_shortcut",
    "set_stochastic_depth",
]
