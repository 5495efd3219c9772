"""What is timed on a GPU of a convolution layer: its tensors, its candidates, its exact result.

Candidates. `cudnn`: the bare convolution. `cudnn_fused`: the convolution with bias, residual and ReLU by cuDNN's fused
calls, the batch norm's scale in the weights; where the layer has a BN-ReLU before it, one element-wise kernel for that
(fastcnn's: PyTorch has none) and then the convolution. `cudnn_parts`: the same with PyTorch's own kernels for residual
and ReLU, where cuDNN refuses the fused call. `triton`, `cuda`: fastcnn's operator on that backend, everything fused.
`triton:...`, `cuda:...`: one of the backend's tiles or kernels, by name. Rehearsals on a CPU put ATen in cuDNN's place
and `cpp` in fastcnn's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_layers import Layer
from torch import Tensor

from fastcnn import _native, backends, ops, use_backend
from fastcnn.backends import variants

Call = Callable[[], Any]
CHUNK = 1 << 25  # values of a result judged at once: float64 copies of more would not fit


def channels_last(*shape: int, device: torch.device, std: float = 1.0) -> Tensor:
    values = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=torch.channels_last)
    return values.normal_(0, std)


def on_backend(name: str, call: Call) -> Call:
    """The call on one of fastcnn's backends; an error where the backend does not cover it."""

    def run() -> Any:
        with use_backend(name, strict=True):
            return call()

    return run


@dataclass
class Tensors:
    """One set of a convolution's operands and its results."""

    x: Tensor
    weight: Tensor
    folded: Tensor  # weight times scale, as cuDNN needs it
    scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    in_scale: Tensor | None
    in_shift: Tensor | None
    out: Tensor
    activated: Tensor | None  # room for what precedes the peers' convolution

    @classmethod
    def random(cls, layer: Layer, batch: int, device: torch.device) -> Tensors:
        """Normal values; scales that are powers of two, so that folding them into weights rounds nothing."""
        c, k = layer.in_channels, layer.out_channels
        x = channels_last(batch, c, layer.height, layer.width, device=device)
        reduction = c // layer.groups * layer.filter[0] * layer.filter[1]
        weight = channels_last(k, c // layer.groups, *layer.filter, device=device, std=reduction**-0.5)
        scale = torch.exp2(torch.randint(-1, 2, (k,), device=device)) if layer.scale else None
        folded = weight if scale is None else (weight * scale.bfloat16()[:, None, None, None])
        out = torch.empty(
            (batch, k, *layer.out_size), dtype=torch.bfloat16, device=device, memory_format=torch.channels_last
        )
        return cls(
            x, weight, folded.contiguous(memory_format=torch.channels_last), scale,
            torch.randn(k, device=device).bfloat16().float() if layer.bias else None,
            torch.empty_like(out).normal_() if layer.residual else None,
            torch.rand(c, device=device) + 0.5 if layer.prologue else None,
            torch.randn(c, device=device) if layer.prologue else None,
            out, torch.empty_like(x) if layer.prologue else None,
        )  # fmt: skip

    def exact(self, layer: Layer, images: slice) -> Tensor:
        """In fp32 without TF32: nothing is rounded on the way. For some of the images, in contiguous memory."""
        x = self.x[images].float().contiguous()
        if self.in_scale is not None and self.in_shift is not None:
            x = torch.relu(x * self.in_scale[:, None, None] + self.in_shift[:, None, None])
        y = F.conv2d(
            x, self.weight.float().contiguous(), None, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        if self.scale is not None:
            y *= self.scale[:, None, None]
        if self.bias is not None:
            y += self.bias[:, None, None]
        if self.residual is not None:
            y += self.residual[images]
        return y.relu_() if layer.relu else y


def conv_calls(layer: Layer, t: Tensors, ours: tuple[str, ...], varied: Collection[str] = ()) -> dict[str, Call]:
    """Every candidate as a call that returns its result; fastcnn's write into ``t.out``.

    ``varied``: backends of which each kernel or tile that could serve the layer is a candidate, "backend:variant".
    """
    window = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def operator() -> Tensor:
        return ops.conv2d(
            t.x, t.weight, t.bias, *window, scale=t.scale, residual=t.residual,
            activation="relu" if layer.relu else "none", input_scale=t.in_scale, input_shift=t.in_shift,
            input_activation="relu" if layer.prologue else "none", out=t.out,
        )  # fmt: skip

    calls: dict[str, Call] = {
        "cudnn": lambda: F.conv2d(t.x, t.weight, None, *window),
        "cudnn_fused": _peer(layer, t, window, fused=True),
        "cudnn_parts": _peer(layer, t, window, fused=False),
    }
    calls |= {name: on_backend(name, operator) for name in ours}
    arguments = contract_arguments(layer, t)
    for name in (name for backend in varied for name in variants.names(backend, "conv2d", arguments)):
        calls[name] = functools.partial(_run_variant, name, arguments)
    return calls


def contract_arguments(layer: Layer, t: Tensors) -> tuple[Any, ...]:
    """conv2d's arguments as backends get them."""
    return (
        t.out, t.x, t.weight, t.scale, t.bias, t.residual, t.in_scale, t.in_shift, layer.prologue,
        "relu" if layer.relu else "none", layer.stride, layer.padding, layer.dilation, layer.groups,
    )  # fmt: skip


def _run_variant(name: str, arguments: tuple[Any, ...]) -> Tensor:
    backends.backend_module(name).conv2d(*arguments)
    return arguments[0]


def _peer(layer: Layer, t: Tensors, window: tuple[Any, ...], fused: bool) -> Call:
    bias = None if t.bias is None else t.bias.bfloat16()

    def convolution(x: Tensor) -> Tensor:
        if fused and x.is_cuda and layer.relu and t.residual is not None:
            return torch.cudnn_convolution_add_relu(x, t.folded, t.residual, 1.0, bias, *window)
        if fused and x.is_cuda and layer.relu:
            return torch.cudnn_convolution_relu(x, t.folded, bias, *window)
        y = F.conv2d(x, t.folded, bias, *window)
        if t.residual is not None:
            y += t.residual
        return y.relu_() if layer.relu else y

    def run() -> Tensor:
        if t.activated is None:
            return convolution(t.x)
        ops.channel_affine(t.x, t.in_scale, t.in_shift, activation="relu", out=t.activated)
        return convolution(t.activated)

    return run


def chunks(batch: int, values_of_image: int) -> Iterator[slice]:
    """Some images at a time."""
    step = max(1, CHUNK // max(1, values_of_image))
    for first in range(0, batch, step):
        yield slice(first, min(batch, first + step))


def launch_triton(layer: Layer, batch: int, varied: bool = False, device: str = "meta") -> None:
    """What the candidates launch through Triton, on tensors without memory: a job for AheadCompiler.

    ``varied``: with every tile as well.
    """
    from fastcnn.backends import triton

    def nhwc(n: int, c: int, h: int, w: int) -> Tensor:
        return torch.empty((n, c, h, w), dtype=torch.bfloat16, device=device, memory_format=torch.channels_last)

    def vector(size: int, there: bool) -> Tensor | None:
        return torch.empty(size, device=device) if there else None

    c, k = layer.in_channels, layer.out_channels
    x, out, weight = (
        nhwc(batch, c, layer.height, layer.width), nhwc(batch, k, *layer.out_size),
        nhwc(k, c // layer.groups, *layer.filter),
    )  # fmt: skip
    before = vector(c, layer.prologue)
    residual = nhwc(*out.shape) if layer.residual else None
    arguments = contract_arguments(
        layer,
        Tensors(x, weight, weight, vector(k, layer.scale), vector(k, layer.bias), residual, before, before, out, None),
    )
    triton.conv2d(*arguments)
    if layer.prologue:
        triton.channel_affine(x, x, before, before, None, "relu")
    if varied:
        for name in variants.names("triton", "conv2d", arguments):
            _run_variant(name, arguments)


def kernel_names(layer: Layer, t: Tensors) -> dict[str, str]:
    """Which kernel and tile each of fastcnn's backends takes by itself."""
    names = {}
    window = (layer.stride, layer.padding, layer.dilation, layer.groups)
    if backends.unavailable("cuda") is None:
        kernels = _native.cuda_conv2d_kernels(t.out, t.x, t.weight, t.residual, layer.prologue, *window, False)
        names["cuda"] = kernels[0]
    if backends.unavailable("triton") is None:
        from fastcnn.triton_kernels import conv2d, report

        prepared = conv2d.prepare_weight(t.weight, layer.groups)
        out, x, _, *rest = contract_arguments(layer, t)
        launch = conv2d.plan_conv2d(out, x, prepared, *rest)
        names["triton"] = f"{launch.kernel.fn.__name__.removesuffix('_kernel')} {report.describe(launch)}"
    return names
