"""Native steps for ATen's sums, means, maxima and norms over dimensions, softmax and layer normalisation."""

from __future__ import annotations

from typing import Any

import torch

from fastcnn.graph.freezing.elementwise import emit_map
from fastcnn.graph.freezing.lowering import Lowering, Rule, Unsupported
from fastcnn.graph.freezing.program import View, contiguous_strides

aten = torch.ops.aten


def _dimensions(dims: Any, rank: int) -> list[int]:
    """Which dimensions, in order; all of them where none is named."""
    if isinstance(dims, int):
        dims = [dims]
    return sorted(d % rank for d in dims) if dims else list(range(rank))


def reduce(low: Lowering, name: str, out: View, input: Any, dims: Any, factor: float = 1.0, mean: bool = False) -> None:
    """``out = factor * sum or max of input over dims``; ``mean`` divides a sum by their size.

    ``out`` may keep the reduced dimensions as 1.
    """
    view = low.as_view(input)
    if view.dtype != out.dtype:
        view = low.copied(view, out.dtype)
    reduced = _dimensions(dims, len(view.shape))
    kept = [d for d in range(len(view.shape)) if d not in reduced]
    if len(out.shape) == len(view.shape):
        out = out.permuted(kept)
    values = view.permuted(reduced).values
    if mean:
        factor /= values
    if name == "sum" and len(kept) == len(reduced) == 2:
        # A mean over pixels, as squeeze-and-excitation takes it: the pooling kernel reads whole pixels.
        pixels = view.permuted(kept + reduced)
        pooled = out.reshaped((*out.shape, 1, 1), (*out.strides, 0, 0))
        images = pixels.pixel_stride() is not None or reduced == [2, 3]  # for these, choose_layouts may spare the copy
        if images and pooled.pixel_stride() is not None:
            low.emit("adaptive_avg_pool2d", pooled, low.as_pixels(pixels))
            if factor * values != 1:
                emit_map(low, "multiply", pooled, pooled, factor * values)
            return
    reduced.sort(key=lambda d: -view.strides[d])
    last = view.permuted(kept + reduced)
    rows = last.merged(len(kept), len(last.shape))
    if rows is None:
        rows = low.copied(last).merged(len(kept), len(last.shape))
        assert rows is not None
    low.emit("reduce_last", out, rows, attributes=(name, factor))


def _sum(low: Lowering, out: View, args: list[Any]) -> None:
    reduce(low, "sum", out, args[0], args[1])


def _mean(low: Lowering, out: View, args: list[Any]) -> None:
    reduce(low, "sum", out, args[0], args[1], mean=True)


def _maximum(low: Lowering, out: View, args: list[Any]) -> None:
    reduce(low, "max", out, args[0], args[1])


def _adaptive_maximum(low: Lowering, out: View, args: list[Any]) -> None:
    """Window i of a dimension: floor(i*H/P) .. ceil((i+1)*H/P).

    Equal windows are a max pool; others are taken by rows, then by columns.
    """
    view = low.as_view(args[0])
    sizes, wanted = view.shape[-2:], out.shape[-2:]
    if len(out.shape) == 4 and all(have % want == 0 for have, want in zip(sizes, wanted, strict=True)):
        kernel = tuple(have // want for have, want in zip(sizes, wanted, strict=True))
        x = low.as_pixels(view)
        geometry = (kernel, kernel, (0, 0), (1, 1))
        low.filled_as_pixels(out, lambda y: low.emit("max_pool2d", y, x, attributes=geometry))
        return
    for dim in (len(out.shape) - 2, len(out.shape) - 1):
        have, want = view.shape[dim], out.shape[dim]
        shape = (*view.shape[:dim], want, *view.shape[dim + 1 :])
        target = out if shape == out.shape else low.temporary(shape, contiguous_strides(shape), out.dtype)
        for i in range(want):
            start = i * have // want
            window = view.narrowed(dim, start, -(-(i + 1) * have // want) - start)
            reduce(low, "max", target.selected(dim, i), window, dim)
        view = target


def _norm(low: Lowering, out: View, args: list[Any]) -> None:
    input, order, dims = args[:3]
    if order != 2:
        raise Unsupported("only the Euclidean norm is covered")
    view = low.as_view(input)
    squares = low.temporary_like(view)
    emit_map(low, "square", squares, view)
    reduce(low, "sum", out, squares, dims)
    emit_map(low, "sqrt", out, out)


def _on_rows(
    low: Lowering, step: str, out: View, input: View, first: int, *vectors: View | None, eps: Any = ()
) -> None:
    """A step on matrices: the dimensions from ``first`` on are a row's columns."""
    x = low.as_matrix(input, first)
    low.filled_as_matrix(out, first, lambda y: low.emit(step, y, x, *vectors, attributes=eps))


def _softmax(low: Lowering, out: View, args: list[Any]) -> None:
    view, dim = low.as_view(args[0]), args[1] % max(len(out.shape), 1)
    if view.dtype != out.dtype:
        view = low.copied(view, out.dtype)
    order = [d for d in range(len(out.shape)) if d != dim] + [dim]
    _on_rows(low, "softmax", out.permuted(order), view.permuted(order), len(order) - 1)


def _layer_norm(low: Lowering, out: View, args: list[Any]) -> None:
    input, normalized, weight, bias, eps = args
    vectors = [
        None if v is None else low.vector(v.reshape(-1), name) for v, name in ((weight, "weight"), (bias, "bias"))
    ]
    first = len(out.shape) - len(normalized)
    _on_rows(low, "layer_norm", out, low.as_view(input), first, *vectors, eps=(float(eps),))


def _group_norm(low: Lowering, out: View, args: list[Any]) -> None:
    """Each image's group of channels is a row of a layer norm; weight and bias come after it, channel by channel."""
    input, weight, bias, n, c, pixels, groups, eps = args
    view = low.as_view(input)
    length = c // groups * pixels
    if groups == 1 and view.is_dense and (n == 1 or view.strides[0] == length):
        target = low.temporary_like(view)  # an image's values in the order they lie
        rows, results = (v.reshaped((n, length), (length, 1)) for v in (view, target))
    else:
        rows = results = low.copied(view).reshaped((n * groups, length), (length, 1))
        target = rows.reshaped(view.shape, contiguous_strides(view.shape))
    low.emit("layer_norm", results, rows, None, None, attributes=(float(eps),))
    for name, value in (("multiply", weight), ("add", bias)):
        if value is not None:
            vector = low.as_view(value)
            shape = (1, c) + (1,) * (len(view.shape) - 2)
            strides = (0, vector.strides[0]) + (0,) * (len(view.shape) - 2)
            emit_map(low, name, target, target, vector.reshaped(shape, strides))
    low.emit("copy", out, target)


_RULES: dict[Any, Rule] = {
    aten.sum.dim_IntList: _sum,
    aten.sum.default: lambda low, out, args: reduce(low, "sum", out, args[0], None),
    aten.mean.dim: _mean,
    aten.mean.default: lambda low, out, args: reduce(low, "sum", out, args[0], None, mean=True),
    aten.amax.default: _maximum,
    aten.adaptive_max_pool2d.default: _adaptive_maximum,
    aten.linalg_vector_norm.default: _norm,
    aten._softmax.default: _softmax,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
}


def reduction_rules() -> dict[Any, Rule]:
    return dict(_RULES)
