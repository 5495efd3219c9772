"""Which values of a graph may share memory, and who writes into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx


class Aliases:
    """Values in classes: two that may share memory are in one. A node that is not known to make a new tensor may return
    any of its arguments, or a part of it.

    Args:
        graph: as it will run.
        writes: whether a node may change a value that another node made.
        is_new: whether a node certainly makes a new tensor.
    """

    def __init__(
        self, graph: fx.Graph, writes: Callable[[fx.Node], bool], is_new: Callable[[fx.Node], bool]
    ) -> None:  # fmt: skip
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self._parent: dict[fx.Node, fx.Node] = {}
        self._members: dict[fx.Node, list[fx.Node]] = {node: [node] for node in graph.nodes}
        self._writers: dict[fx.Node, list[fx.Node]] = {}
        writers = [node for node in graph.nodes if writes(node)]
        for node in graph.nodes:
            if node.op != "output" and not is_new(node):
                for argument in node.all_input_nodes:
                    self._unite(node, argument)
        for node in writers:
            for argument in node.all_input_nodes:
                self._writers.setdefault(self._find(argument), []).append(node)

    def _find(self, node: fx.Node) -> fx.Node:
        while node in self._parent:
            node = self._parent[node]
        return node

    def _unite(self, a: fx.Node, b: fx.Node) -> None:
        a, b = self._find(a), self._find(b)
        if a is not b:
            self._parent[a] = b
            self._members[b] += self._members.pop(a)

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """``new`` has taken a node's place."""
        self.order[new] = self.order[node]
        root = self._find(node)
        self._parent[new] = root
        self._members[root].append(new)

    def of(self, node: fx.Node) -> list[fx.Node]:
        """All that may share memory with a value."""
        return self._members[self._find(node)]

    def writers(self, node: fx.Node) -> Iterator[int]:
        """When the value's memory may be written, as places in the order of nodes."""
        for writer in self._writers.get(self._find(node), ()):
            yield self.order[writer]

    def last_written(self, node: fx.Node) -> int:
        return max(self.writers(node), default=-1)

    def last_read(self, node: fx.Node) -> int:
        """When a value of this memory is last an argument."""
        return max((self.order[user] for member in self.of(node) for user in member.users), default=-1)

    def is_returned(self, node: fx.Node) -> bool:
        return any(user.op == "output" for member in self.of(node) for user in member.users)


