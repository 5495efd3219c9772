"""From a captured graph to a program.

What depends on parameters alone (folded batch norms, merged weights) is computed here, and is a constant of the
program. What an operator writes is not, though it may begin as a copy of a parameter.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fastcnn.graph.freezing.capture import Captured
from fastcnn.graph.freezing.gpu.operators import name_of
from fastcnn.graph.freezing.gpu.program import (
    DEVICE,
    DTYPES_BY_NAME,
    FORMATS_BY_NAME,
    Constant,
    Program,
    Spec,
    Step,
    Value,
)
from fastcnn.graph.freezing.structures import structure_as_data


def make_program(captured: Captured, device: torch.device) -> tuple[Program, list[Tensor]]:
    """The program of a captured graph, and the tensors of its constants, which need not be copies.

    Raises:
        ValueError: it holds something that no file can; all such operators are named.
    """
    return _Making(captured, device).run()


class _Making:
    def __init__(self, captured: Captured, device: torch.device) -> None:
        self._captured, self._device = captured, device
        self._written = _written_storages(captured)
        self._known: dict[Node, Any] = {}  # constants: a tensor each, or several
        self._numbers: dict[Node, Any] = {}  # the values' numbers, one or several
        self._inputs: list[Spec] = []
        self._steps: list[tuple[Any, Any, Any, tuple[Spec, ...], Node]] = []
        self._constants: dict[int, Tensor] = {}  # by the tensor's identity, in order
        self._refused: set[str] = set()

    def run(self) -> tuple[Program, list[Tensor]]:
        nodes = list(self._captured.graph.nodes)
        output = nodes[-1]
        for node in nodes:
            self._node(node)
        if self._refused:
            raise ValueError("no file can hold " + ", ".join(sorted(self._refused)))
        # Numbers are given when all constants are known.
        leaves = list(output.args[0])
        for _, args, kwargs, _, _ in self._steps:
            map_arg((args, kwargs), self._note_constant)
        map_arg(leaves, self._note_constant)
        at = len(self._inputs)
        number_of = {identity: at + i for i, identity in enumerate(self._constants)}
        at += len(number_of)
        steps = []

        def value(node: Node) -> Value:
            tensor = self._known.get(node)
            return Value(number_of[id(tensor)] if tensor is not None else self._numbers[node])

        for target, args, kwargs, specs, node in self._steps:
            args, kwargs = map_arg((args, kwargs), value)
            steps.append(Step(target, tuple(args), dict(kwargs), specs))
            self._number_results(node, at)
            at += len(specs)
        outputs = [value(leaf).number for leaf in leaves]
        structure = structure_as_data(self._captured.spec)
        tensors = list(self._constants.values())
        constants, parts = placed(tensors)
        return Program(self._inputs, constants, steps, outputs, structure), parts

    def _node(self, node: Node) -> None:
        if node.op == "placeholder":
            self._numbers[node] = len(self._inputs)
            self._inputs.append(Spec.of(node.meta["val"]))
        elif node.op == "get_attr":
            value: Any = self._captured.module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            self._known[node] = value
        elif node.op == "call_function":
            self._call(node)

    def _call(self, node: Node) -> None:
        target: Any = node.target
        sources = node.all_input_nodes
        constant = bool(sources) and all(source in self._known for source in sources)
        if constant and self._written.isdisjoint(_storages(node)) and not _written_arguments(node):
            args, kwargs = map_arg((node.args, dict(node.kwargs)), self._known.__getitem__)
            self._known[node] = target(*args, **kwargs)
        elif target is operator.getitem:
            pass
        elif name_of(target) is None:
            self._refused.add(str(target))
        elif any(written in self._known for written in _written_arguments(node)):
            self._refused.add(f"{target} on a parameter or buffer")
        else:
            args = self._plain(node.args, node)
            kwargs = {key: self._plain(value, node) for key, value in node.kwargs.items() if value is not None}
            if kwargs.pop("pin_memory", False):
                self._refused.add(f"{target} to pinned memory")
            for without_effect in ("layout", "non_blocking"):  # all is strided, and on one device
                kwargs.pop(without_effect, None)
            self._steps.append((target, args, kwargs, tuple(map(Spec.of, _tensors_of(node))), node))

    def _plain(self, argument: Any, node: Node) -> Any:
        """An argument as a program has it; nodes stay nodes."""
        if isinstance(argument, (list, tuple)):
            return [self._plain(each, node) for each in argument]
        if isinstance(argument, torch.device):
            if argument == self._device or argument == torch.device(self._device.type):
                return DEVICE
        elif isinstance(argument, torch.dtype):
            if argument in DTYPES_BY_NAME.values():
                return argument
        elif isinstance(argument, torch.memory_format):
            if argument in FORMATS_BY_NAME.values():
                return argument
        elif isinstance(argument, torch.layout):
            if argument == torch.strided:
                return argument
        elif argument is None or isinstance(argument, Node) or type(argument) in (bool, int, float, str):
            return argument
        self._refused.add(f"{node.target} of {argument}")
        return None

    def _note_constant(self, node: Node) -> Node:
        tensor = self._known.get(node)
        if tensor is not None:
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_neg():
                raise ValueError(f"it has a {type(tensor).__name__} that is no ordinary dense tensor")
            if tensor.device != self._device:
                raise ValueError(f"it has a tensor on {tensor.device}, not on {self._device}")
            self._constants.setdefault(id(tensor), tensor)
        return node

    def _number_results(self, node: Node, first: int) -> None:
        """One number for each tensor that a node gives; readers of several go through getitem."""
        result = node.meta.get("val")
        if isinstance(result, Tensor):
            self._numbers[node] = first
            return
        for user in node.users:
            if user.target is operator.getitem:
                before = result[: user.args[1]]  # type: ignore[index]
                self._numbers[user] = first + sum(isinstance(each, Tensor) for each in before)


def _tensors_of(node: Node) -> list[Tensor]:
    """A node's fake results."""
    return [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def _storages(node: Node) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _tensors_of(node)}


def _written_arguments(node: Node) -> list[Node]:
    """The arguments that a node's operator writes, by its schema."""
    written: list[Node] = []
    schema = getattr(node.target, "_schema", None)
    for i, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            map_arg((given,), written.append)
    return written


def _written_storages(captured: Captured) -> set[int]:
    """Of the fake tensors that some operator writes: what begins as a constant does not stay one."""
    storages: set[int] = set()
    for node in captured.graph.nodes:
        for written in _written_arguments(node):
            storages |= _storages(written)
    return storages


def placed(tensors: Sequence[Tensor]) -> tuple[list[Constant], list[Tensor]]:
    """Where each tensor lies in which part: one part for each storage, with the bytes from its start."""
    parts: dict[int, Tensor] = {}
    constants = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parts:
            parts[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        part = list(parts).index(storage.data_ptr())
        constants.append(Constant(part, int(tensor.storage_offset()), Spec.of(tensor)))
    return constants, list(parts.values())
