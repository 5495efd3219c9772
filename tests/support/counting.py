"""Parameters, multiply-adds and output volumes of a model, counted by hooks on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import fastcnn


def on_meta(build: Callable[..., nn.Module] | str, **options: object) -> nn.Module:
    """The model, or the registered one of that name, without memory for its parameters."""
    with torch.device("meta"):
        return fastcnn.create_model(build, **options) if isinstance(build, str) else build(**options)


def parameters(model: nn.Module, *, without: str | None = None) -> int:
    """Trainable values; ``without`` leaves out the parameters whose names start so."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if p.requires_grad and not (without and name.startswith(without)))


def volumes(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """The output of every layer without children that is called, without the batch dimension, by the layer's name."""
    found: dict[str, tuple[int, ...]] = {}
    handles = [
        module.register_forward_hook(lambda m, i, o, name=name: found.__setitem__(name, tuple(o.shape[1:])))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    device = next(model.parameters()).device
    with torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device=device))
    for handle in handles:
        handle.remove()
    return found


def multiply_adds(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Of convolutions and linear layers."""
    sizes = volumes(model, input_size)
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name in sizes:
            total += torch.Size(sizes[name]).numel() * module.weight[0].numel()
    return total
