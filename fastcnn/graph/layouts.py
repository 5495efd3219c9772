"""Channels-last memory between fused calls, whatever the layout of the model's input.

Kernels work on channels-last memory, and an operator's result has the layout that PyTorch's would have. A model that is
given contiguous images would so be converted to and fro at every layer. Here a graph is converted at its borders
instead: what calls that follow the layout of their input hand to each other stays channels-last (``enter``), and where
anything else reads a value, or the model returns it, it has PyTorch's layout again (``leave``).

A conversion is a copy. A value is not converted where a write into it could be missed by one of its two forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastcnn import ops
from fastcnn.graph import calls, concatenation, merging, roles
from fastcnn.graph.aliases import Aliases
from fastcnn.graph.capturing import memory_is_unknown
from fastcnn.ops._layout import in_layout, is_channels_last

# ---- in each call ----------------------------------------------------------------------------------------------------


def enter(x: Any, conv: Any) -> tuple[Any, bool]:
    """A value in channels-last memory, and whether PyTorch would go on in contiguous memory from it.

    ``conv``: a convolution that reads it, if there is one: it goes on in channels-last memory if its weight is.
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or is_channels_last(x) or memory_is_unknown():
        return x, False
    weight = conv["weight"] if isinstance(conv, dict) else getattr(conv, "weight", None)
    contiguous = not (isinstance(weight, Tensor) and weight.dim() == 4 and is_channels_last(weight))
    return x.contiguous(memory_format=torch.channels_last), contiguous


def leave(x: Any, *contiguous: bool) -> Any:
    """A value in the layout that PyTorch would have given it."""
    if not any(contiguous) or not isinstance(x, Tensor) or x.dim() != 4 or x.is_contiguous():
        return x
    return in_layout(x, channels_last=False)


# ---- in the graph ----------------------------------------------------------------------------------------------------

# Which arguments of fused calls are images.
_FUSED: dict[Callable[..., Any], int] = {
    calls.conv_bn: 1, calls.conv_act: 1, calls.bn_act: 1, calls.bn_act_conv: 1, calls.add_act: 2, calls.pool: 1,
    ops.max_pool2d: 1, ops.avg_pool2d: 1, ops.adaptive_avg_pool2d: 1,
}  # fmt: skip
# What looks at a value's shape and layout, and must see what fused calls read.
_READ_SHAPES = (concatenation.begin, concatenation.target, merging.pointwise)
# Value by value, or over pixels: the result has the layout of the input.
_OTHERS = "GLU Softmax LogSoftmax softmax log_softmax RReLU PReLU prelu"
_OPERATIONS = "relu relu_ ReLU add sub mul truediv iadd isub imul add_ sub_ mul_ mean cat concat"
_FOLLOW = (roles.ACTIVATIONS | frozenset(_OPERATIONS.split())) - frozenset(_OTHERS.split())


def keep_channels_last(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Put conversions at the borders of what can stay channels-last."""
    members = {node for node in graph.nodes if _follows(node, modules)}
    if not any(_images(node) for node in members):
        return
    aliases = Aliases(
        graph, lambda n: roles.may_write(n, modules), lambda n: roles.makes_a_new_tensor(n, modules)
    )  # fmt: skip
    while True:
        members -= {node for node in members if not _whole(node, members)}
        entries, exits = _borders(graph, members)
        torn = {v for v in (*entries, *exits) if aliases.last_written(v) > aliases.order[v]}
        if not torn:
            break
        members -= torn
        members -= {user for value in torn for user in entries.get(value, ())}
    if not entries:
        return
    reach = _entries_of(graph, members, entries)
    flags: dict[fx.Node, fx.Node] = {}
    for value, readers in entries.items():
        with graph.inserting_after(_last_of_placeholders(value)):
            entered = graph.call_function(enter, (value, None))
        with graph.inserting_after(entered):
            image = graph.call_function(_item, (entered, 0))
            flags[value] = graph.call_function(_item, (entered, 1))
        entered.args = (value, _convolution_of(graph, value, readers, entered))
        for reader in readers:
            reader.replace_input_with(value, image)
    for value, readers in exits.items():
        asked = tuple(flags[entry] for entry in entries if entry in reach[value])
        if not asked:
            continue
        place = max((value, *asked), key={n: i for i, n in enumerate(graph.nodes)}.__getitem__)
        with graph.inserting_after(place):
            left = graph.call_function(leave, (value, *asked))
        left.meta = dict(value.meta)
        for reader in readers:
            reader.replace_input_with(value, left)


def _item(pair: tuple[Any, bool], i: int) -> Any:
    return pair[i]


def _follows(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        name = type(module).__name__
        plain = type(module).__module__.startswith("torch.nn.") and not roles.has_hooks(module)
        return plain and name in _FOLLOW
    if node.op == "call_method":
        return str(node.target) in _FOLLOW
    if node.op != "call_function":
        return False
    if node.target in _FUSED or node.target in _READ_SHAPES or node.target is concatenation.end:
        return True
    origin = str(getattr(node.target, "__module__", None) or "torch").split(".")[0]
    return origin in ("torch", "_operator") and getattr(node.target, "__name__", "") in _FOLLOW


def _whole(node: fx.Node, members: set[fx.Node]) -> bool:
    """False of a concatenation, or of merged convolutions, where not all that write into its buffer or take its parts
    are members: then the layout that it reads, and so whether there is a buffer or parts, must be PyTorch's.
    """
    if node.target is merging.pointwise:
        return node.users.keys() <= members
    if node.target is not concatenation.begin:
        return True
    return all(
        (user.users.keys() if user.target is concatenation.target else {user}) <= members for user in node.users
    )


def _images(node: fx.Node) -> list[fx.Node]:
    """What a member reads that is worth converting: the images of fused calls."""
    if node.target is concatenation.end:
        slices: Any = node.args[0]
        parts: Any = node.args[1]
        like = slices.args[0]  # its layout decides whether there is a buffer
        return [like] if like in parts else []
    count = _FUSED.get(node.target, 0) if node.op == "call_function" else 0  # type: ignore[arg-type]
    given = [*node.args[:count], node.kwargs.get("residual")]
    return [v for v in given if isinstance(v, fx.Node) and v.op != "get_attr"] if count else []


def _borders(
    graph: fx.Graph, members: set[fx.Node]
) -> tuple[dict[fx.Node, list[fx.Node]], dict[fx.Node, list[fx.Node]]]:
    """Values from outside with the members that read them, and members' values with the outsiders that do."""
    entries: dict[fx.Node, list[fx.Node]] = {}
    exits: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in members:
            for value in _images(node):
                if value not in members and node not in entries.setdefault(value, []):
                    entries[value].append(node)
            outside = [user for user in node.users if user not in members]
            if outside and node.target not in _READ_SHAPES:
                exits[node] = outside
    for value, readers in entries.items():  # the shapes of what is converted are read there too
        readers += [user for user in value.users if user in members and user.target in _READ_SHAPES]
    return entries, exits


def _entries_of(
    graph: fx.Graph, members: set[fx.Node], entries: Mapping[fx.Node, Any]
) -> dict[fx.Node, frozenset[fx.Node]]:
    """From which entries each member's value has its layout: of a sum, that of the first operand; where a value is
    written into a slice, that of the concatenation.
    """
    found: dict[fx.Node, frozenset[fx.Node]] = {}

    def reached(value: Any) -> frozenset[fx.Node]:
        return frozenset([value]) if value in entries else found.get(value, frozenset())

    for node in graph.nodes:
        if node in members:
            several = node.target in (torch.cat, torch.concat, concatenation.end)
            known = (v for v in node.args if isinstance(v, fx.Node) and (v in found or v in entries))
            first = reached(node.kwargs.get("out", next(known, None)))  # a slice has its concatenation's layout
            found[node] = first.union(*map(reached, node.all_input_nodes)) if several else first
    return found


def _last_of_placeholders(value: fx.Node) -> fx.Node:
    """Where to go on after a value: behind all placeholders if it is one."""
    while value.op == "placeholder" and value.next.op == "placeholder":
        value = value.next
    return value


def _convolution_of(graph: fx.Graph, value: fx.Node, readers: list[fx.Node], before: fx.Node) -> Any:
    """A convolution that reads a value, as :func:`enter` takes it."""
    for reader in readers:
        if reader.target in (calls.conv_bn, calls.conv_act) and reader.args[0] is value:
            layer: Any = reader.args[1]
            weight: fx.Node = layer if isinstance(layer, fx.Node) else layer["weight"]
            if weight.op == "placeholder":
                return {"weight": weight}
            if weight.op == "get_attr":
                with graph.inserting_before(before):
                    again = graph.create_node("get_attr", weight.target)
                return again if isinstance(layer, fx.Node) else {"weight": again}
    return None
