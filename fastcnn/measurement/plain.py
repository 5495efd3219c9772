"""A network as PyTorch, and the tools that read its programs, would have it: without any of fastcnn's operators."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules.module import register_module_forward_hook

from fastcnn.nn import modules

_PARENTS: dict[type[nn.Module], type[nn.Module]] = {
    modules.Conv2d: nn.Conv2d,
    modules.Linear: nn.Linear,
    modules.BatchNorm2d: nn.BatchNorm2d,
    modules.MaxPool2d: nn.MaxPool2d,
    modules.AvgPool2d: nn.AvgPool2d,
    modules.AdaptiveAvgPool2d: nn.AdaptiveAvgPool2d,
    modules.LocalResponseNorm: nn.LocalResponseNorm,
}


def plain_program(model: nn.Module, input: Tensor) -> ExportedProgram:
    """The network's inference on ``input``'s shape as a program of PyTorch's own operators.

    fastcnn's layers are replaced by the ``torch.nn`` layers that they extend, and fused calls are taken apart into the
    modules that they stand for, which is what they do by themselves when something watches every module. The model
    itself is left as it is.

    Args:
        model: any network, of fastcnn's modules or not.
        input: (N, C, H, W).

    Raises:
        ValueError: the network still calls one of fastcnn's operators: it does so outside modules.
    """
    plain = copy.deepcopy(model).eval()
    for module in plain.modules():
        module.__class__ = _PARENTS.get(type(module), type(module))
    watcher = register_module_forward_hook(lambda module, args, output: None)
    try:
        with torch.no_grad():
            program = torch.export.export(plain, (input,), strict=False)
    finally:
        watcher.remove()
    ours = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("fastcnn")}
    if ours:
        raise ValueError(f"{type(model).__name__} calls {', '.join(sorted(ours))} outside of fastcnn's modules")
    return program
