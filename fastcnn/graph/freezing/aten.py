"""Native steps for the ATen operators that networks use between fastcnn's: copies, concatenation, padding, arithmetic.

Views need no rule: they are recognised by their storage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastcnn.graph.freezing.lowering import Lowering, Rule, Unsupported, affine
from fastcnn.graph.freezing.program import View

aten = torch.ops.aten


def _copy(low: Lowering, out: View, args: list[Any]) -> None:
    low.emit("copy", out, _expanded(low.as_view(args[0]), out.shape))


def _copy_into(low: Lowering, out: View, args: list[Any]) -> None:
    _copy(low, out, args[1:])


def _expanded(view: View, shape: tuple[int, ...]) -> View:
    """The view broadcast to a shape: stride 0 where a size-1 dimension is repeated."""
    missing = len(shape) - len(view.shape)
    sizes, strides = (1,) * missing + view.shape, (0,) * missing + view.strides
    new = tuple(0 if have == 1 != want else st for have, want, st in zip(sizes, shape, strides, strict=True))
    return replace(view, shape=shape, strides=new)


def _cat(low: Lowering, out: View, args: list[Any]) -> None:
    tensors, dim = args
    dim %= len(out.shape)
    start = 0
    for value in tensors:
        view = low.as_view(value)
        if len(view.shape) != len(out.shape):
            raise Unsupported("operands have different ranks")
        low.emit("copy", out.narrowed(dim, start, view.shape[dim]), view)
        start += view.shape[dim]


def _pad(low: Lowering, out: View, args: list[Any]) -> None:
    input, padding, value = args
    if any(p < 0 for p in padding):
        raise Unsupported("padding is negative")
    inside = out
    view = low.as_view(input)
    for i in range(len(padding) // 2):
        dim = len(out.shape) - 1 - i
        inside = inside.narrowed(dim, padding[2 * i], view.shape[dim])
    low.emit("fill", out, attributes=(float(value),))
    low.emit("copy", inside, view)


def _relu(low: Lowering, out: View, args: list[Any]) -> None:
    affine(low, out, args[0], None, 1.0, True)


def _number(value: Any) -> float | None:
    """A Python number, or a constant of one value."""
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Tensor) and value.dim() == 0:
        return float(value)
    return None


def _multiply(low: Lowering, out: View, args: list[Any]) -> None:
    left, right = args[:2]
    if _number(left) is not None:
        left, right = right, left
    factor = _number(right)
    if factor is not None:
        affine(low, out, left, None, factor, False)
    else:
        _map("multiply", low, out, left, right)


def _sum_of_two(name: str) -> Rule:
    def rule(low: Lowering, out: View, args: list[Any]) -> None:
        left, right, alpha = args
        if alpha != 1:
            raise Unsupported("alpha is not 1")
        shapes = [tuple(v.shape) for v in (left, right) if not isinstance(v, int | float)]
        if name == "add" and shapes == [out.shape] * 2 and left.dtype == right.dtype == out.dtype:
            affine(low, out, left, right, 1.0, False)
        else:
            _map(name, low, out, left, right)

    return rule


def _map(name: str, low: Lowering, out: View, *values: Any) -> None:
    views = []
    for value in values:
        number = _number(value)
        tensor = value if number is None else torch.tensor(number, dtype=out.dtype)
        view = low.as_view(tensor)
        if view.dtype != out.dtype:
            raise Unsupported(f"operands of {view.dtype} and {out.dtype}")
        views.append(_expanded(view, out.shape))
    low.emit("map", out, views[0], views[1] if len(views) > 1 else None, attributes=(name,))


def _unary(name: str) -> Rule:
    return lambda low, out, args: _map(name, low, out, args[0])


def _power(low: Lowering, out: View, args: list[Any]) -> None:
    if args[1] != 2:
        raise Unsupported("only the power 2 is covered")
    _map("square", low, out, args[0])


def _sum(low: Lowering, out: View, args: list[Any]) -> None:
    input, dims, keepdim, dtype = args
    view = low.as_view(input)
    if dtype not in (None, out.dtype) or keepdim or list(dims) not in ([-1], [len(view.shape) - 1]):
        raise Unsupported("only a sum over the last dimension is covered")
    low.emit("sum_last", out, view)


def _addmm(low: Lowering, out: View, args: list[Any]) -> None:
    """What ``nn.Linear`` becomes: ``input @ weight.T + bias``."""
    bias, input, transposed, beta, alpha = args
    if beta != 1 or alpha != 1:
        raise Unsupported("alpha and beta must be 1")
    if isinstance(transposed, View):
        raise Unsupported("weight depends on the input")
    if isinstance(bias, Tensor) and bias.dim() != 1:
        raise Unsupported("bias is not a vector")
    low.rule(torch.ops.fastcnn.linear.default)(low, out, [input, transposed.t(), bias, "none"])


def _mm(low: Lowering, out: View, args: list[Any]) -> None:
    input, transposed = args
    if isinstance(transposed, View):
        raise Unsupported("weight depends on the input")
    low.rule(torch.ops.fastcnn.linear.default)(low, out, [input, transposed.t(), None, "none"])


_RULES: dict[Any, Rule] = {
    aten.clone.default: _copy,
    aten._to_copy.default: _copy,
    aten.copy_.default: _copy_into,
    aten.cat.default: _cat,
    aten.constant_pad_nd.default: _pad,
    aten.relu.default: _relu,
    aten.relu_.default: _relu,
    aten.mul.Tensor: _multiply,
    aten.mul_.Tensor: _multiply,
    aten.add.Tensor: _sum_of_two("add"),
    aten.add_.Tensor: _sum_of_two("add"),
    aten.sub.Tensor: _sum_of_two("subtract"),
    aten.tanh.default: _unary("tanh"),
    aten.tanh_.default: _unary("tanh"),
    aten.neg.default: _unary("negate"),
    aten.pow.Tensor_Scalar: _power,
    aten.sum.dim_IntList: _sum,
    aten.addmm.default: _addmm,
    aten.mm.default: _mm,
}


def aten_rules() -> dict[Callable[..., Any], Rule]:
    return dict(_RULES)
