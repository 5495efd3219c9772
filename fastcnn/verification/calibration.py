"""Random weights that make a good test: every term counts, and activations stay in range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastcnn.backends import use_backend


@torch.no_grad()
def calibrate(model: nn.Module, *inputs: Tensor, seed: int = 0) -> nn.Module:
    """Give an untrained network's batch norms and biases values a trained one could have, and return it.

    As initialised, batch norm is the identity and biases are zero, so a kernel that left them out would pass, and
    activations of deep residual networks grow until fp16 overflows. Here scales and biases are drawn at random, and
    the running statistics are those of one train-mode pass over ``inputs`` (on PyTorch's own operators).
    """
    generator = torch.Generator().manual_seed(seed)

    def random(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty(like.shape).uniform_(low, high, generator=generator).to(like)

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for module in model.modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.add_(random(bias, -0.1, 0.1))
        if isinstance(module, _BatchNorm) and module.weight is not None:
            module.weight.mul_(random(module.weight, 0.75, 1.25))
    if not any(norm.track_running_stats for norm in norms):
        return model
    training = {m: m.training for m in model.modules()}
    momenta: dict[_BatchNorm, Any] = {norm: norm.momentum for norm in norms}
    cpu_state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)  # dropout
        model.train()
        for norm in norms:
            norm.momentum = 1.0
        with use_backend("reference"):
            model(*inputs)
    finally:
        torch.set_rng_state(cpu_state)
        for module, mode in training.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    return model
