"""VGG: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (arXiv:1409.1556).

State-dict keys and initialisation are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.models._common import channels_last
from fastcnn.models._registry import register
from fastcnn.nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, FusedSequential, Linear, MaxPool2d

PAPER = "https://arxiv.org/abs/1409.1556"
IMAGENET = (3, 224, 224)

# Table 1: the 3x3 convolutions (their output channels) of each of the five stages, which end in 2x2 pooling.
STAGES = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    19: ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512, 512, 512, 512)),
}


class VGG(nn.Module):
    """Stages of 3x3 convolutions that end in 2x2 max pooling, then three linear layers.

    (N, in_channels, H, W) -> logits (N, num_classes). 224x224 gives stages of 224, 112, 56, 28, 14 pixels and 7x7 to
    the linear layers; other sizes are pooled to 7x7.

    Args:
        stages: output channels of each stage's convolutions.
        batch_norm: a batch norm after each convolution.
        num_classes: logits.
        dropout: after each hidden linear layer, in train mode.
        init_weights: torchvision's initialisation (He's for convolutions); False leaves PyTorch's.
        in_channels: the input's channels.
        hidden: width of the hidden linear layers.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        batch_norm: bool = False,
        num_classes: int = 1000,
        dropout: float = 0.5,
        *,
        init_weights: bool = True,
        in_channels: int = 3,
        hidden: int = 4096,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in stages:
            for out_channels in stage:
                layers.append(Conv2d(channels, out_channels, 3, padding=1))
                layers += [BatchNorm2d(out_channels)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                channels = out_channels
            layers.append(MaxPool2d(2, 2))
        self.features = FusedSequential(*layers)
        self.avgpool = AdaptiveAvgPool2d((7, 7))
        self.classifier = FusedSequential(
            Linear(channels * 7 * 7, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            Linear(hidden, num_classes),
        )
        if init_weights:
            self._initialise()

    def _initialise(self) -> None:
        if next(self.parameters()).is_meta:  # nothing to initialise
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 512, H // 32, W // 32), the last stage's output."""
        return self.features(channels_last(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.forward_features(x))
        return self.classifier(torch.flatten(x, 1))


@register(IMAGENET, PAPER)
def vgg11(**kwargs: Any) -> VGG:
    """Configuration A."""
    return VGG(STAGES[11], **kwargs)


@register(IMAGENET, PAPER)
def vgg13(**kwargs: Any) -> VGG:
    """Configuration B."""
    return VGG(STAGES[13], **kwargs)


@register(IMAGENET, PAPER)
def vgg16(**kwargs: Any) -> VGG:
    """Configuration D."""
    return VGG(STAGES[16], **kwargs)


@register(IMAGENET, PAPER)
def vgg19(**kwargs: Any) -> VGG:
    """Configuration E."""
    return VGG(STAGES[19], **kwargs)


@register(IMAGENET, PAPER)
def vgg11_bn(**kwargs: Any) -> VGG:
    return VGG(STAGES[11], batch_norm=True, **kwargs)


@register(IMAGENET, PAPER)
def vgg13_bn(**kwargs: Any) -> VGG:
    return VGG(STAGES[13], batch_norm=True, **kwargs)


@register(IMAGENET, PAPER)
def vgg16_bn(**kwargs: Any) -> VGG:
    return VGG(STAGES[16], batch_norm=True, **kwargs)


@register(IMAGENET, PAPER)
def vgg19_bn(**kwargs: Any) -> VGG:
    return VGG(STAGES[19], batch_norm=True, **kwargs)
