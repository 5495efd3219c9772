"""Feed wrong and awkward arguments to every operator of fastcnn.ops, and see that nothing crashes or lies.

Each case must end in a TypeError or ValueError that names the argument, or in PyTorch's answer: NaNs and infinities in
the same places, finite values as accurate as PyTorch's own. What lies around `out`, and every input, stays untouched.

    python examples/bad_inputs.py                    # a table, one row a case; exit status 1 if any case is not clear
    python examples/bad_inputs.py --operator linear  # one operator only
    python examples/bad_inputs.py --json

The cases are the product of the tables below: SUBJECTS (a correct call of each operator, and the same computation in
plain PyTorch) and what is fed in the place of one of its arguments (IMAGES, WEIGHTS, VECTORS, OUTS, OPTIONS).
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcnn
from fastcnn import ops

Arguments = dict[str, Any]

# ---- correct calls, and the same in plain PyTorch ------------------------------------------------------------------


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def positive(*shape: int) -> Tensor:
    return randn(*shape, seed=7).abs() + 0.5


def activate(x: Tensor, activation: str) -> Tensor:
    return {"none": lambda t: t, "relu": F.relu}[activation](x)


def along_channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    x = x if scale is None else x * along_channels(scale, x)
    return x if shift is None else x + along_channels(shift, x)


def added(x: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        return x
    if residual.shape != x.shape:
        raise ValueError("PyTorch would broadcast; a residual has the output's shape")
    return x + residual


def torch_conv2d(
    input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: Any = 1, scale: Any = None, residual: Any = None, activation: str = "none", input_scale: Any = None,
    input_shift: Any = None, input_activation: str = "none",
) -> Tensor:  # fmt: skip
    x = activate(affine(input, input_scale, input_shift), input_activation)
    if scale is None:
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    else:
        y = affine(F.conv2d(x, weight, None, stride, padding, dilation, groups), scale, bias)
    return activate(added(y, residual), activation)


def torch_conv2d_1x1_pair(
    input: Tensor, residual: Tensor, expand_weight: Tensor, reduce_weight: Tensor, expand_scale: Any = None,
    expand_bias: Any = None, reduce_scale: Any = None, reduce_bias: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if any(weight.shape[2:] != (1, 1) for weight in (expand_weight, reduce_weight)):
        raise ValueError("the filters are 1x1")
    wide = torch_conv2d(input, expand_weight, expand_bias, scale=expand_scale, residual=residual, activation="relu")
    return wide, torch_conv2d(wide, reduce_weight, reduce_bias, scale=reduce_scale, activation="relu")


def torch_conv2d_max_pool2d(
    input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: Any = 1, kernel_size: Any = 3, pool_stride: Any = None, pool_padding: Any = 0, pool_dilation: Any = 1,
    scale: Any = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    y = torch_conv2d(input, weight, bias, stride, padding, dilation, groups, scale, activation=activation)
    return F.max_pool2d(y, kernel_size, pool_stride, pool_padding, pool_dilation)


def torch_batch_norm(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: Any = 0.1, eps: Any = 1e-5, residual: Any = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return activate(added(y, residual), activation)


def torch_conv_bn_relu(
    input: Tensor, weight: Tensor, running_mean: Any, running_var: Any, bn_weight: Any = None, bn_bias: Any = None,
    conv_bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1,
    training: bool = False, momentum: Any = 0.1, eps: Any = 1e-5, residual: Any = None, activation: str = "relu",
) -> Tensor:  # fmt: skip
    y = F.conv2d(input, weight, conv_bias, stride, padding, dilation, groups)
    return torch_batch_norm(
        y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, residual, activation
    )


def torch_fold_batch_norm(
    running_mean: Tensor, running_var: Tensor, weight: Any, bias: Any, eps: float, conv_bias: Any = None
) -> tuple[Tensor, Tensor]:
    wide = torch.float32
    for vector in (running_mean, running_var, weight, bias, conv_bias):
        wide = wide if vector is None else torch.promote_types(wide, vector.dtype)
    scale = (running_var.to(wide) + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) + ((0 if conv_bias is None else conv_bias) - running_mean) * scale
    if any(v.shape != running_var.shape for v in (running_mean, scale, shift)):
        raise ValueError("PyTorch would broadcast; these are vectors of one length")
    return scale, shift


def torch_batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    wide = input.to(torch.promote_types(torch.float32, input.dtype)) if input.is_floating_point() else input
    # Of an infinity var_mean makes a NaN also in the mean; torch.mean and batch_norm do not.
    return wide.mean((0, 2, 3)), torch.var(wide, (0, 2, 3), correction=0)


def torch_channel_affine(
    input: Tensor, scale: Any, shift: Any, residual: Any = None, activation: str = "none"
) -> Tensor:
    return activate(added(affine(input, scale, shift), residual), activation)


def torch_residual_add(input: Tensor, residual: Tensor, scale: Any = 1.0, activation: str = "relu") -> Tensor:
    return activate(added(input * scale, residual), activation)


def torch_linear(input: Tensor, weight: Tensor, bias: Any = None, activation: str = "none") -> Tensor:
    return activate(F.linear(input, weight, bias), activation)


def torch_inception_concat(
    inputs: Any, weights: Any, biases: Any = None, scales: Any = None, strides: Any = None, paddings: Any = None,
    activation: str = "relu",
) -> Tensor:  # fmt: skip
    n = len(inputs)
    columns = [weights, biases or [None] * n, strides or [1] * n, paddings or [0] * n, scales or [None] * n]
    parts = [
        x if w is None else torch_conv2d(x, w, b, s, p, scale=c, activation=activation)
        for x, w, b, s, p, c in zip(inputs, *columns, strict=True)
    ]
    return torch.cat(parts, 1)


def torch_dense_concat(features: Tensor, weight: Tensor, bias: Any = None, **rest: Any) -> Tensor:
    source = rest.pop("bottleneck", None)
    rest.pop("buffer", None)
    return torch.cat([features, torch_conv2d(features if source is None else source, weight, bias, **rest)], 1)


def in_buffer() -> Arguments:
    """The features of a dense block in a buffer that has room for four more channels, and one to spare."""
    buffer = torch.full((2, 9, 6, 6), float("nan")).contiguous(memory_format=torch.channels_last)
    return {
        "features": buffer[:, :4].copy_(randn(2, 4, 6, 6)),
        "weight": randn(4, 4, 3, 3),
        "padding": 1,
        "buffer": buffer,
    }


@dataclass(frozen=True)
class Subject:
    """An operator of fastcnn.ops, a correct call of it, and what may be wrong with each argument."""

    operator: str
    call: Callable[[], Arguments]
    pytorch: Callable[..., Any]
    feeds: str  # "argument: table argument: table ..."; inputs[0] is the first of a list
    variant: str = ""
    has_out: bool = True
    updated: tuple[str, ...] = ()  # arguments that the call updates in place, compared too
    slack: float = 1.0  # sums that PyTorch adds up in float64 on a CPU and fastcnn in fp32 may be off by some roundings

    @property
    def title(self) -> str:
        return f"{self.operator} {self.variant}".rstrip()


def image() -> Tensor:
    return randn(2, 4, 6, 6)


def norm(channels: int, prefix: str = "") -> Arguments:
    names = ("running_mean", "running_var", f"{prefix}weight", f"{prefix}bias")
    return dict(zip(names, (randn(channels), positive(channels), positive(channels), randn(channels)), strict=True))


SUBJECTS = [
    Subject(
        "conv2d",
        lambda: {"input": image(), "weight": randn(6, 2, 3, 3), "bias": randn(6), "padding": 1, "groups": 2},
        F.conv2d,
        "input: IMAGES weight: WEIGHTS bias: VECTORS stride: STEPS padding: PADDINGS dilation: STEPS groups: GROUPS",
    ),
    Subject(
        "conv2d",
        lambda: {
            "input": image(),
            "weight": randn(6, 4, 1, 1),
            "bias": randn(6),
            "scale": positive(6),
            "residual": randn(2, 6, 6, 6),
            "activation": "relu",
            "input_scale": positive(4),
            "input_shift": randn(4),
            "input_activation": "relu",
        },
        torch_conv2d,
        "input: IMAGES weight: WEIGHTS bias: VECTORS scale: VECTORS residual: RESIDUALS input_scale: VECTORS "
        "input_shift: VECTORS activation: ACTIVATIONS input_activation: ACTIVATIONS",
        "fused",
    ),
    Subject(
        "conv2d_1x1_pair",
        lambda: {
            "input": image(),
            "residual": randn(2, 6, 6, 6),
            "expand_weight": randn(6, 4, 1, 1),
            "reduce_weight": randn(3, 6, 1, 1),
            "expand_scale": positive(6),
            "expand_bias": randn(6),
            "reduce_scale": positive(3),
            "reduce_bias": randn(3),
        },
        torch_conv2d_1x1_pair,
        "input: IMAGES residual: RESIDUALS expand_weight: WEIGHTS reduce_weight: WEIGHTS expand_scale: VECTORS "
        "expand_bias: VECTORS reduce_scale: VECTORS reduce_bias: VECTORS",
        has_out=False,
    ),
    Subject(
        "conv2d_max_pool2d",
        lambda: {
            "input": image(),
            "weight": randn(6, 4, 3, 3),
            "bias": randn(6),
            "kernel_size": 2,
            "pool_stride": 1,
            "pool_padding": 1,
            "scale": positive(6),
            "activation": "relu",
        },
        torch_conv2d_max_pool2d,
        "input: IMAGES weight: WEIGHTS bias: VECTORS scale: VECTORS stride: STEPS padding: PADDINGS dilation: STEPS "
        "groups: GROUPS kernel_size: STEPS pool_stride: STEPS pool_padding: PADDINGS pool_dilation: STEPS "
        "activation: ACTIVATIONS",
    ),
    Subject(
        "linear",
        lambda: {"input": randn(5, 7), "weight": randn(6, 7), "bias": randn(6), "activation": "relu"},
        torch_linear,
        "input: MATRICES weight: MATRICES bias: VECTORS activation: ACTIVATIONS",
    ),
    Subject(
        "batch_norm",
        lambda: {"input": image(), **norm(4), "residual": randn(2, 4, 6, 6, seed=3), "activation": "relu"},
        torch_batch_norm,
        "input: IMAGES running_mean: VECTORS running_var: VECTORS weight: VECTORS bias: VECTORS "
        "eps: NUMBERS residual: RESIDUALS activation: ACTIVATIONS",
    ),
    Subject(
        "batch_norm",
        lambda: {"input": image(), **norm(4), "training": True},
        torch_batch_norm,
        "input: IMAGES running_mean: VECTORS running_var: VECTORS weight: VECTORS bias: VECTORS "
        "momentum: NUMBERS eps: NUMBERS",
        "training",
        updated=("running_mean", "running_var"),
        slack=4,
    ),
    Subject(
        "fold_batch_norm",
        lambda: {**norm(6), "eps": 1e-5, "conv_bias": randn(6)},
        torch_fold_batch_norm,
        "running_mean: VECTORS running_var: VECTORS weight: VECTORS bias: VECTORS eps: NUMBERS conv_bias: VECTORS",
        has_out=False,
    ),
    Subject(
        "batch_statistics", lambda: {"input": image()}, torch_batch_statistics, "input: IMAGES", has_out=False, slack=4
    ),
    Subject(
        "channel_affine",
        lambda: {"input": image(), "scale": randn(4), "shift": randn(4), "residual": image()},
        torch_channel_affine,
        "input: IMAGES scale: VECTORS shift: VECTORS residual: RESIDUALS activation: ACTIVATIONS",
    ),
    Subject(
        "residual_add",
        lambda: {"input": image(), "residual": randn(2, 4, 6, 6, seed=3), "scale": 0.5},
        torch_residual_add,
        "input: IMAGES residual: RESIDUALS scale: NUMBERS activation: ACTIVATIONS",
    ),
    Subject(
        "conv_bn_relu",
        lambda: {
            "input": image(),
            "weight": randn(6, 4, 3, 3),
            **norm(6, "bn_"),
            "conv_bias": randn(6),
            "residual": randn(2, 6, 4, 4),
        },
        torch_conv_bn_relu,
        "input: IMAGES weight: WEIGHTS running_mean: VECTORS running_var: VECTORS bn_weight: VECTORS "
        "bn_bias: VECTORS conv_bias: VECTORS residual: RESIDUALS stride: STEPS padding: PADDINGS dilation: STEPS "
        "groups: GROUPS eps: NUMBERS activation: ACTIVATIONS",
    ),
    Subject(
        "bottleneck_projection",
        lambda: {"input": image(), "weight": randn(6, 4, 1, 1), **norm(6, "bn_"), "residual": randn(2, 6, 6, 6)},
        torch_conv_bn_relu,
        "input: IMAGES weight: WEIGHTS running_mean: VECTORS running_var: VECTORS bn_weight: VECTORS "
        "bn_bias: VECTORS residual: RESIDUALS stride: STEPS groups: GROUPS activation: ACTIVATIONS",
    ),
    Subject(
        "inception_concat",
        lambda: {
            "inputs": [image(), randn(2, 3, 6, 6)],
            "weights": [randn(6, 4, 1, 1), randn(2, 3, 3, 3)],
            "biases": [randn(6), randn(2)],
            "scales": [positive(6), None],
            "strides": [1, 1],
            "paddings": [0, 1],
        },
        torch_inception_concat,
        "inputs: LISTS inputs[0]: IMAGES inputs[1]: IMAGES weights: LISTS weights[0]: WEIGHTS "
        "biases: LISTS biases[0]: VECTORS scales[0]: VECTORS strides[1]: STEPS paddings[1]: PADDINGS "
        "activation: ACTIVATIONS",
    ),
    Subject(
        "dense_concat",
        lambda: {
            "features": image(),
            "weight": randn(3, 4, 3, 3),
            "bias": randn(3),
            "padding": 1,
            "input_scale": positive(4),
            "input_shift": randn(4),
            "input_activation": "relu",
        },
        torch_dense_concat,
        "features: IMAGES weight: WEIGHTS bias: VECTORS input_scale: VECTORS input_shift: VECTORS "
        "padding: PADDINGS activation: ACTIVATIONS",
        has_out=False,
    ),
    Subject(
        "dense_concat",
        in_buffer,
        torch_dense_concat,
        "features: WHOLES weight: WEIGHTS buffer: BUFFERS padding: PADDINGS",
        "in a buffer",
        has_out=False,
    ),
    Subject(
        "max_pool2d",
        lambda: {"input": image(), "kernel_size": 3, "stride": 2, "padding": 1},
        F.max_pool2d,
        "input: IMAGES kernel_size: STEPS stride: STEPS padding: PADDINGS dilation: STEPS",
    ),
    Subject(
        "avg_pool2d",
        lambda: {"input": image(), "kernel_size": 3, "stride": 2, "padding": 1},
        F.avg_pool2d,
        "input: IMAGES kernel_size: STEPS stride: STEPS padding: PADDINGS divisor_override: GROUPS",
    ),
    Subject(
        "adaptive_avg_pool2d",
        lambda: {"input": image(), "output_size": (3, 4)},
        F.adaptive_avg_pool2d,
        "input: IMAGES output_size: STEPS",
    ),
    Subject(
        "global_avg_pool2d", lambda: {"input": image()}, lambda input: F.adaptive_avg_pool2d(input, 1), "input: IMAGES"
    ),
    Subject(
        "local_response_norm",
        lambda: {"input": image(), "size": 3, "alpha": 0.1},
        F.local_response_norm,
        "input: IMAGES size: GROUPS alpha: NUMBERS beta: NUMBERS k: NUMBERS",
    ),
]

# ---- what is fed ---------------------------------------------------------------------------------------------------


def put(value: float, *, everywhere: bool = False) -> Callable[[Tensor], Tensor]:
    """The tensor with the value at its first place: one pixel of one channel of one image."""

    def feed(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[: None if everywhere else 1] = value
        return t

    return feed


def put_in_channel(value: float) -> Callable[[Tensor], Tensor]:
    def feed(t: Tensor) -> Tensor:
        t = t.clone()
        t[:, -1] = value
        return t

    return feed


def channel_slice(t: Tensor) -> Tensor:
    wide = torch.full((t.shape[0], t.shape[1] + 5, *t.shape[2:]), float("nan"), dtype=t.dtype)
    wide = wide.contiguous(memory_format=torch.channels_last)
    return wide[:, 2 : 2 + t.shape[1]].copy_(t)


def overlapping(t: Tensor) -> Tensor:
    """Rows, images and channels that share memory with their neighbours."""
    return randn(2 * t.numel()).as_strided(t.shape, [1 + 2 * i for i in range(t.dim())])


def odd_strides(t: Tensor) -> Tensor:
    """The same values, each dimension with gaps of its own."""
    strides: list[int] = []
    step = 3
    for size in reversed(t.shape):
        strides.insert(0, step)
        step = step * size + 5
    return torch.full((step + 11,), float("nan")).as_strided(t.shape, strides, 11).copy_(t)


def lazily_negated(t: Tensor) -> Tensor:
    """The imaginary part of a conjugate: real numbers whose memory holds the negatives."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


OBJECTS = {
    "a list": lambda t: t.tolist(),
    "a numpy array": lambda t: t.numpy(),
    "a float": lambda t: 1.0,
    "a string": lambda t: "tensor",
    "an nn.Module": lambda t: torch.nn.Identity(),
}
PLACES = {
    "on the meta device": lambda t: t.to("meta"),
    **({"on the GPU": lambda t: t.cuda()} if torch.cuda.is_available() else {}),
    "sparse": lambda t: t.to_sparse(),
    "in oneDNN's layout": lambda t: t.to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
}
DTYPES = {
    str(dtype).removeprefix("torch."): lambda t, dtype=dtype: t.to(dtype)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8,
                  torch.bool, torch.complex64)
}  # fmt: skip
VALUES = {
    "one NaN": put(math.nan),
    "one inf": put(math.inf),
    "one -inf": put(-math.inf),
    "all NaN": put(math.nan, everywhere=True),
    "1e30 in one place": put(1e30),
    "the largest float in one place": put(torch.finfo(torch.float32).max),
    "denormals": lambda t: t * 1e-40,
    "all -0.0": put(-0.0, everywhere=True),
}
STRIDES = {
    "lazily negated": lazily_negated,
    "odd strides": odd_strides,
    "overlapping strides": overlapping,
    "requiring grad": lambda t: t.clone().requires_grad_(),
}
IMAGES = {
    "None": lambda t: None, **OBJECTS, **PLACES, **DTYPES, **VALUES, **STRIDES,
    "one channel of NaN": put_in_channel(math.nan),
    "one channel of inf": put_in_channel(math.inf),
    "everything 1e30": put(1e30, everywhere=True),
    "transposed H and W": lambda t: t.mT.contiguous().mT,
    "transposed N and C": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "one image expanded (stride 0)": lambda t: t[:1].expand(t.shape),
    "one pixel expanded (stride 0)": lambda t: t[:, :, :1, :1].expand(t.shape),
    "one channel expanded (stride 0)": lambda t: t[:, :1].expand(t.shape),
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "a channel slice of NaNs": channel_slice,
    "every other column": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "one image with odd batch stride": lambda t: t[:1].clone().as_strided((1, *t.shape[1:]), (1, *t.stride()[1:])),
    "an empty batch": lambda t: t[:0],
    "no channels": lambda t: t[:, :0],
    "no rows": lambda t: t[:, :, :0],
    "no columns": lambda t: t[..., :0],
    "one pixel": lambda t: t[..., :1, :1],
    "one channel more": lambda t: torch.cat([t, t[:, :1]], 1),
    "no dimensions": lambda t: t[0, 0, 0, 0],
    "one dimension": lambda t: t[0, 0, 0],
    "two dimensions": lambda t: t[0, 0],
    "three dimensions": lambda t: t[0],
    "five dimensions": lambda t: t[None],
}  # fmt: skip
WHOLES = {k: v for k, v in IMAGES.items() if k in {
    "None", *OBJECTS, *PLACES, "float64", "bfloat16", "requiring grad", "channels-last",
    "an empty batch", "three dimensions"}}  # fmt: skip
RESIDUALS = {k: v for k, v in IMAGES.items() if k != "one channel more"} | {
    "one channel more": IMAGES["one channel more"],
    "to be broadcast": lambda t: t[:1],
}
WEIGHTS = {
    "None": lambda t: None, **OBJECTS, **PLACES, **DTYPES, **VALUES, **STRIDES,
    "one filter of NaN": lambda t: torch.cat([t[:-1], t[-1:] * math.nan]),
    "one filter expanded (stride 0)": lambda t: t[:1].expand(t.shape),
    "transposed filters": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "no filters": lambda t: t[:0],
    "one filter less": lambda t: t[:-1],
    "no channels": lambda t: t[:, :0],
    "one channel more": lambda t: torch.cat([t, t[:, :1]], 1),
    "no rows": lambda t: t[:, :, :0],
    "a filter of 99 x 99": lambda t: t[:, :, :1, :1].expand(-1, -1, 99, 99),
    "three dimensions": lambda t: t[0],
    "five dimensions": lambda t: t[None],
}  # fmt: skip
MATRICES = {
    "None": lambda t: None, **OBJECTS, **PLACES, **DTYPES, **VALUES, **STRIDES,
    "one row of NaN": lambda t: torch.cat([t[:-1], t[-1:] * math.nan]),
    "one column of inf": put_in_channel(math.inf),
    "transposed": lambda t: t.t().contiguous().t(),
    "one row expanded (stride 0)": lambda t: t[:1].expand(t.shape),
    "one column expanded (stride 0)": lambda t: t[:, :1].expand(t.shape),
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[:, :0],
    "one column more": lambda t: torch.cat([t, t[:, :1]], 1),
    "no dimensions": lambda t: t[0, 0],
    "one dimension": lambda t: t[0],
    "four dimensions": lambda t: t[None, None],
}  # fmt: skip
VECTORS = {
    "None": lambda t: None, **OBJECTS, **PLACES, **DTYPES, **VALUES, **STRIDES,
    "one value expanded (stride 0)": lambda t: t[:1].expand(t.shape),
    "negative": lambda t: -t,
    "one value less": lambda t: t[:-1],
    "a single value": lambda t: t[:1],
    "no values": lambda t: t[:0],
    "no dimensions": lambda t: t[0],
    "two dimensions": lambda t: t[None],
}  # fmt: skip
STEPS = {
    repr(value): lambda _, value=value: value
    for value in (0, -1, 1.5, "2", None, (), (1,), (2, 1), (1, 2, 3), (1, None), [1.0, 1.0], True, 2**31, 2**62, 2**63)
}
PADDINGS = {
    repr(value): lambda _, value=value: value
    for value in (-1, 0.5, "valid", "full", None, (1, 1), (1, -1), (1, 1, 1), (1, "1"), 99, 2**62, 2**63)
}
GROUPS = {repr(value): lambda _, value=value: value for value in (0, -2, 3, 2.0, "2", None, (2,), True, 2**40, 2**63)}
NUMBERS = {
    repr(value): lambda _, value=value: value
    for value in (0, 0.0, -1.0, 1e30, 1e300, math.nan, math.inf, None, "1", [1.0], 1j, True)
}
ACTIVATIONS = {
    repr(value): lambda _, value=value: value for value in ("none", "gelu", "ReLU", None, 1, F.relu, ["relu"])
}
LISTS = {
    "None": lambda v: None,
    "a tensor": lambda v: v[0],
    "an integer": lambda v: 3,
    "a tuple": tuple,
    "an empty list": lambda v: [],
    "one entry less": lambda v: v[:-1],
    "a list of numbers": lambda v: [1] * len(v),
}
BUFFERS = {
    **OBJECTS, **{k: v for k, v in PLACES.items()},
    "bfloat16": lambda t: t.bfloat16(),
    "too few channels": lambda t: t[:, :6],
    "one image more": lambda t: t.new_empty(3, *t.shape[1:]),
    "three dimensions": lambda t: t[0],
    "other memory": lambda t: t.clone(),
    "its later channels": lambda t: t[:, 1:],
    "exactly wide enough": lambda t: t[:, :8],
    "expanded (stride 0)": lambda t: t[:1].expand(t.shape),
    "requiring grad": lambda t: t.detach().requires_grad_(),
}  # fmt: skip

GUARD = 12345.0


def out_at(strides: Callable[[Tensor], list[int]], offset: int = 13) -> Callable[[Arguments, Tensor], Tensor]:
    """An `out` of given strides, in the middle of memory full of guard values."""

    def feed(_: Arguments, y: Tensor) -> Tensor:
        steps = strides(y)
        extent = sum((size - 1) * step for size, step in zip(y.shape, steps, strict=True)) + 1
        return torch.full((offset + extent + 29,), GUARD, dtype=y.dtype).as_strided(y.shape, steps, offset)

    return feed


def dense_strides(shape: torch.Size, order: list[int], gap: int = 0, innermost: int = 1) -> list[int]:
    """Strides of memory in which dimensions follow each other in `order`, outermost first."""
    strides, step = [0] * len(shape), innermost
    for dimension in reversed(order):
        strides[dimension] = step
        step = step * shape[dimension] + gap
    return strides


def channels_innermost(y: Tensor) -> list[int]:
    return [0, *range(2, y.dim()), 1] if y.dim() > 2 else list(range(y.dim()))


def input_as_out(arguments: Arguments, y: Tensor) -> Tensor:
    return arguments["input"]


def overlapping_input(arguments: Arguments, y: Tensor) -> Tensor:
    """The input moves into a larger memory, in which `out` begins one value later."""
    memory = torch.zeros(arguments["input"].numel() + y.numel() + 1)
    x = memory[: arguments["input"].numel()].view(arguments["input"].shape)
    arguments["input"] = x.copy_(arguments["input"])
    return memory[1 : 1 + y.numel()].view(y.shape)


def made_from(feed: Callable[[Tensor], Any]) -> Callable[[Arguments, Tensor], Any]:
    return lambda _, y: feed(torch.zeros_like(y))


OUTS: dict[str, Callable[[Arguments, Tensor], Any]] = {
    "contiguous": out_at(lambda y: dense_strides(y.shape, list(range(y.dim())))),
    "channels-last": out_at(lambda y: dense_strides(y.shape, channels_innermost(y))),
    "a channel slice": lambda _, y: out_at(lambda y: [
        step if d == 1 and y.dim() > 2 else step // max(y.shape[1], 1) * (y.shape[1] + 5) if y.dim() > 2 else step
        for d, step in enumerate(dense_strides(y.shape, channels_innermost(y)))])(_, y),
    "odd strides": out_at(lambda y: dense_strides(y.shape, list(range(y.dim())), 5, 3)),
    "transposed": out_at(lambda y: dense_strides(y.shape, list(reversed(range(y.dim()))))),
    "expanded (stride 0)": out_at(lambda y: [0, *dense_strides(y.shape, list(range(y.dim())))[1:]]),
    "a single value expanded": out_at(lambda y: [0] * y.dim()),
    "overlapping strides": out_at(lambda y: [1 + 2 * i for i in range(y.dim())]),
    "sharing the input's memory": overlapping_input,
    "the input itself": input_as_out,
    "one image more": lambda _, y: y.new_empty(y.shape[0] + 1, *y.shape[1:]),
    "to be broadcast": lambda _, y: y.new_empty(1, *y.shape[1:]),
    "no values": lambda _, y: y.new_empty(0),
    "one dimension more": lambda _, y: y.new_empty(1, *y.shape),
    "bfloat16": lambda _, y: y.bfloat16(),
    "float64": lambda _, y: y.double(),
    "int64": lambda _, y: y.long(),
    "requiring grad": lambda _, y: torch.zeros_like(y, requires_grad=True),
    **{place: made_from(move) for place, move in PLACES.items()},
    "lazily negated": lambda _, y: lazily_negated(torch.zeros_like(y)),
    **{name: made_from(make) for name, make in OBJECTS.items()},
}  # fmt: skip

# Where fastcnn gives an answer although PyTorch refuses, and why: (operator, argument; "*" is any, what is fed).
DIFFERENTIABLE = "an answer: fastcnn also differentiates with respect to the statistics"
MIXED = "an answer: next to any input dtype vectors may be fp32"
IN_FP32 = "an answer: fastcnn computes it in fp32, PyTorch has no such kernel on a CPU"
MORE_THAN_PYTORCH: dict[tuple[str, str, str], str] = {
    ("*", "running_mean", "requiring grad"): DIFFERENTIABLE,
    ("*", "running_var", "requiring grad"): DIFFERENTIABLE,
    ("batch_norm", "input", "float64"): MIXED,
    ("local_response_norm", "input", "bfloat16"): IN_FP32,
    ("local_response_norm", "input", "float16"): IN_FP32,
    ("local_response_norm", "size", repr(2**40)): "an answer: fastcnn makes no padded copy, PyTorch runs out of memory",
}
# Where its infinities and NaNs stand elsewhere than PyTorch's, and why.
OVERFLOW = "inf: deviations beyond 1e19 are squared in fp32, by PyTorch on a CPU in float64"
FOLDED = "NaN: an infinite scale is folded into the shift, inf - inf; the other channels are as PyTorch's"
CENTRED = "inf: the mean is taken off before the infinite scale, PyTorch takes inf from inf; other channels are as its"
IN_FLOAT64 = "inf: running statistics are updated in float64, where PyTorch takes inf from inf"
OTHER_THAN_PYTORCH: dict[tuple[str, str, str], str] = {
    ("batch_norm", "input", "everything 1e30"): OVERFLOW,
    ("batch_statistics", "input", "everything 1e30"): OVERFLOW,
    ("conv_bn_relu", "bn_weight", "one inf"): FOLDED,
    ("conv_bn_relu", "bn_weight", "one -inf"): FOLDED,
    ("conv_bn_relu", "bn_weight", "the largest float in one place"): FOLDED,
    ("batch_norm training", "weight", "one inf"): CENTRED,
    ("batch_norm training", "weight", "one -inf"): CENTRED,
    ("batch_norm training", "momentum", "1e+300"): IN_FLOAT64,
}


def reason_for(table: dict[tuple[str, str, str], str], subject: Subject, place: str, fed: str) -> str | None:
    names = (subject.title, subject.operator, "*")
    return next((table[name, place, fed] for name in names if (name, place, fed) in table), None)


# ---- one case ------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What became of one case."""

    operator: str
    argument: str
    fed: str
    outcome: str
    clear: bool
    kind: str  # "same", "refused", "stricter" (PyTorch accepts), "more" (PyTorch refuses), "other" or "unclear"
    fallbacks: list[str] = field(default_factory=list)


def change_one(arguments: Arguments, place: str, feed: Callable[[Any], Any]) -> None:
    name, _, index = place.rstrip("]").partition("[")
    if index:
        arguments[name] = list(arguments[name])
        arguments[name][int(index)] = feed(arguments[name][int(index)])
    else:
        arguments[name] = feed(arguments.get(name))


def argument_at(arguments: Arguments, place: str) -> Any:
    name, _, index = place.rstrip("]").partition("[")
    return arguments[name][int(index)] if index else arguments[name]


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)


def in_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [in_float64(v) for v in value] if isinstance(value, (list, tuple)) else value


def compute(function: Callable[..., Any], subject: Subject, arguments: Arguments) -> list[Tensor]:
    """The results of a call, and what it updated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = list(tensors_of(function(**arguments)))
    return [t.detach() for t in (*results, *(arguments[u] for u in subject.updated)) if t is not None]


TINY = {torch.float64: 1e-14, torch.float32: 2.5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def same_kind(a: Tensor, b: Tensor) -> Tensor:
    """Where both are NaN, both the same infinity or both finite."""
    return (a.isnan() & b.isnan()) | (a.isfinite() & b.isfinite()) | (a.isinf() & (a == b))


def difference(ours: Tensor, theirs: Tensor, exact: Tensor | None, slack: float) -> str | None:
    """What is wrong with our result, by PyTorch's in the same dtype and in float64; None when nothing is."""
    if (ours.shape, ours.dtype, ours.device) != (theirs.shape, theirs.dtype, theirs.device):
        given, expected = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (ours, theirs))
        return f"{given}, PyTorch gives {expected}"
    if ours.device.type == "meta" or ours.numel() == 0:
        return None
    if exact is None or not ours.is_floating_point() or ours.dtype not in TINY:
        return None if torch.equal(ours, theirs) else "other values than PyTorch's"
    ours, theirs, tiny = ours.double(), theirs.double(), TINY[ours.dtype]
    # Whether a NaN in a weight meets the padding's zeros depends on PyTorch's algorithm, which depends on the dtype.
    strange = ~(same_kind(ours, theirs) | same_kind(ours, exact))
    if strange.any():
        places = tuple(strange.nonzero()[0].tolist())
        kinds = f"{ours[places].item():g}, PyTorch gives {theirs[places].item():g}"
        return f"NaN or infinity differs in {int(strange.sum())} places: at {places} {kinds}"
    finite = ours.isfinite() & theirs.isfinite() & exact.isfinite()
    ours, theirs, exact = ours[finite], theirs[finite], exact[finite]
    error, bound = (ours - exact).norm(), 2 * (theirs - exact).norm() + slack * tiny * exact.norm() + 1e-42
    return None if error <= bound else f"an error of {error:.2e}, PyTorch and rounding allow {bound:.2e}"


def names(message: str, place: str, subject: Subject, fed: Any) -> bool:
    """Whether an error message names the argument, or another tensor of the call that a fed tensor disagrees with."""
    words = {place.partition("[")[0]}
    if isinstance(fed, Tensor) and fed.layout == torch.strided and not fed.is_quantized:
        words |= {name for name, value in subject.call().items() if isinstance(value, (Tensor, list))}
    elif isinstance(fed, (int, tuple)):  # a stride makes a smaller output, which the residual no longer has
        words.add("residual")
    return any(re.search(rf"\b{re.escape(word)}\b", message) for word in words)


def run_case(subject: Subject, place: str, fed: str, feed: Callable[..., Any]) -> Result:
    """Feed one thing; judge what comes back."""
    prepared = [subject.call() for _ in range(4)]
    exact_arguments, their_arguments, our_arguments, before = prepared
    theirs: list[Tensor] | None = None
    exact: list[Tensor] | None = None
    refusal = ""
    out: Any = None
    memory: Tensor | None = None
    if place == "out":
        theirs = compute(subject.pytorch, subject, their_arguments)
        exact = compute(subject.pytorch, subject, in_float64_arguments(exact_arguments))
        out = our_arguments["out"] = feed(our_arguments, theirs[0])
        memory, refusal = guard(out), refusal_of_out(out, theirs[0])
    else:
        for arguments in prepared:
            change_one(arguments, place, feed)
        try:
            theirs = compute(subject.pytorch, subject, their_arguments)
        except Exception as error:  # whatever PyTorch says
            refusal = f"{type(error).__name__}: {error}"
        else:
            try:
                exact = compute(subject.pytorch, subject, in_float64_arguments(exact_arguments))
            except Exception:  # not in float64, say for integers: then the very same values are asked for
                exact = None

    known = dict(fastcnn.fallbacks())
    try:
        with fastcnn.use_backend("cpp"):
            ours = compute(getattr(ops, subject.operator), subject, our_arguments)
    except Exception as error:
        result = judge_error(subject, place, fed, argument_at(our_arguments, place), error, refusal)
    else:
        result = judge_answer(subject, place, fed, ours, theirs, exact, refusal)
    result.fallbacks = [f.reason for f, count in fastcnn.fallbacks().items() if count != known.get(f, 0)]
    if result.clear:
        damage = damaged(out, memory, refused=result.kind in ("refused", "stricter"))
        if not damage and not fed.startswith(("the input", "sharing")):
            damage = changed(subject, our_arguments, before)
        if damage:
            result.clear, result.kind, result.outcome = False, "unclear", damage
    return result


def in_float64_arguments(arguments: Arguments) -> Arguments:
    return {name: in_float64(value) for name, value in arguments.items()}


def refusal_of_out(out: Any, y: Tensor) -> str:
    """Why PyTorch would not write its answer there, or ""."""
    if not isinstance(out, Tensor):
        return "out is no tensor"
    if (out.shape, out.dtype, out.device, out.layout) != (y.shape, y.dtype, y.device, y.layout) or out.is_quantized:
        return "out is not like the result"
    if out.requires_grad:
        return "out= does not support automatic differentiation"
    try:
        probe = torch.empty(out.untyped_storage().nbytes() // out.element_size(), dtype=out.dtype)
        torch.neg(y, out=probe.as_strided(out.shape, out.stride(), out.storage_offset()))
    except RuntimeError as error:
        return str(error)
    return ""


def guard(out: Any) -> Tensor | None:
    """A copy of all memory that `out` is a view of."""
    if not isinstance(out, Tensor) or out.layout != torch.strided or out.device.type == "meta" or out.is_quantized:
        return None
    return out.detach().new_empty(0).set_(out.untyped_storage()).clone()


def bytes_of(t: Tensor) -> Tensor:
    return t.detach().resolve_neg().reshape(-1).contiguous().view(torch.uint8)


def damaged(out: Any, memory: Tensor | None, *, refused: bool) -> str:
    if memory is None:
        return ""
    now = guard(out)
    assert now is not None
    if not refused:
        written = torch.zeros(memory.numel(), dtype=torch.bool)
        written.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
        now, memory = now[~written], memory[~written]
    if torch.equal(bytes_of(now), bytes_of(memory)):
        return ""
    return "wrote to out before refusing it" if refused else "wrote outside of out"


def changed(subject: Subject, after: Arguments, before: Arguments) -> str:
    """Which input is not what it was."""
    for name, value in before.items():
        if name in (*subject.updated, "buffer", "out"):
            continue
        for a, b in zip(tensors_of(after[name]), tensors_of(value), strict=True):
            if a.layout != torch.strided or a.device.type == "meta" or a.is_quantized:
                continue
            if not torch.equal(bytes_of(a), bytes_of(b)):
                return f"changed {name}"
    return ""


def judge_error(subject: Subject, place: str, fed: str, value: Any, error: Exception, refusal: str) -> Result:
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    # PyTorch's operators, too, answer out= under autograd with a RuntimeError.
    allowed = (TypeError, ValueError, RuntimeError) if fed == "requiring grad" else (TypeError, ValueError)
    clear = type(error) in allowed and names(str(error), place, subject, value)
    kind = "unclear" if not clear else "refused" if refusal else "stricter"
    return Result(subject.title, place, fed, said, clear, kind)


def _but_first_channel(results: list[Any]) -> list[Any]:
    return [t[:, 1:] if isinstance(t, Tensor) and t.dim() > 1 else t for t in results]


def judge_answer(
    subject: Subject, place: str, fed: str, ours: list[Tensor], theirs: list[Tensor] | None,
    exact: list[Tensor] | None, refusal: str,
) -> Result:  # fmt: skip
    if refusal:
        reason = reason_for(MORE_THAN_PYTORCH, subject, place, fed)
        outcome = f"an answer; PyTorch: {refusal.splitlines()[0]}" if reason is None else reason
        return Result(subject.title, place, fed, outcome, reason is not None, "unclear" if reason is None else "more")
    assert theirs is not None
    if len(ours) != len(theirs):
        wrong: str | None = f"{len(ours)} results, PyTorch gives {len(theirs)}"
    else:
        exacts: list[Tensor | None] = [None] * len(ours) if exact is None else list(exact)
        reason = reason_for(OTHER_THAN_PYTORCH, subject, place, fed)
        if reason in (FOLDED, CENTRED):  # one channel of the result may differ, the others may not
            ours, theirs = _but_first_channel(ours), _but_first_channel(theirs)
            exacts = _but_first_channel(exacts)
        elif reason is not None:
            return Result(subject.title, place, fed, reason, True, "other")
        problems = (difference(*three, subject.slack) for three in zip(ours, theirs, exacts, strict=True))
        wrong = next((p for p in problems if p is not None), None)
        if wrong is None and reason is not None:
            return Result(subject.title, place, fed, reason, True, "other")
    return Result(subject.title, place, fed, wrong or "same as PyTorch", wrong is None, "unclear" if wrong else "same")


def cases() -> Iterator[tuple[Subject, str, str, Callable[..., Any]]]:
    """Every subject, each of its arguments, everything in that argument's table; then `out`."""
    for subject in SUBJECTS:
        words = subject.feeds.split()
        for place, table in zip(words[::2], words[1::2], strict=True):
            for fed, feed in globals()[table].items():
                yield subject, place.rstrip(":"), fed, feed
        if subject.has_out:
            has_input = "input" in inspect.signature(getattr(ops, subject.operator)).parameters
            for fed, feed in OUTS.items():
                if has_input or "input" not in fed:
                    yield subject, "out", fed, feed


# ---- the table -----------------------------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    lines, title = [], None
    for r in results:
        if r.operator != title:
            title = r.operator
            lines += ["", title, "-" * len(title)]
        note = "; PyTorch accepts it" if r.kind == "stricter" else ""
        note += f" ({', '.join(r.fallbacks)}: PyTorch's kernel)" if r.fallbacks and r.kind == "same" else ""
        mark = " " if r.clear else "!"
        lines.append(f"{mark} {r.argument:<18} {r.fed:<34} {shortened(r.outcome)}{note}")
    return "\n".join(lines)


def shortened(text: str, width: int = 130) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--operator", choices=ops.__all__, help="only this operator")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    logging.getLogger("fastcnn").setLevel(logging.ERROR)  # fallbacks are shown in the table
    chosen = [case for case in cases() if options.operator in (None, case[0].operator)]
    results = [run_case(*case) for case in chosen]
    unclear = [r for r in results if not r.clear]
    if options.json:
        print(json.dumps({"cases": len(results), "unclear": len(unclear), "results": [asdict(r) for r in results]}))
        return 1 if unclear else 0
    print(table(results))
    counts = {kind: sum(r.kind == kind for r in results) for kind in ("same", "refused", "stricter", "more", "other")}
    print(
        f"\n{counts['same']} same as PyTorch, {counts['refused']} refused as by PyTorch, "
        f"{counts['stricter']} refused although PyTorch accepts them, "
        f"{counts['more']} answered although PyTorch refuses, "
        f"{counts['other']} with an infinity or NaN elsewhere"
    )
    print(f"{len(results)} cases: " + (f"{len(unclear)} NOT CLEAR" if unclear else "all clear"))
    return 1 if unclear else 0


if __name__ == "__main__":
    sys.exit(main())
