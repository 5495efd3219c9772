"""From a captured graph to native steps.

Every tensor of the graph is either a constant, which depends on parameters alone and is computed here, or a view of a
buffer: views are recognised by their fake storage, so that reshapes, slices and permutations cost nothing whatever
operator made them. What is left are operators that compute, each with a rule: fastcnn's below, ATen's in the files that
aten.py gathers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fastcnn.backends import cpp
from fastcnn.graph.freezing.capture import Captured
from fastcnn.graph.freezing.choosing import Choose, by_rule, plan_step
from fastcnn.graph.freezing.program import (
    Attribute,
    Buffer,
    PackedWeight,
    Program,
    Step,
    View,
    channels_last_strides,
    contiguous_strides,
)

Rule = Callable[["Lowering", "View", list[Any]], None]

DTYPES = (torch.float32, torch.bfloat16)


class Unsupported(Exception):
    """Why a node has no native step."""


class Lowering:
    """Builds a :class:`Program`. Rules get the view to fill and the node's arguments, with views and constants."""

    def __init__(self, captured: Captured, rules: dict[Any, Rule], choose: Choose = by_rule) -> None:
        self.program = Program()
        self.choose = choose  # a convolution's algorithm
        self._captured, self._rules = captured, rules
        self._needed = _needed(captured.graph)
        self._values: dict[Node, Any] = {}  # View or constant Tensor, or a tuple of them
        self._buffers: dict[int, Buffer] = {}  # by the fake storage's identity
        self._weights: dict[tuple[int, int, str], int] = {}
        self._constants: dict[int, Buffer] = {}
        self._kept: list[Tensor] = []  # keeps identities of constants unique
        self._errors: list[str] = []

    def run(self) -> Program:
        """Lower every node.

        Raises:
            ValueError: nodes that no native step covers; the message lists them all.
        """
        for node in self._captured.graph.nodes:
            if node not in self._needed:
                continue
            try:
                self._node(node)
            except Unsupported as reason:
                self._errors.append(f"  {_described(node)}: {reason}")
                self._values[node] = self._stand_in(node)
        if self._errors:
            raise ValueError("model cannot be frozen; no native step covers\n" + "\n".join(self._errors))
        return self.program

    # ---- nodes ---------------------------------------------------------------------------------------------------

    def _node(self, node: Node) -> None:
        if node.op == "placeholder":
            view = self._view_of(node.meta["val"], "input")
            self.program.inputs.append(view)
            self._values[node] = view
        elif node.op == "get_attr":
            value: Any = self._captured.module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            self._values[node] = value
        elif node.op == "output":
            for output in node.args[0]:  # type: ignore[union-attr]
                value = self._values[output] if isinstance(output, Node) else None
                if value is not None:
                    self.program.outputs.append(self.as_view(value))
        else:
            self._call(node)

    def _call(self, node: Node) -> None:
        inputs = [self._values[n] for n in node.all_input_nodes]
        if any(value is None for value in inputs):  # of a node that was refused
            self._values[node] = None
            return
        target: Any = node.target
        args, kwargs = torch.fx.node.map_arg((list(node.args), dict(node.kwargs)), lambda n: self._values[n])
        schema = getattr(target, "_schema", None)
        allocates = target in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default)
        if not allocates and all(_is_constant(value) for value in inputs):
            if schema is not None and schema.is_mutable:
                raise Unsupported("it writes to a parameter or buffer")
            if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
                raise Unsupported("it draws random numbers")
            with torch.no_grad():
                self._values[node] = target(*args, **kwargs)
            return
        if schema is None:  # operator.getitem, of a node with several results
            self._values[node] = target(*args, **kwargs)
            return
        positional = _in_schema_order(schema, args, kwargs)
        if schema.is_mutable:
            out = self._written(target, positional)
            if torch.Tag.inplace_view in target.tags:  # another shape of the same memory
                self._values[node] = view = self._view_of(node.meta["val"])
                if view.buffer is not out.buffer:
                    raise Unsupported("its result lies in other memory")
                return
            self.rule(target)(self, out, positional)
            self._values[node] = out
            return
        fake = node.meta["val"]
        if not isinstance(fake, Tensor):
            if all(isinstance(f, Tensor) and self._known(f) for f in fake):  # split, unbind, chunk
                self._values[node] = tuple(self._view_of(f) for f in fake)
                return
            fake = fake[0]  # operators whose other results (indices, statistics) nobody reads in eval mode
            users = self._needed.intersection(node.users)
            if any(user.target is not operator.getitem or user.args[1] != 0 for user in users):
                raise Unsupported("only its first result can be used")
            view = self._view_of(fake)
            self._values[node] = (view,)
            self.rule(target)(self, view, positional)
            return
        known = self._known(fake)
        view = self._view_of(fake)
        self._values[node] = view
        if not known and not allocates:
            self.rule(target)(self, view, positional)

    def _stand_in(self, node: Node) -> Any:
        """For a node that was refused, so that those after it are looked at too; None where there can be no view."""
        fake = node.meta.get("val")
        try:
            if isinstance(fake, Tensor):
                return self._view_of(fake)
            return tuple(self._view_of(f) for f in fake)  # type: ignore[union-attr]
        except (Unsupported, TypeError, AttributeError):
            return None

    def rule(self, target: Any) -> Rule:
        """How an operator is lowered; raises :class:`Unsupported`."""
        rule = self._rules.get(target)
        if rule is None:
            raise Unsupported("no native step")
        return rule

    def _written(self, target: Any, arguments: list[Any]) -> View:
        """The view that an in-place operator or an `_into` form writes: its first argument."""
        out = arguments[0]
        if not isinstance(out, View):
            raise Unsupported("it writes to a parameter or buffer")
        if out.buffer.kind == "input":
            raise Unsupported("it writes to an input")
        return out

    def _known(self, fake: Tensor) -> bool:
        return _storage(fake) in self._buffers

    def _view_of(self, fake: Tensor, kind: str = "activation") -> View:
        if fake.device.type != "cpu":
            raise Unsupported(f"on {fake.device}; frozen models run on the CPU")
        if fake.dtype not in DTYPES:
            raise Unsupported(f"{fake.dtype}; frozen models compute in float32 or bfloat16")
        if fake.numel() == 0:
            raise Unsupported(f"an empty tensor of shape {tuple(fake.shape)}")
        if fake.is_neg() or fake.is_conj():
            raise Unsupported("a lazily negated or conjugated view")
        buffer = self._buffers.get(_storage(fake))
        if buffer is None:
            item = fake.dtype.itemsize
            buffer = Buffer(-(-fake.untyped_storage().nbytes() // item), fake.dtype, kind)
            self._buffers[_storage(fake)] = buffer
        if buffer.dtype != fake.dtype:
            raise Unsupported("a view as another dtype")
        return View(buffer, int(fake.storage_offset()), tuple(fake.shape), tuple(fake.stride()))

    # ---- for rules -----------------------------------------------------------------------------------------------

    def emit(
        self, name: str, out: View, *inputs: View | None, attributes: Sequence[Attribute] = (),
        weight: int | None = None,
    ) -> None:  # fmt: skip
        self.program.steps.append(Step(name, out, inputs, tuple(attributes), weight))

    def temporary(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> View:
        view = View(Buffer(0, dtype), 0, tuple(shape), tuple(strides))
        view.buffer.length = view.extent
        return view

    def temporary_like(self, view: View) -> View:
        """Of a view's shape, without gaps, its dimensions in the same order."""
        strides = [0] * len(view.shape)
        step = 1
        for dim in sorted(range(len(view.shape)), key=lambda d: (view.strides[d], -d)):
            strides[dim] = step
            step *= view.shape[dim]
        return self.temporary(view.shape, strides, view.dtype)

    def copied(self, view: View, dtype: torch.dtype | None = None) -> View:
        """A contiguous copy, of another dtype if one is given."""
        copied = self.temporary(view.shape, contiguous_strides(view.shape), dtype or view.dtype)
        self.emit("copy", copied, view)
        return copied

    def temporary_pixels(self, like: View) -> View:
        return self.temporary(like.shape, channels_last_strides(like.shape), like.dtype)

    def as_view(self, value: View | Tensor) -> View:
        """A constant as a view of its own buffer."""
        if isinstance(value, View):
            return value
        if value.dtype not in DTYPES:
            raise Unsupported(f"a constant of {value.dtype}")
        buffer = self._constants.get(id(value))
        if buffer is None:
            self._kept.append(value)
            data = value.detach().contiguous()
            buffer = self._constants[id(value)] = Buffer(data.numel(), data.dtype, "constant", data)
        assert buffer.data is not None
        return View(buffer, 0, tuple(value.shape), tuple(buffer.data.stride()))

    def as_pixels(self, value: View | Tensor) -> View:
        """In channels-last memory: the view itself where kernels can read it in place, else a copy."""
        view = self.as_view(value)
        if len(view.shape) != 4:
            raise Unsupported(f"shape {view.shape} instead of (N, C, H, W)")
        if view.pixel_stride() is not None:
            return view
        copied = self.temporary_pixels(view)
        self.emit("copy", copied, view)
        return copied

    def filled_as_pixels(self, out: View, fill: Callable[[View], None]) -> None:
        """``fill`` a view that kernels can write: ``out`` itself, or a temporary copied to it."""
        if out.pixel_stride() is not None:
            fill(out)
            return
        pixels = self.temporary_pixels(out)
        fill(pixels)
        self.emit("copy", out, pixels)

    def as_matrix(self, value: View | Tensor, first: int) -> View:
        """Dimensions before ``first`` as rows, the others as adjacent columns; a copy where they lie otherwise."""
        view = self.as_view(value)
        matrix = view.as_matrix(first)
        if matrix is None:
            matrix = self.copied(view).as_matrix(first)
            assert matrix is not None
        return matrix

    def filled_as_matrix(self, out: View, first: int, fill: Callable[[View], None]) -> None:
        """``fill`` such a matrix: ``out`` itself, or a temporary copied to it."""
        matrix = out.as_matrix(first)
        if matrix is not None:
            fill(matrix)
            return
        dense = self.temporary(out.shape, contiguous_strides(out.shape), out.dtype)
        matrix = dense.as_matrix(first)
        assert matrix is not None
        fill(matrix)
        self.emit("copy", out, dense)

    def vector(self, value: View | Tensor | None, name: str) -> View | None:
        """A per-channel vector, which must be a constant, as float32."""
        if value is None:
            return None
        if isinstance(value, View):
            raise Unsupported(f"{name} depends on the input")
        if value.dtype != torch.float32 or not value.is_contiguous():
            value = value.detach().float().contiguous()
        return self.as_view(value)

    def conv_weight(self, value: Tensor, groups: int, dtype: torch.dtype, algorithm: str) -> int:
        if value.dtype != dtype:
            raise Unsupported(f"weight is {value.dtype}, the input {dtype}")
        key = (id(value), groups, algorithm)
        if key not in self._weights:
            self._kept.append(value)
            k, c, r, s = value.shape
            packed = PackedWeight(
                cpp.pack_weight(value, groups, algorithm), (k, c, r, s), groups, algorithm, value.dtype
            )
            self._weights[key] = len(self.program.weights)
            self.program.weights.append(packed)
        return self._weights[key]

    def elementwise(self, out: View, inputs: Sequence[View | Tensor], fill: Callable[..., None]) -> None:
        """``fill(out, *inputs)`` on 4-D views whose values correspond, for work that knows no channels."""
        views = [self.as_view(value) for value in inputs]
        same = all(v.strides == out.strides and v.shape == out.shape for v in views)
        if same and out.is_dense:
            fill(out.as_row(), *(v.as_row() for v in views))
        elif len(out.shape) == 4:
            if any(v.shape != out.shape for v in views):
                raise Unsupported("operands are broadcast")
            self.filled_as_pixels(out, lambda y: fill(y, *(self.as_pixels(v) for v in views)))
        else:
            raise Unsupported(f"operands of shape {out.shape} lie in different layouts")


def _needed(graph: Graph) -> set[Node]:
    """The nodes that something is done with: inputs and outputs, what writes, and what these read."""
    needed: set[Node] = set()
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        kept = node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)
        if kept or not needed.isdisjoint(node.users):
            needed.add(node)
    return needed


def _described(node: Node) -> str:
    value = node.meta.get("val")
    shape = f" -> {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"{node.name} = {node.target}{shape}"


def _storage(fake: Tensor) -> int:
    return int(fake.untyped_storage()._cdata)


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_constant(v) for v in value)
    return not isinstance(value, View)


def _in_schema_order(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments by position, with the schema's defaults."""
    values = list(args)
    for argument in schema.arguments[len(values) :]:
        values.append(kwargs.get(argument.name, argument.default_value))
    return values


# ---- fastcnn's operators -------------------------------------------------------------------------------------------


def _conv2d(low: Lowering, out: View, args: list[Any]) -> None:
    input, weight, bias, stride, padding, dilation, groups, scale, residual, activation, in_scale, in_shift, relu = args
    x = low.as_pixels(input)
    if isinstance(weight, View):
        raise Unsupported("weight depends on the input")
    stride, top_left, dilation = tuple(stride), tuple(padding[:2]), tuple(dilation)
    algorithm = low.choose(out.shape, x.shape, weight, stride, top_left, dilation, groups)
    packed = low.conv_weight(weight, groups, x.dtype, algorithm)
    vectors = (low.vector(scale, "scale"), low.vector(bias, "bias"))
    r = None if residual is None else low.as_pixels(residual)
    prologue = (low.vector(in_scale, "input_scale"), low.vector(in_shift, "input_shift"))
    name, geometry = plan_step(algorithm, stride, top_left, dilation)
    attributes = (relu, activation == "relu", *geometry)
    low.filled_as_pixels(
        out,
        lambda y: low.emit(name, y, x, *vectors, r, *prologue, attributes=attributes, weight=packed),
    )


def _linear(low: Lowering, out: View, args: list[Any]) -> None:
    input, weight, bias, activation = args
    x, w = low.as_matrix(input, len(input.shape) - 1), low.as_matrix(weight, 1)
    vector = low.vector(bias, "bias")
    low.filled_as_matrix(
        out, len(out.shape) - 1, lambda y: low.emit("linear", y, x, w, vector, attributes=(activation == "relu",))
    )


def _channel_affine(low: Lowering, out: View, args: list[Any]) -> None:
    input, scale, shift, residual, activation = args
    x = low.as_pixels(input)
    s, t = low.vector(scale, "scale"), low.vector(shift, "shift")
    r = None if residual is None else low.as_pixels(residual)
    low.filled_as_pixels(
        out, lambda y: low.emit("channel_affine", y, x, s, t, r, attributes=(activation == "relu", 1.0))
    )


def _residual_add(low: Lowering, out: View, args: list[Any]) -> None:
    input, residual, scale, activation = args
    affine(low, out, input, residual, float(scale), activation == "relu")


def affine(
    low: Lowering, out: View, input: View | Tensor, residual: View | Tensor | None, factor: float, relu: bool
) -> None:
    """``act(input * factor + residual)``, value by value."""
    views = [low.as_view(v) for v in (input, residual) if v is not None]
    if len(views) == 2 and all(v.shape == out.shape for v in views):
        alike = all(v.strides == out.strides for v in views)
        if len(out.shape) != 4 and not (alike and out.is_dense):
            low.emit("map", out, views[1], views[0], attributes=("add", factor, 0.0))
            if relu:
                low.emit("map", out, out, None, attributes=("clamp", 0.0, math.inf))
            return
        if alike and not relu:
            # The same sum, by a step that takes any strides: choose_layouts may find others.
            low.emit("map", out, views[1], views[0], attributes=("add", factor, 0.0))
            return

    def fill(y: View, x: View, r: View | None = None) -> None:
        low.emit("channel_affine", y, x, None, None, r, attributes=(relu, factor))

    low.elementwise(out, [input] if residual is None else [input, residual], fill)


def _pool(name: str, pick: Callable[..., tuple[Attribute, ...]]) -> Rule:
    def rule(low: Lowering, out: View, args: list[Any]) -> None:
        x = low.as_pixels(args[0])
        low.filled_as_pixels(out, lambda y: low.emit(name, y, x, attributes=pick(*args[1:])))

    return rule


def _max_window(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> tuple[Attribute, ...]:
    return (tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))


def _average_window(
    kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool, divisor: int | None
) -> tuple[Attribute, ...]:
    return (tuple(kernel), tuple(stride), tuple(padding), count_include_pad, divisor or 0)


def _into(rule: Rule) -> Rule:
    return lambda low, out, args: rule(low, out, args[1:])


_OPERATORS: dict[str, Rule] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "channel_affine": _channel_affine,
    "residual_add": _residual_add,
    "max_pool2d": _pool("max_pool2d", _max_window),
    "avg_pool2d": _pool("avg_pool2d", _average_window),
    "adaptive_avg_pool2d": _pool("adaptive_avg_pool2d", lambda size: ()),
    "local_response_norm": _pool("local_response_norm", lambda *settings: settings),
}


def fastcnn_rules() -> dict[Any, Rule]:
    rules: dict[Any, Rule] = {}
    for name, rule in _OPERATORS.items():
        rules[getattr(torch.ops.fastcnn, name).default] = rule
        rules[getattr(torch.ops.fastcnn, f"{name}_into").default] = _into(rule)
    return rules
