"""Native steps for ATen's operators that only move values: copies, concatenation, padding, repetition, shuffles.

Views need no rule: they are recognised by their storage.
"""

from __future__ import annotations

from typing import Any

import torch

from fastcnn.graph.freezing.lowering import Lowering, Rule, Unsupported
from fastcnn.graph.freezing.program import View

aten = torch.ops.aten


def _copy(low: Lowering, out: View, args: list[Any]) -> None:
    low.emit("copy", out, low.as_view(args[0]).expanded(out.shape))


def _copy_into(low: Lowering, out: View, args: list[Any]) -> None:
    _copy(low, out, args[1:])


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


def _stack(low: Lowering, out: View, args: list[Any]) -> None:
    tensors, dim = args
    for i, value in enumerate(tensors):
        low.emit("copy", out.selected(dim % len(out.shape), i), low.as_view(value))


def _pad(low: Lowering, out: View, args: list[Any]) -> None:
    input, padding, value = args
    inside, view = out, low.as_view(input)
    for i in range(len(padding) // 2):
        dim = len(out.shape) - 1 - i
        before, after = padding[2 * i : 2 * i + 2]
        view = view.narrowed(dim, max(-before, 0), view.shape[dim] + min(before, 0) + min(after, 0))
        inside = inside.narrowed(dim, max(before, 0), view.shape[dim])
    padded = [i for i in range(len(padding)) if padding[i] > 0]
    if len({i // 2 for i in padded}) == 1:  # beside the copy, which may run at the same time
        dim = len(out.shape) - 1 - padded[0] // 2
        starts = (0, out.shape[dim] - padding[padded[-1]])
        parts = [out.narrowed(dim, starts[i % 2], padding[i]) for i in padded]
    else:
        parts = [out] if padded else []
    for part in parts:
        low.emit("fill", part, attributes=(float(value),))
    low.emit("copy", inside, view)


def _repeat(low: Lowering, out: View, args: list[Any]) -> None:
    """Every dimension of the result is (times, size): the first is broadcast."""
    input, times = args
    view = low.as_view(input)
    missing = len(times) - len(view.shape)
    shape, strides = (1,) * missing + view.shape, (0,) * missing + view.strides
    for i in reversed(range(len(times))):
        out = out.split(i, (times[i], shape[i]))
    spread = view.reshaped(
        tuple(size for pair in zip(times, shape, strict=True) for size in pair),
        tuple(stride for s in strides for stride in (0, s)),
    )
    low.emit("copy", out, spread)


def _upsample_nearest(low: Lowering, out: View, args: list[Any]) -> None:
    """By whole factors: rows of the result are (rows of the input, factor), and the factor is broadcast."""
    view = low.as_view(args[0])
    factors = [have // want for have, want in zip(out.shape[2:], view.shape[2:], strict=True)]
    exact = all(f * want == have for f, have, want in zip(factors, out.shape[2:], view.shape[2:], strict=True))
    given = [scale for scale in args[2:] if scale is not None]
    if not exact or (given and given != factors):
        raise Unsupported("only whole factors are covered")
    (n, c, h, w), (sn, sc, sh, sw) = view.shape, view.strides
    spread = view.reshaped((n, c, h, factors[0], w, factors[1]), (sn, sc, sh, 0, sw, 0))
    low.emit("copy", out.split(3, (w, factors[1])).split(2, (h, factors[0])), spread)


def _channel_shuffle(low: Lowering, out: View, args: list[Any]) -> None:
    input, groups = args
    c = out.shape[1]
    rest = list(range(3, len(out.shape) + 1))
    shuffled = low.as_view(input).split(1, (groups, c // groups)).permuted([0, 2, 1, *rest])
    low.emit("copy", out.split(1, (c // groups, groups)), shuffled)


def _pixel_shuffle(low: Lowering, out: View, args: list[Any]) -> None:
    input, r = args
    view = low.as_view(input)
    if len(view.shape) != 4:
        raise Unsupported(f"shape {view.shape} instead of (N, C, H, W)")
    h, w = view.shape[2:]
    spread = view.split(1, (out.shape[1], r * r)).split(2, (r, r)).permuted([0, 1, 4, 2, 5, 3])
    low.emit("copy", out.split(3, (w, r)).split(2, (h, r)), spread)


def _pixel_unshuffle(low: Lowering, out: View, args: list[Any]) -> None:
    input, r = args
    view = low.as_view(input)
    if len(view.shape) != 4:
        raise Unsupported(f"shape {view.shape} instead of (N, C, H, W)")
    h, w = out.shape[2:]
    spread = view.split(3, (w, r)).split(2, (h, r)).permuted([0, 1, 3, 5, 2, 4])
    low.emit("copy", out.split(1, (view.shape[1], r * r)).split(2, (r, r)), spread)


_RULES: dict[Any, Rule] = {
    aten.clone.default: _copy,
    aten._to_copy.default: _copy,
    aten.copy_.default: _copy_into,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.constant_pad_nd.default: _pad,
    aten.repeat.default: _repeat,
    aten.upsample_nearest2d.default: _upsample_nearest,
    aten.channel_shuffle.default: _channel_shuffle,
    aten.native_channel_shuffle.default: _channel_shuffle,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
}


def copy_rules() -> dict[Any, Rule]:
    return dict(_RULES)
