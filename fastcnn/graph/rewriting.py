"""Finds the table's patterns in a graph and puts fused calls in their place."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from fastcnn.graph import kinds, roles
from fastcnn.graph.concatenation import concatenate_in_place
from fastcnn.graph.layouts import keep_channels_last
from fastcnn.graph.merging import merge_pointwise
from fastcnn.graph.patterns import PATTERNS, FusedCall, Match, ModuleAt, Pattern, writes_in_place


@dataclass(frozen=True)
class Site:
    """One fused call: the layers it stands for."""

    modules: tuple[str, ...]  # module paths; names of functions for what is no module
    pattern: str
    call: str
    merged: bool = False  # another call does the work of several sites like this one, where it can


@dataclass(frozen=True)
class Left:
    """One call that stays as it was written, and why."""

    module: str
    kind: str
    reason: str


def rewrite(
    graph: fx.Graph, modules: Mapping[str, nn.Module], opaque: Mapping[str, str] | None = None
) -> tuple[dict[fx.Node, Site], list[Left], set[str]]:
    """Rewrite a graph in place.

    Args:
        graph: of torch.fx; ``call_module`` targets are keys of ``modules``.
        modules: by path.
        opaque: modules that could not be looked into, with reasons.

    Returns:
        The new nodes and what they stand for, in order of execution; what was left; and the convolutions, by path, of
        whose weights the graph takes the memory layout for granted.
    """
    _ask_inputs_for_their_rank(graph, modules)
    finder = _Finder(graph, modules)
    found = {}
    for node in list(graph.nodes):
        if node not in finder.taken:
            matched = finder.match_at(node)
            if matched is not None:
                new, site = _replace(graph, *matched)
                found[new] = site
    notes = finder.notes()
    # A buffer is channels-last where PyTorch's concatenation of mixed layouts is contiguous. Random masks are drawn in
    # the order of memory: where one is drawn, layouts must be PyTorch's.
    if not any(roles.drops_out(node, modules) for node in graph.nodes):
        notes |= concatenate_in_place(graph, modules)
    patterns = {node: site.pattern.replace("+", " ") for node, site in found.items()}
    for new, nodes in merge_pointwise(graph, modules, patterns).items():
        names = tuple(name for node in nodes for name in found[node].modules)
        found.update({node: replace(found[node], merged=True) for node in nodes})
        found[new] = Site(names, f"{len(nodes)} x {found[nodes[0]].pattern}", "pointwise")
    left = _left(graph, modules, opaque or {}, notes)
    assumed = keep_channels_last(graph, modules)
    graph.lint()
    return {node: found[node] for node in graph.nodes if node in found}, left, assumed


def _ask_inputs_for_their_rank(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Let ``conv(x).ndim`` be ``x.ndim``, so that a check of it (as in timm's batch norms) is no second reader."""
    for node in list(graph.nodes):
        by_method = node.op == "call_method" and node.target in ("dim", "ndimension")
        if not by_method and not (node.target is getattr and node.args[1] == "ndim"):
            continue
        of = node.args[0]
        while roles.role(of, modules) in _KEEP_RANK:
            first = roles.first_argument(of)
            if not isinstance(first, fx.Node):
                break
            if roles.role(of, modules) == "relu" and roles.role(first, modules) not in _KEEP_RANK:
                break  # rather its result than the sum before it, which it may be fused with
            node.replace_input_with(of, first)
            of.prepend(node)
            of = first


_KEEP_RANK = ("conv", "bn", "relu", "max_pool", "avg_pool", "adaptive_pool", "lrn")


class _Finder:
    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.taken: set[fx.Node] = set()
        self._joined: set[fx.Node] = set()
        self._refusals: list[tuple[tuple[fx.Node, ...], str]] = []
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._roles = {node: roles.role(node, modules) for node in graph.nodes}
        self._writers = [i for node, i in self._order.items() if roles.may_write(node, modules)]
        self._nodes = list(graph.nodes)
        statistics = {n: roles.statistics(n, modules) for n in graph.nodes if self._roles[n] == "bn"}
        used = Counter(statistics.values())
        self._reused = {n for n, owner in statistics.items() if owner is not None and used[owner] > 1}

    def match_at(self, node: fx.Node) -> tuple[Pattern, Match, FusedCall] | None:
        for pattern in PATTERNS:
            nodes = self._chain(node, pattern.steps)
            if nodes is None:
                continue
            match = Match(pattern.steps, nodes)
            if not self._is_safe(match):
                continue
            self.taken.update(nodes)
            if len(nodes) > 1:
                self._joined.update(nodes)
            return pattern, match, pattern.build(match)
        return None

    def _chain(self, node: fx.Node, steps: tuple[str, ...]) -> tuple[fx.Node, ...] | None:
        """The path that begins at a node and has these roles, each value but the last with one reader."""
        nodes = [node]
        if self._roles.get(node) != steps[0] or node in self.taken:
            return None
        for step in steps[1:]:
            readers = list(nodes[-1].users)
            if len(readers) != 1:
                return None
            reader = readers[0]
            if self._roles.get(reader) != step or reader in self.taken or reader.all_input_nodes.count(nodes[-1]) != 1:
                return None
            if step != "add" and not self._reads_first(reader, nodes[-1]):
                return None
            nodes.append(reader)
        return tuple(nodes)

    @staticmethod
    def _reads_first(reader: fx.Node, value: fx.Node) -> bool:
        first = reader.args[0] if reader.args else reader.kwargs.get("input")
        others = [*reader.args[1:], *(v for k, v in reader.kwargs.items() if k != "input" or reader.args)]
        return first is value and not any(value is other for other in others)

    def _is_safe(self, match: Match) -> bool:
        """Whether one call at the end of the chain gives what the chain gives."""
        nodes = match.nodes
        if match.steps[0] == "add" and writes_in_place(nodes[0]) and not self._is_only_read_by(nodes[0]):
            return False
        if len(nodes) == 1:
            return True
        for before, node in itertools.pairwise(nodes):
            if self._roles[node] == "add":
                if node.args[0] is node.args[1]:
                    return False
                if writes_in_place(node) and node.args[0] is not before and not self._is_only_read_by(node):
                    return self._note(nodes, "the addition is written into another value")
        if any(node in self._reused for node in nodes):
            # Statistics must be updated in the order of the calls.
            return self._note(nodes, "its batch norm is used more than once")
        first, last = self._order[nodes[0]], self._order[nodes[-1]]
        own = {self._order[node] for node in nodes}
        for i in self._writers:
            if first < i < last and i not in own and not self._is_counter(self._nodes[i]):
                return self._note(nodes, "a value is changed in place between its layers")
        return True

    @staticmethod
    def _is_only_read_by(add: fx.Node) -> bool:
        """Whether nobody sees that ``x += y`` writes into x: a new tensor that no other node has."""
        written = add.args[0]
        return isinstance(written, fx.Node) and len(written.users) == 1 and roles.makes_a_new_tensor(written)

    def _is_counter(self, node: fx.Node) -> bool:
        """``num_batches_tracked.add_(1)``: no layer reads it."""
        target = node.args[0] if node.args else None
        if node.target != "add_" or not isinstance(target, fx.Node):
            return False
        value = target.meta.get("example_value")  # in Dynamo's graphs
        if target.op == "get_attr":
            path, _, name = str(target.target).rpartition(".")
            value = self.modules[path]._buffers.get(name) if path in self.modules else None
        return value is not None and not value.is_floating_point()

    def _note(self, nodes: tuple[fx.Node, ...], reason: str) -> bool:
        self._refusals.append((nodes, reason))
        return False

    def notes(self) -> dict[str, str]:
        """Layers that were kept apart, and why; not where the chain's end was fused with another beginning."""
        found: dict[str, str] = {}
        for nodes, reason in self._refusals:
            if nodes[-1] not in self._joined:
                for node in nodes:
                    found.setdefault(roles.label(node), reason)
        return found


def _replace(graph: fx.Graph, pattern: Pattern, match: Match, call: FusedCall) -> tuple[fx.Node, Site]:
    last = match.nodes[-1]
    names = tuple(roles.label(node) for node in match.nodes)
    with graph.inserting_before(last):

        def filled(value: Any) -> Any:
            if isinstance(value, ModuleAt):
                return graph.create_node("get_attr", value.path)
            if isinstance(value, dict):
                return {key: filled(item) for key, item in value.items()}
            return value

        args = tuple(filled(a) for a in call.args)
        new = graph.call_function(call.function, args, filled(call.kwargs))
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new)
    for node in reversed(match.nodes):
        graph.erase_node(node)
    return new, Site(names, "+".join(pattern.steps), call.function.__name__)


def _left(
    graph: fx.Graph, modules: Mapping[str, nn.Module], opaque: Mapping[str, str], notes: Mapping[str, str]
) -> list[Left]:
    left = []
    for node in graph.nodes:
        if node.op == "call_module":
            name = str(node.target)
            module = modules[name]
            kind = type(module).__name__
            reason = opaque.get(name) or roles.refusal(module) or notes.get(name)
        elif node.op in ("call_function", "call_method"):
            name = kind = roles.label(node)
            if getattr(node.target, "__module__", None) in ("fastcnn.graph.calls",) or _is_ours(node.target):
                continue
            reason = notes.get(name)
        else:
            continue
        if reason is None and (kind in roles.MOVERS or node.meta.get("fastcnn_kind") == kinds.PLAIN):
            continue
        if reason is None and kind in roles.ACTIVATIONS:
            reason = "of the activations only ReLU is fused"
        if reason is None and kind in ("iadd", "add_"):
            reason = "written in place into a value that is no layer's result"
        if reason is None and kind in ("ReLU", "relu", "relu_"):
            reason = "nothing to fuse it with"
        left.append(Left(name, kind, reason or "fastcnn has no operator for it"))
    fused_notes = [
        Left(name, "chain", f"not fused with its neighbours: {reason}")
        for name, reason in notes.items()
        if not any(entry.module == name for entry in left) and name in modules
    ]
    return left + fused_notes


def _is_ours(target: Any) -> bool:
    return str(getattr(target, "__module__", "")).startswith("fastcnn.")
