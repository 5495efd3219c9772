"""Channels-last memory between fused calls, whatever the layout of the model's input.

Kernels work on channels-last memory, and an operator's result has the layout that PyTorch's would have. A model that is
given contiguous images would so be converted to and fro at every layer. Here a graph is converted at its borders
instead: what calls that follow the layout of their input hand to each other stays channels-last (``enter``), and where
anything else reads a value, or the model returns it, it has PyTorch's layout again (``leave``).

In each call a flag goes with what came of a value that entered: whether PyTorch has it in contiguous memory, where here
it is channels-last. Where values of different entries meet, and not all of them are contiguous in PyTorch, they get
PyTorch's layouts back first (``meet``), so that the result has the layout that follows from these. An operator in place
takes them as they are (``meet_in_place``): its result is the value that it writes into.

A conversion is a copy. A value is not converted where a write into it could be missed by one of its two forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastcnn import ops
from fastcnn.graph import calls, concatenation, kinds, merging, roles
from fastcnn.graph.aliases import Aliases
from fastcnn.graph.capturing import memory_is_unknown
from fastcnn.ops import _strides
from fastcnn.ops._layout import in_layout, is_channels_last

# ---- in each call ----------------------------------------------------------------------------------------------------


def enter(x: Any, summed: bool) -> tuple[Any, bool]:
    """A value in channels-last memory, and whether it was converted: PyTorch goes on in contiguous memory from it.

    ``summed``: a sum reads it, which would go on in its very layout, whatever that is.
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or is_channels_last(x) or memory_is_unknown() or x.numel() == 0:
        return x, False
    if x.stride() != _strides.contiguous(x.shape) and (summed or x.is_contiguous(memory_format=torch.channels_last)):
        return x, False
    return _strides.in_strides(x, _strides.channels_last(x.shape)), True


def leave(x: Any, converted: bool) -> Any:
    """A value in the layout that PyTorch would have given it."""
    if not converted or not isinstance(x, Tensor) or x.dim() != 4:
        return x
    return in_layout(x, channels_last=False)


def meet(*values: tuple[Any, bool]) -> tuple[Any, ...]:
    """Operands of one operator and their flags: the operands, and the flag of its result."""
    if any(converted for _, converted in values):
        if all(converted or _is_contiguous(x) for x, converted in values):
            return (*(x for x, _ in values), True)
        return (*(leave(*value) for value in values), False)
    return (*(x for x, _ in values), False)


def meet_in_place(*values: tuple[Any, bool]) -> tuple[Any, ...]:
    """The same of an operator that writes into the first: other readers of that must see it, so it is not copied."""
    if not isinstance(values[0][0], Tensor):  # `number += tensor` makes a new one
        return meet(*values)
    return (*(x for x, _ in values), values[0][1])


def _is_contiguous(x: Any) -> bool:
    return not isinstance(x, Tensor) or x.stride() == _strides.contiguous(x.shape)


def goes_on(converted: bool, layer: Any) -> bool:
    """The flag of a convolution's result, from its input's: filters in channels-last memory lead to that."""
    weight = layer["weight"] if isinstance(layer, dict) else layer.weight
    return converted and not is_channels_last(weight)


# ---- in the graph ----------------------------------------------------------------------------------------------------

# Which arguments of fused calls are images.
_FUSED: dict[Callable[..., Any], int] = {
    calls.conv_bn: 1, calls.conv_act: 1, calls.bn_act: 1, calls.bn_act_conv: 1, calls.add_act: 2, calls.pool: 1,
    ops.max_pool2d: 1, ops.avg_pool2d: 1, ops.adaptive_avg_pool2d: 1,
}  # fmt: skip
# What looks at a value's shape and layout, and must see what fused calls read.
_READ_SHAPES = (concatenation.begin, concatenation.target, merging.pointwise)
# Convolutions, with the place of the layer among the arguments.
_CONVOLUTIONS: dict[Any, int] = {calls.conv_bn: 1, calls.conv_act: 1, calls.bn_act_conv: 2}
# Value by value, or over pixels: the result has the layout of the input.
_OTHERS = "GLU Softmax LogSoftmax softmax log_softmax RReLU PReLU prelu"
_OPERATIONS = "relu relu_ ReLU add sub mul truediv iadd isub imul add_ sub_ mul_ mean cat concat"
_FOLLOW = (roles.ACTIVATIONS | frozenset(_OPERATIONS.split())) - frozenset(_OTHERS.split())


def keep_channels_last(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> set[str]:
    """Put conversions at the borders of what can stay channels-last.

    Returns:
        The convolutions, by path, of whose weights the graph takes the memory layout for granted.
    """
    members = {node for node in graph.nodes if _follows(node, modules)}
    if not any(_images(node) for node in members):
        return set()
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
        return set()
    flags: dict[fx.Node, fx.Node] = {}
    for value, readers in entries.items():
        summed = any(_is_summed(value, reader) for reader in readers)
        with graph.inserting_after(_last_of_placeholders(value)):
            entered = graph.call_function(enter, (value, summed))
        with graph.inserting_after(entered):
            image = graph.call_function(_item, (entered, 0))
            flags[image] = graph.call_function(_item, (entered, 1))
        for reader in readers:
            reader.replace_input_with(value, image)
    assumed: set[str] = set()
    for node in list(graph.nodes):
        if node in members and node.target not in _READ_SHAPES[:2]:
            flag = _flag_of(graph, node, flags, modules, assumed)
            if flag is not None:
                flags[node] = flag
    place = {node: i for i, node in enumerate(graph.nodes)}
    for value, readers in exits.items():
        if value not in flags:
            continue
        with graph.inserting_after(max(value, flags[value], key=place.__getitem__)):
            left = graph.call_function(leave, (value, flags[value]))
        left.meta = dict(value.meta)
        for reader in readers:
            reader.replace_input_with(value, left)
    return assumed


def _is_summed(value: fx.Node, reader: fx.Node) -> bool:
    return reader.target is calls.add_act or reader.kwargs.get("residual") is value or reader.target in _READ_SHAPES[2:]


def _flag_of(
    graph: fx.Graph, node: fx.Node, flags: dict[fx.Node, fx.Node], modules: Mapping[str, nn.Module], assumed: set[str]
) -> fx.Node | None:
    """The flag of a member's value, for which nodes may be put before it; None where it lies as in PyTorch."""
    writing = node.kwargs.get("out")  # which asks for the layout of what the call will read
    at = writing if isinstance(writing, fx.Node) and writing.target is concatenation.target else node
    operands = {operand: flags.get(operand) for operand in _operands(node)}
    image = node.args[0] if node.args else None
    if node.target in _CONVOLUTIONS and isinstance(image, fx.Node) and image in operands:
        layer: Any = node.args[_CONVOLUTIONS[node.target]]
        operands[image] = _flag_of_convolution(graph, at, operands[image], layer, modules, assumed)
    given = list(dict.fromkeys(operands.values()))
    if len(given) > 1:
        in_place = next(iter(operands)) is image and roles.may_write(node, modules)
        values = tuple((operand, flag or False) for operand, flag in operands.items())
        with graph.inserting_before(at):
            met = graph.call_function(meet_in_place if in_place else meet, values)
            for i, operand in enumerate(operands):
                one = graph.call_function(_item, (met, i))
                for reader in {at, node}:
                    reader.replace_input_with(operand, one)
            flag = graph.call_function(_item, (met, len(operands)))
    elif not given or given[0] is None:
        return None
    else:
        flag = given[0]
    if node.target is concatenation.end:
        node.update_kwarg("converted", flag)
    return flag


def _flag_of_convolution(
    graph: fx.Graph, at: fx.Node, flag: fx.Node | None, layer: Any, modules: Mapping[str, nn.Module], assumed: set[str]
) -> fx.Node | None:
    """The flag of a convolution's result, from its input's."""
    if flag is None:
        return None
    known = _weight_of(layer, modules)
    if not isinstance(known, Tensor):
        with graph.inserting_before(at):
            return graph.call_function(goes_on, (flag, _earlier(graph, layer)))
    if isinstance(layer, fx.Node):
        assumed.add(str(layer.target))
    return None if is_channels_last(known) else flag


def _earlier(graph: fx.Graph, layer: Any) -> Any:
    """A layer for a call that may come before the one that it was taken for."""
    weight = layer["weight"] if isinstance(layer, dict) else layer
    if weight.op == "get_attr":
        weight = graph.create_node("get_attr", weight.target)
    return {"weight": weight} if isinstance(layer, dict) else weight


def _weight_of(layer: Any, modules: Mapping[str, nn.Module]) -> Any:
    """A convolution's filters, where their layout is known: of a layer, or Dynamo's example."""
    if isinstance(layer, fx.Node):
        weight = getattr(modules.get(str(layer.target)), "weight", None)
    else:
        weight = layer["weight"].meta.get("example_value") if layer["weight"].op == "placeholder" else None
    return weight if isinstance(weight, Tensor) and weight.dim() == 4 else None


def _operands(node: fx.Node) -> list[fx.Node]:
    """The values whose layouts decide that of a member's result."""
    if node.target is concatenation.end:
        given: Any = node.args[1]
    elif node.target is merging.pointwise:
        given = node.args[:1]
    elif node.op == "call_function" and node.target in _FUSED:
        given = [*node.args[: _FUSED[node.target]], node.kwargs.get("residual")]  # type: ignore[index]
    else:
        given = node.all_input_nodes
    return [v for v in dict.fromkeys(given) if isinstance(v, fx.Node) and v.meta.get("fastcnn_kind") != kinds.PLAIN]


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
    if node.kwargs.get("out") is not None:
        return False  # the result is that one, whatever is read
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
    return all((user.users.keys() if user.target is concatenation.target else {user}) <= members for user in node.users)


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


def _last_of_placeholders(value: fx.Node) -> fx.Node:
    """Where to go on after a value: behind all placeholders if it is one."""
    while value.op == "placeholder" and value.next.op == "placeholder":
        value = value.next
    return value
