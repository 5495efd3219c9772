"""DenseNet: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks" (arXiv:1608.06993).

Every layer reads all feature maps before it in its block. In evaluation a block is one channels-last buffer that grows
in place: a layer reads the first channels and writes its own behind them, so that nothing is ever concatenated; batch
norm and ReLU are the prologue and epilogue of the convolutions. In training the concatenations and activations may be
computed again instead of kept (``memory_efficient``). State-dict keys and initialisation are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models._common import channels_last
from fastcnn.models._registry import register
from fastcnn.nn import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Linear,
    MaxPool2d,
    bn_act,
    bn_act_conv,
    conv_act,
    conv_bn,
)
from fastcnn.nn.recomputation import may_recompute, recomputed
from fastcnn.ops._registration import autocasts

DENSENET = "https://arxiv.org/abs/1608.06993"
IMAGENET = (3, 224, 224)
CIFAR = (3, 32, 32)


class DenseLayer(nn.Module):
    """BN-ReLU-3x3 or, with a bottleneck (DenseNet-B), BN-ReLU-1x1-BN-ReLU-3x3: H_l in the paper's equation 2.

    (N, in_channels, H, W) -> the new channels alone, (N, growth_rate, H, W).

    Args:
        bn_size: the 1x1 has ``bn_size * growth_rate`` channels; 0 for no bottleneck.
        drop_rate: dropout after the last convolution.
        memory_efficient: keep nothing for the backward pass before the 3x3 convolution's input; without a bottleneck
            nothing at all but the layer's input.
    """

    def __init__(
        self, in_channels: int, growth_rate: int, bn_size: int, drop_rate: float, memory_efficient: bool = False
    ) -> None:
        super().__init__()
        self.memory_efficient = memory_efficient
        self.norm1 = BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.has_bottleneck, self.drop_rate = bn_size > 0, drop_rate
        if self.has_bottleneck:
            width = bn_size * growth_rate
            self.conv1 = Conv2d(in_channels, width, 1, bias=False)
            self.norm2 = BatchNorm2d(width)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = Conv2d(width, growth_rate, 3, padding=1, bias=False)
        else:
            self.conv1 = Conv2d(in_channels, growth_rate, 3, padding=1, bias=False)

    def _first(self, *features: Tensor, out: Tensor | None = None) -> Tensor:
        """Concatenation, BN-ReLU and the first convolution; with a bottleneck as far as the second one's input."""
        x = features[0] if len(features) == 1 else torch.cat(features, 1)
        if self.has_bottleneck:
            return bn_act_conv(
                x, self.norm1, self.conv1, preactivation=self.relu1, next_bn=self.norm2, activation=self.relu2
            )
        return bn_act_conv(x, self.norm1, self.conv1, preactivation=self.relu1, out=out)

    def forward(self, features: Tensor | Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """``features``: the feature maps before this layer, in one tensor or in several of the same N, H and W."""
        parts = (features,) if isinstance(features, Tensor) else tuple(features)
        if self.memory_efficient and out is None and may_recompute():
            norms = [self.norm1, self.norm2] if self.has_bottleneck else [self.norm1]
            y = recomputed(self._first, *parts, norms=norms)
        else:
            y = self._first(*parts, out=out)
        if self.has_bottleneck:
            y = conv_act(y, self.conv2, activation="none", out=out)
        return F.dropout(y, self.drop_rate, self.training) if self.drop_rate > 0 else y


def _may_grow_in_place(input: Tensor) -> bool:
    """Autograd keeps what the layers read, autocast chooses what they write, torch.func allows no writes into tensors
    that it has not wrapped: in these cases a block joins its features with :func:`torch.cat`.
    """
    if torch.is_grad_enabled() or autocasts(input.device.type):
        return False
    return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()


class DenseBlock(nn.Sequential):
    """(N, C, H, W) -> (N, C + layers * growth_rate, H, W): the input's channels, then each layer's.

    Children ``denselayer1`` ... are :class:`DenseLayer`, which ``memory_efficient`` hands lists to join themselves.
    """

    def __init__(
        self,
        layers: int,
        in_channels: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        for i in range(layers):
            layer = DenseLayer(in_channels + i * growth_rate, growth_rate, bn_size, drop_rate, memory_efficient)
            self.add_module(f"denselayer{i + 1}", layer)
        self.in_channels, self.growth_rate, self.memory_efficient = in_channels, growth_rate, memory_efficient

    def forward(self, input: Tensor) -> Tensor:
        if _may_grow_in_place(input):
            return self._grown_in_place(input)
        if self.memory_efficient:
            features = [input]
            for layer in self:
                features.append(layer(tuple(features)))
            return torch.cat(features, 1)
        for layer in self:
            input = torch.cat([input, layer(input)], 1)
        return input

    def _grown_in_place(self, input: Tensor) -> Tensor:
        """One buffer: a layer reads the first channels and writes its own behind them."""
        n, channels, h, w = input.shape
        shape = (n, channels + len(self) * self.growth_rate, h, w)
        buffer = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
        buffer[:, :channels].copy_(input)
        for layer in self:
            new = buffer[:, channels : channels + self.growth_rate]
            written = layer(buffer[:, :channels], out=new)
            if written is not new:  # dropout, or a hook that returned another tensor
                new.copy_(written)
            channels += self.growth_rate
        return buffer


class Transition(nn.Module):
    """Between two blocks: BN-ReLU-1x1 to fewer channels, then the mean of every 2x2 pixels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = Conv2d(in_channels, out_channels, 1, bias=False)
        self.pool = AvgPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(bn_act_conv(x, self.norm, self.conv, preactivation=self.relu))


class DenseFeatures(nn.Module):
    """Stem, dense blocks with transitions between them, and the last batch norm and ReLU."""

    def __init__(
        self,
        growth_rate: int,
        block_config: Sequence[int],
        num_init_features: int,
        bn_size: int,
        drop_rate: float,
        compression: float,
        in_channels: int,
        cifar: bool,
        memory_efficient: bool,
    ) -> None:
        super().__init__()
        channels = num_init_features
        self.cifar, self.blocks = cifar, len(block_config)
        if cifar:
            self.conv0 = Conv2d(in_channels, channels, 3, padding=1, bias=False)
        else:
            self.conv0 = Conv2d(in_channels, channels, 7, 2, padding=3, bias=False)
            self.norm0 = BatchNorm2d(channels)
            self.relu0 = nn.ReLU(inplace=True)
            self.pool0 = MaxPool2d(3, 2, padding=1)
        for i, layers in enumerate(block_config, start=1):
            block = DenseBlock(layers, channels, growth_rate, bn_size, drop_rate, memory_efficient)
            self.add_module(f"denseblock{i}", block)
            channels += layers * growth_rate
            if i < len(block_config):
                compressed = int(channels * compression)
                self.add_module(f"transition{i}", Transition(channels, compressed))
                channels = compressed
        self.norm5 = BatchNorm2d(channels)
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        if self.cifar:
            x = conv_act(x, self.conv0, activation="none")
        else:
            x = conv_bn(x, self.conv0, self.norm0, activation=self.relu0)
            x = self.pool0(channels_last(x))  # one input channel: nothing told the stem which layout was meant
        for i in range(1, self.blocks + 1):
            x = self.get_submodule(f"denseblock{i}")(x)
            if i < self.blocks:
                x = self.get_submodule(f"transition{i}")(x)
        return bn_act(x, self.norm5)


class DenseNet(nn.Module):
    """Stem, dense blocks, global average pool, one linear layer (table 1).

    (N, in_channels, H, W) -> logits (N, num_classes). 224x224 gives blocks of 56, 28, 14 and 7 pixels.

    Args:
        growth_rate: k, the channels that a layer adds.
        block_config: layers in each block.
        num_init_features: the stem's channels.
        bn_size: a layer's 1x1 has ``bn_size * growth_rate`` channels (DenseNet-B); 0: layers are one 3x3.
        drop_rate: dropout after each layer.
        num_classes: logits.
        memory_efficient: in training, keep of a layer its output and (DenseNet-B) what its 3x3 reads, and compute
            concatenation, batch norms, ReLUs and the first convolution again in the backward pass: memory that grows
            with the layers, not with their square, for one more run of those convolutions. Results, gradients and
            running statistics are the same. Under torch.compile, which decides itself what to keep, it changes nothing.
        compression: theta, the part of its channels that a transition keeps (DenseNet-C).
        in_channels: the input's channels.
        cifar: a 3x3 stem instead of 7x7/2 and 3x3/2 max pooling.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
        *,
        compression: float = 0.5,
        in_channels: int = 3,
        cifar: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < compression <= 1:
            raise ValueError(f"compression must be above 0 and at most 1, is {compression}")
        self.features = DenseFeatures(
            growth_rate, block_config, num_init_features, bn_size, drop_rate, compression, in_channels, cifar,
            memory_efficient,
        )  # fmt: skip
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.classifier = Linear(self.features.out_channels, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """Kaiming, fan-in, as torchvision's and the paper's."""
        if self.classifier.weight.is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, C, ceil(H / 32), ceil(W / 32)), after the last batch norm and ReLU."""
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


def cifar_densenet(
    depth: int, growth_rate: int, *, bottleneck: bool, drop_rate: float = 0.0, num_classes: int = 10, **kwargs: Any
) -> DenseNet:
    """Section 4.1: three equal blocks. ``bottleneck`` makes it a DenseNet-BC, else a plain DenseNet.

    Args:
        depth: 3n + 4 weighted layers, with bottlenecks 6n + 4.
        growth_rate: k.
        drop_rate: the paper uses 0.2 where it trains without augmentation.
    """
    convolutions = 2 if bottleneck else 1
    layers, rest = divmod(depth - 4, 3 * convolutions)
    if rest != 0 or layers < 1:
        raise ValueError(f"depth must be {3 * convolutions}n + 4, is {depth}")
    return DenseNet(
        growth_rate,
        (layers,) * 3,
        2 * growth_rate if bottleneck else 16,
        4 if bottleneck else 0,
        drop_rate,
        num_classes,
        compression=0.5 if bottleneck else 1.0,
        cifar=True,
        **kwargs,
    )


@register(IMAGENET, DENSENET)
def densenet121(**kwargs: Any) -> DenseNet:
    return DenseNet(32, (6, 12, 24, 16), 64, **kwargs)


@register(IMAGENET, DENSENET)
def densenet169(**kwargs: Any) -> DenseNet:
    return DenseNet(32, (6, 12, 32, 32), 64, **kwargs)


@register(IMAGENET, DENSENET)
def densenet201(**kwargs: Any) -> DenseNet:
    return DenseNet(32, (6, 12, 48, 32), 64, **kwargs)


@register(IMAGENET, DENSENET)
def densenet161(**kwargs: Any) -> DenseNet:
    return DenseNet(48, (6, 12, 36, 24), 96, **kwargs)


@register(CIFAR, DENSENET)
def densenet40_k12_cifar(**kwargs: Any) -> DenseNet:
    return cifar_densenet(40, 12, bottleneck=False, **kwargs)


@register(CIFAR, DENSENET)
def densenet100_k12_cifar(**kwargs: Any) -> DenseNet:
    return cifar_densenet(100, 12, bottleneck=False, **kwargs)


@register(CIFAR, DENSENET)
def densenet100_k24_cifar(**kwargs: Any) -> DenseNet:
    return cifar_densenet(100, 24, bottleneck=False, **kwargs)


@register(CIFAR, DENSENET)
def densenet_bc100_k12_cifar(**kwargs: Any) -> DenseNet:
    return cifar_densenet(100, 12, bottleneck=True, **kwargs)


@register(CIFAR, DENSENET)
def densenet_bc250_k24_cifar(**kwargs: Any) -> DenseNet:
    return cifar_densenet(250, 24, bottleneck=True, **kwargs)


@register(CIFAR, DENSENET)
def densenet_bc190_k40_cifar(**kwargs: Any) -> DenseNet:
    return cifar_densenet(190, 40, bottleneck=True, **kwargs)
