"""cuDNN's calls replaced by their equals on the CPU, so that the logic around them can be tested without a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.backends import cudnn


class Calls:
    """What cuDNN was asked for: the fused calls' results, and the kinds of calls."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.results: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.no_engine = False

    def fused(self, kind: str, input: Tensor, weight: Tensor, z: Tensor | None, bias: Tensor, *geometry) -> Tensor:
        self.kinds.append(kind)
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert bias.dtype == weight.dtype == input.dtype
        if self.no_engine:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        sums = F.conv2d(input.float(), weight.float(), bias.float(), *geometry)
        result = F.relu(sums if z is None else sums + z.float()).to(input.dtype)
        result = result.contiguous(memory_format=torch.channels_last)
        self.results.append(result)
        self.biases.append(bias)
        self.weights.append(weight)
        return result

    def plain(self, input, weight, padding, stride, dilation, groups, benchmark, deterministic, allow_tf32, *, out):
        self.kinds.append("plain")
        self.flags = (benchmark, deterministic, allow_tf32)
        assert input.is_contiguous(memory_format=torch.channels_last)
        self.weights.append(weight)
        return out.copy_(F.conv2d(input, weight, None, stride, padding, dilation, groups))


def substitute_cudnn(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(cudnn, "_DEVICE", "cpu")
    monkeypatch.setattr(cudnn, "unavailable", lambda: None)
    monkeypatch.setattr(cudnn, "_without_engine", set())
    monkeypatch.setattr(torch, "cudnn_convolution", calls.plain)
    monkeypatch.setattr(
        torch, "cudnn_convolution_relu", lambda x, w, b, *geometry: calls.fused("relu", x, w, None, b, *geometry)
    )
    monkeypatch.setattr(
        torch,
        "cudnn_convolution_add_relu",
        lambda x, w, z, alpha, b, *geometry: calls.fused("add_relu", x, w, z, b, *geometry),
    )
    return calls
