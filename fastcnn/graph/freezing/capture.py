"""A model's graph in eval mode: fastcnn's operators and ATen's, with a fake value (shape, strides, storage) for each.

The model runs once on fake tensors, so that nothing is computed; what its forward decides by values of its input cannot
be captured, and PyTorch says so.
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
        ValueError: the result holds something else than tensors.
    """
    specs: list[TreeSpec] = []

    def forward(*arguments: Tensor) -> list[Any]:
        leaves, spec = tree_flatten(model(*arguments))
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise ValueError(f"model must return tensors, returned a {type(leaf).__name__}")
        specs.append(spec)
        return leaves

    modes = {module: module.training for module in model.modules()}
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
