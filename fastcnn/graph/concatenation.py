"""Concatenation of channels without a copy: convolutions write into the slices of one buffer from the start.

``cat([a, b, c], 1)`` becomes

    slices = begin(like, widths)                 before the first of a, b, c is computed
    a = conv_bn(x, ..., out=target(slices, 0, ...))
    ...
    end(slices, (a, b, c))                       the buffer; what is not in it yet is copied

Concatenations of which one begins like the other (a dense block's ``cat([a])``, ``cat([a, b])``, ``cat([a, b, c])``)
share a buffer: the shorter ones are its first channels. Whether there will be a buffer is decided in each call: not
where gradients are recorded, under autocast or tracers, and only where PyTorch's result would be channels-last too.
If not, ``slices`` is None, and ``end`` is :func:`torch.cat`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from fastcnn import ops
from fastcnn.graph import calls, roles
from fastcnn.graph.aliases import Aliases
from fastcnn.graph.capturing import memory_is_unknown
from fastcnn.nn import fusing
from fastcnn.ops._layout import empty_channels_last, is_channels_last
from fastcnn.ops._registration import autocasts
from fastcnn.ops._strides import is_ambiguous

# ---- in each call ----------------------------------------------------------------------------------------------------


@dataclass
class Slices:
    """A buffer and what of it is filled."""

    buffer: Tensor
    ends: list[int]  # where the i-th part's channels end
    filled: list[Tensor | None]

    def slice(self, i: int) -> Tensor:
        return self.buffer[:, self.ends[i - 1] if i else 0 : self.ends[i]]


def begin(like: Tensor, layer: Any, widths: Sequence[Any]) -> Slices | None:
    """A buffer for a concatenation, or None where the parts are to be made apart.

    Args:
        like: (N, C, H, W), a part; or with ``layer`` the input of a convolution that makes one.
        widths: for each part the convolution that will make it, or a tensor with as many channels.
    """
    if torch.is_grad_enabled() or not isinstance(like, Tensor) or like.dim() != 4 or not is_channels_last(like):
        return None
    if forward_ad._current_level >= 0 or autocasts(like.device.type) or fusing._is_watched():
        return None
    if memory_is_unknown():
        return None
    shape = like.shape if layer is None else calls.conv_shape(like, layer)
    assert shape is not None
    channels = [_width(w) for w in widths]
    if min(*shape[2:], *channels) < 1:
        return None
    ends = [sum(channels[: i + 1]) for i in range(len(channels))]
    return Slices(empty_channels_last((shape[0], ends[-1], *shape[2:]), like), ends, [None] * len(ends))


def _width(of: Any) -> int:
    if isinstance(of, Tensor):
        return of.shape[1] if of.dim() == 4 else 0
    weight = of["weight"] if isinstance(of, dict) else of.weight
    return int(weight.shape[0])


def target(slices: Slices | None, i: int, x: Tensor, conv: Any, modules: Sequence[nn.Module]) -> Tensor | None:
    """Where the convolution of ``x`` is to write the i-th part; None where it does not fit or a module has hooks."""
    if slices is None or x.dtype != slices.buffer.dtype or x.device != slices.buffer.device:
        return None
    part = slices.slice(i)
    if calls.conv_shape(x, conv) != part.shape or any(roles.has_hooks(m) for m in modules):
        return None
    if is_ambiguous(part.shape):
        return None  # so is its format in PyTorch
    if not is_channels_last(x) and not is_channels_last(conv["weight"] if isinstance(conv, dict) else conv.weight):
        return None  # PyTorch's part would be contiguous
    slices.filled[i] = part
    return part


def end(slices: Slices | None, parts: Sequence[Any], converted: bool = False) -> Tensor:
    """``cat(parts, 1)``: the buffer's first channels.

    ``converted``: all of it would be contiguous in PyTorch, and will be where anything sees it. Else the result is
    channels-last only if all parts are.
    """
    if slices is None or not all(_fits(slices, i, part, converted) for i, part in enumerate(parts)):
        return torch.cat(tuple(parts), 1)
    for i, part in enumerate(parts):
        if slices.filled[i] is not part:
            slices.slice(i).copy_(part)
            slices.filled[i] = part
    return slices.buffer if len(parts) == len(slices.ends) else slices.buffer[:, : slices.ends[len(parts) - 1]]


def _fits(slices: Slices, i: int, part: Any, converted: bool) -> bool:
    if slices.filled[i] is part:
        return True
    # A part that has a place but is another tensor (a hook's, say) may be read from there: leave it alone.
    return (
        slices.filled[i] is None
        and isinstance(part, Tensor)
        and part.dtype == slices.buffer.dtype
        and part.device == slices.buffer.device
        and part.shape == slices.slice(i).shape
        and (converted or is_channels_last(part))
    )


# ---- in the graph ----------------------------------------------------------------------------------------------------

_CONVOLUTIONS = (calls.conv_bn, calls.conv_act, calls.bn_act_conv)
_KEEP_CHANNELS = (calls.pool, calls.bn_act, calls.add_act, ops.max_pool2d, ops.avg_pool2d)


@dataclass
class _Group:
    """Concatenations that share a buffer; the first is the longest."""

    parts: list[fx.Node]
    nodes: list[fx.Node] = field(default_factory=list)


def concatenate_in_place(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Rewrite a graph whose convolutions are fused calls. Returns names of concatenations that stay, with reasons."""
    if not any(_parts(node) and any(map(_is_convolution, node.all_input_nodes)) for node in graph.nodes):
        return {}
    aliases = Aliases(
        graph, lambda n: roles.may_write(n, modules), lambda n: roles.makes_a_new_tensor(n, modules)
    )  # fmt: skip
    _unnest(graph, aliases)
    groups = _groups(graph)
    placed: set[fx.Node] = set()
    left: dict[str, str] = {}
    for group in groups:
        reason = _apply(graph, group, aliases, placed)
        if reason is not None:
            left.update({roles.label(node): reason for node in group.nodes})
    return left


def _parts(node: fx.Node) -> list[fx.Node] | None:
    """What a node concatenates along the channels, if it does."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
        return None
    given = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
    parts = given.get("tensors")
    if set(given) != {"tensors", "dim"} or given["dim"] != 1 or not isinstance(parts, (list, tuple)):
        return None
    return list(parts) if parts and all(isinstance(p, fx.Node) for p in parts) else None


def _unnest(graph: fx.Graph, aliases: Aliases) -> None:
    """Let ``cat([a, cat([b, c])])`` be ``cat([a, b, c])`` where nothing else reads the inner one."""
    for node in list(graph.nodes):
        parts = _parts(node)
        for inner in parts or ():
            inside = _parts(inner)
            if inside is None or len(inner.users) > 1 or parts is None or parts.count(inner) > 1:
                continue
            if any(True for value in (inner, *inside) for _ in aliases.writers(value)):
                continue
            where = parts.index(inner)
            parts = [*parts[:where], *inside, *parts[where + 1 :]]
            node.args, node.kwargs = (tuple(parts), 1), {}
            graph.erase_node(inner)


def _groups(graph: fx.Graph) -> list[_Group]:
    found = [(node, parts) for node in graph.nodes if (parts := _parts(node)) is not None]
    groups: list[_Group] = []
    for node, parts in sorted(found, key=lambda entry: -len(entry[1])):
        home = next((g for g in groups if len(parts) < len(g.parts) and g.parts[: len(parts)] == parts), None)
        if home is None:
            groups.append(_Group(parts, [node]))
        else:
            home.nodes.append(node)
    return groups


def _is_convolution(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _CONVOLUTIONS and "out" not in node.kwargs


def _layer(node: fx.Node) -> Any:
    return node.args[2] if node.target is calls.bn_act_conv else node.args[1]


def _apply(graph: fx.Graph, group: _Group, aliases: Aliases, placed: set[fx.Node]) -> str | None:
    """Rewrite one group, or return why not. One without convolutions is left without a word."""
    order = aliases.order
    group.parts = _parts(group.nodes[0]) or []  # some may have been rewritten since
    slots = [p for p in group.parts if _is_convolution(p) and p not in placed and group.parts.count(p) == 1]
    if not slots:
        return None
    if any(aliases.is_returned(part) for part in slots):
        return "a part of it is returned as well"
    if any(True for part in slots for _ in aliases.writers(part)):
        return "a part of it is changed in place"
    plain = [part for part in group.parts if part not in slots]
    written = min((w for node in group.nodes for w in aliases.writers(node)), default=None)
    if written is not None and (len(group.nodes) > 1 or max(map(aliases.last_read, slots)) > written):
        return "it is changed in place"
    if len(group.nodes) > 1:
        if any(True for part in plain for _ in aliases.writers(part)):
            return "a part of it is changed in place"
        if sum(map(aliases.is_returned, group.nodes)) > 1:
            return "several that share their beginning are returned"
    first = min((*slots, *group.nodes), key=order.__getitem__)
    like: tuple[Any, Any] | None = None
    ready = {p: p for p in plain if order[p] < order[first]}
    if ready:
        like = (next(iter(ready)), None)
    elif first in slots:
        like = (first.args[0], _layer(first))
    for part in plain:  # of a pooling the channels are known before it is computed
        if part.op == "call_function" and part.target in _KEEP_CHANNELS:
            source = roles.first_argument(part)
            if order.get(source, len(order)) < order[first]:
                ready.setdefault(part, source)
    if like is None or not ready.keys() >= set(plain):
        return "the channels of a part are not known before it is computed"
    widths = [ready[p] if p in ready else _early(graph, _layer(p), first, order) for p in group.parts]
    if any(width is None for width in widths):
        return "the weights of a part are computed"
    with graph.inserting_before(first):
        layer = None if like[1] is None else _early(graph, like[1], first, order)
        slices = graph.call_function(begin, (like[0], layer, tuple(widths)))
    for part in slots:
        with graph.inserting_before(part):
            where = group.parts.index(part)
            arguments = (slices, where, part.args[0], _layer(part), tuple(_modules_of(part)))
            part.update_kwarg("out", graph.call_function(target, arguments))
        placed.add(part)
    for node in group.nodes:
        with graph.inserting_before(node):
            new = graph.call_function(end, (slices, tuple(_parts(node) or ())))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        aliases.replace(node, new)
        graph.erase_node(node)
    return None


def _early(graph: fx.Graph, layer: Any, first: fx.Node, order: Mapping[fx.Node, int]) -> Any:
    """A layer as it can be had before a node; None if it cannot."""
    if isinstance(layer, fx.Node):
        with graph.inserting_before(first):
            return graph.create_node("get_attr", layer.target)
    weight = layer["weight"]
    if any(isinstance(value, fx.Node) for name, value in layer.items() if name not in ("weight", "bias")):
        return None
    if weight.op == "get_attr":
        with graph.inserting_before(first):
            return {**layer, "weight": graph.create_node("get_attr", weight.target), "bias": None}
    if weight.op == "placeholder" or order.get(weight, len(order)) < order[first]:
        return {**layer, "bias": None}
    return None


def _modules_of(site: fx.Node) -> Iterator[fx.Node]:
    for value in (*site.args[1:], *site.kwargs.values()):
        if isinstance(value, fx.Node) and value.op == "get_attr":
            yield value
