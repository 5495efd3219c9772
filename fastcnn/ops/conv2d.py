"""conv2d: 2-D convolution with a prologue on its input and an epilogue on its output.

y = act(conv(pro(x), w) * scale[k] + bias[k] + residual),  pro(x) = input_act(x * input_scale[c] + input_shift[c])
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn import backends
from fastcnn.backends.reference import per_channel, prologue
from fastcnn.ops import _strides
from fastcnn.ops._arguments import (
    IntOrPair,
    kernel_vector,
    pair,
    require_activation,
    require_addressable,
    require_at_least,
    require_int,
    require_optional_tensors,
    require_residual,
    require_same_place,
    require_tensor,
    require_vector,
)
from fastcnn.ops._layout import empty_channels_last, is_channels_last, lies_alike, to_kernel_layout
from fastcnn.ops._registration import Operator, Unread

# Operator arguments, in schema order. padding is (top, left, bottom, right).
SIGNATURE = (
    "Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, "
    "SymInt groups, Tensor? scale, Tensor? residual, str activation, Tensor? input_scale, Tensor? input_shift, "
    "bool input_relu"
)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    input_activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.conv2d`, with batch norm, residual addition and ReLU fused into it.

    Computes ``act(conv(pro(input), weight) * scale + bias + residual)``, where
    ``pro(x) = input_activation(x * input_scale + input_shift)`` is applied before zero padding.

    Args:
        input: (N, C, H, W) or (C, H, W); fp32, bf16 or fp16 run on fastcnn's kernels. Channels-last memory, also a
            channel slice of a wider tensor, is read in place; other layouts are converted.
        weight: (K, C // groups, R, S), in the input's dtype.
        bias: (K,), in the input's dtype or fp32. Added after ``scale``.
        stride, padding, dilation, groups: as in PyTorch; padding may be ``"same"`` or ``"valid"``.
        scale: (K,), multiplies the sums (a batch norm's ``gamma / sqrt(var + eps)``).
        residual: the output's shape and dtype, added before the activation.
        activation: ``"none"`` or ``"relu"``.
        input_scale, input_shift: (C,), the affine map of a batch norm that precedes the convolution.
        input_activation: ``"none"`` or ``"relu"``, applied to the input after that map.
        out: where to write: the output's shape and dtype, for example a channel slice of a larger channels-last
            tensor. No gradient can be recorded then.

    Returns:
        (N, K, P, Q), in the memory layout that PyTorch would choose; ``out`` if given.

    3x3 and 5x5 convolutions with stride 1, and those of square filters with strides 2 to 4, on the CPU that record no
    gradient may be computed by Winograd's algorithm: see :func:`fastcnn.exact` for what it costs and how to rule it
    out. A NaN or infinity in the input may then make any output of the 4x4 tiles that see it NaN, not only those under
    the filter.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, device or dtype; the message names it.
    """
    require_tensor(input, "input")
    require_tensor(weight, "weight")
    require_optional_tensors(
        bias=bias, scale=scale, residual=residual, input_scale=input_scale, input_shift=input_shift, out=out
    )
    require_activation(activation)
    require_activation(input_activation, "input_activation")
    groups = require_int(groups, "groups")
    if weight.dim() != 4:
        raise ValueError(f"weight must have 4 dimensions (K, C // groups, R, S), has shape {tuple(weight.shape)}")
    if input.dim() == 3:
        grown = conv2d(
            input.unsqueeze(0), weight, bias, stride, padding, dilation, groups, scale=scale,
            residual=None if residual is None else residual.unsqueeze(0), activation=activation,
            input_scale=input_scale, input_shift=input_shift, input_activation=input_activation,
            out=None if out is None else out.unsqueeze(0),
        )  # fmt: skip
        return grown.squeeze(0) if out is None else out
    return OPERATOR(
        *operator_arguments(
            input, weight, bias, stride, padding, dilation, groups, scale, residual, activation, input_scale,
            input_shift, input_activation,
        ),
        out=out,
    )  # fmt: skip


def operator_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrPair,
    padding: IntOrPair | str,
    dilation: IntOrPair,
    groups: int,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_activation: str,
) -> tuple[Any, ...]:
    """:func:`conv2d`'s arguments as the operator takes them."""
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    return (
        input, weight, bias, stride, _padding(padding, weight, stride, dilation), dilation, groups, scale, residual,
        activation, input_scale, input_shift, input_activation == "relu",
    )  # fmt: skip


def _padding(
    padding: IntOrPair | str, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right). "same" puts the odd one at the end, as PyTorch does."""
    if isinstance(padding, str):
        if padding == "valid":
            return (0, 0, 0, 0)
        if padding != "same":
            raise ValueError(f"padding must be ints, 'same' or 'valid', is {padding!r}")
        if any(s != 1 for s in stride):
            raise ValueError("padding='same' is not possible with a stride other than 1")
        total = [dilation[i] * (weight.shape[2 + i] - 1) for i in (0, 1)]
        return (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    top, left = pair(padding, "padding")
    return (top, left, top, left)


def output_size(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """P, Q: how often the dilated filter fits into the padded input, by stride."""
    sizes = []
    for i in (0, 1):
        room = input.shape[2 + i] + padding[i] + padding[2 + i] - dilation[i] * (weight.shape[2 + i] - 1) - 1
        if room < 0:
            raise ValueError(
                f"weight's filter ({weight.shape[2]}, {weight.shape[3]}) with dilation {tuple(dilation)} is larger "
                f"than the padded input ({input.shape[2]}, {input.shape[3]}) + {tuple(padding)}"
            )
        sizes.append(room // stride[i] + 1)
    return sizes[0], sizes[1]


def output_shape(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_relu: bool,
) -> tuple[int, int, int, int]:
    """(N, K, P, Q), once the operator's arguments have been checked."""
    if input.dim() != 4:
        raise ValueError(f"input must have shape (N, C, H, W) or (C, H, W), has {tuple(input.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must have 4 dimensions (K, C // groups, R, S), has shape {tuple(weight.shape)}")
    require_at_least(stride, 1, "stride")
    require_at_least(padding, 0, "padding")
    require_at_least(dilation, 1, "dilation")
    require_at_least((groups,), 1, "groups")
    require_at_least(weight.shape[2:], 1, "weight's filter size")
    out_channels, group_channels = weight.shape[:2]
    if input.shape[1] != group_channels * groups:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: with groups={groups} the input must have "
            f"{group_channels * groups} channels, has {input.shape[1]}"
        )
    if out_channels % groups != 0 or out_channels < 1:
        raise ValueError(f"weight's {out_channels} output channels must be a positive multiple of groups={groups}")
    require_same_place(weight, "weight", input)
    shape = (input.shape[0], out_channels, *output_size(input, weight, stride, padding, dilation))
    require_addressable(shape, "padding", tuple(padding))
    require_vector(bias, "bias", out_channels, input)
    require_vector(scale, "scale", out_channels, input)
    require_vector(input_scale, "input_scale", input.shape[1], input)
    require_vector(input_shift, "input_shift", input.shape[1], input)
    require_residual(residual, shape, input)
    return shape


def _allocate(input: Tensor, *rest: Any) -> Tensor:
    return empty_channels_last(output_shape(input, *rest), input)


def _finish(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
) -> Tensor:
    if is_channels_last(input) and (residual is None or lies_alike(out, residual)):  # the common case
        return out
    strides = _strides.of_convolution(out.shape, input.shape, input.stride(), weight)
    if residual is not None:
        strides = _strides.elementwise(out.shape, strides, residual.stride())
    return _strides.in_strides(out, strides)


def fill(out: Tensor, input: Tensor, weight: Tensor, *rest: Any, fresh: bool = False) -> None:
    arguments, facts = contract(out, input, weight, *rest)
    if input.numel() == 0 or weight.numel() == 0:  # nothing to sum: only the epilogue is left
        backends.backend_module("reference").conv2d(*arguments)
    else:
        backends.run("conv2d", out.device, out.dtype, *arguments, fresh=fresh, **facts)


def contract(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_relu: bool,
) -> tuple[tuple[Any, ...], dict[str, object]]:
    """What the kernel contract's conv2d takes, and the facts about it: from the operator's arguments."""
    arguments = (
        out, to_kernel_layout(input), weight, kernel_vector(scale), kernel_vector(bias),
        None if residual is None else to_kernel_layout(residual), kernel_vector(input_scale),
        kernel_vector(input_shift), input_relu, activation, tuple(stride), tuple(padding[:2]), tuple(dilation), groups,
    )  # fmt: skip
    return arguments, {
        "groups": groups,
        "prologue": input_scale is not None or input_shift is not None or input_relu,
        "residual": residual is not None,
        "activation": activation,
        "symmetric": padding[0] == padding[2] and padding[1] == padding[3],
    }


def _sums(values: Tensor, like: Tensor | Unread) -> Tensor:
    """Sum over everything but channels, accumulated in fp32 or wider."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return values.sum((0, 2, 3), dtype=wide).to(like.dtype)


def _backward(
    grad: Tensor,
    out: Tensor | None,
    needs: Sequence[bool],
    input: Tensor,
    weight: Tensor,
    bias: Unread | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: Tensor | None,
    residual: Unread | None,
    activation: str,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    input_relu: bool,
) -> list[Tensor | None]:
    grads: list[Tensor | None] = [None] * 13
    if activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    if bias is not None and needs[2]:
        grads[2] = _sums(grad, bias)
    if residual is not None and needs[8]:
        grads[8] = grad
    top, left, bottom, right = padding
    filtered = prologue(input, input_scale, input_shift, input_relu)
    symmetric = top == bottom and left == right
    padded = filtered if symmetric else F.pad(filtered, (left, right, top, bottom))
    inner_padding = [top, left] if symmetric else [0, 0]
    if scale is not None and needs[7]:
        sums = F.conv2d(padded, weight, None, stride, inner_padding, dilation, groups)
        grads[7] = _sums(grad * sums, scale)
    grad_sums = grad if scale is None else grad * per_channel(scale, grad)
    want_input = needs[0] or (input_scale is not None and needs[10]) or (input_shift is not None and needs[11])
    grad_padded, grads[1], _ = torch.ops.aten.convolution_backward(
        grad_sums, padded, weight, None, stride, inner_padding, dilation, False, [0, 0], groups,
        [want_input, needs[1], False],
    )  # fmt: skip
    if not want_input:
        return grads
    height, width = input.shape[2:]
    grad_filtered = grad_padded if symmetric else grad_padded[:, :, top : top + height, left : left + width]
    if input_relu:
        grad_filtered = torch.ops.aten.threshold_backward(grad_filtered, filtered, 0)
    if input_shift is not None and needs[11]:
        grads[11] = _sums(grad_filtered, input_shift)
    if input_scale is not None:
        if needs[10]:
            grads[10] = _sums(grad_filtered * input, input_scale)
        grad_filtered = grad_filtered * per_channel(input_scale, grad_filtered)
    if needs[0]:
        grads[0] = grad_filtered
    return grads


OPERATOR = Operator(
    "conv2d",
    SIGNATURE,
    allocate=_allocate,
    finish=_finish,
    fill=fill,
    fill_fresh=functools.partial(fill, fresh=True),
    backward=_backward,
    unread=(2, 8),
    autocast=(0, 1, 8),
)
