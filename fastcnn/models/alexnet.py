"""AlexNet: Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks" (2012).

``alexnet`` is the lecture's: one tower, pooling before normalisation. ``alexnet_2gpu`` is the paper's: two towers,
which meet in conv3 and the linear layers only, normalisation before pooling. ``alexnet_owt`` is the one-tower network
of "One weird trick for parallelizing convolutional neural networks" (arXiv:1404.5997), torchvision's, with its
state-dict keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.models._common import channels_last
from fastcnn.models._registry import register
from fastcnn.nn import (
    AdaptiveAvgPool2d,
    Conv2d,
    FusedSequential,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    conv_act,
    linear_act,
)

PAPER = "https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks"
ONE_WEIRD_TRICK = "https://arxiv.org/abs/1404.5997"


class AlexNet(nn.Module):
    """Five convolutions, three of them followed by pooling, and three linear layers.

    (N, in_channels, 227, 227) -> logits (N, num_classes). (The paper says 224, with which its numbers do not work out.)

    Args:
        num_classes: logits.
        dropout: before the second and third linear layer, in train mode.
        groups: of conv2, conv4 and conv5: 2 for the paper's two GPUs.
        norm_first: the paper's order and constants: normalise (k = 2, alpha = 1e-4 for each channel), then pool. Else
            Caffe's and the lecture's: pool, then normalise (k = 1, alpha = 1e-4 over all five channels).
        in_channels: the input's channels.
        hidden: width of the hidden linear layers.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dropout: float = 0.5,
        *,
        groups: int = 1,
        norm_first: bool = False,
        in_channels: int = 3,
        hidden: int = 4096,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        # torch divides alpha by the size, the paper does not.
        alpha, k = (5e-4, 2.0) if norm_first else (1e-4, 1.0)
        self.conv1 = Conv2d(in_channels, 96, 11, 4)
        self.pool1 = MaxPool2d(3, 2)
        self.norm1 = LocalResponseNorm(5, alpha, 0.75, k)
        self.conv2 = Conv2d(96, 256, 5, padding=2, groups=groups)
        self.pool2 = MaxPool2d(3, 2)
        self.norm2 = LocalResponseNorm(5, alpha, 0.75, k)
        self.conv3 = Conv2d(256, 384, 3, padding=1)
        self.conv4 = Conv2d(384, 384, 3, padding=1, groups=groups)
        self.conv5 = Conv2d(384, 256, 3, padding=1, groups=groups)
        self.pool5 = MaxPool2d(3, 2)
        self.fc6 = Linear(256 * 6 * 6, hidden)
        self.drop6 = nn.Dropout(dropout)
        self.fc7 = Linear(hidden, hidden)
        self.drop7 = nn.Dropout(dropout)
        self.fc8 = Linear(hidden, num_classes)
        self.relu = nn.ReLU(inplace=True)
        self._initialise()

    def _initialise(self) -> None:
        """Section 5: Gaussian weights; biases 1 where they give the ReLUs positive inputs."""
        if self.conv1.weight.is_meta:  # nothing to initialise
            return
        positive = (self.conv2, self.conv4, self.conv5, self.fc6, self.fc7)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.constant_(module.bias, 1.0 if module in positive else 0.0)  # type: ignore[arg-type]

    def _pool_norm(self, x: Tensor, pool: nn.Module, norm: nn.Module) -> Tensor:
        return pool(norm(x)) if self.norm_first else norm(pool(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, 227, 227) -> (N, 256, 6, 6), the last pooling's output."""
        x = conv_act(channels_last(x), self.conv1, activation=self.relu)
        x = self._pool_norm(x, self.pool1, self.norm1)
        x = conv_act(x, self.conv2, activation=self.relu)
        x = self._pool_norm(x, self.pool2, self.norm2)
        x = conv_act(x, self.conv3, activation=self.relu)
        x = conv_act(x, self.conv4, activation=self.relu)
        x = conv_act(x, self.conv5, activation=self.relu)
        return self.pool5(x)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.forward_features(x), 1)
        if x.shape[1] != self.fc6.in_features:
            raise ValueError(
                f"input must have 227x227 pixels: its last volume has {x.shape[1]} values, not 256 * 6 * 6"
            )
        x = self.drop6(linear_act(x, self.fc6, activation=self.relu))
        x = self.drop7(linear_act(x, self.fc7, activation=self.relu))
        return self.fc8(x)


class AlexNetOWT(nn.Module):
    """One tower, narrower, without normalisation; torchvision's ``alexnet``.

    (N, in_channels, H, W) -> logits (N, num_classes). 224x224 gives 55, 27 and 13 pixels and 6x6 to the linear layers;
    other sizes are pooled to 6x6. Initialised as PyTorch initialises layers.

    Args:
        num_classes: logits.
        dropout: before the first and second linear layer, in train mode.
        in_channels: the input's channels.
        hidden: width of the hidden linear layers.
    """

    def __init__(
        self, num_classes: int = 1000, dropout: float = 0.5, *, in_channels: int = 3, hidden: int = 4096
    ) -> None:
        super().__init__()
        self.features = FusedSequential(
            Conv2d(in_channels, 64, 11, 4, padding=2),
            nn.ReLU(inplace=True),
            MaxPool2d(3, 2),
            Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            MaxPool2d(3, 2),
            Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            MaxPool2d(3, 2),
        )
        self.avgpool = AdaptiveAvgPool2d((6, 6))
        self.classifier = FusedSequential(
            nn.Dropout(dropout),
            Linear(256 * 6 * 6, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            Linear(hidden, num_classes),
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 256, P, Q), the last pooling's output: 6x6 for 224x224."""
        return self.features(channels_last(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.forward_features(x))
        return self.classifier(torch.flatten(x, 1))


@register((3, 227, 227), PAPER)
def alexnet(**kwargs: Any) -> AlexNet:
    """The lecture's: ungrouped, pooling before normalisation."""
    return AlexNet(**kwargs)


@register((3, 227, 227), PAPER)
def alexnet_2gpu(**kwargs: Any) -> AlexNet:
    """The paper's: conv2, conv4 and conv5 in two groups, one a GPU; normalisation before pooling."""
    return AlexNet(groups=2, norm_first=True, **kwargs)


@register((3, 224, 224), ONE_WEIRD_TRICK)
def alexnet_owt(**kwargs: Any) -> AlexNetOWT:
    return AlexNetOWT(**kwargs)
