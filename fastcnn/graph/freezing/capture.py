"""A model's graph in eval mode: fastcnn's operators and ATen's, with a fake value (shape, strides, storage) for each.

The model runs once on fake tensors, so that nothing is computed; what its forward decides by values of its input cannot
be captured, and PyTorch says so.

PyTorch's fake results of some operators (group norm, channel shuffle) do not have the strides of the real ones, and
then reshape() and contiguous() make a copy in one world and a view in the other: writes after them would go elsewhere.
So the graph is run once on real tensors, and captured again with the real strides of operators that were wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten

from fastcnn.graph.capturing import capturing
from fastcnn.graph.freezing.real_strides import RealStrides, WrongStrides


@dataclass
class Captured:
    """``graph``'s outputs are the leaves of the model's result, whose structure is ``spec``."""

    module: GraphModule
    spec: TreeSpec

    @property
    def graph(self) -> Graph:
        return self.module.graph


def capture(model: nn.Module, inputs: Sequence[Tensor]) -> Captured:
    """Trace ``model(*inputs)`` in eval mode; the model's own modes are left as they were.

    Raises:
        ValueError: the result holds something else than tensors; or strides of fake results cannot be made right.
    """
    suspects: set[Any] = set()
    while True:
        captured = _captured(model, inputs, suspects)
        wrong = WrongStrides(captured.module, inputs).found
        if not wrong:
            return captured
        if wrong <= suspects:  # captured with the real strides, and yet
            names = ", ".join(sorted(map(str, wrong)))
            raise ValueError(
                f"model cannot be frozen: PyTorch's fake results of {names} have other strides than the real ones"
            )
        suspects |= wrong


def _captured(model: nn.Module, inputs: Sequence[Tensor], suspects: set[Any]) -> Captured:
    specs: list[TreeSpec] = []

    def forward(*arguments: Tensor) -> list[Any]:
        with RealStrides(suspects):
            result = model(*arguments)
        leaves, spec = tree_flatten(result)
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise ValueError(f"model must return tensors, returned a {type(leaf).__name__}")
        specs.append(spec)
        return leaves

    modes = {module: module.training for module in model.modules()}
    if any(modes.values()):  # fastcnn's modules forget their packed weights when their mode is set
        model.eval()
    token = capturing.set(True)
    try:
        with torch.no_grad():
            module = make_fx(forward, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    finally:
        capturing.reset(token)
        for each, training in modes.items():
            each.training = training
    return Captured(module, specs[-1])
