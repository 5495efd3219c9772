"""What the architectures share: initialisation and the memory layout at the entry."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def initialise_kaiming(model: nn.Module, *, zero_init_residual: bool = False) -> None:
    """He et al., "Delving Deep into Rectifiers" (arXiv:1502.01852), fan-out, as torchvision's ResNets.

    ``zero_init_residual``: the last batch norm of each residual branch starts at 0, so that blocks start as identities
    (arXiv:1706.02677, section 5.1).
    """
    if next(model.parameters()).is_meta:  # nothing to initialise
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    if zero_init_residual:
        for module in model.modules():
            last = getattr(module, "bn3", None) or getattr(module, "bn2", None)
            if isinstance(last, nn.BatchNorm2d):
                nn.init.zeros_(last.weight)


def channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) in channels-last memory: converted once, where a network begins."""
    if x.dim() != 4:
        raise ValueError(f"input must have shape (N, C, H, W), has {tuple(x.shape)}")
    x = x.contiguous(memory_format=torch.channels_last)
    if x.shape[1] == 1:  # both layouts at once, until the strides say which one is meant
        n, _, h, w = x.shape
        x = x.reshape(n, h, w, 1).permute(0, 3, 1, 2)
    return x
