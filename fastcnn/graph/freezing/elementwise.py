"""Native steps for ATen's functions of one value or two: activations and arithmetic, with broadcasting."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastcnn.graph.freezing.lowering import Lowering, Rule, Unsupported, affine
from fastcnn.graph.freezing.program import View

aten = torch.ops.aten


def number(value: Any) -> float | None:
    """A Python number, or a constant of one value and no dimension."""
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Tensor) and value.dim() == 0:
        return float(value)
    return None


def emit_map(low: Lowering, name: str, out: View, *values: Any, alpha: float = 1.0, beta: float = 0.0) -> None:
    """``out = name(*values)``: views, constants or numbers, broadcast to ``out`` and converted to its dtype."""
    views = []
    for value in values:
        factor = number(value)
        if factor is not None:
            value = torch.tensor(factor, dtype=out.dtype)
        view = low.as_view(value.to(out.dtype) if isinstance(value, Tensor) else value)
        if view.dtype != out.dtype:
            view = low.copied(view, out.dtype)
        views.append(view.expanded(out.shape))
    low.emit("map", out, views[0], views[1] if len(views) > 1 else None, attributes=(name, alpha, beta))


def _unary(name: str, alpha: float = 1.0, beta: float = 0.0) -> Rule:
    return lambda low, out, args: emit_map(low, name, out, args[0], alpha=alpha, beta=beta)


def _binary(name: str) -> Rule:
    return lambda low, out, args: emit_map(low, name, out, *args[:2])


def _add(low: Lowering, out: View, args: list[Any]) -> None:
    left, right, alpha = args
    shapes = [tuple(v.shape) for v in (left, right) if number(v) is None]
    dtypes = [v.dtype for v in (left, right) if number(v) is None]
    if alpha == 1 and shapes == [out.shape] * 2 and len(out.shape) == 4 and dtypes == [out.dtype] * 2:
        affine(low, out, left, right, 1.0, False)
    else:
        emit_map(low, "add", out, left, right, alpha=float(alpha))


def _subtract(low: Lowering, out: View, args: list[Any]) -> None:
    emit_map(low, "subtract", out, args[0], args[1], alpha=float(args[2]))


def _subtract_from(low: Lowering, out: View, args: list[Any]) -> None:
    emit_map(low, "subtract", out, args[1], args[0], alpha=float(args[2]))


def _divide(low: Lowering, out: View, args: list[Any]) -> None:
    if len(args) > 2:
        raise Unsupported("a rounding mode")
    emit_map(low, "divide", out, *args)


def _power(low: Lowering, out: View, args: list[Any]) -> None:
    exponent = number(args[1])
    name = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}.get(exponent or 0.0)
    if name is None:
        raise Unsupported("only the powers 2, 0.5, -0.5 and -1 are covered")
    emit_map(low, name, out, args[0])


def _clamp(low: Lowering, out: View, args: list[Any]) -> None:
    least, most = (bound if bound is None else number(bound) for bound in args[1:3])
    if any(given is not None and bound is None for given, bound in zip(args[1:3], (least, most), strict=True)):
        raise Unsupported("bounds that are no numbers")
    low_end, high_end = -math.inf if least is None else least, math.inf if most is None else most
    # As PyTorch: where the bounds cross, everything becomes the upper one.
    emit_map(low, "clamp", out, args[0], alpha=min(low_end, high_end), beta=high_end)


def _gelu(low: Lowering, out: View, args: list[Any]) -> None:
    emit_map(low, {"none": "gelu", "tanh": "gelu_tanh"}[args[1]], out, args[0])


def _leaky_relu(low: Lowering, out: View, args: list[Any]) -> None:
    emit_map(low, "leaky_relu", out, args[0], alpha=float(args[1]))


def _elu(low: Lowering, out: View, args: list[Any]) -> None:
    input, alpha, scale, input_scale = args
    if input_scale != 1:
        raise Unsupported("an input scale other than 1")
    emit_map(low, "elu", out, input, alpha=float(alpha) * float(scale), beta=float(scale))


def _prelu(low: Lowering, out: View, args: list[Any]) -> None:
    """max(x, 0) + weight * min(x, 0), with a weight that is broadcast."""
    input, weight = args
    view = low.as_view(input)
    positive, negative = low.temporary_like(view), low.temporary_like(view)
    emit_map(low, "clamp", positive, view, alpha=0.0, beta=math.inf)
    emit_map(low, "clamp", negative, view, alpha=-math.inf, beta=0.0)
    emit_map(low, "multiply", negative, negative, weight)
    emit_map(low, "add", out, positive, negative)


def _addcmul(low: Lowering, out: View, args: list[Any]) -> None:
    input, left, right, factor = args
    product = low.temporary_like(out)
    emit_map(low, "multiply", product, left, right)
    emit_map(low, "add", out, input, product, alpha=float(factor))


def _lerp(low: Lowering, out: View, args: list[Any]) -> None:
    start, end, weight = args
    part = low.temporary_like(out)
    emit_map(low, "subtract", part, end, start)
    emit_map(low, "multiply", part, part, weight)
    emit_map(low, "add", out, start, part)


# By the operator's name; each overload that exists, and the form that writes its first argument, has the same rule.
_RULES: dict[str, Rule] = {
    "relu": _unary("clamp", 0.0, math.inf),
    "relu6": _unary("clamp", 0.0, 6.0),
    "hardtanh": _clamp,
    "clamp": _clamp,
    "clamp_min": lambda low, out, args: _clamp(low, out, [args[0], args[1], None]),
    "clamp_max": lambda low, out, args: _clamp(low, out, [args[0], None, args[1]]),
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "_prelu_kernel": _prelu,
    "gelu": _gelu,
    "silu": _unary("silu"),
    "mish": _unary("mish"),
    "sigmoid": _unary("sigmoid"),
    "hardsigmoid": _unary("hardsigmoid"),
    "hardswish": _unary("hardswish"),
    "tanh": _unary("tanh"),
    "exp": _unary("exp"),
    "neg": _unary("negate"),
    "abs": _unary("absolute"),
    "square": _unary("square"),
    "sqrt": _unary("sqrt"),
    "rsqrt": _unary("rsqrt"),
    "reciprocal": _unary("reciprocal"),
    "pow": _power,
    "add": _add,
    "sub": _subtract,
    "rsub": _subtract_from,
    "mul": _binary("multiply"),
    "div": _divide,
    "maximum": _binary("maximum"),
    "minimum": _binary("minimum"),
    "addcmul": _addcmul,
    "lerp": _lerp,
}

_OVERLOADS = ("default", "Tensor", "Scalar", "Tensor_Scalar")


def elementwise_rules() -> dict[Any, Rule]:
    rules: dict[Any, Rule] = {}
    for name, rule in _RULES.items():
        for form in (name, f"{name}_"):
            packet = getattr(aten, form, None)
            for overload in _OVERLOADS:
                if packet is not None and hasattr(packet, overload):
                    rules[getattr(packet, overload)] = rule
    return rules
