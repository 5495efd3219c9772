"""The distinct convolutions of networks, found by running the package's own models without computing anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

import fastcnn
from fastcnn.backends import Call, intercept

Pair = tuple[int, int]

NETWORKS = ("resnet50", "resnext50_32x4d", "vgg16", "googlenet", "densenet121")


@dataclass(frozen=True)
class Layer:
    """One convolution with what is fused into it; sizes of one image."""

    in_channels: int
    height: int
    width: int
    out_channels: int
    filter: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    scale: bool = True  # a batch norm behind it
    bias: bool = True
    relu: bool = True
    residual: bool = False
    prologue: bool = False  # a batch norm and ReLU before it

    @property
    def out_size(self) -> Pair:
        sizes = []
        for i, size in enumerate((self.height, self.width)):
            reach = self.dilation[i] * (self.filter[i] - 1) + 1
            sizes.append((size + 2 * self.padding[i] - reach) // self.stride[i] + 1)
        return sizes[0], sizes[1]

    @property
    def name(self) -> str:
        fused = (("BN+ReLU before", self.prologue), ("residual", self.residual), ("ReLU", self.relu))
        stride, groups = self.stride[0], self.groups
        parts = [
            f"{self.in_channels}x{self.height}x{self.width} to {self.out_channels}",
            f"{self.filter[0]}x{self.filter[1]}" + (f"/{stride}" if stride > 1 else ""),
            *([f"{groups} groups"] if groups > 1 else []),
            *(text for text, is_on in fused if is_on),
        ]
        return ", ".join(parts)

    def flops(self, batch: int) -> int:
        per_output = 2 * (self.in_channels // self.groups) * self.filter[0] * self.filter[1]
        return batch * self.out_channels * self.out_size[0] * self.out_size[1] * per_output

    def bytes(self, batch: int, element: int = 2) -> int:
        """Each tensor once. Of the input only what any filter reads: a 1x1 filter with stride 2 reads a quarter."""
        out_pixels = batch * self.out_size[0] * self.out_size[1]
        rows, columns = (
            min(size, out * min(filter, stride))
            for size, out, filter, stride in zip(
                (self.height, self.width), self.out_size, self.filter, self.stride, strict=True
            )
        )
        values = batch * self.in_channels * rows * columns
        values += self.out_channels * (self.in_channels // self.groups) * self.filter[0] * self.filter[1]
        values += out_pixels * self.out_channels * (2 if self.residual else 1)
        return values * element


def layers_of(network: str) -> Counter[Layer]:
    """How often a network runs each of its convolutions, in the order of their first run."""
    with torch.device("meta"):
        model = fastcnn.create_model(network)
    model = model.eval().to_empty(device="cpu")
    calls: list[Call] = []
    size = fastcnn.models.model_info(network).input_size
    with torch.no_grad(), intercept(calls.append):  # no call is run
        model(torch.empty(1, *size).contiguous(memory_format=torch.channels_last))
    found: Counter[Layer] = Counter()
    for call in calls:
        if call.operator == "conv2d":
            out: Any = call.args[0]
            layer = _layer(call)
            if layer.out_size != tuple(out.shape[2:]):
                raise ValueError(f"{network}: the padding of {layer.name} is not the same on all sides")
            found[layer] += 1
    return found


def _layer(call: Call) -> Layer:
    arguments: tuple[Any, ...] = call.args
    _, x, w, scale, bias, residual, in_scale, in_shift, in_relu, activation, *window, groups = arguments
    stride, padding, dilation = map(tuple, window)
    return Layer(
        x.shape[1], x.shape[2], x.shape[3], w.shape[0], (w.shape[2], w.shape[3]), stride, padding, dilation, groups,
        scale is not None, bias is not None, activation == "relu", residual is not None,
        in_scale is not None or in_shift is not None or bool(in_relu),
    )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One layer at one batch size, and how often each network runs it."""

    layer: Layer
    batch: int
    networks: tuple[tuple[str, int], ...]


def jobs(networks: Iterable[str], batches: Iterable[int]) -> list[Job]:
    """What is to be measured, in order: network by network, in each by batch size; a layer of several networks once.

    In a network of many layers every fourth comes first, so that a run cut short has seen all of its parts.
    """
    of_network = {network: layers_of(network) for network in networks}
    users: dict[Layer, list[tuple[str, int]]] = {}
    for network, layers in of_network.items():
        for layer, count in layers.items():
            users.setdefault(layer, []).append((network, count))
    ordered, seen = [], set()
    for layers in of_network.values():
        new = [layer for layer in layers if layer not in seen]
        seen.update(new)
        if len(new) > 40:
            new = [layer for first in range(4) for layer in new[first::4]]
        ordered += [Job(layer, batch, tuple(users[layer])) for batch in batches for layer in new]
    return ordered
