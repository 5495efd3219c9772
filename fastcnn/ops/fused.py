"""The fused operators that networks are made of: thin, well-named functions over conv2d, batch_norm and residual_add.

    conv_bn_relu           act(bn(conv(x)) + residual)                one convolution in evaluation
    bottleneck_projection  the same for the 1x1 convolutions of a bottleneck
    inception_concat       cat([act(conv_i(x_i)), ...])               each branch writes its slice; nothing is copied
    dense_concat           cat([features, conv(...)])                 new channels go behind the old ones, in place

The fifth, act(scale * x + residual), is :func:`fastcnn.ops.residual_add`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn.ops._arguments import (
    FLOATING,
    IntOrPair,
    pair,
    renamed,
    require_at_least,
    require_optional_tensors,
    require_same_place,
    require_tensor,
)
from fastcnn.ops._registration import autocasts, records_gradient
from fastcnn.ops.batch_norm import batch_norm, fold_batch_norm
from fastcnn.ops.conv2d import conv2d


def conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    conv_bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str = "relu",
    out: Tensor | None = None,
) -> Tensor:
    """``act(batch_norm(conv2d(input, weight, conv_bias)) + residual)``.

    In evaluation this is one convolution: the batch norm becomes the scale and bias of its epilogue, and the weights
    stay as they are. In training the batch norm uses, and its running statistics are updated with, the batch's own
    statistics.

    Args:
        input: (N, C, H, W) or, in evaluation, (C, H, W); fp32, bf16 or fp16 run on fastcnn's kernels.
        weight: (K, C // groups, R, S), in the input's dtype.
        running_mean, running_var, bn_weight, bn_bias: (K,), as in :func:`fastcnn.ops.batch_norm`.
        conv_bias: (K,), the convolution's own bias.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.
        training, momentum, eps: as in :func:`torch.nn.functional.batch_norm`.
        residual: the output's shape and dtype, added before the activation.
        activation: ``"relu"`` or ``"none"``.
        out: where to write, for example a channel slice of a larger channels-last tensor. No gradient can be recorded
            then.

    Returns:
        (N, K, P, Q), in the memory layout that PyTorch would choose; ``out`` if given.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, device or dtype; the message names it.
    """
    _require_batch_norm(
        input, weight, running_mean=running_mean, running_var=running_var, bn_weight=bn_weight, bn_bias=bn_bias,
        conv_bias=conv_bias,
    )  # fmt: skip
    if training:
        sums = conv2d(input, weight, conv_bias, stride, padding, dilation, groups)
        return batch_norm(
            sums, running_mean, running_var, bn_weight, bn_bias, True, momentum, eps, residual=residual,
            activation=activation, out=out,
        )  # fmt: skip
    if running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var must be given in evaluation (training=False)")
    scale, shift = fold_batch_norm(running_mean, running_var, bn_weight, bn_bias, eps, conv_bias)
    return conv2d(
        input, weight, shift, stride, padding, dilation, groups, scale=scale, residual=residual, activation=activation,
        out=out,
    )  # fmt: skip


def _require_batch_norm(input: Tensor, weight: Tensor, **vectors: Tensor | None) -> None:
    """Vectors of one value a filter, in fp32 or in the dtype of the input or, under autocast, of the weight."""
    require_tensor(input, "input")
    require_tensor(weight, "weight")
    require_optional_tensors(**vectors)
    if weight.dim() != 4:
        raise ValueError(f"weight must have 4 dimensions (K, C // groups, R, S), has shape {tuple(weight.shape)}")
    for name, vector in vectors.items():
        if vector is None:
            continue
        require_same_place(vector, name, input, dtype=False)
        if vector.dtype not in FLOATING or vector.dtype not in (torch.float32, input.dtype, weight.dtype):
            raise TypeError(f"{name} must be torch.float32 or of the input's dtype {input.dtype}, is {vector.dtype}")
        if vector.dim() != 1 or vector.shape[0] != weight.shape[0]:
            raise ValueError(f"{name} must have shape ({weight.shape[0]},), has {tuple(vector.shape)}")


def bottleneck_projection(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    conv_bias: Tensor | None = None,
    stride: IntOrPair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str = "relu",
    out: Tensor | None = None,
) -> Tensor:
    """A 1x1 convolution of a bottleneck block with its batch norm, residual addition and ReLU.

    Serves all three of a ResNet bottleneck (He et al., 2016): the reduction, the expansion that takes the block's input
    as ``residual``, and, with a ``stride`` and ``activation="none"``, the projection of the shortcut. Arguments, result
    and errors are those of :func:`conv_bn_relu`; a 1x1 filter needs no padding and no dilation.

    Raises:
        ValueError: the weight's filter is not 1x1.
    """
    require_tensor(weight, "weight")
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(
            f"weight must be a 1x1 filter of shape (K, C // groups, 1, 1), has shape {tuple(weight.shape)}"
        )
    return conv_bn_relu(
        input, weight, running_mean, running_var, bn_weight, bn_bias, conv_bias=conv_bias, stride=stride, groups=groups,
        training=training, momentum=momentum, eps=eps, residual=residual, activation=activation, out=out,
    )  # fmt: skip


def inception_concat(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] | None = None,
    *,
    scales: Sequence[Tensor | None] | None = None,
    strides: Sequence[IntOrPair] | None = None,
    paddings: Sequence[IntOrPair | str] | None = None,
    activation: str = "relu",
    out: Tensor | None = None,
) -> Tensor:
    """The end of an inception module (Szegedy et al., 2015): the last convolutions of all branches, concatenated.

    Branch i computes ``act(conv2d(inputs[i], weights[i]) * scales[i] + biases[i])``, straight into its channel slice of
    one channels-last output, so that concatenation costs nothing. Where a gradient is recorded, and under autocast, the
    branches are computed apart and joined by :func:`torch.cat`.

    Args:
        inputs: one (N, C_i, H_i, W_i) tensor a branch; the same tensor may serve several.
        weights: one (K_i, C_i, R_i, S_i) filter a branch; None for a branch that ends without a convolution (the
            pooling of a grid reduction), whose input is copied as it is.
        biases: one (K_i,) vector or None a branch: a convolution's bias, or a folded batch norm's shift.
        scales: one (K_i,) vector or None a branch: a folded batch norm's scale.
        strides, paddings: one a branch, as in :func:`torch.nn.functional.conv2d`; 1 and 0 by default.
        activation: ``"relu"`` or ``"none"``, after every convolution.
        out: where to write: (N, sum of K_i, P, Q). No gradient can be recorded then.

    Returns:
        (N, sum of K_i, P, Q), in channels-last memory; ``out`` if given.

    Raises:
        ValueError, TypeError: an argument has a wrong length, shape, device or dtype; the message names it.
    """
    for name, values in (("inputs", inputs), ("weights", weights)):
        _require_sequence(values, name)
    branches = len(inputs)
    require_optional_tensors(out=out)
    if branches == 0:
        raise ValueError("inputs must have at least one branch")
    biases = _one_a_branch(biases, None, "biases", branches)
    scales = _one_a_branch(scales, None, "scales", branches)
    strides = _one_a_branch(strides, 1, "strides", branches)
    paddings = _one_a_branch(paddings, 0, "paddings", branches)
    weights = _one_a_branch(weights, None, "weights", branches)
    for i, (input, weight) in enumerate(zip(inputs, weights, strict=True)):
        require_tensor(input, f"inputs[{i}]")
        if input.dim() != 4:
            raise ValueError(f"inputs[{i}] must have shape (N, C, H, W), has {tuple(input.shape)}")
        require_optional_tensors(**{f"weights[{i}]": weight, f"biases[{i}]": biases[i], f"scales[{i}]": scales[i]})
        if weight is not None and weight.dim() != 4:
            raise ValueError(f"weights[{i}] must have 4 dimensions (K, C, R, S), has shape {tuple(weight.shape)}")

    def branch(i: int, target: Tensor | None) -> Tensor:
        weight = weights[i]
        if weight is None:
            return inputs[i] if target is None else target.copy_(inputs[i])
        try:
            return conv2d(
                inputs[i], weight, biases[i], strides[i], paddings[i], scale=scales[i], activation=activation,
                out=target,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            names = {"input": "inputs", "weight": "weights", "bias": "biases", "scale": "scales", "stride": "strides"}
            places = {name: f"{plural}[{i}]" for name, plural in (names | {"padding": "paddings"}).items()}
            raise renamed(error, places) from error

    if out is None and _must_be_functional((*inputs, *weights, *biases, *scales)):
        parts = [branch(i, None) for i in range(branches)]
        return torch.cat(parts, 1).contiguous(memory_format=torch.channels_last)

    channels = [inputs[i].shape[1] if w is None else w.shape[0] for i, w in enumerate(weights)]
    sizes = [_branch_size(inputs[i], w, strides[i], paddings[i]) for i, w in enumerate(weights)]
    if any(size != sizes[0] for size in sizes):
        given = ", ".join(map(str, sizes))
        raise ValueError(f"inputs must give outputs of one size (N, P, Q) by their strides and paddings, give {given}")
    count, height, width = sizes[0]
    shape = (count, sum(channels), height, width)
    if out is None:
        first = inputs[0]
        out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=torch.channels_last)
    elif tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {shape}, has {tuple(out.shape)}")
    begin = 0
    for i in range(branches):
        branch(i, out[:, begin : begin + channels[i]])
        begin += channels[i]
    return out


def _must_be_functional(tensors: Sequence[Tensor | None]) -> bool:
    """Whether writing into a given tensor is out of the question: autograd records, or autocast chooses the dtype."""
    device = next(t.device.type for t in tensors if t is not None)
    return records_gradient(tensors) or autocasts(device)


def _one_a_branch(values: Sequence | None, default: object, name: str, branches: int) -> list:
    if values is None:
        return [default] * branches
    _require_sequence(values, name)
    if len(values) != branches:
        raise ValueError(f"{name} must have one entry for each of the {branches} inputs, has {len(values)}")
    return list(values)


def _require_sequence(values: object, name: str) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a list or tuple with an entry a branch, is {type(values).__name__}")


def _branch_size(
    input: Tensor, weight: Tensor | None, stride: IntOrPair, padding: IntOrPair | str
) -> tuple[int, int, int]:
    """(N, P, Q) of a branch's output."""
    n, _, h, w = input.shape
    if weight is None or padding == "same":
        return (n, h, w)
    strides = pair(stride, "strides")
    require_at_least(strides, 1, "strides")
    ends = (0, 0) if isinstance(padding, str) else pair(padding, "paddings")
    p, q = (
        (size + 2 * end - r) // s + 1 for size, end, r, s in zip((h, w), ends, weight.shape[2:], strides, strict=True)
    )
    return (n, p, q)


def dense_concat(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bottleneck: Tensor | None = None,
    padding: IntOrPair | str = 0,
    scale: Tensor | None = None,
    activation: str = "none",
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    input_activation: str = "none",
    buffer: Tensor | None = None,
) -> Tensor:
    """A layer of a dense block (Huang et al., 2017): ``cat([features, conv2d(features)], 1)``, without the copy.

    With a ``buffer``, wide enough for the whole block, each layer writes its new channels behind those that are there
    and returns a view with both, the next layer's ``features``::

        buffer = torch.empty(n, channels + layers * growth, h, w, memory_format=torch.channels_last)
        features = buffer[:, :channels].copy_(x)
        for layer in block:
            features = dense_concat(features, layer.weight, ..., buffer=buffer)

    Without one, where a gradient is recorded (which an in-place write would break) and under autocast, it joins with
    :func:`torch.cat`: the loop above then serves training as well.

    Args:
        features: (N, C, H, W), the block's input and the channels that earlier layers added.
        weight: (growth, C, R, S), the convolution that makes the new channels.
        bias, scale, activation: its epilogue, and
        input_scale, input_shift, input_activation: its prologue (the pre-activation batch norm and ReLU), as in
            :func:`fastcnn.ops.conv2d`.
        bottleneck: what the convolution reads where that is not ``features`` themselves: the output of the layer's 1x1
            convolution.
        padding: the convolution's; it must keep the features' height and width.
        buffer: (N, at least C + growth, H, W), channels-last, with ``features`` being ``buffer[:, :C]``.

    Returns:
        (N, C + growth, H, W): ``buffer[:, : C + growth]``, or a new tensor.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, device or dtype; the message names it. ValueError also
            where ``features`` are not the buffer's first channels.
    """
    require_tensor(features, "features")
    require_tensor(weight, "weight")
    require_optional_tensors(bottleneck=bottleneck, buffer=buffer)
    source = features if bottleneck is None else bottleneck
    if features.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"features and weight must have 4 dimensions, have shapes {tuple(features.shape)} and {tuple(weight.shape)}"
        )
    if source.dim() == 4:
        size = _branch_size(source, weight, 1, padding if isinstance(padding, str) else pair(padding, "padding"))
        if size != (features.shape[0], *features.shape[2:]):
            raise ValueError(
                f"padding {padding!r} must let the convolution with weight {tuple(weight.shape)} keep the size "
                f"(N, H, W) of the features {(features.shape[0], *features.shape[2:])}, it gives {size}"
            )

    def convolution(target: Tensor | None) -> Tensor:
        try:
            return conv2d(
                source, weight, bias, 1, padding, scale=scale, activation=activation, input_scale=input_scale,
                input_shift=input_shift, input_activation=input_activation, out=target,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            name = "features" if bottleneck is None else "bottleneck"
            raise renamed(error, {"input": name, "out": "buffer"}) from error

    tensors = (features, source, weight, bias, scale, input_scale, input_shift)
    if buffer is None or _must_be_functional(tensors):
        return torch.cat([features, convolution(None)], 1)
    channels = features.shape[1]
    total = channels + weight.shape[0]
    _require_first_channels(features, buffer, total)
    convolution(buffer[:, channels:total])
    return buffer[:, :total]


def _require_first_channels(features: Tensor, buffer: Tensor, total: int) -> None:
    n, c, h, w = features.shape
    if buffer.dim() != 4 or (buffer.shape[0], *buffer.shape[2:]) != (n, h, w) or buffer.shape[1] < total:
        raise ValueError(f"buffer must have shape ({n}, at least {total}, {h}, {w}), has {tuple(buffer.shape)}")
    if records_gradient((buffer,)):
        raise ValueError("buffer must not require grad: a layer writes into it")
    if torch.compiler.is_compiling():  # addresses are not known yet
        return
    first = buffer[:, :c]
    if first.data_ptr() != features.data_ptr() or first.stride() != features.stride():
        raise ValueError("features must be the buffer's first channels, buffer[:, :C]")
