"""GoogLeNet: Szegedy et al., "Going Deeper with Convolutions" (arXiv:1409.4842), table 1.

``googlenet_lrn`` is the paper's. ``googlenet`` is torchvision's, with its state-dict keys and initialisation: batch
norm for local response normalisation, a 3x3 where the paper has a 5x5, a smaller fourth pooling.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcnn.models._common import channels_last
from fastcnn.models._registry import register
from fastcnn.nn import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    ConvBNReLU,
    ConvReLU,
    Inception,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    linear_act,
)

PAPER = "https://arxiv.org/abs/1409.4842"
IMAGENET = (3, 224, 224)
AUX_LOSS_WEIGHT = 0.3  # section 5: what each auxiliary classifier's loss is multiplied by before it is added

# Table 1: #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj.
BLOCKS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class GoogLeNetOutputs(NamedTuple):
    """What a GoogLeNet with auxiliary classifiers returns in train mode, each (N, num_classes).

    The paper's loss: ``loss(logits) + 0.3 * (loss(aux_logits1) + loss(aux_logits2))``.
    """

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class InceptionAux(nn.Module):
    """An auxiliary classifier: average pool to 4x4, 1x1 convolution to 128, linear 1024, dropout, linear.

    (N, in_channels, 14, 14) -> (N, num_classes). ``pool`` is the paper's 5x5/3 or torchvision's adaptive one, which
    takes other sizes as well.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        conv_block: type[ConvBNReLU] | type[ConvReLU],
        pool: nn.Module,
        dropout: float = 0.7,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.conv = conv_block(in_channels, 128, 1)
        self.fc1 = Linear(2048, 1024)
        self.fc2 = Linear(1024, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.conv(self.pool(x)), 1)
        return self.fc2(self.dropout(linear_act(x, self.fc1)))


class GoogLeNet(nn.Module):
    """Three convolutions, nine inception modules, global average pool, one linear layer.

    (N, in_channels, H, W) -> logits (N, num_classes); in train mode, with ``aux_logits``,
    :class:`GoogLeNetOutputs`. 224x224 gives modules of 28, 14 and 7 pixels.

    Args:
        num_classes: logits.
        aux_logits: with the two auxiliary classifiers, which only train mode computes. Without them, ``weights=`` of
            :func:`fastcnn.create_model` may still hold them: their keys, and no others, are left out.
        transform_input: the input is normalised with ImageNet's mean and deviation; change that to mean and deviation
            0.5, as torchvision's pretrained weights need.
        init_weights: the network's own initialisation; False leaves PyTorch's.
        dropout, dropout_aux: before the last linear layer of the network and of the auxiliary classifiers.
        batch_norm: torchvision's network; False for the paper's (biases, local response normalisation with Caffe's
            constants, 5x5 filters, 3x3 for the fourth pooling, 5x5/3 average pooling in the auxiliary classifiers).
        in_channels: the input's channels.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        init_weights: bool = True,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
        *,
        batch_norm: bool = True,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if transform_input and in_channels != 3:
            raise ValueError(f"transform_input is for in_channels=3, which are {in_channels}")
        self.aux_logits, self.transform_input, self.batch_norm = aux_logits, transform_input, batch_norm
        conv = ConvBNReLU if batch_norm else ConvReLU
        self.conv1 = conv(in_channels, 64, 7, 2, padding=3)
        self.maxpool1 = MaxPool2d(3, 2, ceil_mode=True)
        self.norm1 = nn.Identity() if batch_norm else LocalResponseNorm(5)
        self.conv2 = conv(64, 64, 1)
        self.conv3 = conv(64, 192, 3, padding=1)
        self.norm2 = nn.Identity() if batch_norm else LocalResponseNorm(5)
        self.maxpool2 = MaxPool2d(3, 2, ceil_mode=True)
        self.inception3a = self._inception("3a", 192)
        self.inception3b = self._inception("3b", 256)
        self.maxpool3 = MaxPool2d(3, 2, ceil_mode=True)
        self.inception4a = self._inception("4a", 480)
        self.inception4b = self._inception("4b", 512)
        self.inception4c = self._inception("4c", 512)
        self.inception4d = self._inception("4d", 512)
        self.inception4e = self._inception("4e", 528)
        self.maxpool4 = MaxPool2d(2 if batch_norm else 3, 2, ceil_mode=True)
        self.inception5a = self._inception("5a", 832)
        self.inception5b = self._inception("5b", 832)
        self.aux1 = self.aux2 = None
        if aux_logits:
            self.aux1 = InceptionAux(512, num_classes, conv, self._aux_pool(), dropout_aux)
            self.aux2 = InceptionAux(528, num_classes, conv, self._aux_pool(), dropout_aux)
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = Linear(1024, num_classes)
        if init_weights:
            self._initialise()

    def _inception(self, name: str, in_channels: int) -> Inception:
        conv, kernel_size = (ConvBNReLU, 3) if self.batch_norm else (ConvReLU, 5)
        return Inception(in_channels, *BLOCKS[name], conv, kernel_size=kernel_size)

    def _aux_pool(self) -> nn.Module:
        return AdaptiveAvgPool2d((4, 4)) if self.batch_norm else AvgPool2d(5, 3)

    def left_out_keys(self) -> frozenset[str]:
        """The auxiliary classifiers' state-dict keys, where this network has none."""
        if self.aux1 is not None:
            return frozenset()
        with torch.device("meta"):
            head = InceptionAux(512, 1, ConvBNReLU if self.batch_norm else ConvReLU, self._aux_pool())
        return frozenset(f"{name}.{key}" for name in ("aux1", "aux2") for key in head.state_dict())

    def _initialise(self) -> None:
        """torchvision's truncated Gaussian; for the paper's network that of Caffe's bvlc_googlenet."""
        if self.fc.weight.is_meta:  # nothing to initialise
            return
        for module in self.modules():
            if not isinstance(module, (nn.Conv2d, nn.Linear)):
                continue
            if self.batch_norm:
                nn.init.trunc_normal_(module.weight, 0.0, 0.01, -2, 2)
            else:
                bound = math.sqrt(3 / module.weight[0].numel())
                nn.init.uniform_(module.weight, -bound, bound)
                assert module.bias is not None
                nn.init.constant_(module.bias, 0.2 if isinstance(module, nn.Conv2d) else 0.0)

    def _transformed(self, x: Tensor) -> Tensor:
        """From (x - mean) / std with ImageNet's constants to (x - 0.5) / 0.5."""
        if not self.transform_input:
            return x
        red = x[:, 0:1] * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
        green = x[:, 1:2] * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
        blue = x[:, 2:3] * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
        return torch.cat((red, green, blue), 1)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        x = self.conv1(channels_last(self._transformed(x)))
        x = self.norm1(self.maxpool1(x))
        x = self.conv3(self.conv2(x))
        x = self.maxpool2(self.norm2(x))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x = self.inception4a(x)
        aux1 = self.aux1(x) if self.training and self.aux1 is not None else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x) if self.training and self.aux2 is not None else None
        x = self.maxpool4(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))
        logits = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        return logits if aux1 is None or aux2 is None else GoogLeNetOutputs(logits, aux2, aux1)


@register(IMAGENET, PAPER)
def googlenet(**kwargs: Any) -> GoogLeNet:
    """torchvision's."""
    return GoogLeNet(**kwargs)


@register(IMAGENET, PAPER)
def googlenet_lrn(**kwargs: Any) -> GoogLeNet:
    """The paper's, with its dropout of 0.4 before the last layer."""
    return GoogLeNet(batch_norm=False, **{"dropout": 0.4, **kwargs})
