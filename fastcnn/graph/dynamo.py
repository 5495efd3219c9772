"""``torch.compile(model, backend="fastcnn")``: the pattern table on the graphs that TorchDynamo captures.

Dynamo passes parameters to its graphs as inputs, so that layers appear as functions of tensors; it guards what a graph
took for granted, breaks graphs where it must, and captures train and eval mode apart. The rewritten graph runs node by
node on PyTorch's eager engine, where autograd records fastcnn's operators: training needs nothing else.

An installed fastcnn is found by its entry point ``torch_dynamo_backends``; :func:`register` does the same by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from fastcnn.graph.rewriting import rewrite


def fastcnn(graph_module: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """The backend: a captured graph, rewritten, as a callable."""
    rewrite(graph_module.graph, dict(graph_module.named_modules(remove_duplicate=False)))
    graph_module.recompile()
    return graph_module.forward


def register() -> None:
    """Make the backend known to ``torch.compile`` where fastcnn was not installed with its entry points."""
    from torch._dynamo.backends import registry

    if "fastcnn" not in registry.list_backends(exclude_tags=()):
        registry.register_backend(fastcnn, name="fastcnn")
