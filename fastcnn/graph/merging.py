"""1x1 convolutions of one value as one call: its pixels are read once, and there is one call to make.

    a = conv_bn(x, a_conv, a_bn)                 parts = pointwise(x, ((a_conv, a_bn, "relu"), (b_conv, b_bn, "relu")))
    ...                                becomes   a = conv_bn(x, a_conv, a_bn, merged=(parts, 0))
    b = conv_bn(x, b_conv, b_bn)                 ...
                                                 b = conv_bn(x, b_conv, b_bn, merged=(parts, 1))

Parts are slices of one buffer, so they are merged only where fused calls alone read them. Whether there are parts is
decided in each call: not where gradients are recorded, where a batch norm uses its batch's statistics, or where a layer
was given hooks. Then ``parts`` is None, and each call computes its own. The layers keep their parameters; the joined
weight is a derived value, kept until one of them changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fastcnn import ops
from fastcnn.backends.derived import PLAIN_TENSORS
from fastcnn.graph import calls, concatenation, roles
from fastcnn.graph.aliases import Aliases
from fastcnn.graph.patterns import MERGED
from fastcnn.nn import fusing
from fastcnn.nn.merging import is_as_in_a_call, joined, writes_in_place
from fastcnn.ops._layout import is_channels_last

Branch = tuple[calls.ConvLayer, calls.NormLayer | None, fusing.Activation]

# ---- in each call ----------------------------------------------------------------------------------------------------


def pointwise(x: Tensor, branches: Sequence[Branch]) -> tuple[Tensor, ...] | None:
    """``act(bn(conv(x)))`` of every branch, as slices of one buffer; None where they are to be computed apart.

    Args:
        x: (N, C, H, W).
        branches: 1x1 convolution, batch norm or None, activation.
    """
    if not is_as_in_a_call(x) or x.dim() != 4 or not x.numel() or x.is_meta or not is_channels_last(x):
        return None
    activation = fusing._fusable_name(branches[0][2])
    stride: Any = None
    tensors: list[Tensor | None] = []
    epsilons: list[float | None] = []
    for conv, bn, act in branches:
        filters, norm = calls._filters(conv), None if bn is None else calls._statistics(bn)
        if filters is None or (bn is not None and norm is None) or fusing._fusable_name(act) != activation:
            return None
        weight = filters["weight"]
        steps = _pair(filters.get("stride", 1))
        if not _is_pointwise(filters, x) or (stride is not None and steps != stride):
            return None
        stride = steps
        tensors += [weight, filters["bias"]]
        tensors += [None] * 4 if norm is None else [norm.get(n) for n in _STATISTICS]
        epsilons.append(None if norm is None else norm.get("eps", 1e-5))
    if activation is None or not all(t is None or type(t) in PLAIN_TENSORS for t in tensors):
        return None
    if not writes_in_place(x, tensors):
        return None
    weight, scale, bias = joined(tensors, tuple(epsilons))
    together = ops.conv2d(x, weight, bias, stride, scale=scale, activation=activation)
    widths = [len(tensors[i]) for i in range(0, len(tensors), 6)]  # type: ignore[arg-type]
    return together.split(widths, 1)  # type: ignore[no-any-return, no-untyped-call]


def _pair(value: Any) -> Any:
    """A setting for both dimensions; padding by name is none, of a 1x1 filter."""
    if isinstance(value, str):
        return (0, 0)
    return tuple(value) * (3 - len(value)) if isinstance(value, (tuple, list)) else (value, value)


_STATISTICS = ("running_mean", "running_var", "weight", "bias")


def _is_pointwise(filters: calls.Settings, x: Tensor) -> bool:
    weight = filters["weight"]
    return (
        weight.shape[1:] == (x.shape[1], 1, 1)
        and weight.dtype == x.dtype
        and weight.device == x.device
        and filters.get("groups", 1) == 1
        and _pair(filters.get("padding", 0)) == (0, 0)
    )


# ---- in the graph ----------------------------------------------------------------------------------------------------

# What may read a part: calls that take a slice of a wider tensor as it is.
_READERS = (
    calls.conv_bn, calls.conv_act, calls.bn_act, calls.bn_act_conv, calls.pool,
    ops.max_pool2d, ops.avg_pool2d, ops.adaptive_avg_pool2d,
)  # fmt: skip


def merge_pointwise(
    graph: fx.Graph, modules: Mapping[str, nn.Module], patterns: Mapping[fx.Node, str]
) -> dict[fx.Node, list[fx.Node]]:
    """Rewrite a graph of fused calls.

    Args:
        graph: with concatenations in place: what writes into their slices stays as it is.
        modules: by path.
        patterns: of each fused call its chain.

    Returns:
        The new calls, each with those that it does the work of.
    """
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if patterns.get(node) in MERGED and _can_be_a_part(node, modules):
            groups.setdefault((node.args[0], patterns[node], _stride(node.args[1], modules)), []).append(node)
    if not any(len(nodes) > 1 for nodes in groups.values()):
        return {}
    aliases = Aliases(
        graph, lambda n: roles.may_write(n, modules), lambda n: roles.makes_a_new_tensor(n, modules)
    )  # fmt: skip
    order = aliases.order
    found = {}
    for (x, *_), nodes in groups.items():
        first = nodes[0]
        early = [n for n in nodes if all(_is_ready(v, first, order) for v in n.all_input_nodes)]
        written = [w for w in aliases.writers(x) if w > order[first]]
        early = [n for n in early if not any(w < order[n] for w in written)]
        if len(early) > 1:
            found[_merge(graph, x, early)] = early
    return found


def _can_be_a_part(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if not node.kwargs.keys() <= {"activation", "in_place"} or not isinstance(node.args[0], fx.Node) or not node.users:
        return False
    layer: Any = node.args[1]
    if isinstance(layer, fx.Node):
        conv = modules.get(str(layer.target)) if layer.op == "get_attr" else None
        if not isinstance(conv, nn.Conv2d):
            return False
        filters, shape = {name: getattr(conv, name) for name in calls._GEOMETRY}, conv.weight.shape
    else:
        filters, shape = layer, _shape_of(layer["weight"], modules)
    if shape is None or shape[2:] != (1, 1) or filters.get("groups", 1) != 1:
        return False
    return _pair(filters.get("padding", 0)) == (0, 0) and all(_reads_image(user, node) for user in node.users)


def _stride(layer: Any, modules: Mapping[str, nn.Module]) -> Any:
    return _pair(modules[str(layer.target)].stride if isinstance(layer, fx.Node) else layer.get("stride", 1))


def _shape_of(weight: Any, modules: Mapping[str, nn.Module]) -> Any:
    """A parameter's shape: by its path, or in Dynamo's graphs by its example."""
    if not isinstance(weight, fx.Node):
        return None
    value = weight.meta.get("example_value")
    if weight.op == "get_attr":
        path, _, name = str(weight.target).rpartition(".")
        value = modules[path]._parameters.get(name) if path in modules else None
    return value.shape if isinstance(value, Tensor) and value.dim() == 4 else None


def _reads_image(user: fx.Node, node: fx.Node) -> bool:
    """Whether a call reads a node as its image and as nothing else, or its shape only."""
    if user.target in (concatenation.begin, concatenation.target):
        return True
    others: list[fx.Node] = []
    fx.node.map_arg((user.args[1:], user.kwargs), others.append)
    return user.op == "call_function" and user.target in _READERS and user.args[:1] == (node,) and node not in others


def _is_ready(value: Any, first: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether a layer's tensor or setting can be had before a node."""
    if _is_number(value):
        return _is_ready(value.args[0], first, order)
    return value.op == "get_attr" or order[value] < order[first]


def _is_number(value: fx.Node) -> bool:
    """Dynamo's way to a setting (eps) that it takes for dynamic."""
    return value.op == "call_method" and value.target == "item"


def _merge(graph: fx.Graph, x: fx.Node, nodes: list[fx.Node]) -> fx.Node:
    with graph.inserting_before(nodes[0]):

        def early(value: fx.Node) -> fx.Node:
            return graph.node_copy(value, early) if value.op == "get_attr" or _is_number(value) else value

        branches = tuple(
            (node.args[1], node.args[2] if len(node.args) > 2 else None, node.kwargs.get("activation", "none"))
            for node in nodes
        )
        new = graph.call_function(pointwise, (x, fx.node.map_arg(branches, early)))
    for place, node in enumerate(nodes):
        node.update_kwarg("merged", (new, place))
    return new
