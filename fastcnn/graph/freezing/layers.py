"""Native steps for ATen's convolutions, batch norms, pools and matrix products that optimizing did not replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcnn import ops
from fastcnn.graph.freezing.elementwise import emit_map
from fastcnn.graph.freezing.lowering import Lowering, Rule, Unsupported
from fastcnn.graph.freezing.program import View

aten, own = torch.ops.aten, torch.ops.fastcnn


def _convolution(low: Lowering, out: View, args: list[Any]) -> None:
    input, weight, bias, stride, padding, dilation, transposed, _, groups = args
    if transposed:
        raise Unsupported("a transposed convolution")
    if isinstance(weight, View):
        raise Unsupported("weight depends on the input")
    view = low.as_view(input)
    if len(view.shape) == 3:  # one dimension is two, of which the first has one row
        view, out, weight = view.unsqueezed(2), out.unsqueezed(2), weight.unsqueeze(2)
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    if len(view.shape) != 4:
        raise Unsupported(f"a convolution of shape {view.shape}")
    rule = low.rule(own.conv2d.default)
    rule(low, out, [
        view, weight, bias, stride, [*padding, *padding], dilation, groups, None, None, "none", None, None, False
    ])  # fmt: skip


def _batch_norm(low: Lowering, out: View, args: list[Any]) -> None:
    input, weight, bias, mean, var, eps = args
    if any(isinstance(v, View) for v in (weight, bias, mean, var)) or mean is None or var is None:
        raise Unsupported("statistics or weights that depend on the input")
    scale, shift = ops.fold_batch_norm(mean, var, weight, bias, eps)
    view = low.as_view(input)
    while len(view.shape) < 4:
        view, out = view.unsqueezed(len(view.shape)), out.unsqueezed(len(out.shape))
    low.rule(own.channel_affine.default)(low, out, [view, scale, shift, None, "none"])


def _native_batch_norm(low: Lowering, out: View, args: list[Any]) -> None:
    input, weight, bias, mean, var, training, _, eps = args
    if training:
        raise Unsupported("batch statistics")
    _batch_norm(low, out, [input, weight, bias, mean, var, eps])


def _batch_norm_in_evaluation(low: Lowering, out: View, args: list[Any]) -> None:
    _batch_norm(low, out, [*args[:5], args[6]])


def _pair(value: Any) -> list[int]:
    return list(value) * 2 if len(value) == 1 else list(value)


def _max_pool(low: Lowering, out: View, args: list[Any]) -> None:
    input, kernel, stride, padding, dilation, ceil_mode = args
    low.rule(own.max_pool2d.default)(
        low, out, [input, _pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation), ceil_mode]
    )


def _avg_pool(low: Lowering, out: View, args: list[Any]) -> None:
    input, kernel, stride, padding, ceil_mode, count_include_pad, divisor = args
    low.rule(own.avg_pool2d.default)(
        low, out,
        [input, _pair(kernel), _pair(stride or kernel), _pair(padding), ceil_mode, count_include_pad, divisor],
    )  # fmt: skip


def _adaptive_avg_pool(low: Lowering, out: View, args: list[Any]) -> None:
    low.rule(own.adaptive_avg_pool2d.default)(low, out, args)


def _product(low: Lowering, out: View, left: View | Tensor, right: View | Tensor, bias: View | Tensor | None) -> None:
    """``left @ right + bias`` of matrices, as ``linear`` with the transposed right one."""
    transposed = right.permuted([1, 0]) if isinstance(right, View) else right.t()
    low.rule(own.linear.default)(low, out, [left, transposed, bias, "none"])


def _addmm(low: Lowering, out: View, args: list[Any]) -> None:
    """What ``nn.Linear`` becomes: ``bias + input @ weight.T``."""
    bias, input, transposed, beta, alpha = args
    if beta != 1 or alpha != 1:
        raise Unsupported("alpha and beta must be 1")
    if isinstance(bias, Tensor) and bias.dim() == 1:
        _product(low, out, input, transposed, bias)
        return
    product = low.temporary(out.shape, (out.shape[1], 1), out.dtype)
    _product(low, product, input, transposed, None)
    emit_map(low, "add", out, product, bias)


def _mm(low: Lowering, out: View, args: list[Any]) -> None:
    _product(low, out, args[0], args[1], None)


def _bmm(low: Lowering, out: View, args: list[Any]) -> None:
    left, right = (low.as_view(value) for value in args)
    for i in range(out.shape[0]):
        _product(low, out.selected(0, i), left.selected(0, i), right.selected(0, i), None)


_RULES: dict[Any, Rule] = {
    aten.convolution.default: _convolution,
    aten.native_batch_norm.default: _native_batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm_in_evaluation,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.avg_pool2d.default: _avg_pool,
    aten._adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten.addmm.default: _addmm,
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
}


def layer_rules() -> dict[Any, Rule]:
    return dict(_RULES)
